"""What every request passes first and last: its id, who may ask, errors, and the log."""

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import time
import traceback
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duomoe.command import say
from duomoe.server.access_log import AccessLog
from duomoe.server.errors import ApiError, ClientGone, as_api_error
from duomoe.server.metrics import Metrics, Watch

# Nothing of what is asked or answered is told here, so no key is needed.
OPEN_PATHS = frozenset(("/", "/health", "/metrics"))

# The status by which logs call a request whose client has left.
CLIENT_GONE = 499

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Front:
    """Wraps an application.

    Args:
        app: answers, or raises.
        keys: of whom may ask; empty where anybody may.
        metrics: where errors are counted.
        log: where requests are written down, if anywhere.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics, log: AccessLog | None) -> None:
        self._app, self._metrics, self._log = app, metrics, log
        # Digests are of one length, so that comparing them tells nothing of a key's.
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whatever happens."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        number = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16).encode()
        state: dict[str, Any] = {"watch": Watch(self._metrics), "tenant": b"", "error": None}
        scope["state"] = state
        scope["app"] = self  # or else the router answers by itself what it has no route for
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number)]
            await send(message)

        try:
            state["tenant"] = self._admit(scope["path"], headers)
            await self._app(scope, receive, send_on)
        except ClientGone:
            status = CLIENT_GONE
            self._metrics.abandoned.inc()
        except Exception as error:
            state["error"] = error
            if not status:
                await _send_error(error, send_on)
            # Else the answer stays incomplete, and the server closes the connection.
        if state["error"] is not None:
            self._metrics.refuse(_api_error(state["error"]).status)
            _say_failure(state["error"], number.decode())
        if self._log is not None:
            self._log.write(_line(scope, status, number.decode()))

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> bytes:
        """Return whose request it is, as a digest; empty where there are no keys.

        Raises:
            ApiError: when it may not ask.
        """
        if not self._keys:
            _check_origin(headers.get(b"origin"))
            return b""
        if path in OPEN_PATHS:
            return b""
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        # All are compared, so that how long it takes does not tell which one it was.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key"
            )
        return given


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _check_origin(origin: bytes | None) -> None:
    """Refuse what a browser sends for a page of another site, where no key keeps it out.

    A name in a page's address may be made to mean this machine; an address cannot.
    """
    if origin is None:
        return
    host = urlsplit(origin.decode("latin-1")).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if host != "localhost":
            raise ApiError(
                403, "pages of other sites may not ask; to serve pages under a name, start with --api-key"
            ) from None


def _api_error(error: BaseException) -> ApiError:
    """Return any error, also one of the router's, as clients are told it."""
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase.lower()
        return ApiError(error.status_code, f"{phrase}: see docs/serving.md for what is served")
    return as_api_error(error)


async def _send_error(error: BaseException, send: Send) -> None:
    told = _api_error(error)
    body = json.dumps(told.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if told.retry_after is not None:
        headers.append((b"retry-after", str(told.retry_after).encode()))
    if told.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": told.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _say_failure(error: BaseException, number: str) -> None:
    """Tell who runs the server of a failure that is no client's, with where it was."""
    if not isinstance(error, HTTPException) and as_api_error(error).code is None and _api_error(error).status >= 500:
        say(f"error: request {number} failed: {''.join(traceback.format_exception(error)).rstrip()}")


def _line(scope: Scope, status: int, number: str) -> dict[str, Any]:
    """Return what the log says of a request."""
    watch: Watch = scope["state"]["watch"]
    client, error = scope.get("client"), scope["state"]["error"]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": number,
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(time.perf_counter() - watch.arrived, 6),
        "ttft_s": None if watch.ttft_s is None else round(watch.ttft_s, 6),
        "prompt_tokens": watch.prompt_tokens,
        "completion_tokens": watch.tokens,
        "error": None if error is None else _api_error(error).message,
    }
