"""The experts' home: for each MoE layer one tensor of rows in host memory, or on the device when all fit there."""

import torch
from torch import Tensor

from duomoe.experts.format import ExpertFormat
from duomoe.experts.packed import pack_layer
from duomoe.memory.pinned import pin


class ExpertStore:
    """Every expert of a model, as rows.

    Where the format is packed, a layer has its place only when it is added: how large it is follows from its values.

    Attributes:
        layers: uint8 [num_experts, stored bytes] for each MoE layer, so that a layer is one copy and an expert one row.
            The stored bytes are the format's `row_bytes`, or fewer: then the layer's rows are packed.
        pinned: whether a GPU can read the rows by itself.
    """

    def __init__(
        self, expert_format: ExpertFormat, num_layers: int, num_experts: int, device: torch.device, pinned: bool
    ) -> None:
        self.format = expert_format
        self.num_experts = num_experts
        self.layers: list[Tensor] = []
        self._pin = self.pinned = pinned
        if not expert_format.packed:
            shape = (num_experts, expert_format.row_bytes)
            for _ in range(num_layers):
                self._append(torch.empty(shape, dtype=torch.uint8, device=device))

    def add(self, rows: Tensor) -> None:
        """Add a copy of the next layer's plain rows, uint8 [num_experts, row_bytes]: packed, if all of them pack."""
        packed = pack_layer(rows)
        self._append(rows.clone() if packed is None else packed)

    def _append(self, rows: Tensor) -> None:
        self.layers.append(rows)
        if self._pin and not pin(rows):
            self.pinned = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(rows.nbytes for rows in self.layers)

    @property
    def packed(self) -> list[bool]:
        """Whether each layer's rows are packed."""
        return [rows.shape[1] != self.format.row_bytes for rows in self.layers]
