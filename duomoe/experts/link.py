"""The link between host and device memory, and the count of every byte that crosses it."""

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass
class Traffic:
    """What crossed the link and why, in bytes; and how often an expert that a layer needed was in a slot already.

    A hit or a miss is one expert needed by one layer in one pass, however many of the pass's tokens chose it.
    """

    streamed_bytes: int = 0
    demand_bytes: int = 0
    prefetch_used_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    hits: int = 0
    misses: int = 0

    def since(self, before: "Traffic") -> "Traffic":
        """Return what was added since the copy `before` was made."""
        return Traffic(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(Traffic)))

    @property
    def link_bytes(self) -> int:
        """All bytes that crossed, whatever the cause."""
        return self.streamed_bytes + self.demand_bytes + self.prefetch_used_bytes + self.prefetch_wasted_bytes


class Link:
    """Copies expert rows into slots.

    Copies are queued on the stream that computes, so a kernel launched after a copy sees it and a copy queued after
    a kernel waits for it.
    """

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def demand(self, row: Tensor, slot: Tensor) -> None:
        """Copy one expert's row, which is needed now, into a slot; both uint8 [row_bytes]."""
        slot.copy_(row, non_blocking=True)
        self.traffic.demand_bytes += row.nbytes
