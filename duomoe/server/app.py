"""The HTTP application: which path is answered by what."""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from duomoe.server.access_log import AccessLog
from duomoe.server.body import body_of
from duomoe.server.front import Front
from duomoe.server.generate import Generate
from duomoe.server.metrics import Metrics
from duomoe.server.service import Service

if TYPE_CHECKING:
    from duomoe.server.served_model import ServedModel

PAGE = Path(__file__).parent / "page.html"


def make_app(service: Service, keys: Sequence[str] = (), log: AccessLog | None = None) -> ASGIApp:
    """Return the application.

    Args:
        service: the model that is served.
        keys: of whom may ask; empty where anybody may.
        log: where requests are written down, if anywhere.
    """
    metrics = Metrics(service.names[0])
    pages = _Pages(service, metrics)

    def post(path: str, answer: "Callable[[ServedModel, bytes], dict[str, Any]]") -> Route:
        return Route(path, functools.partial(pages.call, answer), methods=["POST"])

    routes = [
        Route("/", pages.page),
        Route("/health", pages.health),
        Route("/metrics", pages.metrics),
        Route("/v1/models", pages.models),
        Route("/v1/models/{name:path}", pages.model),
        Route(
            "/v1/completions", Generate(service, lambda model, *asked: model.begin_completion(*asked)), methods=["POST"]
        ),
        Route(
            "/v1/chat/completions", Generate(service, lambda model, *asked: model.begin_chat(*asked)), methods=["POST"]
        ),
        post("/tokenize", lambda model, body: model.tokenize(body)),
        post("/detokenize", lambda model, body: model.detokenize(body)),
        Route("/tokenizer_info", pages.tokenizer_info),
    ]
    return Front(Router(routes, redirect_slashes=False), keys, metrics, log)


class _Pages:
    """Answers that are not generated."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics
        self._page = PAGE.read_bytes()
        self._page_headers = {"content-security-policy": _policy(self._page.decode()), "cache-control": "no-cache"}

    async def page(self, request: Request) -> Response:
        return Response(self._page, media_type="text/html", headers=self._page_headers)

    async def health(self, request: Request) -> Response:
        state, reason = self._service.state, self._service.reason
        body = {"status": state} | ({"reason": reason} if reason else {})
        return JSONResponse(body, 200 if state == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        model = self._service.loaded
        return Response(
            self._metrics.exposition(None if model is None else model.reading()), media_type="text/plain; version=0.0.4"
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._service.names]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._card(self._service.check_name(request.path_params["name"])))

    def _card(self, name: str) -> dict[str, Any]:
        model = self._service.loaded
        longest = None if model is None else model.llm.max_model_len
        card = {"id": name, "object": "model", "created": self._service.created, "owned_by": "duomoe"}
        return card | {"root": self._service.names[0], "max_model_len": longest}

    async def call(self, answer: "Callable[[ServedModel, bytes], dict[str, Any]]", request: Request) -> Response:
        """Answer what is computed off the event loop from a request's body."""
        model = self._service.model
        async with body_of(request.scope, request.receive, self._service) as body:
            told = await self._service.run(lambda: json.dumps(answer(model, body)).encode())
        return Response(told, media_type="application/json")

    async def tokenizer_info(self, request: Request) -> Response:
        return JSONResponse(await self._service.run(self._service.model.tokenizer_info))


def _policy(page: str) -> str:
    """Return what a browser may run and load for the page: what stands in it, and answers of this server."""
    hashes = {}
    for tag in ("script", "style"):
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
