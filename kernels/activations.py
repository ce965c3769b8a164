"""Activations in fp8, for products that are fp8 on both sides (grouped_gemm.py): each token's 128 by 128 values scaled.

The scale is the group's largest magnitude over the largest of float8_e4m3fn, as checkpoints whose `activation_scheme`
is dynamic expect it. Scales lie transposed, [groups, tokens]: those that a tile of tokens needs are adjacent.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import TRITON_TYPE, Configuration
from duomoe.kernels.operator import operator
from duomoe.kernels.quantised import FP8_BLOCK

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
TOKENS = 16  # that one program quantises


def quantise_activations_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `quantise_activations` with plain PyTorch."""
    tokens, inner = x.shape
    groups = -(-inner // FP8_BLOCK)
    grouped = F.pad(x.float(), (0, groups * FP8_BLOCK - inner)).view(tokens, groups, FP8_BLOCK)
    largest = grouped.abs().amax(2)
    # By a tensor: PyTorch multiplies by a number's reciprocal on GPUs.
    scales = torch.where(largest == 0, 1.0, largest / torch.full_like(largest, FP8_MAX))
    scaled = (grouped / scales[:, :, None]).flatten(1)[:, :inner]
    return scaled.to(torch.float8_e4m3fn).contiguous(), scales.T.contiguous()


@operator()
def quantise_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return activations in fp8.

    Args:
        x: [tokens, inner] of any float type.

    Returns:
        float8_e4m3fn [tokens, inner], and the scales, float32 [groups of 128 inputs, tokens]: a value is their product.
    """
    return quantise_activations_reference(x)


@quantise_activations.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    tokens, inner = x.shape
    scales = x.new_empty(-(-inner // FP8_BLOCK), tokens, dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), scales


def dequantise_activations(x: Tensor, scales: Tensor | None) -> Tensor:
    """Undo `quantise_activations` in float32; without scales `x` is as it is."""
    if scales is None:
        return x.float()
    return x.float() * scales.T.repeat_interleave(FP8_BLOCK, 1)[:, : x.shape[1]]


@triton.jit(do_not_specialize=("tokens",))
def _quantise_kernel(
    x: tl.tensor, out: tl.tensor, scales: tl.tensor, tokens: tl.tensor, inner: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Each program quantises one group of 128 inputs of BLOCK tokens."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1) * 128 + tl.arange(0, 128)
    own = (token < tokens)[:, None] & (k < inner)[None, :]
    at = token.to(tl.int64)[:, None] * inner + k[None, :]
    values = tl.load(x + at, mask=own, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    # Divided as IEEE says: another rounding could end beyond the largest number.
    scale = tl.where(largest == 0, 1.0, tl.div_rn(largest, tl.full((BLOCK,), 448.0, tl.float32)))
    scaled = tl.div_rn(values, tl.broadcast_to(scale[:, None], (BLOCK, 128)))
    tl.store(out + at, scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=own)
    tl.store(scales + tl.program_id(1) * tokens + token, scale, mask=token < tokens)


@quantise_activations.register_cuda
def quantise_activations_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `quantise_activations`."""
    tokens, inner = x.shape
    groups = triton.cdiv(inner, FP8_BLOCK)
    out = torch.empty_like(x, dtype=torch.uint8)
    scales = x.new_empty(groups, tokens, dtype=torch.float32)
    if tokens:
        _quantise_kernel[(triton.cdiv(tokens, TOKENS), groups)](x, out, scales, tokens, inner, BLOCK=TOKENS)
    return out.view(torch.float8_e4m3fn), scales


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launcher chooses; GPUs before sm_89 have no fp8."""
    types = {
        "x": f"*{TRITON_TYPE[dtype]}:16",
        "out": "*u8:16",
        "scales": "*fp32:16",
        "tokens": "i32",
        "inner": "i32:16",
    }
    return [Configuration(_quantise_kernel, types, {"BLOCK": TOKENS})] if capability >= 89 else []
