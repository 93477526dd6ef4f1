"""How the next token is chosen, and when a text ends: the parameters of a request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 1024  # per token: the device reserves room for them for every text of a batch
MAX_SAMPLES = 4096  # of one request: each holds a copy of the prompt and waits in the queue


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request, checked on construction: a bad value raises ValueError."""

    max_tokens: int = 64  # most tokens to generate
    temperature: float = 1.0  # divides the logits; 0 is greedy
    top_k: int = 40  # only the k likeliest tokens; 0 is off
    top_p: float = 1.0  # only the fewest tokens whose probabilities reach it; 1 is off
    min_p: float = 0.0  # only tokens with at least this fraction of the likeliest one's probability; 0 is off
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the text so far become less likely
    seed: int | None = None  # same seed, same text; None draws a fresh one, which the Completion reports
    n: int = 1  # samples of the same prompt, at most 4096; sample i draws with (seed, i, position)
    stop: tuple[str, ...] = ()  # strings that end the text; they are not part of it
    stop_token_ids: tuple[int, ...] = ()  # tokens that end it, besides <|endoftext|>
    ignore_eos: bool = False  # continue past <|endoftext|>
    logprobs: int = 0  # report this many of the likeliest tokens at each position, at most 1024; 0 is off
    on_overflow: str = "error"  # if prompt + max_tokens exceed the context: "error" refuses, "stop" ends the text there

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                _fail(name, "a list or tuple", value)
            object.__setattr__(self, name, tuple(value))
        for name, is_right, rule in _RULES:
            if not is_right(getattr(self, name)):
                _fail(name, rule, getattr(self, name))


def _fail(name: str, rule: str, value: Any) -> None:
    try:
        got = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits; lists in lists in lists
        got = f"one of type {type(value).__name__} that Python does not write out"
    got = got if len(got) <= 200 else got[:100] + "..."
    raise ValueError(f"SamplingParams: {name} must be {rule}, got {got}")


def _integer(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _number(is_right: Callable[[float], bool]) -> Callable[[Any], bool]:
    """Compared with its bounds, which exclude NaN, and never converted: an integer may be too large for a float."""
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and is_right(v)


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_tokens", _integer(1), "an integer of at least 1"),
    ("temperature", _number(lambda v: 0 <= v <= 1e30), "a number in 0..1e30"),  # float32 holds it and its quotients
    ("top_k", _integer(0, 2**31 - 1), "an integer in 0..2^31 - 1"),
    ("top_p", _number(lambda v: 0 < v <= 1), "a number in (0, 1]"),
    ("min_p", _number(lambda v: 0 <= v <= 1), "a number in [0, 1]"),
    ("repetition_penalty", _number(lambda v: 1e-30 <= v <= 1e30), "a number in 1e-30..1e30"),
    ("seed", lambda v: v is None or _integer(0, 2**63 - 1)(v), "None or an integer in 0..2^63 - 1"),
    ("n", _integer(1, MAX_SAMPLES), f"an integer in 1..{MAX_SAMPLES}"),
    ("stop", lambda v: len(v) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} strings"),
    ("stop", lambda v: all(isinstance(s, str) and s for s in v), "strings that are not empty"),
    ("stop_token_ids", lambda v: all(_integer(0)(t) for t in v), "integers of at least 0"),
    ("ignore_eos", lambda v: isinstance(v, bool), "True or False"),
    ("logprobs", _integer(0, MAX_LOGPROBS), f"an integer in 0..{MAX_LOGPROBS}"),
    ("on_overflow", lambda v: v in ("error", "stop"), "'error' or 'stop'"),
)
