"""`layer_prefetch`: while a layer computes, the next one crosses whole, whatever its router will choose."""

from collections.abc import Iterator

from torch import Tensor

from duomoe.experts.compute import LayerSum
from duomoe.experts.policies.hosted import HostedPolicy
from duomoe.models import Routing


class LayerPrefetch(HostedPolicy):
    """Sends all experts of the next layer ahead, as far as there are slots; what is still missing is fetched then."""

    def enter(self, index: int) -> None:
        """Send the first layer, which has none before it."""
        if index == 0:
            self._send(0)

    def experts(self, index: int, total: LayerSum, inputs: list[Tensor], routings: list[Routing]) -> Iterator[None]:
        """Compute the layer, and send the next one as soon as all of this one is on its way."""
        needed = self.needed(routings)
        self.lease.release(index, set(range(self.lease.store.num_experts)) - set(needed))
        yield from self.lease.run(total, index, needed, "demand_bytes", after_wave=lambda: self._send(index + 1))
        self._send(index + 1)

    def _send(self, index: int) -> None:
        lease = self.lease
        if index < len(lease.store.layers):
            for expert in lease.absent(index, range(lease.store.num_experts)):
                if not lease.fetch(index, expert, "prefetched_bytes"):
                    break
