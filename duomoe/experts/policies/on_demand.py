"""`on_demand`: fetch what was routed, wait for it, keep nothing. The schedule of Hugging Face Accelerate's offload."""

from torch import Tensor

from duomoe.experts.policies.bounded import BoundedPolicy
from duomoe.models import Routing


class OnDemand(BoundedPolicy):
    """Runs each layer in waves of as many experts as there are slots."""

    def experts(self, index: int, h: Tensor, routing: Routing) -> Tensor:
        """Fetch a wave, wait for all of it, compute it, and go on to the next."""
        # Fetching on demand means that the host waits for the router; this is what the policy models.
        needed = routing.experts.unique().tolist()  # host-sync ok: see above
        self.traffic.misses += len(needed)
        total = self.expert_sum(h, routing)
        slots = len(self.residency.pool)
        for first in range(0, len(needed), slots):
            wave = needed[first : first + slots]
            for expert in wave:
                self.residency.fetch(index, expert, "demand_bytes")
            self.residency.compute(total, index, wave)
            self.residency.forget()
        return total.total()
