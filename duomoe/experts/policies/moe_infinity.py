"""`moe_infinity`: a request's use of experts so far is matched with those of earlier requests; the best match says what
to prefetch and what to keep. After MoE-Infinity (arXiv 2401.14361).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from duomoe.experts.compute import LayerSum
from duomoe.experts.link import Link
from duomoe.experts.page_routing import Prompt
from duomoe.experts.policies.hosted import HostedPolicy
from duomoe.experts.policies.policy import Pass
from duomoe.experts.predictor import Predictor
from duomoe.experts.store import ExpertStore
from duomoe.models import Batch, LayerKV, Model, Routing

# How many earlier requests are remembered, the latest ones.
REMEMBERED = 128

# `Directory.last_use` holds whole numbers: an expert's worth in so many parts.
WORTH = 1 << 30


class MoeInfinity(HostedPolicy):
    """Caches by the matched request's counts, and prefetches the next layer's experts by them."""

    def __init__(
        self, model: Model, store: ExpertStore, num_slots: int, link: Link, predictor: Predictor | None
    ) -> None:
        super().__init__(model, store, num_slots, link, predictor)
        self.used = torch.zeros(len(store.layers), store.num_experts)  # by the present request, how often
        self.library: list[Tensor] = []  # the same of earlier ones

    def prefill(self, chunks: Sequence[Batch], kv: Sequence[LayerKV], prompts: Sequence[Prompt], beside: bool) -> Pass:
        """Begin a request, or several that count as one."""
        if self.used.any():
            self.library = [*self.library, self.used][-REMEMBERED:]
            self.used = torch.zeros_like(self.used)
        return super().prefill(chunks, kv, prompts, beside)

    def experts(self, index: int, total: LayerSum, inputs: list[Tensor], routings: list[Routing]) -> Iterator[None]:
        """Compute the layer, and prefetch for the next one as soon as all of this one is on its way."""
        needed = self.needed(routings)
        for routing in routings:
            chosen = routing.experts.cpu().flatten().long()  # host-sync ok: the schedule runs on the host
            self.used[index] += torch.bincount(chosen[chosen >= 0], minlength=self.used.shape[1])
        worth = self._worth()
        stamps = dict(enumerate(worth[index].tolist()))  # host-sync ok: is on the host
        self.lease.release(index, set(stamps) - set(needed))
        yield from self.lease.run(
            total, index, needed, "demand_bytes", stamps=stamps, after_wave=lambda: self._prefetch(index + 1, worth)
        )
        self._prefetch(index + 1, worth)

    def _worth(self) -> Tensor:
        """Return int64 [layers, experts]: the share of its layer's uses that each expert has in the best match.

        Of equal shares, those of earlier layers are worth more: they are needed first.
        """
        match = self.used
        if self.library:
            earlier = torch.stack(self.library)
            alike = torch.cosine_similarity(earlier.flatten(1), self.used.flatten()[None], dim=1)
            match = earlier[alike.argmax()]
        share = match / match.sum(1, keepdim=True).clamp(min=1)
        layers = len(share)
        return (share * (1 - torch.arange(layers)[:, None] / layers) * WORTH).long()

    def _prefetch(self, index: int, worth: Tensor) -> None:
        """Send the experts of a layer that the match used, most used first, over what is worth less."""
        if index >= len(worth):
            return
        lease = self.lease
        order = worth[index].argsort(descending=True, stable=True)
        likely = [int(expert) for expert in order[: self.model.config.top_k] if worth[index, expert] > 0]
        for expert in lease.absent(index, likely):
            least = int(worth[index, expert])
            if not lease.fetch(index, expert, "prefetched_bytes", below=least):
                break
            slot = lease.slot(index, expert)
            assert slot is not None
            lease.last_use[slot] = least
