"""`on_demand`: fetch what was routed, wait for it, keep nothing. The schedule of Hugging Face Accelerate's offload."""

from collections.abc import Iterator

from torch import Tensor

from duomoe.experts.compute import LayerSum
from duomoe.experts.policies.hosted import HostedPolicy
from duomoe.models import Routing


class OnDemand(HostedPolicy):
    """Runs each layer in waves of as many experts as there are slots."""

    def experts(self, index: int, total: LayerSum, inputs: list[Tensor], routings: list[Routing]) -> Iterator[None]:
        """Fetch a wave, wait for all of it, compute it, and go on to the next."""
        # Fetching on demand means that the host waits for the router; this is what the policy models.
        needed = self.needed(routings)
        self.traffic.misses += len(needed)
        slots = len(self.lease.pool)
        for first in range(0, len(needed), slots):
            wave = needed[first : first + slots]
            for expert in wave:
                self.lease.fetch(index, expert, "demand_bytes")
            self.lease.compute(total, index, wave)
            self.lease.forget()
            yield
