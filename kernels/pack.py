"""Matrices of bfloat16 packed into 12 bits a value on a GPU, bit for bit as `pack_bf16` packs them on the host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.bf16_packed import GROUP, MOST_CODE, patch_room, weight_bytes, weight_words
from duomoe.kernels.configuration import TRITON_TYPE, Configuration

# The same for kernels.
_GROUP, _MOST_CODE = tl.constexpr(GROUP), tl.constexpr(MOST_CODE)


@triton.jit
def _exponents(
    values: tl.tensor, row: tl.tensor, first: tl.tensor, inner: tl.tensor, GROUPS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return some groups of a row, int32 [GROUPS, 8]: their bits, their exponents, and which values are the row's."""
    column = first * _GROUP + tl.arange(0, GROUPS)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    inside = column < inner
    bits = tl.load(values + row * inner + column, mask=inside, other=0).to(tl.int16, bitcast=True).to(tl.int32)
    return bits, bits >> 7 & 255, inside


@triton.jit
def _codes(exponent: tl.tensor, base: tl.tensor, inside: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the codes of some groups, [GROUPS, 8], and which groups are patches, [GROUPS]; what pads has code 1."""
    code = tl.where(inside, exponent - base + 1, 1)
    far = tl.max(((code < 1) | (code > _MOST_CODE)).to(tl.int32), 1)
    return code, far


@triton.jit
def _count_patches_kernel(
    values: tl.tensor, bases: tl.tensor, counts: tl.tensor, inner: tl.tensor, GROUPS: tl.constexpr
) -> None:
    """Each program finds one row's base, and counts the row's patches."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros((GROUPS, _GROUP), tl.int32)
    for first in range(0, tl.cdiv(inner, _GROUP), GROUPS):
        _, exponent, _ = _exponents(values, row, first, inner, GROUPS)
        most = tl.maximum(most, tl.where(exponent == 255, 0, exponent))
    base = tl.maximum(tl.max(tl.max(most, 1), 0) - (_MOST_CODE - 1), 0)
    patches = tl.zeros((GROUPS,), tl.int32)
    for first in range(0, tl.cdiv(inner, _GROUP), GROUPS):
        _, exponent, inside = _exponents(values, row, first, inner, GROUPS)
        _, far = _codes(exponent, base, inside)
        patches += far
    tl.store(bases + row, base.to(tl.uint8))
    tl.store(counts + row, tl.sum(patches, 0))


@triton.jit(do_not_specialize=("room",))
def _pack_kernel(
    values: tl.tensor,
    bases: tl.tensor,
    starts: tl.tensor,
    weights: tl.tensor,
    patches: tl.tensor,
    inner: tl.tensor,
    room: tl.tensor,
    GROUPS: tl.constexpr,
) -> None:
    """Each program packs one row, whose patches are numbered from `starts` on; those beyond the room are not stored."""
    row = tl.program_id(0).to(tl.int64)
    base = tl.load(bases + row).to(tl.int32)
    used = tl.load(starts + row)
    groups = weight_words(inner) // 3
    bytes_at = weights + row * weight_words(inner)
    codes_at = bytes_at + 2 * groups
    value = tl.arange(0, _GROUP)
    # Where in its word each value's code goes, and where in one of two words its byte: see bf16_packed.py.
    code_shift = ((value % 2) * 16 + (value // 2) * 4)[None, :]
    byte_shift = ((value % 2) * 16 + (value // 2 % 2) * 8)[None, :]
    for first in range(0, groups, GROUPS):
        bits, exponent, inside = _exponents(values, row, first, inner, GROUPS)
        code, far = _codes(exponent, base, inside)
        number = used + tl.cumsum(far, 0) - 1
        used += tl.sum(far, 0)
        own = ((bits >> 8 & 128) | (bits & 127)) << byte_shift
        low = tl.where(far != 0, number, tl.sum(tl.where(value[None, :] < 4, own, 0), 1))
        high = tl.sum(tl.where(value[None, :] < 4, 0, own), 1)
        group = first + tl.arange(0, GROUPS)
        kept = group < groups
        tl.store(bytes_at + 2 * group, low, mask=kept)
        tl.store(bytes_at + 2 * group + 1, high, mask=kept)
        tl.store(codes_at + group, tl.where(far != 0, 0, tl.sum(code << code_shift, 1)), mask=kept)
        patch = patches + (number * _GROUP)[:, None] + value[None, :]
        tl.store(patch, bits.to(tl.int16), mask=(kept & (far != 0) & (number < room))[:, None] & (value >= 0)[None, :])


OPTIONS = {"GROUPS": 128, "num_warps": 4}


def pack(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack a matrix, bfloat16 [outer, inner], on its GPU; the host does not wait.

    Returns:
        Weights, bases and patches (bf16_packed.py), and whether the patches fit into their room, bool []; where they do
        not, the rest is no matrix.
    """
    outer, inner = values.shape
    values = values.contiguous()
    bases = values.new_empty(outer, dtype=torch.uint8)
    counts = values.new_empty(outer, dtype=torch.int32)
    _count_patches_kernel[(outer,)](values, bases, counts, inner, **OPTIONS)
    ends, room = counts.cumsum(0, dtype=torch.int32), patch_room(outer, inner)
    weights = values.new_empty(outer, weight_bytes(inner), dtype=torch.uint8)
    patches = values.new_zeros(room, GROUP, dtype=torch.int16)
    words = weights.view(torch.int32)
    _pack_kernel[(outer,)](values, bases, ends - counts, words, patches, inner, room, **OPTIONS)
    return weights, bases, patches, ends[-1] <= room


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List both kernels; values are bfloat16, whatever the model's dtype."""
    types = {"values": f"*{TRITON_TYPE[torch.bfloat16]}:16", "bases": "*u8:16", "inner": "i32:16"}
    packing = types | {"starts": "*i32:16", "weights": "*i32:16", "patches": "*i16:16", "room": "i32"}
    return [
        Configuration(_count_patches_kernel, types | {"counts": "*i32:16"}, OPTIONS),
        Configuration(_pack_kernel, packing, OPTIONS),
    ]
