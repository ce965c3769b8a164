"""The experts' home: for each MoE layer one tensor of rows in host memory, or on the device when all fit there."""

import torch
from torch import Tensor

from duomoe.experts.format import ExpertFormat
from duomoe.memory.pinned import pin, touched


class ExpertStore:
    """Every expert of a model, as rows. Layers are added one after the other.

    Args:
        expert_format: what rows are to look like.
        num_experts: of a layer.
        device: where they are.
        pin: let a GPU read the rows by itself.

    Attributes:
        layers: uint8 [num_experts, row bytes] for each MoE layer, so that a layer is one copy and an expert one row.
        formats: of each layer's rows; not `format` where that is packed and the layer is not.
        pinned: whether a GPU can read the rows by itself.
    """

    def __init__(self, expert_format: ExpertFormat, num_experts: int, device: torch.device, pin: bool) -> None:
        self.format, self.num_experts, self.device = expert_format, num_experts, device
        self.layers: list[Tensor] = []
        self.formats: list[ExpertFormat] = []
        self._pin = self.pinned = pin

    def rows(self, expert_format: ExpertFormat) -> Tensor:
        """Return memory for a layer's rows, uint8 [num_experts, row_bytes], not yet part of the store."""
        size = self.num_experts, expert_format.row_bytes
        if not self._pin:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        rows = touched(self.num_experts * expert_format.row_bytes).view(size)
        if not pin(rows):
            self.pinned = False
        return rows

    def add(self, rows: Tensor, expert_format: ExpertFormat) -> None:
        """Make rows the next layer's, in this memory."""
        self.layers.append(rows)
        self.formats.append(expert_format)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(rows.nbytes for rows in self.layers)
