"""Prefill: experts stream through the slots, each at most once in a pass, ahead of the layer that computes them.

The pass is layer-major: all tokens of all its prompts go through a layer before any goes on, so an expert that has
been computed is not needed again in this pass. As soon as a layer has sent for all it needs, the next layer's experts
follow, under the computation of this one's last waves and of the next one's attention. Which of them the router will
choose is not known then, so only those are sent that probably will be: with many tokens nearly all, the most popular
first, and with few tokens none.

What stays behind is what decode starts with: of each layer the experts that its tokens used most, and most recently.
"""

import torch
from torch import Tensor

from duomoe.experts.compute import LayerSum
from duomoe.experts.residency import Residency
from duomoe.kernels.admit import ONE

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


def prompt_use(experts: Tensor, num_experts: int) -> Tensor:
    """Return in how many of `ONE` tokens each expert was needed, int32 [num_experts], for decode to begin with.

    Args:
        experts: [tokens, top_k], those of one layer; counted as if a few more tokens had chosen evenly.
        num_experts: of the layer.
    """
    tokens, top_k = experts.shape
    share = (experts.flatten().int().bincount(minlength=num_experts) + 1) / (tokens + num_experts / top_k)
    return (share.clamp(max=1) * ONE).int()


class PrefillStream:
    """Streams one pass after the other through a residency's slots.

    Args:
        residency: the slots.
        top_k: experts per token.

    Attributes:
        use: int32 [layers, experts], in how many of `ONE` tokens of the last pass each expert was needed.
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
        self.use = torch.zeros(self.num_layers, self.num_experts, dtype=torch.int32)
        # Of all passes so far, by which it is judged what the next one will need; at first as if all were alike.
        self._seen_tokens = self.num_experts / top_k
        self._seen_uses = torch.ones(self.num_layers, self.num_experts, dtype=torch.float64)

    def begin(self, tokens: int) -> None:
        """Begin a pass of that many tokens."""
        self.tokens = tokens
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
        self._note_use(index, experts)
        worth = self._worth(experts)
        needed = [expert for expert in range(self.num_experts) if worth[expert] > 0]
        ranked = sorted(range(self.num_experts), key=lambda expert: -worth[expert])
        stamps = {expert: -rank for rank, expert in enumerate(ranked)}
        residency = self.residency
        for expert, slot in residency.residents(index).items():
            if worth[expert] == 0:
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

    def _note_use(self, index: int, experts: Tensor) -> None:
        """Count how often each expert was needed, for decode and for later passes."""
        self.use[index] = prompt_use(experts, self.num_experts)
        self._seen_uses[index] += experts.flatten().bincount(minlength=self.num_experts)
        if index == self.num_layers - 1:
            self._seen_tokens += len(experts)

    def _worth(self, experts: Tensor) -> list[float]:
        """Return what each expert is worth to decode; more than 0 for those that were chosen, 0 for all others."""
        tokens, top_k = experts.shape
        age = torch.arange(tokens - 1, -1, -1, dtype=torch.float64)
        use = torch.exp2(-age.clamp(max=HALF_LIFE * 500) / HALF_LIFE)  # clamped, so that it never becomes 0
        worth = torch.zeros(self.num_experts, dtype=torch.float64)
        worth.index_add_(0, experts.flatten(), use.repeat_interleave(top_k))
        return worth.tolist()  # host-sync ok: is on the host
