"""The choices of one request, read together as they are generated."""

import asyncio
import contextlib
from collections.abc import Sequence

from duomoe.engine.completion import Chunk
from duomoe.engine.stream import Stream


class Choices:
    """Iterates over (index, chunks) of several streams, in the order in which chunks come.

    It is a context, which reads while it lasts; at its end all streams are closed.

    Args:
        streams: one for each choice.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        self._left = len(streams)
        self._readers: list[asyncio.Task[None]] = []
        self._read: asyncio.Queue[tuple[int, list[Chunk] | Exception]] = asyncio.Queue()

    async def __aenter__(self) -> "Choices":
        if len(self._streams) > 1:
            self._readers = [asyncio.create_task(self._read_all(*each)) for each in enumerate(self._streams)]
        return self

    async def __aexit__(self, *error: object) -> None:
        for reader in self._readers:
            reader.cancel()
        for stream in self._streams:
            stream.close()

    def __aiter__(self) -> "Choices":
        return self

    async def __anext__(self) -> tuple[int, list[Chunk]]:
        if not self._left:
            raise StopAsyncIteration
        index, read = (0, await self._streams[0].batch()) if not self._readers else await self._read.get()
        if isinstance(read, Exception):
            raise read
        if read[-1].completion is not None:
            self._left -= 1
        return index, read

    async def _read_all(self, index: int, stream: Stream) -> None:
        """Put what a stream brings into the queue."""
        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    self._read.put_nowait((index, await stream.batch()))
        except Exception as error:
            self._read.put_nowait((index, error))
