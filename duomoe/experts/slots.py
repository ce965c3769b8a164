"""Slots on the compute device, and the directory that says which expert is in which."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from duomoe.experts.format import ExpertFormat
from duomoe.kernels.admit import NOBODY


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

    def table(self, slots: Mapping[int, int], num_experts: int) -> Tensor:
        """Return int32 [num_experts] on the device: the slots of some experts of a layer, -1 for all others."""
        table = [-1] * num_experts
        for expert, slot in slots.items():
            table[expert] = slot
        return sent(torch.tensor(table, dtype=torch.int32), self.rows.device)


class Directory:
    """Which expert is in which slot: on the compute device, always.

    A slot has at most one owner, and an expert at most one slot. Decode changes it by kernels (kernels/admit.py); a
    prefill reads it, and writes it before the next decode step.

    Attributes:
        slot_of: int32 [layers, experts], -1 where the expert is absent.
        owner_of: int32 [num_slots], `layer * experts + expert`, NOBODY where the slot is empty, LEASED where the host
            fills it: decode neither uses nor gives away such a slot.
        last_use: int64 [num_slots], larger is later.
        unproven: int32 [num_slots], 1 where the expert was sent ahead and no layer has needed it since; its row may be
            there in part.
        use: int32 [layers, experts], in how many of `ONE` (kernels/admit.py) steps the expert is needed.
        clock: int64 [1], counts waves.
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, device: torch.device) -> None:
        def filled(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        # In one piece, which is written at once; each part begins where 16 bytes do, as kernels like it.
        parts = [-(-size // 4) * 4 for size in (num_layers * num_experts, num_slots, num_slots)]
        self._whole = filled(-1, sum(parts))
        places, owners, unproven = self._whole.split(parts)
        self.slot_of = places[: num_layers * num_experts].view(num_layers, num_experts)
        self.owner_of, self.unproven = owners[:num_slots], unproven[:num_slots].zero_()
        self.last_use = filled(0, num_slots, dtype=torch.int64)
        self.use = filled(0, num_layers, num_experts)
        self.clock = filled(0, 1, dtype=torch.int64)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors, in the order in which the kernels take them."""
        return self.slot_of, self.owner_of, self.last_use, self.unproven, self.use, self.clock

    def write(self, places: Tensor, owners: Tensor) -> None:
        """Say anew where all experts are.

        Args:
            places: int64 [layers, experts] on the host, as `slot_of`.
            owners: int64 [num_slots], as `owner_of`; rows are whole for whatever is computed from now on.
        """
        whole = torch.zeros(len(self._whole), dtype=torch.int32)
        whole[: places.numel()] = places.flatten()
        begin = self.owner_of.storage_offset()
        whole[begin : begin + len(owners)] = owners
        self._whole.copy_(sent(whole, self._whole.device))

    def clear(self) -> None:
        """Let no slot have an owner."""
        self.slot_of.fill_(-1)
        self.owner_of.fill_(NOBODY)
        self.unproven.zero_()

    def read(self) -> tuple[Tensor, Tensor]:
        """Return on the host whose each slot is, NOBODY where its row may be there in part only, and `use`; waits."""
        owners = torch.where(self.unproven == 0, self.owner_of, self.owner_of.clamp(max=NOBODY))
        both = torch.cat([owners, self.use.flatten()]).cpu()  # host-sync ok: where a prefill waits for the router
        return both[: len(owners)].long(), both[len(owners) :].view_as(self.use)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on a device of a tensor on the host, for which nobody waits."""
    # From memory that is not pinned, a copy would wait for all that is queued on the device.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
