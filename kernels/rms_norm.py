"""RMSNorm, alone and fused with the residual addition that precedes it (Zhang & Sennrich, arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import TRITON_TYPE, Configuration
from duomoe.kernels.operator import operator
from duomoe.kernels.threads import Threads


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` in float32 with plain PyTorch."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` in float32 with plain PyTorch."""
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm_reference(total, weight, eps), total


@operator()
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of `x` [..., hidden] to unit root mean square, then by `weight` [hidden]; same dtype as `x`."""
    with Threads(x.numel()):
        return F.rms_norm(x, weight.shape, weight, eps).contiguous()


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator()
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `x` to `residual` (both [..., hidden]) and normalise the sum.

    Returns `(rms_norm(sum), sum)`. The sum is rounded to the dtype of `x` before it is normalised, so that both
    results come from the same numbers.
    """
    with Threads(x.numel()):
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, eps), total


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out)


@triton.jit
def _rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    hidden: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Each program normalises one row; given a residual, it adds that first and stores the sum too."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * hidden + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / hidden + eps)
    scaled = normed * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + column, scaled.to(out.dtype.element_ty), mask=inside)


def _options(hidden: int) -> dict[str, int]:
    """Choose the block (a whole row) and the warps that share it."""
    block = triton.next_power_of_2(hidden)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}


@rms_norm.register_cuda
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Launch the kernel of `rms_norm`."""
    hidden = x.shape[-1]
    rows = x.reshape(-1, hidden)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if len(rows) > 0:
        _rms_norm_kernel[(len(rows),)](
            rows, None, weight, out, None, rows.stride(0), 0, hidden, eps, **_options(hidden)
        )
    return out.view(x.shape)


@add_rms_norm.register_cuda
def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `add_rms_norm`."""
    hidden = x.shape[-1]
    rows, residuals = x.reshape(-1, hidden), residual.reshape(-1, hidden)
    out, total = (torch.empty(rows.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if len(rows) > 0:
        _rms_norm_kernel[(len(rows),)](
            rows, residuals, weight, out, total, rows.stride(0), residuals.stride(0), hidden, eps, **_options(hidden)
        )
    return out.view(x.shape), total.view(x.shape)


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launchers choose for the hidden sizes of common models."""
    pointer = f"*{TRITON_TYPE[dtype]}:16"
    plain = {"x": pointer, "weight": pointer, "out": pointer, "eps": "fp32"}
    plain |= {"x_stride": "i32:16", "residual_stride": "i32:16", "hidden": "i32:16"}
    added = plain | {"residual": pointer, "total": pointer}
    sizes = (2048, 8192)
    return [Configuration(_rms_norm_kernel, types, _options(size)) for types in (plain, added) for size in sizes]
