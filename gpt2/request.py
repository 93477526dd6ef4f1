"""What the engine takes and what it returns: a request with its samples, and a completion with its outputs.

Plain Python over ints and text. Everything that can be wrong with a prompt and its parameters is found here, before any
work.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence

import tiktoken

from gpt2 import scheduler
from gpt2.config import GPT2Config
from gpt2.sampling import SamplingParams
from gpt2.text import TextStream
from gpt2.tokenizer import END_OF_TEXT

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads sample numbers over the seeds


@dataclasses.dataclass(frozen=True)
class Logprob:
    """A generated token's log-probability, and those of the likeliest tokens at its position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Output:
    """One sample: its text, and its tokens, including the one that ended it, if any."""

    text: str
    tokens: list[int]
    finish_reason: str  # "stop": end-of-text, a stop token or a stop string; "length": max_tokens; "abort"
    logprobs: list[Logprob] | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """The result of one request: `n` outputs, in the order of their sample numbers."""

    prompt_tokens: list[int]
    outputs: list[Output]
    request_id: int = -1
    seed: int = 0  # the parameters' seed, or the fresh one that was drawn


@dataclasses.dataclass(eq=False)
class Sample:
    """A sequence being generated."""

    request: Request
    sequence: scheduler.Sequence
    seed: int  # int64
    stream: TextStream
    logprobs: list[Logprob]
    finish_reason: str | None = None
    read: int = 0  # tokens of the sequence that `stream` has seen, or that stand for no text

    def take(self, tokens: list[int], eos_token_id: int) -> int:
        """Append tokens, up to one that ends the text, and return how many were appended; see `finish_reason`."""
        params, known = self.request.params, self.sequence.tokens
        ends = params.stop_token_ids if params.ignore_eos else (eos_token_id, *params.stop_token_ids)
        if not any(end in tokens for end in ends) and (not params.stop or self.stream.extend(tokens)):
            known += tokens  # the usual case: nothing ends it early
            if params.stop:
                self.read = len(known)
            if len(known) == self.sequence.max_length:
                self.finish("length")
            return len(tokens)
        for count, token in enumerate(tokens, 1):
            known.append(token)
            if token in ends:
                self._read(len(known) - 1)
                self.read = len(known)  # it is not part of the text
                self.finish("stop")
            else:
                self._read(len(known))
                if self.stream.stopped:
                    self.finish("stop")
                elif len(known) == self.sequence.max_length:
                    self.finish("length")
            if self.finish_reason is not None:
                return count
        return len(tokens)

    @property
    def text(self) -> str:
        """The part of the text that can no longer change."""
        self._read(len(self.sequence.tokens))
        return self.stream.text

    def _read(self, count: int) -> None:
        tokens = self.sequence.tokens[self.read : count]
        if tokens and not self.stream.extend(tokens):
            for token in tokens:
                self.stream.push(token)
        self.read = max(self.read, count)

    def finish(self, reason: str) -> None:
        """End the text; a stop string found in its last characters overrides `reason`."""
        self._read(len(self.sequence.tokens))
        self.stream.finish()
        self.finish_reason = "stop" if self.stream.stopped else reason
        self.request.unfinished -= 1


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, its parameters, and the samples generated from it."""

    number: int  # given by the engine once it is queued
    prompt: list[int]
    params: SamplingParams
    seed: int
    samples: list[Sample] = dataclasses.field(default_factory=list)
    unfinished: int = 0  # samples

    @property
    def done(self) -> bool:
        return self.unfinished == 0

    def completion(self) -> Completion:
        outputs = [
            Output(
                text=s.stream.text,
                tokens=s.sequence.tokens[s.sequence.prompt_length :],
                finish_reason=s.finish_reason or "abort",
                logprobs=s.logprobs if self.params.logprobs else None,
            )
            for s in self.samples
        ]
        return Completion(self.prompt, outputs, self.number, self.seed)


def make_request(
    prompt: str | Sequence[int],
    params: SamplingParams,
    config: GPT2Config,
    tokenizer: tiktoken.Encoding | None,
    fresh_seed: Callable[[], int],
) -> Request:
    """A request whose prompt and parameters fit the model; ValueError, naming the option, if they do not.

    fresh_seed draws the seed, below 2^63, of a request whose parameters have none.
    """
    if not isinstance(params, SamplingParams):
        raise ValueError(f"Engine: params must be SamplingParams, got {type(params).__name__}")
    tokens = _encode(prompt, config, tokenizer)
    if len(tokens) > config.n_positions:
        raise ValueError(f"Engine: a prompt must be at most {config.n_positions} tokens, got {len(tokens)}")
    length = len(tokens) + params.max_tokens
    if length > config.n_positions:
        if params.on_overflow == "error":
            raise ValueError(
                f"Engine: prompt and max_tokens must fit in {config.n_positions} positions, "
                f"got {len(tokens)} + {params.max_tokens} (on_overflow='stop' ends the text there instead)"
            )
        length = config.n_positions
    if params.stop and tokenizer is None:
        raise ValueError("Engine: stop strings need a tokenizer, got None")
    if params.logprobs > config.vocab_size:
        raise ValueError(f"Engine: logprobs must be at most {config.vocab_size}, got {params.logprobs}")
    if bad := [t for t in params.stop_token_ids if t >= config.vocab_size]:
        raise ValueError(f"Engine: stop_token_ids must be below {config.vocab_size}, got {bad[0]}")
    seed = fresh_seed() if params.seed is None else params.seed
    request = Request(-1, tokens, params, seed, unfinished=params.n)
    family = scheduler.Family()
    for number in range(params.n):
        sequence = scheduler.Sequence(tokens=list(tokens), prompt_length=len(tokens), max_length=length, family=family)
        stream = TextStream(tokenizer, params.stop)
        sample = Sample(request, sequence, _sample_seed(seed, number), stream, [], read=len(tokens))
        request.samples.append(sample)
    return request


def _encode(prompt: str | Sequence[int], config: GPT2Config, tokenizer: tiktoken.Encoding | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("Engine: a prompt in text needs a tokenizer, got None")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("Engine: a prompt must be valid Unicode, got a lone surrogate") from None
        tokens = tokenizer.encode(prompt, allowed_special={END_OF_TEXT}, disallowed_special=())
    else:
        if not isinstance(prompt, Iterable):
            raise ValueError(f"Engine: a prompt must be text or token ids, got {prompt!r}")
        tokens = [_token(token, config.vocab_size - 1) for token in prompt]
    return tokens or [config.eos_token_id]


def _token(token: object, most: int) -> int:
    """A token id as an int; numpy's and torch's integers are accepted too."""
    try:
        number = -1 if isinstance(token, bool) else operator.index(token)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number <= most:
        raise ValueError(f"Engine: token ids must be integers in 0..{most}, got {token!r}")
    return number


def _sample_seed(seed: int, number: int) -> int:
    """The seed of sample `number` of a request, as an int64; sample 0 has the request's own."""
    mixed = (seed ^ (number * GOLDEN)) & (2**64 - 1)
    return mixed - 2**64 if mixed >= 2**63 else mixed
