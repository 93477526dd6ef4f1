"""Turns a text into a file of token ids, once, and windows of it into batches.

    TEXT  --tokenise-->  NAME.tokens (uint16 or uint32, memory-mapped) + NAME.json (what it was made from)

The text is streamed: neither it nor its tokens are ever in memory as a whole. It is cut where the tokenizer would split
it anyway, so the tokens are those of the whole. Each document begins with <|endoftext|>.

The windows of one pass lie end to end around the tokens, which form a ring (the last token is followed by the first,
which is <|endoftext|>), so that each token is predicted exactly once per pass. Where they start and their order depend
only on (seed, pass), so what a step sees depends only on its number: a run's data position is its step.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from torch import Tensor

from gpt2.tokenizer import END_OF_TEXT

IGNORED = -100  # a target that the loss leaves out
CHARACTERS = 1 << 20  # of text read at a time
_SEPARATOR = f"\n{END_OF_TEXT}\n"
# Empty documents: one separator line after another.
_LEADING = re.compile(f"(?:{re.escape(END_OF_TEXT)}\n)+")
_SEPARATORS = re.compile(f"\n{_LEADING.pattern}")
# No word of the tokenizer's pattern spans these: a single space or line break between two characters that are neither.
_BETWEEN_WORDS = re.compile(r"\S(?: (?=\S)|\n(?=\S))")


def text_files(data: str | Path) -> list[Path]:
    """A file, or all *.txt of a folder and its subfolders, in the order of their names."""
    path = Path(data)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.txt") if p.is_file())
        if not files:
            raise ValueError(f"a folder of data must hold *.txt files, got {path}")
        return files
    if not path.exists():
        raise ValueError(f"there is no text {path}")
    return [path]


def pieces(path: Path, characters: int = CHARACTERS) -> Iterator[tuple[bool, str]]:
    """(does a document begin here, text): the documents of a file in pieces that can be tokenised independently."""
    with path.open(encoding="utf-8-sig") as file:  # a byte-order mark at its start is dropped
        text, begins, searched = "", True, 0
        while True:
            try:
                chunk = file.read(characters)
            except UnicodeDecodeError as e:
                raise ValueError(f"{path}: not UTF-8 text ({e.reason}, byte {e.object[e.start]:#04x})") from None
            text += chunk
            if begins and (lines := _LEADING.match(text)):
                text, searched = text[lines.end() :], 0
            while lines := _SEPARATORS.search(text, searched):
                if lines.start():
                    yield begins, text[: lines.start()]
                text, begins, searched = text[lines.end() :], True, 0
            if not chunk:
                break
            # What may yet become a separator is kept back, and so is all of a text without a place to cut.
            end = max(0, len(text) - len(_SEPARATOR))
            places = _BETWEEN_WORDS.finditer(text, max(0, searched - 2), end)
            last = next(iter(collections.deque(places, maxlen=1)), None)
            searched = end
            if last is not None:
                cut = last.start() + (1 if text[last.start() + 1] == " " else 2)
                yield begins, text[:cut]
                text, begins, searched = text[cut:], False, end - cut
        text = text.removesuffix(f"\n{END_OF_TEXT}")
        if text and text != END_OF_TEXT:
            yield begins, text


def tokenise(data: str | Path, tokenizer: tiktoken.Encoding, folder: Path, name: str, fixed: bool) -> np.ndarray:
    """The tokens of `data`, (N,), read from `folder`/`name`.tokens, which is made if it is missing or incomplete.

    It is made anew if the data's sizes or modification times, or the tokenizer, have changed. With `fixed`, for a run
    that has begun, times do not count and other changes raise ValueError, as does text that is not UTF-8.
    """
    files = text_files(data)
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32)
    made_from = {
        "files": [[path.name, path.stat().st_size] for path in files],
        "tokenizer": fingerprint(tokenizer),
        "dtype": dtype.name,
        "modified": [path.stat().st_mtime_ns for path in files],
    }
    path, note = folder / f"{name}.tokens", folder / f"{name}.json"
    known = _noted(note)  # written last: without it the tokens are those of an interrupted attempt
    if known.keys() == {*made_from, "tokens"}:
        wrong = [k for k, v in made_from.items() if known.get(k) != v and not (fixed and k == "modified")]
        if wrong and fixed:
            key = wrong[0]
            raise ValueError(f"{key} must be what {path} was made with, {known.get(key)}, got {made_from[key]}")
        if not wrong and path.exists() and path.stat().st_size == known["tokens"] * dtype.itemsize:
            return np.memmap(path, dtype=dtype, mode="r")

    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    try:
        count = 0
        with draft.open("wb") as out:
            for tokens in _encode(itertools.chain.from_iterable(map(pieces, files)), tokenizer):
                out.write(np.asarray(tokens, dtype=dtype).tobytes())
                count += len(tokens)
            out.flush()
            os.fsync(out.fileno())
        if count == 0:
            raise ValueError(f"the data must hold text, got nothing in {data}")
        note.unlink(missing_ok=True)
        draft.replace(path)
        with draft.open("w", encoding="utf-8") as file:
            json.dump({**made_from, "tokens": count}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(note)
    except OSError as e:
        raise OSError(f"{path} could not be written: {e}") from e
    finally:
        draft.unlink(missing_ok=True)
    return np.memmap(path, dtype=dtype, mode="r")


def _noted(note: Path) -> dict[str, Any]:
    """What a note says, or nothing if it is missing or damaged: the tokens can be made again."""
    try:
        known = json.loads(note.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) and type(known.get("tokens")) is int else {}


def _encode(parts: Iterable[tuple[bool, str]], tokenizer: tiktoken.Encoding) -> Iterator[list[int]]:
    parts = iter(parts)
    threads = os.cpu_count() or 1
    while some := list(itertools.islice(parts, 4 * threads)):
        encoded = tokenizer.encode_ordinary_batch([text for _, text in some], num_threads=threads)
        for (begins, _), tokens in zip(some, encoded):
            yield [tokenizer.eot_token, *tokens] if begins else tokens


def fingerprint(tokenizer: tiktoken.Encoding) -> str:
    """Differs for tokenizers that differ in any token."""
    digest = hashlib.sha256(str(tokenizer.eot_token).encode())
    for number in range(tokenizer.n_vocab):
        try:
            token = tokenizer.decode_single_token_bytes(number)
        except KeyError:  # a number that no token has
            token = b""
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()[:16]


class Windows:
    """The batches of a run, by number: sample s is window s mod `count` of pass s // `count`."""

    def __init__(self, tokens: np.ndarray, context: int, order: str, seed: int) -> None:
        if len(tokens) < context + 1:
            raise ValueError(
                f"the data must hold at least context + 1 = {context + 1} tokens, got {len(tokens)} "
                "(a smaller context will do)"
            )
        self.tokens, self.context, self.order, self.seed = tokens, context, order, seed
        self.count = -(-len(tokens) // context)
        self._pass: tuple[int, int, np.ndarray] | None = None  # number, where its first window starts, order

    def batch(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (size, context) int64 each, of samples `first` .. `first` + size - 1."""
        windows = np.empty((size, self.context + 1), dtype=np.int64)
        valid = np.empty(size, dtype=np.int64)
        for row in range(size):
            windows[row], valid[row] = self._window(*divmod(first + row, self.count))
        inputs, targets = windows[:, :-1], windows[:, 1:].copy()
        targets[np.arange(self.context) >= valid[:, None]] = IGNORED
        return torch.from_numpy(inputs.copy()), torch.from_numpy(targets)

    def targets(self, first: int, size: int) -> int:
        """How many targets of these samples the loss counts."""
        return sum(self._valid(self._number(*divmod(first + row, self.count))) for row in range(size))

    def _window(self, number: int, position: int) -> tuple[np.ndarray, int]:
        window = self._number(number, position)
        assert self._pass is not None
        start = (self._pass[1] + window * self.context) % len(self.tokens)
        taken = self.tokens[start : start + self.context + 1]
        if len(taken) <= self.context:  # around the ring
            taken = np.concatenate([taken, self.tokens[: self.context + 1 - len(taken)]])
        return taken, self._valid(window)

    def _number(self, number: int, position: int) -> int:
        """Which window of pass `number` comes at `position`."""
        if self._pass is None or self._pass[0] != number:
            if self.order == "sequential":
                self._pass = number, 0, np.arange(self.count)
            else:
                random = np.random.default_rng((self.seed, number))
                self._pass = number, int(random.integers(len(self.tokens))), random.permutation(self.count)
        return int(self._pass[2][position])

    def _valid(self, window: int) -> int:
        """Targets of a window before the ring closes: fewer than all in the last one."""
        return min(self.context, len(self.tokens) - window * self.context)


def consecutive(tokens: np.ndarray, context: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (inputs, targets) of `size` windows that predict tokens 1 .. N - 1 once each, for validation.

    The last window is moved back to end with the text; the last batch is padded with windows without targets.
    """
    context = min(context, len(tokens) - 1)
    count = -(-(len(tokens) - 1) // context)
    for first in range(0, count, size):
        inputs = np.zeros((size, context), dtype=np.int64)
        targets = np.full((size, context), IGNORED, dtype=np.int64)
        for row, window in enumerate(range(first, min(first + size, count))):
            start = min(window * context, len(tokens) - 1 - context)
            seen = window * context - start
            inputs[row] = tokens[start : start + context]
            targets[row, seen:] = tokens[start + 1 + seen : start + 1 + context]
        yield torch.from_numpy(inputs), torch.from_numpy(targets)
