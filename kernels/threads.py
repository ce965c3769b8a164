"""On how many threads a computation on the CPU runs.

torch shares nearly every product among all of its threads. One that sleeps takes tens of microseconds to wake, and much
longer where another process has its core, while most operations of a small model's decode step take less than ten. So
what is little work stays on the calling thread. How much it is follows from shapes alone.
"""

from types import TracebackType

import torch

# In weights that are read once: about a millisecond's work of one core.
WORTH_SHARING = 1 << 20
# A core multiplies a weight by so many rows in the time in which it reads it.
ROWS_PER_READ = 16


def product_work(rows: int, weights: int) -> int:
    """Return the work of multiplying some rows of activations by a matrix of so many weights."""
    return weights * max(rows, ROWS_PER_READ) // ROWS_PER_READ


class Threads:
    """A context in which torch computes on the calling thread alone, unless the work is worth sharing.

    Args:
        work: how much there is to do, in weights that are read once, or elements of activations.
    """

    def __init__(self, work: int) -> None:
        self.before = torch.get_num_threads()
        self.alone = work < WORTH_SHARING and self.before > 1

    def __enter__(self) -> None:
        if self.alone:
            torch.set_num_threads(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.alone:
            torch.set_num_threads(self.before)
