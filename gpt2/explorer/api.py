"""The OpenAI completions protocol: what a client may ask for, and what it gets back.

Plain Python: a JSON object in, checked; JSON objects out. Everything wrong with a request becomes an ApiError, whose
status and text the client sees. Beyond OpenAI's fields there are top_k, min_p, repetition_penalty, stop_token_ids and
ignore_eos, as in SamplingParams, and return_token_ids, which adds the ids of each choice's tokens.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import tiktoken

from gpt2.config import GPT2Config
from gpt2.request import Logprob, Output
from gpt2.sampling import SamplingParams
from gpt2.tokenizer import END_OF_TEXT

MAX_LOGPROBS = 20
MAX_CHOICES = 128  # prompts times n of one request


class ApiError(Exception):
    """An error as an answer: an HTTP status and OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A request that has been checked; whether its prompts fit the model is checked later."""

    prompts: list[str | list[int]]
    params: SamplingParams
    max_tokens: int  # 0 is allowed here: nothing is generated, and `echo` scores the prompt
    logprobs: int | None = None  # likeliest tokens reported at each place; None reports nothing, 0 the chosen one alone
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False


# SamplingParams' own fields under their own names; their checks are made there.
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "n", "stop", "stop_token_ids", "ignore_eos",
)  # fmt: skip
# OpenAI's fields that are not supported, each with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
_OTHERS = ("model", "prompt", "max_tokens", "logprobs", "echo", "stream", "stream_options", "return_token_ids", "user")


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body must be JSON: {e}") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"the body must be a JSON object, got {_kind(content)}")
    return content


def parse_request(content: dict[str, Any], model: str) -> CompletionRequest:
    """Check the fields of a request to the model named `model`."""
    known = {*_SAMPLING, *_REFUSED, *_OTHERS}
    if unknown := [name for name in content if name not in known]:
        raise ApiError(400, f"unrecognized request argument: {shorten(unknown[0])}", shorten(unknown[0]))
    given = {name: value for name, value in content.items() if value is not None}  # null asks for the default
    if given.get("model", model) != model:
        raise ApiError(
            404, f"the model {shorten(given['model'])} does not exist; this is {model!r}", "model", "model_not_found"
        )
    for name, harmless in _REFUSED.items():
        if name in given and (isinstance(given[name], bool) or given[name] not in harmless):
            if name == "best_of" and given[name] == given.get("n", 1):
                continue
            raise ApiError(400, f"{name} is not supported, got {shorten(given[name])}", name)
    for name in ("echo", "stream", "return_token_ids"):
        if not isinstance(given.get(name, False), bool):
            raise ApiError(400, f"{name} must be true or false, got {shorten(given[name])}", name)
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise ApiError(400, f"stream_options must be an object, got {shorten(options)}", "stream_options")
    max_tokens = _integer(given, "max_tokens", 16, 0, 2**31 - 1)
    logprobs = _integer(given, "logprobs", 0, 0, MAX_LOGPROBS) if "logprobs" in given else None
    prompts = _prompts(given.get("prompt", END_OF_TEXT))
    try:
        params = SamplingParams(
            **{"top_k": 0} | {name: given[name] for name in _SAMPLING if name in given},  # OpenAI has no top_k
            max_tokens=max(1, max_tokens),
            logprobs=0 if logprobs is None else max(1, logprobs),
        )
        "".join(params.stop).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "stop must be valid Unicode, got a lone surrogate", "stop") from None
    except (ValueError, TypeError) as e:
        message = shorten(str(e).removeprefix("SamplingParams: "), quote=False)
        raise ApiError(400, message, next((n for n in _SAMPLING if message.startswith(n + " ")), None)) from None
    if len(prompts) * params.n > MAX_CHOICES:
        raise ApiError(400, f"prompts times n must be at most {MAX_CHOICES}, got {len(prompts)} * {params.n}", "n")
    return CompletionRequest(
        prompts,
        params,
        max_tokens,
        logprobs,
        given.get("echo", False),
        given.get("stream", False),
        options.get("include_usage", False),
        given.get("return_token_ids", False),
    )


def _integer(given: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = given.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ApiError(400, f"{name} must be an integer in {low}..{high}, got {shorten(value)}", name)
    return value


def _prompts(prompt: Any) -> list[str | list[int]]:
    """OpenAI's four forms of a prompt -> a list of texts and lists of token ids."""
    prompts = [prompt] if isinstance(prompt, str) or (prompt and _is_ids(prompt)) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        raise ApiError(400, f"prompt must be a string, token ids, or a list of these, got {_kind(prompt)}", "prompt")
    return prompts


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in value)


class Encoder:
    """Turns prompts into token ids that fit the model's context; an empty one becomes <|endoftext|>."""

    def __init__(self, tokenizer: tiktoken.Encoding, config: GPT2Config) -> None:
        self._tokenizer = tokenizer
        self._config = config
        # No text that fits is longer; longer ones are refused before any time is spent on them.
        self._longest = config.n_positions * max(len(content) for content in tokenizer.token_byte_values())

    def __call__(self, prompt: Any, param: str = "prompt", room: int = 0) -> list[int]:
        """The ids of a text, or of ids; `room` more must fit after them."""
        if isinstance(prompt, str):
            if len(prompt) > self._longest:
                raise ApiError(400, self._too_long(f"{len(prompt)} characters"), param, "context_length_exceeded")
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise ApiError(400, f"{param} must be valid Unicode, got a lone surrogate", param) from None
            tokens = self._tokenizer.encode(prompt, allowed_special={END_OF_TEXT}, disallowed_special=())
        elif _is_ids(prompt):
            tokens = prompt
        else:
            raise ApiError(400, f"{param} must be a string or token ids, got {_kind(prompt)}", param)
        if wrong := [t for t in tokens if not 0 <= t < self._config.vocab_size]:
            rule = f"token ids must be in 0..{self._config.vocab_size - 1}"
            raise ApiError(400, f"{rule}, got {shorten(wrong[0])}", param)
        tokens = tokens or [self._config.eos_token_id]
        if len(tokens) + room > self._config.n_positions:
            got = f"{len(tokens)} tokens" + (f" and max_tokens = {room}" if room else "")
            raise ApiError(400, self._too_long(got), param, "context_length_exceeded")
        return tokens

    def _too_long(self, got: str) -> str:
        return f"a prompt and what follows it must fit in {self._config.n_positions} tokens, got {got}"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def shorten(value: Any, *, quote: bool = True) -> str:
    """What a client sent, cut short enough to be quoted in an answer."""
    text = repr(value) if quote else value
    return text if len(text) <= 200 else text[:200] + "..."


# -- answers


def dump_json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def too_slow(seconds: float) -> ApiError:
    return ApiError(504, f"an answer may take {seconds:g} s; ask for fewer tokens", code="timeout")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Choice:
    """One of a request's choices, written piece by piece: `take` turns what is new in an Output into a piece."""

    def __init__(self, index: int, request: CompletionRequest, tokenizer: tiktoken.Encoding, prompt: list[int]) -> None:
        self.index = index
        self.finished = False
        self.tokens = 0  # written
        self._request = request
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._written = 0  # characters of the output
        self._start = 0  # of the next token in the text, in characters
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def echo(self, text: str, scores: Sequence[Logprob] | None) -> dict[str, Any]:
        """The prompt as the first piece; scores are those of all its tokens but the first, which nothing precedes."""
        first = {"text": text, "index": self.index, "finish_reason": None, "logprobs": None}
        if scores is not None:
            first["logprobs"] = self._logprobs(self._prompt, [None, *scores])
        self._start = len(text)
        self._decoder.reset()
        return first

    def take(self, output: Output) -> dict[str, Any] | None:
        """What is new since the last call; None if nothing is."""
        text, tokens = output.text[self._written :], output.tokens[self.tokens :]
        if self.finished or not (text or tokens or output.finish_reason):
            return None
        piece: dict[str, Any] = {
            "text": text,
            "index": self.index,
            "finish_reason": output.finish_reason or None,
            "logprobs": None,
        }
        if self._request.logprobs is not None:
            piece["logprobs"] = self._logprobs(tokens, (output.logprobs or [])[self.tokens : self.tokens + len(tokens)])
        if self._request.return_token_ids:
            piece["token_ids"] = tokens
        self._written += len(text)
        self.tokens += len(tokens)
        self.finished = bool(output.finish_reason)
        return piece

    def _logprobs(self, tokens: Sequence[int], scores: Sequence[Logprob | None]) -> dict[str, Any]:
        wanted = self._request.logprobs or 0
        tops = [
            {token_text(self._tokenizer, t): _finite(v) for t, v in (*s.top[:wanted], (s.token, s.logprob))}
            if s
            else None
            for s in scores
        ]  # the chosen token is always included, as OpenAI says
        return {
            "tokens": [token_text(self._tokenizer, t) for t in tokens],
            "token_logprobs": [_finite(s.logprob) if s else None for s in scores],
            "top_logprobs": tops if wanted else None,
            "text_offset": [self._place(t) for t in tokens],
        }

    def _place(self, token: int) -> int:
        """Where in the text the next token begins, in characters."""
        content = token_bytes(self._tokenizer, token)
        if content and content[0] & 0xC0 != 0x80:  # a new character: an incomplete one before it is U+FFFD
            self._start += len(self._decoder.decode(b"", final=True))
        place = self._start
        self._start += len(self._decoder.decode(content))
        return place


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two pieces of a choice as one."""
    both = {**second, "text": first["text"] + second["text"]}
    if first["logprobs"]:
        both["logprobs"] = {
            name: None if values is None else values + second["logprobs"][name]
            for name, values in first["logprobs"].items()
        }
    return both


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity, and a token that float16 rounds away has a probability of 0


def token_bytes(tokenizer: tiktoken.Encoding, token: int) -> bytes:
    """The bytes of a token; empty for an id that only a padded vocabulary has."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return b""


def token_text(tokenizer: tiktoken.Encoding, token: int) -> str:
    r"""A token as OpenAI writes it: its text, or "bytes:\xe2\x80" where it is part of a character."""
    content = token_bytes(tokenizer, token)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
