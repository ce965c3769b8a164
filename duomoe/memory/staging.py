"""Staging buffers: host memory that is read into and copied to a GPU from, time and again."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from duomoe.memory.pinned import register, touched


class Event(Protocol):
    """A point in a stream's work, as torch.cuda.Event; one that was never recorded has passed."""

    def record(self) -> None:
        """Make it the point behind all that the present stream has been given so far."""

    def synchronize(self) -> None:
        """Wait until the stream has come there."""


@dataclass(frozen=True, eq=False)
class StagingBuffer:
    """A part of a ring's memory.

    Attributes:
        memory: uint8 [n].
        copied: behind the last copies from it.
    """

    memory: Tensor
    copied: Event


class StagingRing:
    """Equal buffers that are taken, filled, copied from and given back, in turn.

    A buffer has one holder at a time: whoever has taken it, then the copies that were queued from it. The ring must
    live until these have ended.

    Args:
        memory: uint8 [count * n].
        count: of buffers.
        new_event: makes an event of the GPU that copies.
    """

    def __init__(self, memory: Tensor, count: int, new_event: Callable[[], Event]) -> None:
        self._memory = memory  # is pinned for as long as this tensor itself lives
        self._idle = deque(StagingBuffer(part, new_event()) for part in memory.view(count, -1))

    @property
    def idle(self) -> int:
        """How many buffers nobody has taken; copies from them may still be under way."""
        return len(self._idle)

    def take(self) -> StagingBuffer:
        """Return the buffer that was given back first, when the copies from it have ended. One must be idle."""
        buffer = self._idle.popleft()
        buffer.copied.synchronize()  # host-sync ok: while weights are loaded
        return buffer

    def give_back(self, buffer: StagingBuffer) -> None:
        """Give back a buffer behind the last copy from it, all of which the present stream makes."""
        buffer.copied.record()
        self._idle.append(buffer)

    @contextlib.contextmanager
    def buffer(self) -> Iterator[StagingBuffer]:
        """Take a buffer and give it back."""
        buffer = self.take()
        try:
            yield buffer
        finally:
            self.give_back(buffer)


def staging_memory(size: int) -> Tensor:
    """Return host memory, uint8 [size], pinned where the system allows it; copies from other memory are slower."""
    memory = touched(size)
    register(memory)
    return memory
