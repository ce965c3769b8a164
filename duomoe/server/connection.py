"""A connection: uvicorn's protocol, within limits that keep those who only hold connections from those who ask."""

import asyncio
import json
import resource
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from duomoe.server.errors import ApiError

# A connection ends that for so many seconds asks nothing, does not finish a request's head, or reads nothing.
PATIENCE = 60.0
# All header lines of a request together.
MAX_HEAD_BYTES = 64 << 10
# Connections at once, as far as there are files for them beside those of the model, the log and libraries.
MAX_CONNECTIONS, SPARE_FILES = 8192, 128


class Connection(HttpToolsProtocol):
    """One that ends when it idles or stalls too long; where there are too many, the longest idle one ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head, self._head_bytes = True, 0
        self._idle_since: float | None = None
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, idle; make room where there is none."""
        super().connection_made(transport)
        self._idle()
        if len(self.connections) > most_connections():
            idle = [each for each in self.connections if isinstance(each, Connection) and each._idle_since is not None]
            min(idle, key=lambda each: each._idle_since or 0.0).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._end_never()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has arrived, as long as a head's size is in bounds."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("the head of the request is too long")

    def on_headers_complete(self) -> None:
        """Begin to answer."""
        self._in_head, self._idle_since = False, None
        self._end_never()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Expect the next head."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Idle until the next request, unless that is here already."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self._idle()

    def pause_writing(self) -> None:
        """Wait for a client that reads too slowly, but not for ever."""
        super().pause_writing()
        self._end_soon()

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self._end_never()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the shape of all errors, and close."""
        body = json.dumps(ApiError(400, msg).body).encode()
        size = str(len(body)).encode()
        head = b"content-type: application/json\r\ncontent-length: " + size + b"\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[400] + head + body)
        self.transport.close()

    def _idle(self) -> None:
        self._idle_since = time.monotonic()
        self._end_soon()

    def _end_soon(self) -> None:
        self._end_never()
        self._end = self.loop.call_later(PATIENCE, self.transport.abort)

    def _end_never(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None


def raise_file_limit() -> None:
    """Let this process have as many files, and so connections, as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def most_connections() -> int:
    """Return how many connections there may be at once."""
    return min(MAX_CONNECTIONS, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES))
