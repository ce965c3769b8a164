"""What the policies that keep some experts on the device, and all of them on the host, have in common."""

from collections.abc import Sequence

from torch import Tensor

from duomoe.experts.link import Link
from duomoe.experts.policies.policy import Policy
from duomoe.experts.residency import Residency
from duomoe.experts.slots import SlotPool
from duomoe.experts.store import ExpertStore
from duomoe.models import Batch, LayerKV, Model


class BoundedPolicy(Policy):
    """A policy over `num_slots` slots.

    Args:
        model: the non-expert part.
        store: all experts, in host memory.
        num_slots: how many of them the device holds.
        link: from the one to the other.
    """

    def __init__(self, model: Model, store: ExpertStore, num_slots: int, link: Link) -> None:
        super().__init__(model)
        pool = SlotPool(store.format, num_slots, model.device)
        self.residency = Residency(store, pool, link, self.traffic)

    def forward(self, batch: Batch, kv: Sequence[LayerKV]) -> Tensor:
        """Pass a batch through all blocks; after a failure nothing counts as resident."""
        try:
            return super().forward(batch, kv)
        except BaseException:
            self.residency.forget()
            raise
