"""The paged KV cache: keys and values of all layers, in pages of 16 tokens."""

import torch
from torch import Tensor

from duomoe.memory.pages import PAGE_SIZE, PagePool
from duomoe.models import LayerKV, ModelConfig


class KVCache:
    """The pages of all layers, and who holds them.

    Attributes:
        layers: each layer's pages. Keys and values are tensors of their own, because torch.compile does not keep apart
            the writes to two views of one tensor.
        pages: whose each page is.
    """

    def __init__(self, config: ModelConfig, num_pages: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (num_pages, PAGE_SIZE, config.num_kv_heads, config.head_dim)

        def pages() -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.layers = [LayerKV(pages(), pages()) for _ in range(config.num_layers)]
        self.pages = PagePool(num_pages)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(kv.k.nbytes + kv.v.nbytes for kv in self.layers)


def kv_page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one page over all layers, keys and values."""
    return config.num_layers * 2 * PAGE_SIZE * config.kv_size * dtype.itemsize
