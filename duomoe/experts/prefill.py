"""Prefill: experts stream through the slots, each at most once in a pass, ahead of the layer that computes them.

The pass is layer-major: all tokens of all its prompts go through a layer before any goes on, so an expert that has
been computed is not needed again in this pass. As soon as a layer has sent for all it needs, the next layer's experts
follow, under the computation of this one's last waves and of the next one's attention. Which of them the router will
choose is not known then; with many tokens nearly all are, and with few nothing is sent ahead.

What stays behind is what decode starts with: of each layer the experts that its tokens used most, and most recently.
"""

import torch

from duomoe.experts.compute import LayerSum
from duomoe.experts.residency import Residency
from duomoe.experts.slots import ALWAYS
from duomoe.models import Routing

# Sending an expert ahead gains its transfer when it is chosen and wastes it when it is not.
WORTH_SENDING = 0.5

# A use counts half as much for an expert's worth to decode as one this many tokens later.
HALF_LIFE = 32


# One slot computes while the other is filled.
SMALLEST_RING = 2


def ring_slots(slots: int) -> int:
    """Return how many of so many slots experts stream through; the others are kept for decode."""
    return max(SMALLEST_RING, slots // 4)


class PrefillStream:
    """Streams one pass after the other through a residency's slots.

    Args:
        residency: the slots.
        top_k: experts per token.
    """

    def __init__(self, residency: Residency, top_k: int) -> None:
        self.residency = residency
        self.top_k = top_k
        self.num_layers, self.num_experts = residency.directory.slot_of.shape
        slots = len(residency.pool)
        # A layer's best experts keep this many slots when others are sent ahead; the rest of the slots is the ring.
        self.kept = max(0, slots - ring_slots(slots)) // self.num_layers
        self.ahead = False

    def begin(self, tokens: int) -> None:
        """Begin a pass of that many tokens."""
        self.ahead = 1 - (1 - self.top_k / self.num_experts) ** tokens > WORTH_SENDING
        # From now on a slot's last use is minus its owner's rank in its layer, so that all layers count alike.
        directory = self.residency.directory
        for index in range(self.num_layers):
            slots = [slot for slot in directory.slot_of[index].tolist() if slot >= 0]  # host-sync ok: is on the host
            slots.sort(key=lambda slot: -int(directory.last_use[slot]))
            for rank, slot in enumerate(slots):
                directory.last_use[slot] = -rank

    def send_ahead(self, index: int) -> None:
        """Send a layer's experts to whatever slots can be spared, if it is likely that they are needed."""
        if not self.ahead or index >= self.num_layers:
            return
        for expert in self.residency.absent(index, range(self.num_experts)):
            if not self.residency.fetch(index, expert, "streamed_bytes", self._can_be_spared):
                break

    def _can_be_spared(self, slot: int) -> bool:
        return int(self.residency.directory.last_use[slot]) <= -self.kept

    def run(self, total: LayerSum, index: int, routing: Routing) -> None:
        """Compute a layer's experts, and send the next layer's when all of this one's are sent."""
        self._note_use(index, routing)
        worth = self._worth(routing)
        needed = [expert for expert in range(self.num_experts) if worth[expert] > 0]
        ranked = sorted(range(self.num_experts), key=lambda expert: -worth[expert])
        stamps = {expert: -rank for rank, expert in enumerate(ranked)}
        unneeded = set(ranked) - set(needed)
        self.residency.release(index, unneeded)
        directory = self.residency.directory
        for expert in unneeded:
            if (slot := directory.find(index, expert)) is not None:
                directory.last_use[slot] = stamps[expert]
        self.residency.run(
            total,
            index,
            needed,
            "streamed_bytes",
            self._can_be_spared,
            stamps,
            after_wave=lambda: self.send_ahead(index + 1),
        )

    def _worth(self, routing: Routing) -> list[float]:
        """Return what each expert is worth to decode; more than 0 for those that were chosen, 0 for all others."""
        tokens, top_k = routing.experts.shape
        age = torch.arange(tokens - 1, -1, -1, dtype=torch.float64)
        use = torch.exp2(-age.clamp(max=HALF_LIFE * 500) / HALF_LIFE)  # clamped, so that it never becomes 0
        experts = routing.experts.cpu().long().flatten()  # host-sync ok: prefill decides on the host what to send
        worth = torch.zeros(self.num_experts, dtype=torch.float64)
        return worth.index_add_(0, experts, use.repeat_interleave(top_k)).tolist()  # host-sync ok: is on the host

    def _note_use(self, index: int, routing: Routing) -> None:
        """Tell decode how often each expert was needed: its share of the tokens, as if a few more had chosen evenly."""
        tokens, top_k = routing.experts.shape
        experts = routing.experts.cpu().long().flatten()  # host-sync ok: as in `_worth`
        share = (torch.bincount(experts, minlength=self.num_experts) + 1) / (tokens + self.num_experts / top_k)
        self.residency.directory.use[index] = (share.clamp(max=1) * ALWAYS).int()
