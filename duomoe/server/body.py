"""A request's body, read within limits of size and time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import Receive, Scope

from duomoe.server.errors import ApiError, ClientGone
from duomoe.server.service import Service


@contextlib.asynccontextmanager
async def body_of(scope: Scope, receive: Receive, service: Service) -> AsyncIterator[bytes]:
    """Read a request's body. Its bytes count as held until the context ends.

    Raises:
        ApiError: when it is not said to be JSON, too large, too slow, or one too many.
        ClientGone: when the client leaves before it is complete.
    """
    headers = dict(scope["headers"])
    # A page of another site can send other types without asking first; this one it cannot.
    if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "the content type must be application/json")
    stated = headers.get(b"content-length", b"")
    if stated.isdigit():
        _check(int(stated[:20]), service)
    body = bytearray()
    try:
        await _read(receive, service, body)
        yield bytes(body)
    finally:
        service.give_back_body_bytes(len(body))


async def _read(receive: Receive, service: Service, body: bytearray) -> None:
    """Append to a body all that arrives of it."""
    more = True
    try:
        async with asyncio.timeout(service.limits.body_seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part, more = message.get("body", b""), message.get("more_body", False)
                body += part
                service.take_body_bytes(len(part))
                _check(len(body), service)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time") from None


def _check(size: int, service: Service) -> None:
    limit = service.limits.body_bytes
    if size > limit:
        raise ApiError(413, f"the body has more than {limit} bytes, the most that is read", code="body_too_large")
