"""What an expert looks like as bytes: one contiguous row, each of its tensors at a fixed, aligned offset.

A format is the tensors of a row and the function that makes them of a matrix. There are four, told apart by kernels
through the dtypes of these tensors (kernels/quantised.py):

| format | of an expert | in a row besides the weights |
|---|---|---|
| plain | the compute dtype | |
| fp8 | float8_e4m3fn | `_scales` of blocks of 128 by 128 |
| int4 | two values in a byte | `_scales` and `_zeros` of groups of 64 or 128 inputs |
| bf16-packed | bfloat16 in 12 bits | the bases as `_scales`, the patches as `_zeros` (kernels/bf16_packed.py) |

A row has `gate_up`, the gate matrix over the up matrix, and `down`, and the other tensors for each. Out of a
checkpoint, `StoredMatrices.read` (stored.py) gives a matrix in whatever form it is stored; `ExpertFormat.write`
converts it where it is not in the row's form already, and puts its tensors in their places. `fill_row` does so for all
matrices of an expert, one after the other.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duomoe.experts.matrix import Matrix, Require, to_fp8, to_int4, to_packed, to_plain
from duomoe.kernels.bf16_packed import GROUP as PATCH
from duomoe.kernels.bf16_packed import patch_room, weight_bytes
from duomoe.kernels.quantised import block_shape, packed_width, scale_shape

# Every tensor of a row begins at a multiple of this many bytes, and so does every row.
ALIGNMENT = 256

# How a matrix's tensors are called, behind its own name, in the order of `row_tensors`.
SUFFIXES = ("", "_scales", "_zeros")

Stored = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class RowTensor:
    """One tensor of an expert's row."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # bytes from the row's start

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ExpertFormat:
    """The tensors of an expert's row, by name. Whatever moves experts sees only `row_bytes`."""

    name: str  # 'plain', 'fp8', 'int4' or 'bf16-packed'
    tensors: Mapping[str, RowTensor]
    row_bytes: int
    convert: Callable[[Matrix, Require], Matrix]  # to the form whose `row_tensors` a row holds
    fp8_activations: bool = False  # whether the activations of many tokens are quantised, too (ExpertSum)

    @property
    def quantised(self) -> bool:
        """Whether the weights in a row are not the values that a plain one would have."""
        return self.name in ("fp8", "int4")

    @property
    def packed(self) -> bool:
        """Whether not all matrices have this format: a layer of which one does not pack stays plain."""
        return self.name == "bf16-packed"

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Return each tensor of `rows` as a strided view [n, *shape] of the same memory.

        Args:
            rows: uint8 [n, row_bytes], or wider: the slots of a pool, in which another layer's rows have more bytes.
        """
        assert rows.dtype == torch.uint8 and rows.shape[1] >= self.row_bytes
        return {
            name: rows[:, item.offset : item.offset + item.size].view(item.dtype).unflatten(1, item.shape)
            for name, item in self.tensors.items()
        }

    def write(
        self, matrix: Matrix, views: Mapping[str, Tensor], name: str, index: int, count: int, require: Require
    ) -> Matrix:
        """Put a matrix into its place in an expert's row, and return it as it is there.

        Args:
            matrix: in any form.
            views: the row's tensors.
            name: of the tensor that holds the matrix, 'gate_up' or 'down'.
            index: which of the matrices stacked there it is.
            count: how many there are.
            require: is asked that the format can hold its values (InputError), and has room for them (DoesNotPack).
        """
        converted = self.convert(matrix, require)
        for suffix, tensor in zip(SUFFIXES, converted.row_tensors(), strict=False):
            views[name + suffix].chunk(count)[index].copy_(tensor)
        return converted


def plain_format(hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> ExpertFormat:
    """Return unquantised experts' format: gate over up [2 * intermediate, hidden], down [hidden, intermediate]."""

    def stored(outer: int, inner: int) -> list[Stored]:
        return [((outer, inner), dtype)]

    return _format("plain", hidden_size, intermediate_size, stored, lambda matrix, _: to_plain(matrix, dtype))


def packed_format(hidden_size: int, intermediate_size: int) -> ExpertFormat:
    """Return the format of experts in bfloat16 in 12 bits."""

    def stored(outer: int, inner: int) -> list[Stored]:
        weights, patches = (outer, weight_bytes(inner)), (patch_room(outer, inner), PATCH)
        return [(weights, torch.uint8), ((outer,), torch.uint8), (patches, torch.int16)]

    return _format("bf16-packed", hidden_size, intermediate_size, stored, to_packed)


def fp8_format(hidden_size: int, intermediate_size: int, fp8_activations: bool = False) -> ExpertFormat:
    """Return the format of experts in float8_e4m3fn, with float32 scales of blocks of 128 by 128."""

    def stored(outer: int, inner: int) -> list[Stored]:
        return [((outer, inner), torch.float8_e4m3fn), (block_shape(outer, inner), torch.float32)]

    expert_format = _format("fp8", hidden_size, intermediate_size, stored, to_fp8)
    return replace(expert_format, fp8_activations=fp8_activations)


def int4_format(hidden_size: int, intermediate_size: int, group: int, scale_dtype: torch.dtype) -> ExpertFormat:
    """Return the format of experts in 4 bits, with a scale and a zero point for each output and `group` inputs."""

    def stored(outer: int, inner: int) -> list[Stored]:
        groups = scale_shape(outer, inner, group)
        return [((outer, packed_width(inner)), torch.uint8), (groups, scale_dtype), (groups, torch.uint8)]

    def convert(matrix: Matrix, require: Require) -> Matrix:
        return to_int4(matrix, group, scale_dtype, require)

    return _format("int4", hidden_size, intermediate_size, stored, convert)


def _format(
    name: str,
    hidden_size: int,
    intermediate_size: int,
    stored: Callable[[int, int], list[Stored]],
    convert: Callable[[Matrix, Require], Matrix],
) -> ExpertFormat:
    """Lay out a row: `stored` says in what tensors a matrix [outer, inner] is kept."""
    tensors, offset = {}, 0
    matrices = {"gate_up": (2, intermediate_size, hidden_size), "down": (1, hidden_size, intermediate_size)}
    for matrix, (count, outer, inner) in matrices.items():
        for suffix, ((length, *rest), dtype) in zip(SUFFIXES, stored(outer, inner), strict=False):
            tensors[matrix + suffix] = RowTensor((count * length, *rest), dtype, offset)
            offset = aligned(offset + tensors[matrix + suffix].size)
    return ExpertFormat(name, tensors, offset, convert)


def aligned(size: int) -> int:
    """Return `size` rounded up to the alignment of rows and their tensors."""
    return -(-size // ALIGNMENT) * ALIGNMENT
