"""What the policies that keep some experts on the device, and all of them on the host, have in common."""

import torch

from duomoe.experts.link import Link
from duomoe.experts.policies.policy import Policy
from duomoe.experts.predictor import Predictor
from duomoe.experts.residency import Residency
from duomoe.experts.slots import SlotPool
from duomoe.experts.store import ExpertStore
from duomoe.models import Model, Routing


class BoundedPolicy(Policy):
    """A policy over `num_slots` slots.

    Args:
        model: the non-expert part.
        store: all experts, in host memory.
        num_slots: how many of them the device holds.
        link: from the one to the other.
        predictor: says which experts the next layers are likely to need; None where there is none.
    """

    def __init__(
        self, model: Model, store: ExpertStore, num_slots: int, link: Link, predictor: Predictor | None
    ) -> None:
        super().__init__(model, store)
        pool = SlotPool(store.formats, num_slots, model.device)
        self.residency = Residency(store, pool, link, self.traffic)

    def close(self) -> None:
        """Close the link."""
        self.residency.link.close()

    def forget(self) -> None:
        """After a failure nothing counts as resident."""
        self.residency.forget()

    def needed(self, routings: list[Routing]) -> list[int]:
        """Return the experts that any token chose, in ascending order; waits for the device."""
        chosen = torch.cat([routing.experts.flatten() for routing in routings]).unique()
        return [expert for expert in chosen.tolist() if expert >= 0]  # host-sync ok: for schedules that the host runs
