"""The HTTP server: OpenAI's completions, the Explorer page and what it asks for, health and metrics.

    GET  /  /explorer.css  /explorer.js                      the page
    GET  /explorer/model   POST /explorer/look  /explorer/attention
    POST /v1/completions   GET /v1/models  /v1/models/NAME   /v1/chat/completions says why not
    GET  /health  /metrics

Every answer but the page and the metrics is JSON, an error OpenAI's error object. A client that goes away, or a time
limit that passes, ends its request in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import secrets
import socket
import sys
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt2.engine import Engine
from gpt2.explorer import api, look
from gpt2.explorer.api import ApiError
from gpt2.explorer.metrics import Metrics
from gpt2.explorer.worker import EngineError, Job, Worker
from gpt2.request import Logprob, Output

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
DRAIN_BYTES, DRAIN_SECONDS = 1 << 26, 10.0  # of a body nobody wants, read so that its sender hears the answer

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client may cost the others."""

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0  # until a body has come
    requests: int = 256  # at work or waiting; more are answered 429
    seconds: float = 600.0  # until an answer is complete


def create_app(
    engine: Engine,
    name: str,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] = ("*",),
) -> Starlette:
    """The server of an engine with a tokenizer, which it owns from then on, as an ASGI application.

    name: what clients call the model. api_key: what they must send as bearer token. origins: web pages of other origins
    that may ask (CORS). hosts: the names under which the server answers.
    """
    server = _Server(engine, name, limits or Limits())
    middleware = [
        Middleware(_Gate, metrics=server.metrics),
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
    ]
    if origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"])
        )
    if api_key is not None:
        middleware.append(Middleware(_Bearer, key=api_key))
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
    """A uvicorn for `create_app`: told to stop, it ends what is under way, so that no client holds up the end.

    Each hears of it: a 503, or an error in its stream. uvicorn alone would wait, cancel, and log a traceback for each.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.config.app.state.worker.close)  # type: ignore[union-attr]
        await super().shutdown(sockets)


class Json(JSONResponse):
    """In ASCII, so that whatever a client sent can be quoted to it."""

    def render(self, content: Any) -> bytes:
        return _dump(content).encode()


def _dump(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


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
        self.limits = limits
        self.model = engine.model
        self.tokenizer = engine.tokenizer
        self.encode = api.Encoder(engine.tokenizer, engine.model.config)
        self.active = 0  # requests that were let in and are not answered yet
        self.created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.close)

    # -- what all requests have in common

    async def _object(self, request: Request) -> dict[str, Any]:
        """The JSON object that a client sends."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a form of another web page can send without asking
            raise ApiError(415, f"the content type must be application/json, got {api.shorten(kind)}")
        limit = self.limits.body_bytes
        body = bytearray()

        async def read() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > limit:
                    raise ApiError(413, f"a body must be at most {limit} bytes")

        try:
            await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body must come within {self.limits.body_seconds:g} s") from None
        return api.parse_json(bytes(body))

    def _enter(self) -> Callable[[], None]:
        """Count a request in; returns what counts it out, once."""
        if self.active >= self.limits.requests:
            raise ApiError(429, f"{self.limits.requests} requests are at work; try again", code="too_many_requests")
        self.active += 1
        stack = contextlib.ExitStack()

        def leave() -> None:
            self.active -= 1

        stack.callback(leave)
        return stack.close

    async def _answer(self, request: Request, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, which is cancelled where the client goes away or the time is over."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait({task, gone}, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnect
            raise self._late()
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    def _late(self) -> ApiError:
        return ApiError(504, f"an answer may take {self.limits.seconds:g} s; ask for fewer tokens", code="timeout")

    async def _compute(self, request: Request, work: Callable[[], Result]) -> Result:
        leave = self._enter()
        try:
            return await self._answer(request, self.worker.run(work))
        finally:
            leave()

    # -- OpenAI's protocol

    async def completions(self, request: Request) -> Response:
        wanted = api.parse_request(await self._object(request), self.name)
        prompts = [self.encode(prompt, room=wanted.max_tokens) for prompt in wanted.prompts]
        leave = self._enter()
        handed_on = False
        try:
            writing = _Writing(self, wanted, prompts)
            if not wanted.stream:
                return Json(await self._answer(request, writing.whole()))
            await self._answer(request, writing.begin())
            handed_on = True
            return _Events(writing.events(self.limits.seconds), leave)
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
        content = await self._object(request)
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
        content = await self._object(request)
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
            text = None  # a part of a character
        return {"id": token, "text": text, "bytes": content.hex(" ")}

    # -- operation

    async def health(self, request: Request) -> Response:
        if not self.worker.alive:
            raise EngineError("the engine has stopped")
        return Json({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        text = self.metrics.text(self.worker.stats, active=self.active, jobs=self.worker.jobs)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


class _Writing:
    """The answer to one completions request in the making."""

    def __init__(self, server: _Server, wanted: api.CompletionRequest, prompts: list[list[int]]) -> None:
        self.server = server
        self.worker = server.worker
        self.wanted = wanted
        self.prompts = prompts
        self.job = Job(prompts, wanted.params, follow=wanted.stream)
        self.scores: list[Sequence[Logprob] | None] = [None] * len(prompts)
        self.started = time.monotonic()
        self.choices = [
            [api.Choice(p * wanted.params.n + i, wanted, server.tokenizer, tokens) for i in range(wanted.params.n)]
            for p, tokens in enumerate(prompts)
        ]
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": server.name,
        }

    async def begin(self) -> None:
        """Queue the prompts, and score them where the answer repeats them; ValueError becomes the client's error."""
        try:
            if self.wanted.max_tokens:
                await self.worker.submit(self.job)
            else:
                self.job.outputs = [[Output("", [], "length", [])] * self.wanted.params.n for _ in self.prompts]
            if self.wanted.echo and self.wanted.logprobs is not None:
                for index, tokens in enumerate(self.prompts):
                    self.scores[index] = await self.worker.run(functools.partial(self._score, tokens))
        except ValueError as e:
            raise ApiError(400, str(e)) from None
        except BaseException:
            self.worker.drop(self.job)
            raise

    def _score(self, tokens: list[int]) -> list[Logprob]:
        return look.score(self.server.model, tokens, self.wanted.logprobs or 0)

    @property
    def _done(self) -> bool:
        return self.job.done or not self.wanted.max_tokens

    async def whole(self) -> dict[str, Any]:
        """Everything as one object."""
        try:
            await self.begin()
            while not self._done:
                await self.job.wait()
        finally:
            self.worker.drop(self.job)
        finished = [list(self._echo(p)) for p in range(len(self.prompts))]
        pieces: list[dict[str, Any]] = []
        for p, outputs in enumerate(self.job.outputs):
            for i, (choice, output) in enumerate(zip(self.choices[p], outputs)):
                piece = choice.take(output)
                assert piece is not None  # it ends
                pieces.append(api.joined(finished[p][i], piece) if finished[p] else piece)
        self._measure(first=False)
        return {**self.head, "choices": pieces, "usage": self._usage()}

    async def events(self, seconds: float) -> AsyncGenerator[str, None]:
        """Everything as server-sent events, after `begin`."""
        try:
            for p in range(len(self.prompts)):
                for piece in self._echo(p):
                    yield self._event([piece])
            first = True
            while True:
                done = self._done  # asked before the outputs are looked at: what comes in between is not missed
                for p, outputs in enumerate(self.job.outputs):
                    for choice, output in zip(self.choices[p], outputs):
                        if (new := choice.take(output)) is not None:
                            yield self._event([new])
                if first and any(c.tokens for choices in self.choices for c in choices):
                    first = False
                    self._measure(first=True)
                if done:
                    break
                try:
                    await asyncio.wait_for(self.job.wait(), max(0.0, self.started + seconds - time.monotonic()))
                except asyncio.TimeoutError:
                    raise self.server._late() from None
            if self.wanted.include_usage:
                yield self._event([], usage=self._usage())
            self._measure(first=False)
            yield "data: [DONE]\n\n"
        except (ApiError, EngineError) as e:  # too late for a status
            body = e.body if isinstance(e, ApiError) else ApiError(503, str(e)).body
            yield f"data: {_dump(body)}\n\n"
        finally:
            self.worker.drop(self.job)

    def _echo(self, p: int) -> Iterator[dict[str, Any]]:
        if self.wanted.echo:
            given = self.wanted.prompts[p]
            text = given if isinstance(given, str) else self.server.tokenizer.decode(given)
            for choice in self.choices[p]:
                yield choice.echo(text, self.scores[p])

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {_dump({**self.head, 'choices': choices, **more})}\n\n"

    def _usage(self) -> dict[str, int]:
        written = sum(choice.tokens for choices in self.choices for choice in choices)
        return api.usage(sum(map(len, self.prompts)), written)

    def _measure(self, *, first: bool) -> None:
        seconds = time.monotonic() - self.started
        (self.server.metrics.first_token if first else self.server.metrics.request).observe(seconds)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Bearer:
    """Asks for a key wherever the model is at work; the page itself and /health are for everyone."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in (*PAGE, "/health"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.key):
                error = ApiError(401, "a bearer key is needed: Authorization: Bearer KEY", code="invalid_api_key")
                await Json(error.body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class _Gate:
    """Around everything: counts answers, and reads what is left of a body before an answer to it begins.

    A server that answers and closes with unread data in its socket makes the system reset the connection, and the
    client may never see why it was refused.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        complete, status = False, 499

        async def receiving() -> Message:
            nonlocal complete
            message = await receive()
            complete = complete or not message.get("more_body", False)
            return message

        async def drain() -> None:
            size = 0
            while not complete and size < DRAIN_BYTES:
                size += len((await receiving()).get("body", b""))

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status != 408:  # that one waited long enough
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(drain(), DRAIN_SECONDS)
            await send(message)

        try:
            await self.app(scope, receiving, sending)
        except Exception:  # answered already
            traceback.print_exc(file=sys.stderr)
        finally:
            self.metrics.answered(scope["path"], status)
