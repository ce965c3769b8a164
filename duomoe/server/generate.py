"""The endpoints that generate text: from a request's body to its answer, whole or as events."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from duomoe.errors import InputError
from duomoe.server.body import body_of
from duomoe.server.errors import ApiError, ClientGone, as_api_error
from duomoe.server.events import Events, while_connected
from duomoe.server.metrics import Watch
from duomoe.server.service import Service

if TYPE_CHECKING:
    from duomoe.server.answer import Answer
    from duomoe.server.choices import Choices
    from duomoe.server.generation import Generation
    from duomoe.server.served_model import ServedModel

# Submits what a body asks for, in the name of a tenant.
Begin = Callable[["ServedModel", bytes, bytes], "Generation[Any]"]


class Generate:
    """An endpoint that generates, as an ASGI application.

    Args:
        service: whose model is asked.
        begin: submits what a body asks for.
    """

    def __init__(self, service: Service, begin: Begin) -> None:
        self._service, self._begin = service, begin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            Exception: when there is no answer; nothing has been sent then.
            ClientGone: when the client has left.
        """
        events = Events(send)
        try:
            with self._service.answering():
                model = self._service.model
                async with self._submitted(model, scope, receive) as generation:
                    scope["state"]["watch"].submitted(generation.prompt_tokens, len(generation.streams))
                    async with self._in_time(), while_connected(receive):
                        answer = model.answer(generation)
                        await self._send(generation, answer, scope["state"]["watch"], events, send)
        except ClientGone:
            raise
        except Exception as error:
            if not isinstance(error, ApiError | InputError):
                await self._service.examine()
            if not events.started:
                raise
            scope["state"]["error"] = error
            await events.fail(as_api_error(error))

    @contextlib.asynccontextmanager
    async def _submitted(
        self, model: "ServedModel", scope: Scope, receive: Receive
    ) -> AsyncIterator["Generation[Any]"]:
        """Read and submit what is asked for; end it with the context."""
        async with body_of(scope, receive, self._service) as body:
            work = partial(self._begin, model, body, scope["state"]["tenant"])
            submitting = asyncio.ensure_future(self._service.run(work))
            try:
                generation = await asyncio.shield(submitting)
            except asyncio.CancelledError:
                submitting.add_done_callback(partial(_end, model))  # the thread goes on, and what it submits must end
                raise
        try:
            yield generation
        finally:
            model.end(generation)

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Let a request take no longer than it may."""
        seconds = self._service.limits.request_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise ApiError(504, f"the request took longer than {seconds:g} s", code="timeout") from None

    async def _send(
        self, generation: "Generation[Any]", answer: "Answer", watch: Watch, events: Events, send: Send
    ) -> None:
        """Send what is generated, as it comes or when it is complete."""
        from duomoe.server.choices import Choices

        async with Choices(generation.streams) as choices:
            if not generation.streaming.stream:
                await self._send_whole(answer, choices, watch, send)
                return
            async for index, chunks in choices:
                watch.take(index, chunks)
                await events.write(answer.events(index, chunks))
            await events.write(answer.last_events(), last=True)

    async def _send_whole(self, answer: "Answer", choices: "Choices", watch: Watch, send: Send) -> None:
        completions = {}
        async for index, chunks in choices:
            watch.take(index, chunks)
            if (completion := chunks[-1].completion) is not None:
                completions[index] = completion
        body = await self._service.run(lambda: answer.whole([completions[index] for index in sorted(completions)]))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _end(model: "ServedModel", submitting: "asyncio.Future[Generation[Any]]") -> None:
    """End what was submitted for nobody."""
    if not submitting.cancelled() and submitting.exception() is None:
        model.end(submitting.result())
