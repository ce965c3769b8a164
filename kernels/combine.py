"""The sum over a token's experts, in the order of the router's choices and never by atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import TRITON_TYPE, Configuration
from duomoe.kernels.operator import operator
from duomoe.kernels.threads import Threads


def combine_reference(parts: Tensor, experts: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `combine` in float32 with plain PyTorch."""
    splits, _, hidden = parts.shape
    tokens, top_k = experts.shape
    total = torch.zeros(tokens, hidden, dtype=torch.float32, device=parts.device)
    pairs = parts.view(splits, tokens, top_k, hidden)
    for choice in range(top_k):
        real = (experts[:, choice] >= 0)[:, None]
        for split in range(splits):
            total += torch.where(real, pairs[split, :, choice].float(), 0.0)
    return total.to(dtype)


@operator()
def combine(parts: Tensor, experts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up each token's expert outputs in float32, choice by choice and split by split.

    Args:
        parts: [splits, tokens * top_k, hidden], the weighted outputs of the pairs (one split after a GEMM, several
            after a GEMV).
        experts: [tokens, top_k] int32; -1 is padding and adds nothing.
        dtype: of the result.

    Returns:
        [tokens, hidden] in `dtype`.
    """
    (splits, _, hidden), (tokens, top_k) = parts.shape, experts.shape
    pairs = parts.view(splits, tokens, top_k, hidden)
    with Threads(parts.numel()):
        if tokens > 0 and int(experts.min()) < 0:  # host-sync ok: runs on the CPU
            pairs = pairs.masked_fill((experts < 0)[None, :, :, None], 0.0)
        first, *others = (part for choice in pairs.unbind(2) for part in choice.unbind(0))
        total = first.to(torch.float32, copy=True)
        for part in others:
            total += part
        return total.to(dtype)


@combine.register_fake
def _(parts: Tensor, experts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts.new_empty(experts.shape[0], parts.shape[2], dtype=dtype)


@triton.jit(do_not_specialize=("pairs",))
def _combine_kernel(
    parts: tl.tensor,
    experts: tl.tensor,
    out: tl.tensor,
    pairs: tl.tensor,
    hidden: tl.tensor,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Each program adds up BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        # Masked, not multiplied by zero: nobody wrote a padding pair's part, so it may hold NaN.
        real = inside & (tl.load(experts + pair) >= 0)
        for split in tl.static_range(SPLITS):
            at = parts + (split * tl.cast(pairs, tl.int64) + pair) * hidden + column
            total += tl.load(at, mask=real, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)


def _options(splits: int, top_k: int) -> dict[str, int]:
    """Choose how many columns a program takes: few, so that one token's are spread over the GPU."""
    return {"SPLITS": splits, "TOP_K": top_k, "BLOCK": 512, "num_warps": 2}


@combine.register_cuda
def combine_triton(parts: Tensor, experts: Tensor, dtype: torch.dtype) -> Tensor:
    """Launch the kernel of `combine`."""
    splits, pairs, hidden = parts.shape
    tokens, top_k = experts.shape
    out = torch.empty(tokens, hidden, dtype=dtype, device=parts.device)
    if tokens > 0:
        options = _options(splits, top_k)
        _combine_kernel[(tokens, triton.cdiv(hidden, options["BLOCK"]))](parts, experts, out, pairs, hidden, **options)
    return out


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launcher chooses after a GEMM and after a GEMV."""
    types = {"experts": "*i32:16", "out": f"*{TRITON_TYPE[dtype]}:16", "pairs": "i32", "hidden": "i32:16"}
    after_gemm = types | {"parts": f"*{TRITON_TYPE[dtype]}:16"}
    after_gemv = types | {"parts": "*fp32:16"}
    return [
        Configuration(_combine_kernel, after_gemm, _options(1, 8)),
        Configuration(_combine_kernel, after_gemv, _options(4, 2)),
        Configuration(_combine_kernel, after_gemv, _options(2, 8)),
    ]
