"""The server's process: its socket, its signals, the model that loads meanwhile, and how it ends."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from duomoe.command import say
from duomoe.errors import InputError
from duomoe.server.connection import Connection, raise_file_limit
from duomoe.server.service import Service

if TYPE_CHECKING:
    from duomoe.server.served_model import ServedModel

# After the engine has failed, answers that say so have so many seconds to be sent.
FAREWELL = 2.0


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        InputError: when the address is not this machine's, or is in use.
    """
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port must be from 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"--host {host} --port {port}: {reason}; choose another with --host or --port") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return where a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(listener: socket.socket, app: ASGIApp, service: Service, load: "Callable[[], ServedModel]") -> int:
    """Serve until a signal ends it, or the engine fails.

    Args:
        listener: where to.
        app: answers.
        service: what the application serves.
        load: returns the model; runs in a thread of its own.

    Returns:
        The exit code: 0 once a signal has let all requests end; 128 and the signal's number where a second one, or one
        while the model loads, has ended them; 1 when the engine has failed.

    Raises:
        InputError: when the model cannot be loaded as it was asked for.
    """
    raise_file_limit()
    server = _Server(app, service)
    loading = _Loading(load, service)
    loading.start()
    server.run(sockets=[listener])
    if loading.error is not None:
        raise loading.error
    if loading.is_alive():
        # It cannot be interrupted, and an interpreter that ends under it may crash.
        sys.stdout.flush()
        os._exit(128 + server.signals[0])
    service.close()
    if service.state == "failed":
        say(f"error: the engine has failed: {service.reason}")
        return 1
    return 128 + server.signals[1] if len(server.signals) > 1 else 0


class _Loading(threading.Thread):
    """Loads the model, and hands it to the service."""

    def __init__(self, load: "Callable[[], ServedModel]", service: Service) -> None:
        super().__init__(name="server-loading", daemon=True)
        self._load, self._service = load, service
        self.error: BaseException | None = None

    def run(self) -> None:
        """Load; what goes wrong is the command's to say."""
        try:
            self._service.ready(self._load())
        except BaseException as error:
            self.error = error
            self._service.fail(str(error))


class _Server(uvicorn.Server):
    """Drains at the first signal and stops at the second, or when the model has failed.

    Attributes:
        signals: that have come.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=120,  # `Connection` has a limit of its own
            timeout_graceful_shutdown=2,  # for connections; requests have ended by then
        )
        super().__init__(config)
        self._service = service
        self.signals: list[int] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal; `on_tick` does the rest."""
        self.signals.append(sig)

    async def on_tick(self, counter: int) -> bool:
        """See, ten times a second, what has come; return whether to end."""
        if self.signals and self._service.state in ("loading", "ready"):
            if self._service.requests:
                say(f"draining: {self._service.requests} requests are under way; a second signal ends them")
            self._service.drain()
        self._service.look_after()
        self.should_exit = self.should_exit or self._is_over()
        return await super().on_tick(counter)

    def _is_over(self) -> bool:
        service = self._service
        if len(self.signals) > 1:
            self.force_exit = True
            return True
        if service.state == "failed":
            return not service.requests or time.monotonic() > service.failed_at + FAREWELL
        return bool(self.signals) and not service.requests
