"""A matrix of an expert on its way from a checkpoint into a row: plain, packed, fp8 in blocks, or int4 in groups.

Whatever a checkpoint stores becomes one of these, whatever a row holds comes from one, and all know their values in
float32. A conversion that has no short cut goes through the values. What must hold of these is asked of `require`: on
the host at once, on a GPU for all that has been converted, when it has been.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from duomoe.checkpoint import finite
from duomoe.errors import InputError
from duomoe.kernels.bf16_packed import pack_bf16
from duomoe.kernels.pack import pack
from duomoe.kernels.quantised import FP8_BLOCK, dequantise, pack_int4, scale_shape

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max

# Is told what must hold, bool [], and what is to be raised where it does not.
Require = Callable[[Tensor, Exception], None]


def at_once(holds: Tensor, problem: Exception) -> None:
    """Raise the problem unless the condition holds."""
    if not bool(holds):  # host-sync ok: while weights are loaded
        raise problem


@dataclass(frozen=True)
class PlainMatrix:
    """Values as they are: [outer, inner] of any float type."""

    weight: Tensor

    def values(self) -> Tensor:
        """Return float32 [outer, inner]."""
        return self.weight.float()

    def row_tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of a row that hold this matrix: its weights."""
        return (self.weight,)


class DoesNotPack(Exception):
    """A matrix of bfloat16 has too many values that are far from the others, and stays plain."""


@dataclass(frozen=True)
class PackedMatrix:
    """Values of bfloat16 in 12 bits (kernels/bf16_packed.py).

    Attributes:
        weight: uint8 [outer, weight_bytes].
        bases: uint8 [outer].
        patches: int16 [room, 8].
        inner: values of an output.
    """

    weight: Tensor
    bases: Tensor
    patches: Tensor
    inner: int

    def values(self) -> Tensor:
        """Return float32 [outer, inner]."""
        return dequantise(*self.row_tensors(), self.inner)

    def row_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tensors of a row that hold this matrix: weights, bases and patches."""
        return self.weight, self.bases, self.patches


@dataclass(frozen=True)
class Fp8Matrix:
    """Values of float8_e4m3fn with a scale for each block of 128 by 128.

    Attributes:
        weight: float8_e4m3fn [outer, inner].
        scales: float32 [outer blocks, inner blocks].
    """

    weight: Tensor
    scales: Tensor

    def values(self) -> Tensor:
        """Return float32 [outer, inner]: weight times scale."""
        return dequantise(self.weight, self.scales.T, None, self.weight.shape[1])

    def row_tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of a row that hold this matrix: weights and scales (kernels/quantised.py)."""
        return self.weight, self.scales.T


@dataclass(frozen=True)
class Int4Matrix:
    """Values of 4 bits with a scale and a zero point for each output and group of inputs.

    Attributes:
        nibbles: uint8 [outer, inner], from 0 to 15.
        scales: float16 or bfloat16 [outer, groups].
        zeros: uint8 [outer, groups], from 0 to 16.
        group: inputs in a group, the last of which may be shorter.
    """

    nibbles: Tensor
    scales: Tensor
    zeros: Tensor
    group: int

    def values(self) -> Tensor:
        """Return float32 [outer, inner]: (nibble - zero) times scale."""
        inner = self.nibbles.shape[1]
        scales, zeros = (t.float().repeat_interleave(self.group, 1)[:, :inner] for t in (self.scales, self.zeros))
        # In the scales' order: AWQ has nibbles by input, and where orders are mixed a CPU takes four times as long.
        return (self.nibbles.contiguous().float() - zeros) * scales

    def row_tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of a row that hold this matrix: weights, scales and zero points (kernels/quantised.py)."""
        outer, inner = self.nibbles.shape
        groups, _ = scale_shape(outer, inner, self.group)
        padding = (0, 0, 0, groups - self.scales.shape[1])
        return pack_int4(self.nibbles), F.pad(self.scales.T, padding), F.pad(self.zeros.T, padding)


Matrix = PlainMatrix | PackedMatrix | Fp8Matrix | Int4Matrix


def to_plain(matrix: Matrix, dtype: torch.dtype) -> PlainMatrix:
    """Return a matrix's values in a dtype."""
    return PlainMatrix((matrix.weight if isinstance(matrix, PlainMatrix) else matrix.values()).to(dtype))


def to_packed(matrix: Matrix, require: Require = at_once) -> PackedMatrix:
    """Return a matrix's values as bfloat16 in 12 bits.

    Raises:
        DoesNotPack: when there are too many that are far from the others.
    """
    values = to_plain(matrix, torch.bfloat16).weight.contiguous()
    if values.is_cuda:
        weights, bases, patches, fits = pack(values)
        require(fits, DoesNotPack())
        return PackedMatrix(weights, bases, patches, values.shape[1])
    on_host = pack_bf16(values)
    if on_host is None:
        raise DoesNotPack
    return PackedMatrix(*on_host, values.shape[1])


def to_fp8(matrix: Matrix, require: Require = at_once) -> Fp8Matrix:
    """Return a matrix quantised in blocks: the largest magnitude of a block becomes the largest of fp8.

    Raises:
        InputError: when a value is not finite.
    """
    if isinstance(matrix, Fp8Matrix):
        return matrix
    values = matrix.values()
    outer, inner = values.shape
    tall, wide = -(-outer // FP8_BLOCK), -(-inner // FP8_BLOCK)
    blocks = F.pad(values, (0, wide * FP8_BLOCK - inner, 0, tall * FP8_BLOCK - outer))
    blocks = blocks.view(tall, FP8_BLOCK, wide, FP8_BLOCK)
    largest = blocks.abs().amax((1, 3))
    # By a tensor: by a number, a GPU multiplies with its inverse, and rounds otherwise.
    scales = largest / torch.full_like(largest, FP8_MAX)
    require(finite(scales), _unusable())
    scales = scales.masked_fill(scales == 0, 1.0)
    scaled = (blocks / scales[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX)
    weight = scaled.view(tall * FP8_BLOCK, -1)[:outer, :inner].to(torch.float8_e4m3fn)
    return Fp8Matrix(weight.contiguous(), scales)


def to_int4(matrix: Matrix, group: int, scale_dtype: torch.dtype, require: Require = at_once) -> Int4Matrix:
    """Return a matrix quantised in groups: the range of a group, zero included, becomes 0 to 15.

    Raises:
        InputError: when a value is not finite, or too large for the scales' dtype.
    """
    if isinstance(matrix, Int4Matrix) and matrix.group == group and matrix.scales.dtype == scale_dtype:
        return matrix
    values = matrix.values()
    outer, inner = values.shape
    groups = -(-inner // group)
    grouped = F.pad(values, (0, groups * group - inner)).view(outer, groups, group)
    low, high = grouped.amin(2).clamp_(max=0.0), grouped.amax(2).clamp_(min=0.0)
    scales = ((high - low) / torch.full_like(high, 15)).to(scale_dtype)
    require(finite(scales), _unusable())
    scales = scales.masked_fill(scales == 0, 1.0)
    zeros = (-low / scales.float()).round_().clamp_(0, 15)
    nibbles = (grouped / scales.float()[:, :, None]).round_().add_(zeros[:, :, None]).clamp_(0, 15)
    nibbles = nibbles.to(torch.uint8).view(outer, -1)[:, :inner]
    return Int4Matrix(nibbles, scales, zeros.to(torch.uint8), group)


def _unusable() -> InputError:
    return InputError("holds NaN, infinity or too large values, and cannot be quantised")
