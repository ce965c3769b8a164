"""`layer_prefetch`: while a layer computes, the next one crosses whole, whatever its router will choose."""

from torch import Tensor

from duomoe.experts.policies.bounded import BoundedPolicy
from duomoe.models import Routing


class LayerPrefetch(BoundedPolicy):
    """Sends all experts of the next layer ahead, as far as there are slots; what is still missing is fetched then."""

    def enter(self, index: int) -> None:
        """Send the first layer, which has none before it."""
        if index == 0:
            self._send(0)

    def experts(self, index: int, inputs: list[Tensor], routings: list[Routing]) -> list[Tensor]:
        """Compute the layer, and send the next one as soon as all of this one is on its way."""
        total = self.layer_sum(inputs, routings)
        needed = self.needed(routings)
        self.residency.release(index, set(range(self.residency.store.num_experts)) - set(needed))
        self.residency.run(total, index, needed, "demand_bytes", after_wave=lambda: self._send(index + 1))
        self._send(index + 1)
        return total.totals()

    def _send(self, index: int) -> None:
        residency = self.residency
        if index < len(residency.store.layers):
            for expert in residency.absent(index, range(residency.store.num_experts)):
                if not residency.fetch(index, expert, "prefetched_bytes"):
                    break
