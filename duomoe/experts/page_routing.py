"""How often the tokens of each page of the KV cache have chosen each expert.

Who finds a prompt's pages computed finds there, too, what computing them would have shown: which experts it uses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from duomoe.memory.pages import PAGE_SIZE


class Prompt(NamedTuple):
    """A sequence of which a pass computes the rest.

    Attributes:
        tokens: how many the pass computes.
        pages: what was computed before, all full, in order.
        behind: how many tokens come behind those pages, in this pass or shared with another sequence of it.
    """

    tokens: int
    pages: list[int]
    behind: int


def page_routing_bytes(num_pages: int, num_layers: int, num_experts: int) -> int:
    """Return the bytes of the counts."""
    return (num_pages + 1) * num_layers * num_experts


class PageRouting:
    """Counts by page, MoE layer and expert, on the compute device.

    Args:
        num_pages: of the cache.
        num_layers: with experts.
        num_experts: of a layer.
        device: where they are.

    Attributes:
        counts: uint8 [num_pages + 1, num_layers, num_experts]; the last page is that of padding.
    """

    def __init__(self, num_pages: int, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_pages + 1, num_layers, num_experts, dtype=torch.uint8, device=device)
        self._first = torch.arange(num_layers, device=device)[:, None, None] * num_experts

    def note(self, rows: Tensor, experts: Tensor, index: int = 0) -> None:
        """Count what some tokens have chosen, on the device. A page's first token begins its counts anew.

        Args:
            rows: int64 [tokens], where each token's key is (Batch.rows); -1 for padding.
            experts: [layers, tokens, top_k], the choice in consecutive MoE layers; what padding chose is ignored.
            index: the first of them.
        """
        num_pages, num_layers, num_experts = self.counts.shape
        layers = slice(index, index + len(experts))
        pages = torch.where(rows >= 0, rows // PAGE_SIZE, num_pages - 1)
        begun = torch.where(rows % PAGE_SIZE == 0, pages, num_pages - 1)
        self.counts[:, layers].index_fill_(0, begun, 0)
        places = (pages * (num_layers * num_experts))[:, None] + self._first[layers] + experts.clamp(min=0)
        places = places.flatten()
        self.counts.view(-1).scatter_add_(0, places, self.counts.new_ones(()).expand_as(places))

    def of(self, pages: list[int]) -> Tensor:
        """Return the counts of some pages, float64 [pages, layers, experts], on the host; waits for the device."""
        chosen = torch.tensor(pages, dtype=torch.int64, device=self.counts.device)
        return self.counts[chosen].cpu().double()  # host-sync ok: prefill decides on the host what to keep
