"""How well a model predicts a text: sliding-window perplexity, which `gpt2 eval` prints, and log-likelihoods.

`log_likelihoods` scores many continuations, each given its own context; `gpt2.harness` builds on it.

For perplexity every token of the text is scored once. A window of `context` tokens moves by `stride` and scores the
tokens that no earlier window has reached, each given at least context - stride preceding tokens, if the text has them.
A smaller stride costs more windows and gives each token more context: at 1 the score is exact, and at context - 1, the
largest, the first token that a window scores has one token before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

PACKED_TOKENS = 8192  # most tokens of one forward pass over packed sequences, unless a single one is longer
SCORED_ROWS = 1024  # rows whose logits exist at a time: 200 MB with GPT-2's vocabulary


@dataclasses.dataclass(frozen=True)
class Score:
    """What `score` measured."""

    tokens: int  # scored: all but the first of the sequence
    loss: float  # mean negative log-likelihood of a token, in nats

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(first, last, scored): tokens first..last - 1 are read, and the last `scored` of them are predicted.

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
    """The mean loss of `model` (a GPT2) on a sequence of token ids; windows of equal length run `batch_size` at a time.

    context is the model's n_positions unless given, stride half of it. Raises ValueError on a value that does not fit.
    """
    import torch

    limit = model.config.n_positions
    context = limit if context is None else context
    if not 2 <= context <= limit:
        raise ValueError(f"context must lie in 2..{limit}, got {context}")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride < context:
        raise ValueError(f"stride must lie in 1..{context - 1}, below the context of {context}, got {stride}")
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    if len(tokens) < 2:
        raise ValueError(f"there must be at least 2 tokens, got {len(tokens)}")
    sequence = torch.tensor(tokens)
    least, most = int(sequence.min()), int(sequence.max())
    if least < 0 or most >= model.config.vocab_size:
        raise ValueError(f"tokens must lie in 0..{model.config.vocab_size - 1}, got {least if least < 0 else most}")
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


def log_likelihoods(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_batch: int = 256,
    progress: bool = False,
) -> list[tuple[float, bool]]:
    """(log-probability of the continuation in nats, whether it is the greedy one) of (context, continuation) ids.

    If context and continuation together exceed n_positions + 1 tokens, the context loses its first ones: the last token
    is predicted, never read. Sequences of all lengths are packed without padding, at most `max_batch` in a pass; pairs
    that read the same tokens, as the one-token answers to a question do, are computed once. Raises ValueError, before
    any work, on an empty context or continuation, one longer than n_positions, or a token that does not exist.
    """
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    limit, vocabulary = model.config.n_positions, model.config.vocab_size
    if not isinstance(max_batch, int) or max_batch < 1:
        raise ValueError(f"log_likelihoods: max_batch must be an integer of at least 1, got {max_batch!r}")
    readers: dict[tuple[int, ...], list[int]] = {}  # what the model reads -> the pairs that it answers
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 1 <= len(continuation) <= limit:
            raise ValueError(
                f"log_likelihoods: pair {number}: a context must not be empty and a continuation have 1..{limit} "
                f"tokens, got {len(context)} and {len(continuation)}"
            )
        tokens = (*context, *continuation)
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise ValueError(
                f"log_likelihoods: pair {number}: tokens must lie in 0..{vocabulary - 1}, "
                f"got {min(tokens)}..{max(tokens)}"
            )
        readers.setdefault(tokens[-limit - 1 : -1], []).append(number)

    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    with torch.no_grad(), tqdm(total=len(pairs), desc="log-likelihood", disable=not progress) as bar:
        for batch in _packs(sorted(readers, key=len, reverse=True), max_batch):  # too little memory shows at once
            borders = [0, *itertools.accumulate(map(len, batch))]
            answered = [(end, number) for end, read in zip(borders[1:], batch) for number in readers[read]]
            rows = [row for end, number in answered for row in range(end - len(pairs[number][1]), end)]
            wanted = [token for _, number in answered for token in pairs[number][1]]
            device = model.device
            hidden = model.hidden_packed(
                torch.tensor([token for read in batch for token in read], device=device),
                torch.tensor(borders, dtype=torch.int32, device=device),
                len(batch[0]),
            )
            scores, greedy = [], []
            for some, targets in zip(
                torch.tensor(rows, device=device).split(SCORED_ROWS),
                torch.tensor(wanted, device=device).split(SCORED_ROWS),
            ):
                logits = model.logits(hidden[some]).float()
                scores.append(-F.cross_entropy(logits, targets, reduction="none"))
                greedy.append(logits.argmax(-1) == targets)
            lengths = [len(pairs[number][1]) for _, number in answered]
            parts = torch.cat(scores).double().cpu().split(lengths), torch.cat(greedy).cpu().split(lengths)
            for (_, number), score_of_each, is_greedy in zip(answered, *parts):
                found[number] = float(score_of_each.sum()), bool(is_greedy.all())
            bar.update(len(answered))
    return found


def _packs(sequences: Sequence[tuple[int, ...]], most: int) -> Iterator[list[tuple[int, ...]]]:
    """Sequences in order, packed at most `most` together and, if several, at most PACKED_TOKENS tokens."""
    pack: list[tuple[int, ...]] = []
    tokens = 0
    for sequence in sequences:
        if pack and (len(pack) == most or tokens + len(sequence) > PACKED_TOKENS):
            yield pack
            pack, tokens = [], 0
        pack.append(sequence)
        tokens += len(sequence)
    if pack:
        yield pack


def evaluate(options: argparse.Namespace) -> None:
    """`gpt2 eval`: the text after one <|endoftext|>, so that its first token is scored too."""
    from pathlib import Path

    from gpt2.commands import load
    from gpt2.tokenizer import END_OF_TEXT

    try:
        text = Path(options.data).read_text(encoding="utf-8-sig")
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
