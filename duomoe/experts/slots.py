"""Slots on the compute device, and the directory that says which expert is in which."""

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


# `Directory.use` of an expert that every step needs.
ALWAYS = 65536


class Directory:
    """Which expert is in which slot. A slot has at most one owner, and an expert at most one slot.

    Prefill decides on the host, decode on the device, each by a directory of its own; whoever begins takes over what
    the other has left (`copy_from`). Kernels change the tensors in place (kernels/admit.py); the methods are for the
    host.

    Attributes:
        slot_of: int32 [layers, experts], -1 where the expert is absent.
        owner_of: int32 [num_slots], `layer * experts + expert`, -1 where the slot is empty.
        last_use: int64 [num_slots], larger is later; the slot with the smallest is the first to be given away.
        unproven: int32 [num_slots], 1 where the expert was sent ahead by decode and no layer has needed it since; its
            row may be there in part.
        use: int32 [layers, experts], of how many steps in `ALWAYS` the expert was needed, lately.
        clock: int64 [1], counts decode's waves.
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, device: torch.device) -> None:
        def filled(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.device = device
        self.slot_of = filled(-1, num_layers, num_experts)
        self.owner_of = filled(-1, num_slots)
        self.last_use = filled(0, num_slots, dtype=torch.int64)
        self.unproven = filled(0, num_slots)
        self.use = filled(0, num_layers, num_experts)
        self.clock = filled(0, 1, dtype=torch.int64)

    def copy_from(self, other: "Directory") -> None:
        """Take over another directory's contents, wherever it is."""
        for name in ("slot_of", "owner_of", "last_use", "unproven", "use", "clock"):
            getattr(self, name).copy_(getattr(other, name))

    def find(self, layer: int, expert: int) -> int | None:
        """Return the expert's slot, or None."""
        slot = int(self.slot_of[layer, expert])
        return None if slot < 0 else slot

    def owner(self, slot: int) -> tuple[int, int] | None:
        """Return the slot's (layer, expert), or None when it is empty."""
        owner = int(self.owner_of[slot])
        return None if owner < 0 else divmod(owner, self.slot_of.shape[1])

    def place(self, layer: int, expert: int, slot: int) -> None:
        """Give a slot to an expert that has none; whoever owned it loses it."""
        assert self.slot_of[layer, expert] < 0, "an expert has at most one slot"
        self.vacate(slot)
        self.slot_of[layer, expert] = slot
        self.owner_of[slot] = layer * self.slot_of.shape[1] + expert

    def vacate(self, slot: int) -> None:
        """Empty a slot; it may be empty already."""
        if (owner := self.owner(slot)) is not None:
            self.slot_of[owner] = -1
            self.owner_of[slot] = -1
        self.unproven[slot] = 0

    def slots(self, layer: int, experts: list[int], device: torch.device) -> Tensor:
        """Return int32 [experts] on a device: the slots of these experts of a layer, -1 for all others."""
        found = torch.full_like(self.slot_of[layer], -1)
        found[experts] = self.slot_of[layer, experts]
        assert bool((found[experts] >= 0).all()), "an expert of this wave is not resident"
        return found.to(device, non_blocking=True)
