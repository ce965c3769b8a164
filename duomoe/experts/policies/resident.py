"""`resident`: every expert has a slot, and nothing ever moves."""

from dataclasses import replace

import torch
from torch import Tensor

from duomoe.experts.compute import LayerSum
from duomoe.experts.link import Traffic
from duomoe.experts.policies.policy import Policy
from duomoe.experts.store import ExpertStore
from duomoe.models import Model, Routing


class Resident(Policy):
    """Computes straight from the store, which is on the compute device: its rows are the slots.

    Args:
        model: the non-expert part.
        store: all experts.
        expands_quantised: long passes may expand quantised experts (LayerSum): there is memory for it.
    """

    can_be_captured = True
    interruptible = True

    def __init__(self, model: Model, store: ExpertStore, expands_quantised: bool) -> None:
        super().__init__(model, store)
        self.expands_quantised = expands_quantised
        self.weights = [each.views(rows) for each, rows in zip(store.formats, store.layers, strict=True)]
        self.slots = torch.arange(store.num_experts, dtype=torch.int32, device=model.device)
        self.used = torch.zeros((), dtype=torch.int64, device=model.device)

    def experts(self, index: int, total: LayerSum, inputs: list[Tensor], routings: list[Routing]) -> tuple[()]:
        """Compute all experts in one wave."""
        if self.slots.is_cpu and sum(len(routing.experts) for routing in routings) == 1:
            # One token's experts are distinct, and on a CPU nothing is padding.
            self.traffic.hits += routings[0].experts.numel()
        else:
            # Counted on the device, so that the step does not wait for the host.
            seen = torch.zeros(len(self.slots) + 1, dtype=torch.int64, device=self.slots.device)
            for routing in routings:
                seen.index_fill_(0, routing.experts.flatten().long(), 1)  # padding, -1, goes to the last place
            self.used += seen[:-1].sum()
        total.wave(self.weights[index], self.slots, len(self.slots))
        return ()

    def traffic_so_far(self) -> Traffic:
        """Return a copy of the counts: every use is a hit."""
        used = int(self.used.item())  # host-sync ok: between requests, not between tokens
        return replace(self.traffic, hits=self.traffic.hits + used)
