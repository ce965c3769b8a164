"""What happens to a fused QKV projection before attention: head norm, rotary embedding, and the write into KV pages.

Rotary embedding in the half-split convention (Su et al., arXiv 2104.09864, as Llama-family checkpoints store it):
element `i` of a head is rotated with element `i + head_dim / 2`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import TRITON_TYPE, Configuration
from duomoe.kernels.operator import operator
from duomoe.kernels.rms_norm import rms_norm_reference
from duomoe.kernels.threads import Threads


def rope_and_cache_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute `rope_and_cache` in float32 with plain PyTorch; writes the pages as the kernel does."""
    tokens = qkv.shape[0]
    kv_heads, head_dim = k_pages.shape[2:]
    q_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q, k, v = qkv.view(tokens, q_heads + 2 * kv_heads, head_dim).split([q_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q = rms_norm_reference(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm_reference(k, k_norm, eps)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    kept = rows >= 0
    k_pages.view(-1, kv_heads, head_dim)[rows[kept]] = rotate(k)[kept].to(k_pages.dtype)
    v_pages.view(-1, kv_heads, head_dim)[rows[kept]] = v[kept].to(v_pages.dtype)
    return rotate(q).to(qkv.dtype)


@operator(mutates_args=("k_pages", "v_pages"))
def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalise and rotate the heads of a QKV projection, store keys and values, return the queries.

    Args:
        qkv: [tokens, (q_heads + 2 * kv_heads) * head_dim], the query heads first, then keys, then values.
        cos: [tokens, head_dim / 2] float32, the cosine of each token's angles (with any attention scaling).
        sin: as `cos`.
        k_pages: [pages, page_size, kv_heads, head_dim], written at `rows`.
        v_pages: as `k_pages`.
        rows: [tokens] int64, `page * page_size + offset` of each token; -1 stores nothing (padding).
        q_norm: [head_dim] weight of a per-head RMSNorm before the rotation (Qwen3), or None.
        k_norm: as `q_norm`, for the keys.
        eps: of those norms.

    Returns:
        The rotated queries, [tokens, q_heads, head_dim], in the dtype of `qkv`.
    """
    kv_heads, head_dim = k_pages.shape[2:]
    q_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    heads = qkv.view(len(qkv), q_heads + 2 * kv_heads, head_dim)
    with Threads(qkv.numel()):
        both, v = heads[:, :-kv_heads], heads[:, -kv_heads:]  # queries and keys are rotated together
        if q_norm is not None or k_norm is not None:
            parts = zip(both.split([q_heads, kv_heads], dim=1), (q_norm, k_norm), strict=True)
            both = torch.cat([x if norm is None else F.rms_norm(x, norm.shape, norm, eps) for x, norm in parts], 1)
        both = _rotated(both, cos, sin)
        q, k = both[:, :q_heads].contiguous(), both[:, q_heads:]
        if min(rows.tolist(), default=0) < 0:  # host-sync ok: runs on the CPU
            kept = rows >= 0
            rows, k, v = rows[kept], k[kept], v[kept]
        k_pages.view(-1, kv_heads, head_dim).index_copy_(0, rows, k)
        v_pages.view(-1, kv_heads, head_dim).index_copy_(0, rows, v)
        return q


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads [tokens, heads, head_dim] with their halves rotated."""
    halves = x.float().unflatten(2, (2, -1))
    cos, sin = cos[:, None, None], sin[:, None]
    out: Tensor = halves * cos
    (first, second), (to_first, to_second) = halves.unbind(2), out.unbind(2)
    to_first.addcmul_(second, sin, value=-1)
    to_second.addcmul_(first, sin)
    return out.flatten(2).to(x.dtype)


@rope_and_cache.register_fake
def _(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    kv_heads, head_dim = k_pages.shape[2:]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads, head_dim)


@triton.jit
def _norm_heads(
    first: tl.tensor,
    second: tl.tensor,
    weight: tl.tensor,
    chosen: tl.tensor,
    eps: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Normalise the chosen heads, given as their two halves [heads, BLOCK]; the others stay as they are."""
    element = tl.arange(0, BLOCK)
    inside = element < HEAD_DIM // 2
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM
    scale = tl.rsqrt(mean + eps)[:, None]
    first_weight = tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
    second_weight = tl.load(weight + HEAD_DIM // 2 + element, mask=inside, other=0.0).to(tl.float32)
    # Rounded to the weight's dtype in between, as a norm of its own would.
    first_normed = (first * scale * first_weight).to(weight.dtype.element_ty).to(tl.float32)
    second_normed = (second * scale * second_weight).to(weight.dtype.element_ty).to(tl.float32)
    return tl.where(chosen, first_normed, first), tl.where(chosen, second_normed, second)


@triton.jit
def _rope_and_cache_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    rows: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    q_heads: tl.tensor,
    kv_heads: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Each program normalises, rotates and stores HEADS neighbouring heads of one token, whichever of q, k, v."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    element = tl.arange(0, BLOCK)[None, :]
    half: tl.constexpr = HEAD_DIM // 2
    all_heads = q_heads + 2 * kv_heads
    inside = (head < all_heads) & (element < half)
    at = qkv + (token * all_heads + head) * HEAD_DIM + element
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)

    is_q = head < q_heads
    is_v = head >= q_heads + kv_heads
    is_k = (head >= q_heads) & (head < q_heads + kv_heads)
    if q_norm is not None:
        first, second = _norm_heads(first, second, q_norm, is_q, eps, HEAD_DIM, BLOCK)
    if k_norm is not None:
        first, second = _norm_heads(first, second, k_norm, is_k, eps, HEAD_DIM, BLOCK)

    c = tl.load(cos + token * half + element, mask=element < half, other=0.0)
    s = tl.load(sin + token * half + element, mask=element < half, other=0.0)
    dtype = out.dtype.element_ty
    first, second = (
        tl.where(is_v, first, first * c - second * s).to(dtype),
        tl.where(is_v, second, second * c + first * s).to(dtype),
    )

    query = out + (token * q_heads + head) * HEAD_DIM + element
    tl.store(query, first, mask=inside & is_q)
    tl.store(query + half, second, mask=inside & is_q)
    row = tl.load(rows + token)
    kept = inside & (row >= 0)
    key = k_pages + (row * kv_heads + head - q_heads) * HEAD_DIM + element
    tl.store(key, first, mask=kept & is_k)
    tl.store(key + half, second, mask=kept & is_k)
    value = v_pages + (row * kv_heads + head - q_heads - kv_heads) * HEAD_DIM + element
    tl.store(value, first, mask=kept & is_v)
    tl.store(value + half, second, mask=kept & is_v)


def _options(head_dim: int) -> dict[str, int]:
    """Choose how many heads a program takes."""
    return {"HEAD_DIM": head_dim, "HEADS": 8, "BLOCK": triton.next_power_of_2(head_dim // 2), "num_warps": 2}


@rope_and_cache.register_cuda
def rope_and_cache_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Launch the kernel of `rope_and_cache`."""
    tokens = qkv.shape[0]
    kv_heads, head_dim = k_pages.shape[2:]
    heads = qkv.shape[1] // head_dim
    q_heads = heads - 2 * kv_heads
    out = torch.empty(tokens, q_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if tokens > 0:
        options = _options(head_dim)
        _rope_and_cache_kernel[(tokens, triton.cdiv(heads, options["HEADS"]))](
            qkv, cos, sin, k_pages, v_pages, rows, q_norm, k_norm, out, eps, q_heads, kv_heads, **options
        )
    return out


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launcher chooses for common heads, without and with their norms."""
    pointer = f"*{TRITON_TYPE[dtype]}:16"
    plain = dict.fromkeys(("qkv", "k_pages", "v_pages", "out"), pointer)
    plain |= {"cos": "*fp32:16", "sin": "*fp32:16", "rows": "*i64:16", "eps": "fp32"}
    plain |= {"q_heads": "i32:16", "kv_heads": "i32"}
    normed = plain | {"q_norm": pointer, "k_norm": pointer}
    return [
        Configuration(_rope_and_cache_kernel, plain, _options(128)),
        Configuration(_rope_and_cache_kernel, plain, _options(80)),
        Configuration(_rope_and_cache_kernel, normed, _options(128)),
    ]
