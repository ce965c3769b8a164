"""What an expert looks like as bytes: one contiguous row, each of its tensors at a fixed, aligned offset."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Every tensor of a row begins at a multiple of this many bytes, and so does every row.
ALIGNMENT = 256


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

    tensors: Mapping[str, RowTensor]
    row_bytes: int

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Return each tensor of `rows` (uint8 [n, row_bytes]) as a strided view [n, *shape] of the same memory."""
        assert rows.dtype == torch.uint8 and rows.shape[1] == self.row_bytes
        return {
            name: rows[:, item.offset : item.offset + item.size].view(item.dtype).unflatten(1, item.shape)
            for name, item in self.tensors.items()
        }


def plain_format(hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> ExpertFormat:
    """Return unquantised experts' format: gate over up [2 * intermediate, hidden], down [hidden, intermediate]."""
    shapes = {"gate_up": (2 * intermediate_size, hidden_size), "down": (hidden_size, intermediate_size)}
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        tensors[name] = RowTensor(shape, dtype, offset)
        offset = aligned(offset + tensors[name].size)
    return ExpertFormat(tensors, offset)


def aligned(size: int) -> int:
    """Return `size` rounded up to the alignment of rows and their tensors."""
    return -(-size // ALIGNMENT) * ALIGNMENT
