"""The experts' home: for each MoE layer one tensor of rows in host memory, or on the device when all fit there."""

import torch
from torch import Tensor

from duomoe.experts.format import ExpertFormat
from duomoe.memory.pinned import pin


class ExpertStore:
    """Every expert of a model, as rows.

    Attributes:
        layers: uint8 [num_experts, row_bytes] for each MoE layer, so that a layer is one copy and an expert one row.
        pinned: whether a GPU can read the rows by itself.
    """

    def __init__(
        self, expert_format: ExpertFormat, num_layers: int, num_experts: int, device: torch.device, pinned: bool
    ) -> None:
        self.format = expert_format
        self.num_experts = num_experts
        shape = (num_experts, expert_format.row_bytes)
        self.layers: list[Tensor] = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(num_layers)]
        self.pinned = pinned and all([pin(rows) for rows in self.layers])

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(rows.nbytes for rows in self.layers)
