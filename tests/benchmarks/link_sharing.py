"""What a decode step's demand for experts and a prefill's copies in the background cost each other on one link.

`python -P tests/benchmarks/link_sharing.py` on a GPU prints a table: a demand of one row and of eight, by the kernel
that decode fetches with or by the copy engine, on an idle link and while the copy engine is busy with rows of a
prefill. `demand` is from the moment at which the GPU comes to it until it is there.
"""

import statistics
import sys
from collections.abc import Callable

import torch

from duomoe.kernels import fetch
from duomoe.kernels.fetch import LANES
from duomoe.memory.pinned import pin, touched

ROW_BYTES = 7_155_968  # an expert of Qwen3-30B-A3B, packed
ROWS, BACKGROUND_ROWS = 256, 200
ROUNDS = 15


class Link:
    """Pinned rows on the host, slots on the GPU, and both ways between them."""

    def __init__(self) -> None:
        self.rows = touched(ROWS * ROW_BYTES).view(ROWS, ROW_BYTES)
        pin(self.rows)
        self.slots = torch.empty(ROWS, ROW_BYTES, dtype=torch.uint8, device="cuda")
        self.table = torch.tensor([self.rows.data_ptr()], device="cuda")
        self.sizes = torch.tensor([ROW_BYTES], dtype=torch.int32, device="cuda")
        self.progress = torch.zeros(ROWS, LANES, dtype=torch.int32, device="cuda")
        self.moved = torch.zeros(3, dtype=torch.int64, device="cuda")

    def by_kernel(self, count: int) -> None:
        """Fetch the first rows as decode does."""
        numbers = torch.arange(count, dtype=torch.int32, device="cuda")
        entries = torch.stack((numbers, numbers, torch.zeros_like(numbers)))
        fetch(self.table, self.sizes, ROWS, entries, self.slots, self.progress, self.moved)

    def by_engine(self, first: int, count: int) -> None:
        """Copy rows as prefill does."""
        for row, slot in zip(self.rows[first : first + count], self.slots[first : first + count], strict=True):
            slot.copy_(row, non_blocking=True)


def timed(stream: torch.cuda.Stream, work: Callable[[], None], delay: int = 0) -> tuple[torch.cuda.Event, ...]:
    """Put work on a stream, behind so many cycles of waiting; return events before and behind it."""
    before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        if delay:
            torch.cuda._sleep(delay)
        before.record()
        work()
        behind.record()
    return before, behind


def together(link: Link, busy: bool, demand: Callable[[], None] | None, priority: int) -> tuple[float, float]:
    """Return milliseconds of the demand (0 for none), and the background's GB/s (0 for none)."""
    copies, urgent = torch.cuda.Stream(), torch.cuda.Stream(priority=priority)
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        background = timed(copies, lambda: link.by_engine(16, BACKGROUND_ROWS), delay=5_000_000) if busy else None
        asked = timed(urgent, demand, delay=25_000_000 if busy else 0) if demand else None
        torch.cuda.synchronize()
        rate = BACKGROUND_ROWS * ROW_BYTES / background[0].elapsed_time(background[1]) / 1e6 if background else 0.0
        found.append((asked[0].elapsed_time(asked[1]) if asked else 0.0, rate))
    waits, rates = zip(*found, strict=True)
    return statistics.median(waits), statistics.median(rates)


def main() -> None:
    """Print the table."""
    if not torch.cuda.is_available():
        sys.exit("link_sharing.py needs an NVIDIA GPU")
    link = Link()
    demands: dict[str, tuple[Callable[[], None] | None, int]] = {"none": (None, 0)}
    for count in (1, 8):
        demands[f"{count} by kernel"] = (lambda count=count: link.by_kernel(count)), -1
        demands[f"{count} by copy engine"] = (lambda count=count: link.by_engine(0, count)), 0
        demands[f"{count} by copy engine, high priority"] = (lambda count=count: link.by_engine(0, count)), -1
    print(f"{torch.cuda.get_device_name()}; rows of {ROW_BYTES} bytes, medians of {ROUNDS}\n")
    print("| background | demand | demand, ms | background, GB/s |\n|---|---|---|---|")
    for busy in (False, True):
        for name, (demand, priority) in demands.items():
            if busy or demand is not None:
                together(link, busy, demand, priority)
                wait, rate = together(link, busy, demand, priority)
                print(f"| {'rows' if busy else 'none'} | {name} | {wait:.3f} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
    main()
