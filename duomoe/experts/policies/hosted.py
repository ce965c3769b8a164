"""What the policies have in common that decide on the host in both phases: they lease all slots for good."""

import torch

from duomoe.experts.link import Link
from duomoe.experts.policies.bounded import BoundedPolicy
from duomoe.experts.predictor import Predictor
from duomoe.experts.store import ExpertStore
from duomoe.models import Model, Routing


class HostedPolicy(BoundedPolicy):
    """A policy that waits for the router in each layer of every pass and step; arguments as in `BoundedPolicy`."""

    def __init__(
        self, model: Model, store: ExpertStore, num_slots: int, link: Link, predictor: Predictor | None
    ) -> None:
        super().__init__(model, store, num_slots, link, predictor)
        self.lease.take(dict.fromkeys(range(num_slots)), {})

    def needed(self, routings: list[Routing]) -> list[int]:
        """Return the experts that any token chose, in ascending order; waits for the device."""
        chosen = torch.cat([routing.experts.flatten() for routing in routings]).unique()
        return [expert for expert in chosen.tolist() if expert >= 0]  # host-sync ok: for schedules that the host runs
