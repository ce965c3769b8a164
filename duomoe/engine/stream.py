"""A request as its caller holds it."""

from collections.abc import Sequence
from operator import methodcaller
from queue import Empty

from duomoe.engine.completion import Chunk
from duomoe.engine.outbox import Event
from duomoe.engine.request import Request
from duomoe.engine.thread import PATIENCE, EngineThread


class Stream:
    """A request's chunks as they come, for `for` or `async for`. Closing it, or dropping it, ends the request.

    Chunks that nobody reads wait here; the request does not wait for them. A `next` that is interrupted may lose its
    chunk, but never the completion's end: whoever reads on comes to it.

    Args:
        thread: runs the request.
        request: one that is submitted (`submit_all`).
    """

    def __init__(self, thread: EngineThread, request: Request) -> None:
        self._thread, self._request, self._outbox = thread, request, request.outbox
        self._ended = False

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Chunk:
        """Wait for the next chunk.

        Raises:
            RuntimeError: when the model is closed meanwhile.
            BaseException: what has failed, where a step of this request did.
        """
        while not self._ended:
            try:
                return self._take(self._outbox.get(PATIENCE))
            except Empty:
                self._look_after()
        raise StopIteration

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Chunk:
        """Wait for the next chunk in a coroutine; raises as `__next__`."""
        while not self._ended:
            try:
                return self._take(await self._outbox.get_async(PATIENCE))
            except Empty:
                self._look_after()
        raise StopAsyncIteration

    async def batch(self) -> list[Chunk]:
        """Wait for the next chunk in a coroutine; return it, and those that have come behind it meanwhile.

        Raises:
            StopAsyncIteration: at the end.
            Exception: as `__next__`; chunks that came just before are lost then.
        """
        chunks = [await self.__anext__()]
        while not self._ended:
            try:
                chunks.append(self._take(self._outbox.get(0)))
            except Empty:
                break
        return chunks

    def _look_after(self) -> None:
        """Where nothing has come for a while, see whether anything can."""
        if self._outbox.is_over:
            self._ended = True  # somebody has taken the last event, and was interrupted before it counted
        else:
            try:
                self._thread.check()
            except RuntimeError:
                self.close()  # where it is the engine itself that reads, the request would go on
                raise

    def _take(self, event: Event) -> Chunk:
        if isinstance(event, Chunk):
            if event.completion is not None:
                self._ended = True
            return event
        self._ended = True
        try:
            if isinstance(event, StopIteration | StopAsyncIteration):  # which would look like the end
                raise RuntimeError(f"a step of this request raised {type(event).__name__}") from event
            raise event
        finally:
            del event  # or error and frame would hold each other

    def close(self) -> None:
        """End the request, if it has not ended, and give its memory back between two steps."""
        if not self._ended:
            self._thread.send(methodcaller("cancel", self._request))
            self._ended = True  # behind that, so that whoever is interrupted between can close again

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def submit_all(thread: EngineThread, requests: Sequence[Request]) -> list[Stream]:
    """Submit requests together: the engine finds all of them between the same two steps, however callers take turns.

    Raises:
        RuntimeError: when the model is closed, or was loaded in another process.
    """
    thread.check()
    streams = [Stream(thread, request) for request in requests]
    thread.send(methodcaller("add", requests))
    return streams
