"""Quantised matrices: how they lie in an expert's row, in PyTorch, and the functions by which kernels read them.

A matrix [outer, inner] has one of four forms. Its tensors' dtypes say which, and their shapes the rest:

- plain: bfloat16, float16 or float32 [outer, inner];
- fp8: float8_e4m3fn [outer, inner], and float32 scales, one for each block of 128 by 128;
- int4: uint8 [outer, padded inner / 2], two values in a byte, and for each output and group of 64 or 128 inputs a scale
  (float16 or bfloat16) and a zero point (uint8);
- packed: bfloat16 in 12 bits (bf16_packed.py), where the bases, uint8, take the place of scales, and the patches,
  int16, that of zero points.

A value is `weight * scale`, or `(nibble - zero) * scale`, in float32. The grouped GEMM rounds it to the dtype of the
activations before it multiplies: a quantised expert computes what a plain one of the rounded values does, bit for bit.

Scales and zero points lie transposed, [groups of inner, groups of outer]: a tile's are adjacent. Where a row stacks
matrices (gate over up), each is quantised by itself, and so all their tensors are stacked along dimension 0.

An int4 byte holds two values that are 64 apart, so that a tile of bytes becomes two tiles of values, one from all low
halves and one from all high ones, without an exchange between threads: byte j of 64 has value j of a chunk of 128 in
its low half and value 64 + j in its high half. The inner dimension is padded to whole chunks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.bf16_packed import patch_words, unpack_bf16, weight_words
from duomoe.kernels.configuration import TRITON_TYPE

FP8_BLOCK = 128
INT4_PLANE = 64
INT4_CHUNK = 2 * INT4_PLANE
INT4_GROUPS = (64, 128)

# What a launcher passes by name: the `constexpr` arguments in capitals, `num_warps` and `num_stages`.
Form = dict[str, Any]


def scale_shape(outer: int, inner: int, group: int) -> tuple[int, int]:
    """Return the shape of an int4 matrix's scales, and of its zero points."""
    return -(-inner // INT4_CHUNK) * INT4_CHUNK // group, outer


def block_shape(outer: int, inner: int) -> tuple[int, int]:
    """Return the shape of an fp8 matrix's scales."""
    return -(-inner // FP8_BLOCK), -(-outer // FP8_BLOCK)


def packed_width(inner: int) -> int:
    """Return how many bytes a row of an int4 matrix takes."""
    return -(-inner // INT4_CHUNK) * INT4_PLANE


def pack_int4(values: Tensor) -> Tensor:
    """Return values from 0 to 15, uint8 [outer, inner], as int4 weights, uint8 [outer, packed_width]."""
    outer, inner = values.shape
    padded = values.new_zeros(outer, 2 * packed_width(inner))
    padded[:, :inner] = values
    low, high = padded.view(outer, -1, 2, INT4_PLANE).unbind(2)
    return (low | high << 4).view(outer, -1)


def unpack_int4(packed: Tensor, inner: int) -> Tensor:
    """Undo `pack_int4`."""
    bytes_ = packed.reshape(len(packed), -1, INT4_PLANE)
    return torch.stack((bytes_ & 15, bytes_ >> 4), 2).flatten(1)[:, :inner]


def dequantise(w: Tensor, scales: Tensor | None, zeros: Tensor | None, inner: int, matrices: int = 1) -> Tensor:
    """Return a matrix's values in float32, [outer, inner].

    Args:
        w: the weights of an expert, in any of the four forms.
        scales: None for a plain matrix.
        zeros: None for a plain matrix, and for fp8.
        inner: values in a row.
        matrices: how many matrices of equal size are stacked in `w`.
    """
    if scales is None:
        return w.float()
    if is_packed(scales):
        assert zeros is not None
        parts = zip(w.chunk(matrices), scales.chunk(matrices), zeros.chunk(matrices), strict=True)
        return torch.cat([unpack_bf16(*part, inner) for part in parts]).float()
    rows = len(w) // matrices
    if zeros is None:
        spread = _transposed(scales, matrices).repeat_interleave(FP8_BLOCK, 1)[:, :rows].flatten(0, 1)
        return w.float() * spread.repeat_interleave(FP8_BLOCK, 1)[:, :inner]
    group = int4_group(w, scales, matrices)
    scale, zero = (_transposed(item, matrices).flatten(0, 1).float() for item in (scales, zeros))
    scale, zero = (item.repeat_interleave(group, 1)[:, :inner] for item in (scale, zero))
    return (unpack_int4(w, inner).float() - zero) * scale


def is_packed(scales: Tensor | None) -> bool:
    """Return whether a matrix with these scales is bfloat16 in 12 bits."""
    return scales is not None and scales.dtype == torch.uint8


def _transposed(scales: Tensor, matrices: int) -> Tensor:
    """Return stacked scales [matrices * inner groups, outer groups] as [matrices, outer groups, inner groups]."""
    return scales.reshape(matrices, -1, scales.shape[1]).transpose(1, 2)


def int4_group(w: Tensor, scales: Tensor, matrices: int) -> int:
    """Return how many inputs share a scale. `w` and `scales` may be those of one expert or of a pool."""
    return 2 * w.shape[-1] * matrices // scales.shape[-2]


def expert_values(
    slot: int, w: Tensor, scales: Tensor | None, zeros: Tensor | None, inner: int, matrices: int = 1
) -> Tensor:
    """Return `dequantise` of the expert in a slot of a pool, whose tensors have a dimension of slots in front."""
    if scales is None:
        return w[slot].float()
    scales, zeros = (None if item is None else item[slot] for item in (scales, zeros))
    return dequantise(w[slot], scales, zeros, inner, matrices)


def kernel_form(w: Tensor, scales: Tensor | None, matrices: int, capability: int) -> Form:
    """Return the `constexpr` arguments that tell a kernel how a pool's weights are written.

    FORMAT is 'plain', 'packed', 'int4', or for fp8 'fp8' where the GPU converts it and 'fp8_bits' where it cannot
    (before sm_89). GROUP is how many inputs share a scale, 1 where none do.
    """
    if scales is None:
        return {"FORMAT": "plain", "GROUP": 1}
    if is_packed(scales):
        return {"FORMAT": "packed", "GROUP": 1}
    if w.dtype == torch.float8_e4m3fn:
        return {"FORMAT": "fp8" if capability >= 89 else "fp8_bits", "GROUP": FP8_BLOCK}
    return {"FORMAT": "int4", "GROUP": int4_group(w, scales, matrices)}


def pools(w: Tensor, scales: Tensor | None, zeros: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return a pool's tensors as kernels take them.

    fp8 goes as bytes, which GPUs without fp8 can load too, and packed weights and patches as words. Where a format
    lacks a tensor, the weights take its place, from which nothing is read then.
    """
    if scales is not None and zeros is not None and is_packed(scales):
        return w.view(torch.int32), scales, zeros.view(torch.int32)
    w = w.view(torch.uint8) if w.dtype == torch.float8_e4m3fn else w
    return w, w if scales is None else scales, w if zeros is None else zeros


def strides(*pool: Tensor) -> tuple[int, ...]:
    """Return the distances from one slot to the next in the tensors that `pools` returned, in their elements."""
    return tuple(item.stride(0) for item in pool)


def example_forms(dtype: torch.dtype, capability: int) -> list[tuple[Form, dict[str, str]]]:
    """Return every form that launchers meet, with its arguments' types, for the compile gate (configuration.py).

    Others than plain ones are listed for bfloat16 alone: float16 differs by one instruction.
    """
    fp8: Form = {"FORMAT": "fp8" if capability >= 89 else "fp8_bits", "GROUP": FP8_BLOCK}
    int4: Form = {"FORMAT": "int4", "GROUP": 128}
    plain: Form = {"FORMAT": "plain", "GROUP": 1}
    apart = dict.fromkeys(("scale_stride", "zero_stride"), "i32:16")
    own, byte = f"*{TRITON_TYPE[dtype]}:16", "*u8:16"
    packed: Form = {"FORMAT": "packed", "GROUP": 1}
    every = [
        (plain, apart | {"w": own, "scales": own, "zeros": own}),
        (fp8, apart | {"w": byte, "scales": "*fp32:16", "zeros": byte}),
        (int4, apart | {"w": byte, "scales": "*fp16:16", "zeros": byte}),
        (packed, apart | {"w": "*i32:16", "scales": byte, "zeros": "*i32:16"}),
    ]
    return every[:1] if dtype == torch.float16 else every


@triton.jit
def row_length(inner: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Return the distance from one row of a matrix to the next, in elements of its weights."""
    if FORMAT == "int4":
        return tl.cdiv(inner, 128) * 64
    elif FORMAT == "packed":
        return weight_words(inner)
    else:
        return inner


@triton.jit
def scale_places(
    matrix: tl.tensor, row: tl.tensor, rows: tl.tensor, inner: tl.tensor, FORMAT: tl.constexpr, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return where the first scale of some rows of a stacked matrix lies, and how far from one group's to the next's.

    `rows` is the height of one matrix, `row` counts within it. For packed weights, where the rows' bases lie, and in
    words where their matrices' patches begin.
    """
    if FORMAT == "int4":
        groups = tl.cdiv(inner, 128) * (128 // GROUP)
        return matrix * groups * rows + row, rows
    elif FORMAT == "packed":
        return matrix * rows + row, (matrix + 0 * row) * patch_words(rows, inner)
    else:
        blocks = tl.cdiv(rows, 128)
        return matrix * tl.cdiv(inner, GROUP) * blocks + row // 128, blocks


@triton.jit
def decoded(
    raw: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    place: tl.tensor,
    HALF: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Return a tile [rows, inner] of quantised weights as values in DTYPE.

    `place` says where the scale of each row lies for this tile's group; HALF is 0 for the low and 1 for the high halves
    of int4 bytes.
    """
    scale = tl.load(scales + place).to(tl.float32)[:, None]
    if FORMAT == "int4":
        # Converting integers is slow on GPUs. As the last bits of a float of 2 ** 23, a nibble is added to it; all of
        # this is exact, for the high half 16 times what it is for the low one.
        TIMES: tl.constexpr = 16 if HALF else 1
        zero = tl.load(zeros + place).to(tl.float32)[:, None]
        bits = (raw & (15 * TIMES)).to(tl.int32) | 0x4B000000
        value = bits.to(tl.float32, bitcast=True) - (8388608.0 + zero * TIMES)
        return (value * (scale / TIMES)).to(DTYPE)
    else:
        return (fp8_number(raw, FORMAT) * scale).to(DTYPE)


@triton.jit
def tiny_int4(raw: tl.tensor, LEFT: tl.constexpr) -> tl.tensor:
    """Return `nibble * 2 ** (LEFT - 149)` in float32, of the nibbles that begin at bit LEFT, at most 19, of integers.

    Converting integers is slow on GPUs; the last bits of a float are such a number as they are. Multiplied by powers of
    two on either side it is exact, of activations under 2 ** 64.
    """
    return (raw & (15 << LEFT)).to(tl.float32, bitcast=True)


@triton.jit
def fp8_number(raw: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Return bytes of float8_e4m3fn as float32; for FORMAT 'fp8_bits' by shifts and one exact product."""
    if FORMAT == "fp8":
        return raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = raw.to(tl.int32)
        # Sign, exponent and mantissa in float32's places: right up to the two exponents' biases, subnormals included.
        shifted = ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True)
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), shifted * 1.329227995784916e36)  # 2 ** 120
