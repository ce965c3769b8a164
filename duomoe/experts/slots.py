"""Slots on the compute device, and the directory that says which expert is in which."""

from collections.abc import Sequence

import torch
from torch import Tensor

from duomoe.experts.format import ExpertFormat


class SlotPool:
    """Room for `num_slots` experts of any layer on the compute device.

    Args:
        formats: of each layer's rows.
        num_slots: how many there are.
        device: where they are.

    Attributes:
        rows: uint8 [num_slots, bytes of the largest row].
        views: for each layer each tensor of its format, [num_slots, *shape], sharing memory with `rows`.
    """

    def __init__(self, formats: Sequence[ExpertFormat], num_slots: int, device: torch.device) -> None:
        slot_bytes = max((each.row_bytes for each in formats), default=0)
        self.rows = torch.empty(num_slots, slot_bytes, dtype=torch.uint8, device=device)
        self.views = [each.views(self.rows) for each in formats]

    def __len__(self) -> int:
        return self.rows.shape[0]


class Directory:
    """Which expert is in which slot, as decode keeps it: on the device, changed in place by kernels/admit.py.

    A slot has at most one owner, and an expert at most one slot.

    Attributes:
        slot_of: int32 [layers, experts], -1 where the expert is absent.
        owner_of: int32 [num_slots], `layer * experts + expert`, -1 where the slot is empty.
        last_use: int64 [num_slots], larger is later.
        unproven: int32 [num_slots], 1 where the expert was sent ahead and no layer has needed it since; its row may be
            there in part.
        use: int32 [layers, experts], in how many of `ONE` (kernels/admit.py) steps the expert is needed.
        clock: int64 [1], counts waves.
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, device: torch.device) -> None:
        def filled(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.slot_of = filled(-1, num_layers, num_experts)
        self.owner_of = filled(-1, num_slots)
        self.last_use = filled(0, num_slots, dtype=torch.int64)
        self.unproven = filled(0, num_slots)
        self.use = filled(0, num_layers, num_experts)
        self.clock = filled(0, 1, dtype=torch.int64)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors, in the order in which the kernels take them."""
        return self.slot_of, self.owner_of, self.last_use, self.unproven, self.use, self.clock
