"""Where the engine leaves what a request's caller is to get. The engine never waits for a caller."""

import asyncio
import threading
import weakref
from collections import deque
from queue import Empty, SimpleQueue

from duomoe.engine.completion import Chunk

# What a caller gets: a chunk, or what has ended its request.
Event = Chunk | BaseException


class Outbox:
    """The events of one request, in order; the last one is an error, or a chunk with the completion.

    It is a `SimpleQueue`, whose `put` holds no lock that a signal handler or the garbage collector could find held. A
    coroutine that waits is woken through its loop.
    """

    def __init__(self) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._last_is_there = False
        self._waiting: tuple[_Wakener, asyncio.Event] | None = None

    def put(self, event: Event) -> None:
        """Leave an event."""
        self._events.put(event)
        self._last_is_there = not isinstance(event, Chunk) or event.completion is not None
        if (waiting := self._waiting) is not None:
            waiting[0].wake(waiting[1])

    @property
    def is_over(self) -> bool:
        """Whether the last event has been taken."""
        return self._last_is_there and self._events.empty()

    def get(self, timeout: float) -> Event:
        """Wait for the next event.

        Raises:
            Empty: when there is none in so many seconds.
        """
        return self._events.get(timeout=timeout)

    async def get_async(self, timeout: float) -> Event:
        """Do the same in a coroutine."""
        wakener = wakener_of(asyncio.get_running_loop())
        if self._waiting is None or self._waiting[0] is not wakener:
            self._waiting = wakener, asyncio.Event()
        _, there = self._waiting
        while True:
            there.clear()  # before the look, so that an event that comes behind it is not missed
            try:
                return self._events.get_nowait()
            except Empty:
                pass
            try:
                async with asyncio.timeout(timeout):  # not wait_for, which at times swallows a cancellation
                    await there.wait()
            except TimeoutError:
                raise Empty from None


class _Wakener:
    """Wakes the coroutines of one loop, all of a step by one call into the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._there: deque[asyncio.Event] = deque()
        self._called = False

    def wake(self, there: asyncio.Event) -> None:
        """Set an event of the loop, soon; from any thread."""
        self._there.append(there)
        loop = self._loop()
        if not self._called and loop is not None:
            self._called = True
            try:
                loop.call_soon_threadsafe(self._run)
            except RuntimeError:  # the loop is closed: nobody waits there any more
                self._there.clear()

    def _run(self) -> None:
        self._called = False  # first: what is added from here on calls again
        while self._there:
            self._there.popleft().set()


_wakeners: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Wakener]" = weakref.WeakKeyDictionary()
_wakeners_lock = threading.Lock()


def wakener_of(loop: asyncio.AbstractEventLoop) -> _Wakener:
    """Return what wakes the coroutines of a loop."""
    with _wakeners_lock:
        return _wakeners.setdefault(loop, _Wakener(loop))
