"""`lru`: prefill streams; decode keeps what was used last, and fetches what it lacks when the router asks for it."""

from collections.abc import Sequence

from torch import Tensor

from duomoe.experts.link import Link
from duomoe.experts.policies.bounded import BoundedPolicy
from duomoe.experts.prefill import PrefillStream
from duomoe.experts.store import ExpertStore
from duomoe.models import Batch, LayerKV, Model, Routing


class Lru(BoundedPolicy):
    """A cache of experts over all layers, least recently used out."""

    def __init__(self, model: Model, store: ExpertStore, num_slots: int, link: Link) -> None:
        super().__init__(model, store, num_slots, link)
        self.stream = PrefillStream(self.residency, model.config.top_k)
        self.prefilling = False

    def forward(self, batch: Batch, kv: Sequence[LayerKV]) -> Tensor:
        """Pass a batch through all blocks: a prefill when a sequence has more than one token."""
        self.prefilling = batch.max_query_len > 1
        if self.prefilling:
            self.stream.begin(len(batch.tokens))
        return super().forward(batch, kv)

    def enter(self, index: int) -> None:
        """Send the layer's experts ahead, under its attention."""
        if self.prefilling:
            self.stream.send_ahead(index)

    def experts(self, index: int, h: Tensor, routing: Routing) -> Tensor:
        """Compute what is in slots while the rest is on its way."""
        total = self.expert_sum(h, routing)
        if self.prefilling:
            self.stream.run(total, index, routing)
        else:
            needed = routing.experts.unique().tolist()  # host-sync ok: for now the host decides what decode fetches
            self.residency.run(total, index, needed, "demand_bytes")
        return total.total()
