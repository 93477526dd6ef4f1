"""What stands in front of the handlers: who may ask, and what one client may cost the others."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import sys
import traceback
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt2.explorer import api
from gpt2.explorer.api import ApiError
from gpt2.explorer.metrics import Metrics

DRAIN_BYTES, DRAIN_SECONDS = 1 << 26, 10.0  # of an unwanted body, read so that its sender sees the answer

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client may cost the others."""

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0  # until a body has arrived
    requests: int = 256  # at work or waiting; more are answered 429
    seconds: float = 600.0  # until an answer is complete


class Guard:
    """Holds the requests of all clients to the limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.active = 0  # requests that were let in and are not answered yet

    async def content(self, request: Request) -> dict[str, Any]:
        """The JSON object that a client sends."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # another site's form can send other types without a preflight
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

    def enter(self) -> Callable[[], None]:
        """Count a request in; returns a function that counts it out, once."""
        if self.active >= self.limits.requests:
            raise ApiError(429, f"{self.limits.requests} requests are at work; try again", code="too_many_requests")
        self.active += 1
        stack = contextlib.ExitStack()

        def leave() -> None:
            self.active -= 1

        stack.callback(leave)
        return stack.close

    async def answer(self, request: Request, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, which is cancelled if the client goes away or the time is up."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait({task, gone}, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnect
            raise api.too_slow(self.limits.seconds)
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Json(JSONResponse):
    """JSON in ASCII, so that whatever a client sent can be quoted back to it."""

    def render(self, content: Any) -> bytes:
        return api.dump_json(content).encode()


class Bearer:
    """Requires a key, except for the paths in `free`, which are for everyone."""

    def __init__(self, app: ASGIApp, key: str, free: Collection[str]) -> None:
        self.app = app
        self.key = key.encode()
        self.free = free

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.free:
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            # Scheme names are case-insensitive (RFC 9110, 11.1); keys are compared in constant time.
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key, self.key):
                error = ApiError(401, "a bearer key is needed: Authorization: Bearer KEY", code="invalid_api_key")
                await Json(error.body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Gate:
    """The outermost layer: counts answers, and reads what is left of a body before an answer to it begins.

    If a server answers and closes a socket with unread data, the system resets the connection, and the client may
    never see why it was refused.
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
                if status != 408:  # that one has waited long enough
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(drain(), DRAIN_SECONDS)
            await send(message)

        try:
            await self.app(scope, receiving, sending)
        except Exception:  # answered already
            traceback.print_exc(file=sys.stderr)
        finally:
            self.metrics.answered(scope["path"], status)
