"""One transformer block, as the two plain functions around its experts.

The families differ in which weights a block has (biases, head norms, a shared expert, a dense MLP), not in how they
are used, so these two functions serve them all; `BlockWeights` says which tensors may be None. They are compiled
once and reused for every layer. What happens between them, the experts, belongs to the schedule.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from duomoe.kernels import add_rms_norm, paged_attention, rms_norm, rope_and_cache, route
from duomoe.models.batch import Batch, LayerKV, Routing
from duomoe.models.config import ModelConfig
from duomoe.models.weights import BlockWeights


def before(
    w: BlockWeights, c: ModelConfig, window: int, x: Tensor, batch: Batch, kv: LayerKV
) -> tuple[Tensor, Tensor, Routing | None]:
    """Norm, attention over KV pages, norm, router.

    Args:
        w: the block's weights.
        c: the model's shape.
        window: how many positions this block's attention sees; 0 means all.
        x: [tokens, hidden], the residual stream.
        batch: the pass; its tokens' keys and values are written into the pages.
        kv: this layer's pages.

    Returns:
        `(x, h, routing)`: the stream with attention added, the normalised hidden states that the experts work on, and
        the router's choice (None in a dense block; no experts, -1, for tokens that are padding).
    """
    h = rms_norm(x, w.input_norm, c.rms_norm_eps)
    qkv = F.linear(h, w.qkv, w.qkv_bias)
    q = rope_and_cache(qkv, batch.cos, batch.sin, kv.k, kv.v, batch.rows, w.q_norm, w.k_norm, c.rms_norm_eps)
    mixed = paged_attention(
        q,
        kv.k,
        kv.v,
        batch.page_table,
        batch.query_start,
        batch.context_len,
        batch.max_query_len,
        c.head_dim**-0.5,
        window,
    )
    attended = F.linear(mixed.flatten(1), w.o, w.o_bias)
    h, x = add_rms_norm(attended, x, w.post_norm, c.rms_norm_eps)
    if w.router is None:
        return x, h, None
    weights, experts = route(F.linear(h, w.router), c.top_k, c.norm_topk_prob)
    return x, h, Routing(weights, experts.masked_fill(batch.rows[:, None] < 0, -1))


def after(w: BlockWeights, x: Tensor, h: Tensor, y: Tensor | None) -> Tensor:
    """Shared expert and residual; in a dense block the MLP.

    Args:
        w: the block's weights.
        x: [tokens, hidden], the residual stream from `before`.
        h: [tokens, hidden], the normalised states from `before`.
        y: [tokens, hidden], the routed experts' weighted sum; None in a dense block.

    Returns:
        The residual stream for the next block.
    """
    if w.dense_gate_up is not None and w.dense_down is not None:
        return x + _swiglu(h, w.dense_gate_up, w.dense_down)
    assert y is not None
    if w.shared_gate_up is not None and w.shared_down is not None and w.shared_gate is not None:
        y = y + torch.sigmoid(F.linear(h, w.shared_gate)) * _swiglu(h, w.shared_gate_up, w.shared_down)
    return x + y


def _swiglu(h: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(h, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)
