"""A stream of a GPU that does its work as late as it may: when an event behind it is waited for."""

from collections import deque
from collections.abc import Callable


class LateStream:
    """Copies that were queued, in order."""

    def __init__(self) -> None:
        self.work: deque[Callable[[], object]] = deque()
        self.queued = self.done = 0

    def queue(self, work: Callable[[], object]) -> None:
        self.work.append(work)
        self.queued += 1

    def run_until(self, point: int) -> None:
        while self.done < point:
            self.work.popleft()()
            self.done += 1

    def synchronize(self) -> None:
        self.run_until(self.queued)

    def event(self) -> "LateEvent":
        return LateEvent(self)


class LateEvent:
    """As torch.cuda.Event, of a late stream."""

    def __init__(self, stream: LateStream) -> None:
        self.stream, self.point = stream, 0

    def record(self) -> None:
        self.point = self.stream.queued

    def synchronize(self) -> None:
        self.stream.run_until(self.point)
