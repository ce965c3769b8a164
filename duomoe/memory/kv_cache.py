"""The paged KV cache: keys and values in pages of 16 tokens, handed to sequences as they grow."""

import torch
from torch import Tensor

from duomoe.models import LayerKV, ModelConfig

PAGE_SIZE = 16  # tokens


def pages_for(tokens: int) -> int:
    """Return how many pages hold that many tokens."""
    return -(-tokens // PAGE_SIZE)


class PageAllocator:
    """Hands out page numbers. A page is free or has exactly one holder, a sequence.

    Admission is by reservation: a sequence reserves the most it may ever need before it starts, and takes pages only
    as it grows. So a running sequence never fails to get its next page, and pages it turns out not to need go back
    to others the moment it ends.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # popped from the end: lowest numbers first
        self._held: dict[int, list[int]] = {}
        self._reserved: dict[int, int] = {}

    @property
    def unreserved(self) -> int:
        """Pages that a new sequence may still reserve."""
        return self.num_pages - sum(self._reserved.values())

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - len(self._free)

    def reserve(self, sequence: int, max_tokens: int) -> bool:
        """Admit a sequence that will hold at most `max_tokens`; return False when there is no room for it now."""
        assert sequence not in self._reserved, "a sequence reserves once"
        pages = pages_for(max_tokens)
        if pages > self.unreserved:
            return False
        self._reserved[sequence] = pages
        self._held[sequence] = []
        return True

    def grow(self, sequence: int, tokens: int) -> list[int]:
        """Give the sequence pages for `tokens` in all; return all of its pages in order."""
        held = self._held[sequence]
        needed = pages_for(tokens)
        assert needed <= self._reserved[sequence], "a sequence grew beyond its reservation"
        while len(held) < needed:
            held.append(self._free.pop())
        return held

    def release(self, sequence: int) -> None:
        """Take back all pages of a sequence, and its reservation."""
        del self._reserved[sequence]
        self._free.extend(reversed(self._held.pop(sequence)))
        assert len(self._free) <= self.num_pages, "a page came back twice"


class KVCache:
    """The pages of all layers, and who holds them.

    Attributes:
        layers: each layer's pages. Keys and values are tensors of their own, because torch.compile does not keep apart
            the writes to two views of one tensor.
        allocator: whose each page is.
    """

    def __init__(self, config: ModelConfig, num_pages: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (num_pages, PAGE_SIZE, config.num_kv_heads, config.head_dim)

        def pages() -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.layers = [LayerKV(pages(), pages()) for _ in range(config.num_layers)]
        self.allocator = PageAllocator(num_pages)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(kv.k.nbytes + kv.v.nbytes for kv in self.layers)


def kv_page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one page over all layers, keys and values."""
    return config.num_layers * 2 * PAGE_SIZE * config.kv_size * dtype.itemsize
