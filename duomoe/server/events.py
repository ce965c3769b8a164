"""Server-sent events on their way to a client, which may leave."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from starlette.types import Receive, Send

from duomoe.server.errors import ApiError, ClientGone

# `x-accel-buffering` is heeded by nginx, which else collects events before it passes them on.
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Events:
    """Sends events; the answer begins with the first.

    Args:
        send: of ASGI.

    Attributes:
        started: whether anything was sent.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def write(self, events: bytes, last: bool = False) -> None:
        """Send some events, or none; wait while the client has much to read still."""
        if not events and not last:
            return
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self._send({"type": "http.response.body", "body": events, "more_body": not last})

    async def fail(self, error: ApiError) -> None:
        """End the answer with an error."""
        await self.write(b"data: " + json.dumps(error.body).encode() + b"\n\n", last=True)


@contextlib.asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel what is done within when the client leaves.

    Args:
        receive: of ASGI; the body has been read.

    Raises:
        ClientGone: when it has left.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()
