"""What one pass over the layers works on: several sequences' tokens, one after the other, and where their keys are."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """The tokens of one pass. All tensors are on the compute device; a named tuple, so that it can be compiled over.

    `max_query_len` is known on the host: it selects the decode kernel (1) and bounds the prefill kernel's grid.
    """

    tokens: Tensor  # [tokens] int64
    cos: Tensor  # [tokens, head_dim / 2] float32
    sin: Tensor  # as cos
    rows: Tensor  # [tokens] int64: page * page_size + offset of each token's key and value; -1 for padding
    page_table: Tensor  # [sequences, max_pages] int32
    query_start: Tensor  # [sequences + 1] int32: where each sequence's tokens begin
    context_len: Tensor  # [sequences] int32: tokens of each sequence so far, those of this pass included
    max_query_len: int


class LayerKV(NamedTuple):
    """One layer's pages of keys and of values, each [pages, page_size, kv_heads, head_dim]."""

    k: Tensor
    v: Tensor


class Routing(NamedTuple):
    """The router's choice for every token of a pass."""

    weights: Tensor  # [tokens, top_k] float32
    experts: Tensor  # [tokens, top_k] int32
