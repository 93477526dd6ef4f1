"""How well a model predicts a text: perplexity by a sliding window, and `gpt2 eval`, which prints it.

Every token of the text is scored once. A window of `context` tokens moves on by `stride`; what it scores are the tokens
that no window before it has reached, each after at least context - stride tokens of its past, where the text has them.
A smaller stride costs more windows and gives each token more past: at 1 the score is exact, at `context` the windows
share nothing, and their first tokens are predicted from nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Score:
    """What `score` measured."""

    tokens: int  # scored: all but the first of the sequence
    loss: float  # mean negative log-likelihood of a token, in nats

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(first, last, scored): token first..last - 1 are read, and the last `scored` of them are what is predicted.

    Token 0 has nothing before it and is never scored. length 10, context 5, stride 3: (0, 5, 4), (3, 8, 3), (5, 10, 2).
    """
    found = []
    done = 1  # tokens that are scored, or never will be
    while done < length:
        last = context if done == 1 else min(done + stride, length)
        last = min(last, length)
        found.append((max(0, last - context), last, last - done))
        done = last
    return found


def score(
    model: Any, tokens: Sequence[int], *, context: int | None = None, stride: int | None = None, batch_size: int = 4
) -> Score:
    """The mean loss of `model` (a GPT2) on a sequence of token ids, windows of one length `batch_size` at a time.

    context is the model's n_positions unless given, stride half of it. Raises ValueError on a value that does not fit.
    """
    import torch

    limit = model.config.n_positions
    context = limit if context is None else context
    if not 2 <= context <= limit:
        raise ValueError(f"eval: context must lie in 2..{limit}, got {context}")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride < context:
        raise ValueError(f"eval: stride must lie in 1..{context - 1}, below the context of {context}, got {stride}")
    if batch_size < 1:
        raise ValueError(f"eval: batch size must be at least 1, got {batch_size}")
    if len(tokens) < 2:
        raise ValueError(f"eval: there must be at least 2 tokens, got {len(tokens)}")
    sequence = torch.tensor(tokens)
    if not 0 <= int(sequence.min()) <= int(sequence.max()) < model.config.vocab_size:
        raise ValueError(f"eval: tokens must lie in 0..{model.config.vocab_size - 1}, got {int(sequence.max())}")
    total = 0.0
    waiting: list[tuple[int, int, int]] = []
    todo = windows(len(tokens), context, stride)
    with torch.no_grad():
        for number, window in enumerate(todo):
            waiting.append(window)
            following = todo[number + 1] if number + 1 < len(todo) else None
            if len(waiting) < batch_size and following and following[1] - following[0] == window[1] - window[0]:
                continue
            rows = torch.stack([sequence[first:last] for first, last, _ in waiting])
            targets = rows[:, 1:].clone()
            for row, (_, _, scored) in zip(targets, waiting):
                row[: len(row) - scored] = -100
            loss = model.loss(rows[:, :-1].to(model.device), targets.to(model.device))
            total += float(loss) * sum(scored for _, _, scored in waiting)
            waiting = []
    return Score(len(tokens) - 1, total / (len(tokens) - 1))


def evaluate(options: argparse.Namespace) -> None:
    """`gpt2 eval`: the text after one <|endoftext|>, so that its first token is scored too."""
    from pathlib import Path

    from gpt2.commands import load
    from gpt2.tokenizer import END_OF_TEXT

    try:
        text = Path(options.data).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"--data {options.data}: not UTF-8 text ({e})") from None
    if not text:
        raise ValueError(f"--data {options.data}: the file is empty")
    model, tokenizer = load(options)
    tokens = tokenizer.encode(text, allowed_special={END_OF_TEXT}, disallowed_special=())
    result = score(
        model,
        [model.config.eos_token_id, *tokens],
        context=options.context,
        stride=options.stride,
        batch_size=options.batch_size,
    )
    size = len(text.encode("utf-8"))
    context = options.context or model.config.n_positions
    bits = result.loss / math.log(2)
    of_a_byte = bits * result.tokens / size
    print(f"perplexity {result.perplexity:.4f}")
    print(f"loss {result.loss:.6f} nats a token, {bits:.4f} bits a token, {of_a_byte:.4f} bits a byte")
    print(f"{result.tokens} tokens, {size} bytes, context {context}, stride {options.stride or max(1, context // 2)}")
