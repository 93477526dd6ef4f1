"""The HTTP server: OpenAI's completions, the Explorer page and what it asks for, health and metrics.

    GET  /  /explorer.css  /explorer.js                      the page
    GET  /explorer/model   POST /explorer/look  /explorer/attention
    POST /v1/completions   GET /v1/models  /v1/models/NAME   /v1/chat/completions says why not
    GET  /health  /metrics

Answers are JSON, but for the page, the metrics and streamed completions; errors are OpenAI's error object. If a client
goes away or the time limit passes, its request in the engine is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gpt2.engine import Engine
from gpt2.explorer import api, look
from gpt2.explorer.api import ApiError
from gpt2.explorer.completion import Writing
from gpt2.explorer.guard import Bearer, Gate, Guard, Json, Limits
from gpt2.explorer.metrics import Metrics
from gpt2.explorer.worker import EngineError, Worker

PAGE = {"/": ("index.html", "text/html"), "/explorer.css": ("explorer.css", "text/css")} | {
    "/explorer.js": ("explorer.js", "text/javascript")
}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

Result = TypeVar("Result")


def create_app(
    engine: Engine,
    name: str,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] = ("*",),
) -> Starlette:
    """An ASGI application that serves an engine with a tokenizer, and owns the engine from then on.

    name: what clients call the model. api_key: what they must send as bearer token. origins: other origins whose web
    pages may ask (CORS). hosts: the host names that the server answers to.
    """
    server = _Server(engine, name, limits or Limits())
    middleware = [
        Middleware(Gate, metrics=server.metrics),
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
    ]
    if origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"])
        )
    if api_key is not None:
        middleware.append(Middleware(Bearer, key=api_key, free=(*PAGE, "/health")))
    routes = [Route(path, _page(*file), methods=["GET"]) for path, file in PAGE.items()]
    routes += [
        Route("/explorer/model", server.describe, methods=["GET"]),
        Route("/explorer/look", server.look, methods=["POST"]),
        Route("/explorer/attention", server.attention, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/models", server.models, methods=["GET"]),
        Route("/v1/models/{name:path}", server.one_model, methods=["GET"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.show_metrics, methods=["GET"]),
    ]
    handlers: Mapping[Any, Any] = {
        ApiError: lambda request, e: Json(e.body, e.status, {"retry-after": "1"} if e.status == 429 else None),
        EngineError: lambda request, e: Json(ApiError(503, str(e)).body, 503),
        ClientDisconnect: lambda request, e: Response(status_code=499),
        HTTPException: _http_error,
        Exception: lambda request, e: Json(ApiError(500, "the server failed on this request").body, 500),
    }
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=server.lifespan)
    app.state.worker = server.worker
    return app


class Server(uvicorn.Server):
    """A uvicorn server for `create_app`: when told to stop, it ends running requests, so that none delays the shutdown.

    Each client is told: a 503, or an error in its stream. uvicorn alone would wait, cancel, and log a traceback each.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.config.app.state.worker.close)  # type: ignore[union-attr]
        await super().shutdown(sockets)


def _http_error(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    what = {404: f"there is no {api.shorten(request.url.path, quote=False)} here"}
    what[405] = f"{request.method} is not allowed here"
    return Json(ApiError(e.status_code, what.get(e.status_code, e.detail)).body, e.status_code, e.headers)


def _page(file: str, media_type: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    content = (Path(__file__).parent / file).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return page


class _Events(StreamingResponse):
    """Server-sent events; however they end, `closed` is called."""

    def __init__(self, events: AsyncGenerator[str, None], closed: Callable[[], object]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._events = events
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closed()
            await self._events.aclose()


class _Server:
    """The handlers of the routes, and what they share."""

    def __init__(self, engine: Engine, name: str, limits: Limits) -> None:
        if engine.tokenizer is None:
            raise ValueError("serve: the engine needs a tokenizer, got None")
        self.worker = Worker(engine)
        self.metrics = Metrics()
        self.name = name
        self.guard = Guard(limits)
        self.model = engine.model
        self.tokenizer = engine.tokenizer
        self.encode = api.Encoder(engine.tokenizer, engine.model.config)
        self.created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.close)

    async def _compute(self, request: Request, work: Callable[[], Result]) -> Result:
        leave = self.guard.enter()
        try:
            return await self.guard.answer(request, self.worker.run(work))
        finally:
            leave()

    # -- OpenAI's protocol

    async def completions(self, request: Request) -> Response:
        wanted = api.parse_request(await self.guard.content(request), self.name)
        prompts = [self.encode(prompt, room=wanted.max_tokens) for prompt in wanted.prompts]
        leave = self.guard.enter()
        handed_on = False
        try:
            writing = Writing(self.worker, self.tokenizer, self.metrics, self.name, wanted, prompts)
            if not wanted.stream:
                return Json(await self.guard.answer(request, writing.whole()))
            await self.guard.answer(request, writing.begin())
            handed_on = True
            return _Events(writing.events(self.guard.limits.seconds), leave)
        finally:
            if not handed_on:
                leave()

    async def chat(self, request: Request) -> Response:
        raise ApiError(400, "GPT-2 has no chat template: it continues a text. Use /v1/completions.", code="no_chat")

    async def models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.name:
            raise ApiError(404, f"the model {api.shorten(name)} does not exist", "model", "model_not_found")
        return Json(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "gpt2-kernels"} | {
            "max_model_len": self.model.config.n_positions
        }

    # -- the page

    async def describe(self, request: Request) -> Response:
        config, model = self.model.config, self.model
        return Json(
            {
                "name": self.name,
                "device": str(model.device),
                "dtype": str(model.dtype).removeprefix("torch."),
                "parameters": sum(p.numel() for p in model.parameters()),
                "layers": config.n_layer,
                "heads": config.n_head,
                "positions": config.n_positions,
                "vocabulary": config.vocab_size,
                "end_of_text": config.eos_token_id,
                "temperatures": look.TEMPERATURES,
            }
        )

    async def look(self, request: Request) -> Response:
        """{"prompt": a text or token ids} -> its tokens, and what may come next."""
        content = await self.guard.content(request)
        tokens = self.encode(content.get("prompt"))
        scores, following = await self._compute(request, lambda: look.look(self.model, tokens))
        logprobs = [None, *(s.logprob for s in scores)]
        return Json(
            {
                "tokens": [self._token(t) | {"logprob": p} for t, p in zip(tokens, logprobs)],
                "likeliest": [self._token(t) for t in following.tokens[:10]],
                "logprobs": [round(p, 6) for p in following.logprobs],
                "log_sums": [round(z, 6) for z in following.log_sums],
            }
        )

    async def attention(self, request: Request) -> Response:
        """{"prompt", "layer", "head"}, null for the average -> what each token attends to."""
        content = await self.guard.content(request)
        tokens = self.encode(content.get("prompt"))
        config = self.model.config
        chosen = []
        for name, count in (("layer", config.n_layer), ("head", config.n_head)):
            value = content.get(name)
            if value is not None and (type(value) is not int or not 0 <= value < count):
                raise ApiError(400, f"{name} must be null or in 0..{count - 1}, got {api.shorten(value)}", name)
            chosen.append(value)
        layer, head = chosen
        found = await self._compute(request, lambda: look.attention(self.model, tokens, layer, head))
        shares = [[round(share, 6) for share in row] for row in found.shares]
        return Json({"keys": found.keys, "shares": shares, "whole": found.whole})

    def _token(self, token: int) -> dict[str, Any]:
        content = api.token_bytes(self.tokenizer, token)
        try:
            text = content.decode()
        except UnicodeDecodeError:
            text = None  # part of a character
        return {"id": token, "text": text, "bytes": content.hex(" ")}

    # -- operation

    async def health(self, request: Request) -> Response:
        if not self.worker.alive:
            raise EngineError("the engine has stopped")
        return Json({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        text = self.metrics.text(self.worker.stats, active=self.guard.active, jobs=self.worker.jobs)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")
