"""The answer to one completions request, as it is written: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import tiktoken

from gpt2.explorer import api, look
from gpt2.explorer.api import ApiError
from gpt2.explorer.metrics import Metrics
from gpt2.explorer.worker import EngineError, Job, Worker
from gpt2.request import Logprob, Output


class Writing:
    """The answer to one completions request in the making."""

    def __init__(
        self,
        worker: Worker,
        tokenizer: tiktoken.Encoding,
        metrics: Metrics,
        name: str,
        wanted: api.CompletionRequest,
        prompts: list[list[int]],
    ) -> None:
        self.worker = worker
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.wanted = wanted
        self.prompts = prompts
        self.job = Job(prompts, wanted.params, follow=wanted.stream)
        self.scores: list[Sequence[Logprob] | None] = [None] * len(prompts)
        self.started = time.monotonic()
        self.choices = [
            [api.Choice(p * wanted.params.n + i, wanted, tokenizer, tokens) for i in range(wanted.params.n)]
            for p, tokens in enumerate(prompts)
        ]
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }

    async def begin(self) -> None:
        """Queue the prompts, and score them if the answer echoes them; ValueError becomes the client's error."""
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
        return look.score(self.worker.engine.model, tokens, self.wanted.logprobs or 0)

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
                assert piece is not None  # it has ended
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
                done = self._done  # read before the outputs, so that nothing in between is missed
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
                    raise api.too_slow(seconds) from None
            if self.wanted.include_usage:
                yield self._event([], usage=self._usage())
            self._measure(first=False)
            yield "data: [DONE]\n\n"
        except (ApiError, EngineError) as e:  # too late for an HTTP status
            body = e.body if isinstance(e, ApiError) else ApiError(503, str(e)).body
            yield f"data: {api.dump_json(body)}\n\n"
        finally:
            self.worker.drop(self.job)

    def _echo(self, p: int) -> Iterator[dict[str, Any]]:
        if self.wanted.echo:
            given = self.wanted.prompts[p]
            text = given if isinstance(given, str) else self.tokenizer.decode(given)
            for choice in self.choices[p]:
                yield choice.echo(text, self.scores[p])

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {api.dump_json({**self.head, 'choices': choices, **more})}\n\n"

    def _usage(self) -> dict[str, int]:
        written = sum(choice.tokens for choices in self.choices for choice in choices)
        return api.usage(sum(map(len, self.prompts)), written)

    def _measure(self, *, first: bool) -> None:
        seconds = time.monotonic() - self.started
        (self.metrics.first_token if first else self.metrics.request).observe(seconds)
