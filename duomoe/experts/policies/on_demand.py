"""`on_demand`: fetch what was routed, wait for it, keep nothing. The schedule of Hugging Face Accelerate's offload."""

from torch import Tensor

from duomoe.experts.link import Link
from duomoe.experts.policies.policy import Policy
from duomoe.experts.slots import Directory, SlotPool
from duomoe.experts.store import ExpertStore
from duomoe.models import Model, Routing


class OnDemand(Policy):
    """Runs each layer in waves of as many experts as there are slots."""

    def __init__(self, model: Model, store: ExpertStore, num_slots: int) -> None:
        super().__init__(model)
        self.store = store
        self.pool = SlotPool(store.format, num_slots, model.device)
        self.directory = Directory(len(store.layers), store.num_experts, num_slots, model.device)
        self.link = Link(self.traffic)

    def experts(self, index: int, h: Tensor, routing: Routing) -> Tensor:
        """Fetch and compute, wave by wave."""
        # host-sync ok: fetching on demand means that the host waits for the router; this is what the policy models.
        needed = routing.experts.unique().tolist()
        self.traffic.misses += len(needed)
        total = self.expert_sum(h, routing)
        for first in range(0, len(needed), len(self.pool)):
            wave = needed[first : first + len(self.pool)]
            slots = self.directory.hand_over(index, wave)
            for slot, expert in enumerate(wave):
                self.link.demand(self.store.layers[index][expert], self.pool.rows[slot])
            total.wave(self.pool.views, slots)
        return total.total()
