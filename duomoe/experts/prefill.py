"""Prefill: experts stream through the slots, each at most once in a pass, ahead of the layer that computes them.

The pass is layer-major: all tokens of all its prompts go through a layer before any goes on, so an expert that has
been computed is not needed again in this pass. As soon as a layer has sent for all it needs, the next layer's experts
follow, under the computation of this one's last waves and of the next one's attention. Which of them the router will
choose is not known then, so only those are sent that probably will be: with many tokens nearly all, the most popular
first, and with few tokens none.

What stays behind is what decode starts with: of each layer the experts that its tokens used most, and most recently.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from duomoe.experts.compute import LayerSum
from duomoe.experts.page_routing import PageRouting, Prefix
from duomoe.experts.residency import Residency
from duomoe.kernels.admit import ONE
from duomoe.memory.pages import PAGE_SIZE

# Sending an expert ahead wastes its transfer when it is not chosen. When it is, that gains only what the link would
# have been idle until the router's choice is known, which a few experts fill: so those that are nearly certain.
WORTH_SENDING = 0.9

# A use counts half as much for an expert's worth to decode as one this many tokens later.
HALF_LIFE = 32

# One slot computes while the other is filled.
SMALLEST_RING = 2


def ring_slots(slots: int, num_experts: int) -> int:
    """Return how many of so many slots experts stream through; the others are kept for decode.

    Under the attention of a long prompt half a layer can cross: a smaller ring would let the link wait.

    Args:
        slots: of all layers.
        num_experts: of one layer.
    """
    return max(SMALLEST_RING, slots // 4, min(slots // 2, num_experts // 2))


def prompt_use(counts: Tensor, tokens: int, top_k: int) -> Tensor:
    """Return in how many of `ONE` tokens each expert was needed, int32 [num_experts], for decode to begin with.

    Args:
        counts: [num_experts], how many tokens chose each, in one layer; a few more are added that chose evenly.
        tokens: how many there were.
        top_k: experts per token.
    """
    share = (counts + 1) / (tokens + len(counts) / top_k)
    return (share.clamp(max=1) * ONE).int()


class Known(NamedTuple):
    """What is known of the prompts of a pass by what was computed of them before.

    Attributes:
        tokens: how many those were.
        counts: float64 [layers, experts], how many of them chose each expert.
        worth: the same, but a choice counts half as much for every `HALF_LIFE` tokens that come behind it.
    """

    tokens: int
    counts: Tensor
    worth: Tensor


def known_of(routing: PageRouting, prefixes: Sequence[Prefix]) -> Known | None:
    """Return what is known of prompts by the routing of what was computed of them before; None if nothing was."""
    pages = [page for prefix in prefixes for page in prefix.pages]
    if not pages:
        return None
    counts = routing.of(pages)
    ages = torch.tensor(
        [each.behind + PAGE_SIZE * after for each in prefixes for after in range(len(each.pages) - 1, -1, -1)]
    )
    worth = counts * _worth_at(ages)[:, None, None]
    return Known(PAGE_SIZE * len(pages), counts.sum(0), worth.sum(0))


def _worth_at(ages: Tensor) -> Tensor:
    """Return what a use so many tokens ago counts for an expert's worth to decode; never 0."""
    return torch.exp2(-ages.double().clamp(max=HALF_LIFE * 500) / HALF_LIFE)


class PrefillStream:
    """Streams one pass after the other through a residency's slots.

    Args:
        residency: the slots.
        top_k: experts per token.

    Attributes:
        use: int32 [layers, experts], in how many of `ONE` tokens of the last pass's prompts each expert was needed.
    """

    def __init__(self, residency: Residency, top_k: int) -> None:
        self.residency = residency
        self.top_k = top_k
        self.num_layers, self.num_experts = len(residency.store.layers), residency.store.num_experts
        slots = len(residency.pool)
        # A layer's best experts keep this many slots when others are sent ahead; the rest of the slots is the ring.
        kept = max(0, slots - ring_slots(slots, self.num_experts)) // max(1, self.num_layers)
        self.spared_below = 1 - kept
        self.tokens = 0  # of the pass
        self._known: Known | None = None
        self.use = torch.zeros(self.num_layers, self.num_experts, dtype=torch.int32)
        # Of all passes so far, by which it is judged what the next one will need; at first as if all were alike.
        self._seen_tokens = self.num_experts / top_k
        self._seen_uses = torch.ones(self.num_layers, self.num_experts, dtype=torch.float64)

    def begin(self, tokens: int, known: Known | None) -> None:
        """Begin a pass of that many tokens, for prompts of which something may be known."""
        self.tokens, self._known = tokens, known
        # From now on a slot's last use is minus its owner's rank in its layer, so that all layers count alike.
        residency = self.residency
        for index in range(self.num_layers):
            slots = sorted(residency.residents(index).values(), key=lambda slot: -residency.last_use[slot])
            for rank, slot in enumerate(slots):
                residency.stamp(slot, -rank)

    def send_ahead(self, index: int) -> None:
        """Send a layer's experts that are likely to be needed to whatever slots can be spared."""
        if index >= self.num_layers:
            return
        share = (self._seen_uses[index] / self._seen_tokens).clamp(max=1)
        likely = 1 - (1 - share) ** self.tokens > WORTH_SENDING
        order = share.argsort(descending=True, stable=True)
        for expert in self.residency.absent(index, order[likely[order]].tolist()):  # host-sync ok: is on the host
            if not self.residency.fetch(index, expert, "streamed_bytes", self.spared_below):
                break

    def run(self, total: LayerSum, index: int, experts: Tensor) -> None:
        """Compute a layer's experts, and send the next layer's when all of this one's are sent.

        Args:
            total: the layer's sum.
            index: the MoE layer's number.
            experts: [tokens, top_k], the router's choice; -1 for padding.
        """
        experts = experts.cpu().long()  # host-sync ok: prefill decides on the host what to send
        experts = experts[experts[:, 0] >= 0]
        counts = experts.flatten().bincount(minlength=self.num_experts)
        needed = counts.nonzero().flatten().tolist()  # host-sync ok: is on the host
        self._note_use(index, counts, len(experts))
        worth = self._worth(index, experts)
        ranked = sorted(range(self.num_experts), key=lambda expert: -worth[expert])
        stamps = {expert: -rank for rank, expert in enumerate(ranked)}
        residency = self.residency
        for expert, slot in residency.residents(index).items():
            if counts[expert] == 0:
                residency.stamp(slot, stamps[expert])
        residency.run(
            total,
            index,
            needed,
            "streamed_bytes",
            self.spared_below,
            stamps,
            after_wave=lambda: self.send_ahead(index + 1),
        )

    def _note_use(self, index: int, counts: Tensor, tokens: int) -> None:
        """Note how often each expert was needed, for decode and for later passes."""
        self._seen_uses[index] += counts
        if index == self.num_layers - 1:
            self._seen_tokens += tokens
        if self._known is not None:
            counts, tokens = counts + self._known.counts[index], tokens + self._known.tokens
        self.use[index] = prompt_use(counts, tokens, self.top_k)

    def _worth(self, index: int, experts: Tensor) -> list[float]:
        """Return what each expert is worth to decode; more for each token that chose it, and for later ones."""
        tokens, top_k = experts.shape
        use = _worth_at(torch.arange(tokens - 1, -1, -1))
        worth = torch.zeros(self.num_experts, dtype=torch.float64)
        worth.index_add_(0, experts.flatten(), use.repeat_interleave(top_k))
        if self._known is not None:
            worth += self._known.worth[index]
        return worth.tolist()  # host-sync ok: is on the host
