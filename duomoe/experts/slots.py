"""Slots on the compute device, and the directory that says which expert is in which."""

from collections.abc import Sequence

import torch
from torch import Tensor

from duomoe.experts.format import ExpertFormat


class SlotPool:
    """Room for `num_slots` experts on the compute device.

    Attributes:
        rows: uint8 [num_slots, row_bytes].
        views: each tensor of the format, [num_slots, *shape], sharing memory with `rows`.
    """

    def __init__(self, expert_format: ExpertFormat, num_slots: int, device: torch.device) -> None:
        self.rows = torch.empty(num_slots, expert_format.row_bytes, dtype=torch.uint8, device=device)
        self.views = expert_format.views(self.rows)

    def __len__(self) -> int:
        return self.rows.shape[0]


class Directory:
    """Which expert is in which slot. A slot has at most one owner, and an expert at most one slot.

    Attributes:
        slot_of: int32 [layers, experts] on the device, -1 where the expert is absent.
        owner_of: int32 [num_slots] on the device, `layer * experts + expert`, -1 where the slot is empty.
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, device: torch.device) -> None:
        self.slot_of = torch.full((num_layers, num_experts), -1, dtype=torch.int32, device=device)
        self.owner_of = torch.full((num_slots,), -1, dtype=torch.int32, device=device)

    def hand_over(self, layer: int, experts: Sequence[int]) -> Tensor:
        """Empty all slots, then give the first ones to `experts` of `layer`, in order.

        Returns:
            `slot_of[layer]`, what the expert kernels take.
        """
        assert len(set(experts)) == len(experts) <= len(self.owner_of)
        num_experts = self.slot_of.shape[1]
        owners = torch.tensor(experts, dtype=torch.int64).to(self.slot_of.device, non_blocking=True)
        self.slot_of.fill_(-1)
        self.slot_of[layer, owners] = torch.arange(len(experts), dtype=torch.int32, device=self.slot_of.device)
        self.owner_of.fill_(-1)
        self.owner_of[: len(experts)] = (layer * num_experts + owners).to(torch.int32)
        return self.slot_of[layer]
