"""What the policies that keep some experts on the device, and all of them on the host, have in common."""

from duomoe.experts.lease import Lease
from duomoe.experts.link import Link
from duomoe.experts.policies.policy import Policy
from duomoe.experts.predictor import Predictor
from duomoe.experts.slots import SlotPool
from duomoe.experts.store import ExpertStore
from duomoe.models import Model


class BoundedPolicy(Policy):
    """A policy over `num_slots` slots.

    Args:
        model: the non-expert part.
        store: all experts, in host memory.
        num_slots: how many of them the device holds.
        link: from the one to the other.
        predictor: says which experts the next layers are likely to need; None where there is none.

    Attributes:
        lease: the slots that the host fills.
    """

    def __init__(
        self, model: Model, store: ExpertStore, num_slots: int, link: Link, predictor: Predictor | None
    ) -> None:
        super().__init__(model, store)
        self.lease = Lease(store, SlotPool(store.formats, num_slots, model.device), link, self.traffic)

    def close(self) -> None:
        """Close the link."""
        self.lease.link.close()

    def forget(self) -> None:
        """After a failure nothing counts as resident."""
        self.lease.forget()
