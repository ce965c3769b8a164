"""`on_demand`: fetch what was routed, wait for it, keep nothing. The schedule of Hugging Face Accelerate's offload."""

from torch import Tensor

from duomoe.experts.policies.bounded import BoundedPolicy
from duomoe.models import Routing


class OnDemand(BoundedPolicy):
    """Runs each layer in waves of as many experts as there are slots."""

    def experts(self, index: int, inputs: list[Tensor], routings: list[Routing]) -> list[Tensor]:
        """Fetch a wave, wait for all of it, compute it, and go on to the next."""
        # Fetching on demand means that the host waits for the router; this is what the policy models.
        needed = self.needed(routings)
        self.traffic.misses += len(needed)
        total = self.layer_sum(inputs, routings)
        slots = len(self.residency.pool)
        for first in range(0, len(needed), slots):
            wave = needed[first : first + slots]
            for expert in wave:
                self.residency.fetch(index, expert, "demand_bytes")
            self.residency.compute(total, index, wave)
            self.residency.forget()
        return total.totals()
