"""The model as a service: whether it can be asked, how much is under way, and work off the event loop."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from duomoe.server.errors import ApiError

if TYPE_CHECKING:
    from duomoe.server.served_model import ServedModel

R = TypeVar("R")

State = Literal["loading", "ready", "draining", "failed"]

# Threads that parse, tokenise and format; one that is busy with a long prompt leaves the others to shorter ones.
WORKERS = 4
# What all bodies that are being read may have together.
BODIES_ROOM = 256 << 20


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Attributes:
        body_bytes: of one request.
        body_seconds: in which a body has to arrive.
        request_seconds: that a request may take in all.
        sequences: that may run or wait at once.
    """

    body_bytes: int = 8 << 20
    body_seconds: float = 60.0
    request_seconds: float = 3600.0
    sequences: int = 1024


class Service:
    """A model that is loading, ready, draining or failed, and the requests that are under way.

    Attributes:
        state: what `/health` says.
        reason: why it has failed.
        failed_at: when it has, in seconds of the monotonic clock.
        requests: that are being answered with generated text.
    """

    def __init__(self, names: list[str], limits: Limits) -> None:
        self.names, self.limits = names, limits
        self.state: State = "loading"
        self.reason = ""
        self.failed_at = 0.0
        self.created = int(time.time())
        self.requests = 0
        self._model: ServedModel | None = None
        self._lock = threading.Lock()
        self._sequences = 0
        self._body_bytes = 0
        self._workers = ThreadPoolExecutor(WORKERS, "server-text")

    def ready(self, model: "ServedModel") -> None:
        """Serve a model from now on."""
        self._model = model
        if self.state == "loading":
            self.state = "ready"

    def drain(self) -> None:
        """Take no more requests; those that are under way go on."""
        if self.state in ("loading", "ready"):
            self.state = "draining"

    def fail(self, reason: str) -> None:
        """Answer all requests with errors from now on."""
        if self.state != "failed":
            self.state, self.reason, self.failed_at = "failed", reason, time.monotonic()

    def look_after(self) -> None:
        """Find out whether the engine still runs."""
        if self._model is not None:
            try:
                self._model.check()
            except RuntimeError as error:
                self.fail(str(error))

    async def examine(self) -> None:
        """Find out, after a step has failed, whether others can go well."""
        if self._model is not None and self.state != "failed":
            try:
                await self.run(self._model.llm.check_device)
            except RuntimeError as error:
                self.fail(str(error))

    @property
    def loaded(self) -> "ServedModel | None":
        """The model, whether or not new requests are taken; None until it is loaded."""
        return self._model

    @property
    def model(self) -> "ServedModel":
        """The model, for a new request.

        Raises:
            ApiError: when it cannot be asked now.
        """
        if self.state == "loading" or self._model is None:
            raise ApiError(503, "the model is loading; try again soon", code="loading", retry_after=5)
        if self.state == "draining":
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=30)
        if self.state == "failed":
            raise ApiError(500, f"the engine has failed: {self.reason}", code="failed")
        return self._model

    def check_name(self, name: str | None) -> str:
        """Return the name that an answer bears: the one a request has given, if it is one of this model's.

        Raises:
            ApiError: when it is not.
        """
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(404, f"the model {name[:200]!r} is not served here; {known} is", "model", "model_not_found")
        return name or self.names[0]

    async def run(self, work: Callable[[], R]) -> R:
        """Run what would hold up the event loop in a thread, and wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request while it is answered with generated text."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def take_sequences(self, count: int) -> None:
        """Count sequences that are about to be submitted; in any thread.

        Raises:
            ApiError: when there are too many. Then they are not counted.
        """
        with self._lock:
            if self._sequences + count > self.limits.sequences:
                raise ApiError(
                    429,
                    f"{self._sequences} sequences run or wait, of at most {self.limits.sequences}, and this request "
                    f"has {count}; try again later",
                    code="too_many_sequences",
                    retry_after=2,
                )
            self._sequences += count

    def give_back_sequences(self, count: int) -> None:
        """End what `take_sequences` has counted."""
        with self._lock:
            self._sequences -= count

    def take_body_bytes(self, count: int) -> None:
        """Count bytes of a body as they arrive, in the event loop; `give_back_body_bytes` must follow in any case.

        Raises:
            ApiError: when other bodies take so much memory already.
        """
        self._body_bytes += count
        if self._body_bytes > BODIES_ROOM:
            raise ApiError(503, "too many bodies are being read; try again later", code="busy", retry_after=2)

    def give_back_body_bytes(self, count: int) -> None:
        """End what `take_body_bytes` has counted."""
        self._body_bytes -= count

    def close(self) -> None:
        """Let go of the threads and of the model; waits for the engine's step to end."""
        self._workers.shutdown(cancel_futures=True)
        if self._model is not None:
            self._model.close()
