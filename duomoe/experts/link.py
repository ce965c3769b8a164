"""The link between host and device memory: expert rows on their way into slots, and the count of every byte.

A copy is sent, goes on while other things compute, and is waited for before its slot is read. Copies cross one after
the other in the order in which they were sent.
"""

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field, fields
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from duomoe.own_threads import mark_thread


@dataclass
class Traffic:
    """What crossed the link and why, in bytes; and how often an expert that a layer needed was in a slot already.

    A hit or a miss is one expert needed by one layer in one pass, however many of the pass's tokens chose it.
    """

    streamed_bytes: int = 0  # by a prefill
    demand_bytes: int = 0  # by a decode step that needed them
    prefetched_bytes: int = 0  # by a decode step that expected to need them
    prefetch_used_bytes: int = 0  # of those, what was needed then
    hits: int = 0
    misses: int = 0

    def since(self, before: "Traffic") -> "Traffic":
        """Return what was added since the copy `before` was made."""
        return Traffic(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(Traffic)))

    @property
    def link_bytes(self) -> int:
        """All bytes that crossed, whatever the cause."""
        return self.streamed_bytes + self.demand_bytes + self.prefetched_bytes

    @property
    def prefetch_wasted_bytes(self) -> int:
        """What was prefetched and not needed, or not yet."""
        return max(0, self.prefetched_bytes - self.prefetch_used_bytes)


class LinkError(RuntimeError):
    """A copy failed. The slot it was for holds nothing that may be read."""


@dataclass(eq=False)
class Copy:
    """One expert row on its way into a slot."""

    source: Tensor
    slot: Tensor
    moved: int = 0  # bytes that are there
    ahead: int = 0  # of those, what crossed ahead of need
    arrived: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Link(ABC):
    """Copies expert rows into slots. A `Mark` is a point in the course of computation."""

    @abstractmethod
    def mark(self) -> Any:
        """Return a mark behind everything that has been computed (or queued for it) so far."""

    @abstractmethod
    def send(self, source: Tensor, slot: Tensor, after: Any = None) -> Any:
        """Begin to copy a row, uint8 [row bytes], into a slot, which may have more.

        Args:
            source: the row, in host memory.
            slot: where to.
            after: a mark behind the last use of what the slot held; None for one that held nothing.

        Returns:
            The copy, to be waited for.
        """

    @abstractmethod
    def wait(self, copy: Any) -> None:
        """Let everything that is computed from now on see the copy.

        Raises:
            LinkError: when it failed.
        """

    @abstractmethod
    def has_arrived(self, copy: Any) -> bool:
        """Return whether waiting for the copy would take no time."""

    def has_failed(self, copy: Any) -> bool:
        """Return whether waiting for the copy would raise; False where nobody knows before."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Give up whatever the link runs on; copies that have not begun fail."""


@dataclass(frozen=True)
class Pace:
    """How fast a link is: a copy of n bytes takes `latency + n / bandwidth` seconds."""

    bandwidth: float  # bytes per second
    latency: float = 0.0  # seconds


# A copy that is sent ahead crosses in so many pieces, none smaller than this many bytes: the longest that an urgent one
# waits for it.
PIECES = 8
MIN_PIECE = 4096

# Who waits for a copy looks every so many seconds whether the thread is still there.
PATIENCE = 1.0


class HostLink(Link):
    """The link where both ends are host memory: a thread copies while the caller computes.

    Computation there is over when the call that asked for it returns, so a mark carries nothing.

    A copy that is sent ahead of need crosses in pieces, and only while nothing else wants to. It can be recalled, and
    go on later from where it stood, ahead of need or urgently.

    No lock guards the two queues: one that is held where something is raised might never be given back. Both ends
    change them by single operations, and where they have crossed, a piece of no bytes is moved in vain.

    Args:
        pace: let no copy arrive earlier than it would over a link of that speed; None is as fast as memory.
    """

    def __init__(self, pace: Pace | None = None) -> None:
        self.pace = pace
        self.ahead_bytes = 0  # that have crossed ahead of need
        self._urgent: deque[Copy] = deque()
        self._ahead: deque[Copy] = deque()
        self._last: Copy | None = None  # moved before; going on with it has no latency
        self._changes: SimpleQueue[None] = SimpleQueue()  # one for each: the thread looks again
        self._closed = False
        self._free_at = 0.0  # when the link, at its pace, is done with all it has been given
        self._thread = threading.Thread(target=self._run, name="duomoe-link", daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """Return nothing: what was computed is done."""
        return None

    def send(self, source: Tensor, slot: Tensor, after: None = None) -> Copy:
        """Queue a copy for the thread."""
        return self._queue(Copy(source, slot), self._urgent)

    def send_ahead(self, copy: Copy) -> Copy:
        """Queue a copy, new or recalled, behind all urgent ones."""
        return copy if copy.arrived.is_set() else self._queue(copy, self._ahead)

    def recall(self) -> None:
        """Stop all copies that were sent ahead; a piece that is on its way comes before whatever is sent later."""
        self._ahead.clear()

    def promote(self, copy: Copy) -> Copy:
        """Go on with a recalled copy as an urgent one."""
        return copy if copy.arrived.is_set() else self._queue(copy, self._urgent)

    def _queue(self, copy: Copy, queue: deque[Copy]) -> Copy:
        if self._closed:
            raise LinkError("the expert link is closed")
        queue.append(copy)
        self._changes.put(None)
        return copy

    def wait(self, copy: Copy) -> None:
        """Block until the copy has arrived."""
        while not copy.arrived.wait(PATIENCE):
            if not self._thread.is_alive():
                raise LinkError("the expert link is closed")
        if copy.error is not None:
            raise LinkError(f"an expert could not be copied into its slot: {copy.error}") from copy.error

    def has_arrived(self, copy: Copy) -> bool:
        """Return whether the thread is done with the copy."""
        return copy.arrived.is_set()

    def has_failed(self, copy: Copy) -> bool:
        """Return whether the thread could not make the copy."""
        return copy.error is not None

    def close(self) -> None:
        """Stop the thread; copies that have not begun fail."""
        self._closed = True
        self._changes.put(None)
        if threading.current_thread() is not self._thread:  # a destructor may run in any thread
            self._thread.join()

    def _run(self) -> None:
        mark_thread()
        while (work := self._next()) is not None:
            copy, size, ahead = work
            try:
                self._move(copy, size)
                copy.moved += size
                copy.ahead += size * ahead
                self.ahead_bytes += size * ahead
            except BaseException as error:  # whatever it is, the one who waits must hear of it
                copy.error = error
            self._finish(copy)

    def _next(self) -> tuple[Copy, int, bool] | None:
        """Wait for work; return a copy, which stays in its queue, how many bytes to move, and if ahead of need."""
        while not self._closed:
            for queue in (self._urgent, self._ahead):
                with contextlib.suppress(IndexError):  # it is empty, or has just been emptied
                    copy = queue[0]
                    left = copy.source.nbytes - copy.moved
                    ahead = queue is self._ahead
                    return copy, min(left, max(MIN_PIECE, copy.source.nbytes // PIECES)) if ahead else left, ahead
            self._changes.get()
        for copy in (*self._urgent, *self._ahead):
            copy.error = LinkError("the expert link was closed")
            copy.arrived.set()
        return None

    def _finish(self, copy: Copy) -> None:
        """End a piece: the copy leaves its queue if it is through; it may have been recalled or promoted meanwhile."""
        if copy.error is not None or copy.moved == copy.source.nbytes:
            for queue in (self._urgent, self._ahead):
                with contextlib.suppress(ValueError, IndexError):  # it left, or the queue changes at this moment
                    queue.remove(copy)
            copy.arrived.set()

    def _move(self, copy: Copy, size: int) -> None:
        """Move the next `size` bytes of a copy."""
        begin = time.perf_counter()
        end = copy.moved + size
        copy.slot[copy.moved : end].copy_(copy.source[copy.moved : end])
        if self.pace:
            # Counted from when the link became free, not from now: the thread's own delays do not add up.
            latency = 0.0 if copy is self._last else self.pace.latency
            self._free_at = max(self._free_at, begin) + latency + size / self.pace.bandwidth
            time.sleep(max(0.0, self._free_at - time.perf_counter()))
        self._last = copy


class CudaLink(Link):
    """The link to a GPU: a stream of its own for copies from pinned memory; marks and copies are CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        """Record an event on the stream that computes."""
        event = torch.cuda.Event()
        event.record()
        return event

    def send(self, source: Tensor, slot: Tensor, after: torch.cuda.Event | None = None) -> torch.cuda.Event:
        """Queue a copy on the link's stream, behind `after`; return an event behind the copy."""
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            slot[: source.nbytes].copy_(source, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return arrived

    def wait(self, copy: torch.cuda.Event) -> None:
        """Let the computing stream wait for the copy; the host goes on."""
        torch.cuda.current_stream().wait_event(copy)

    def has_arrived(self, copy: torch.cuda.Event) -> bool:
        """Ask the GPU, without waiting for it."""
        return bool(copy.query())

    def close(self) -> None:
        """Do nothing: a stream needs no end."""


def open_link(device: torch.device, pace: Pace | None) -> Link:
    """Return the link to a device; only the CPU's can be paced."""
    return CudaLink(device) if device.type == "cuda" else HostLink(pace)
