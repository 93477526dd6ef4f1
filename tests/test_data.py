"""Tokens of a streamed text, and the windows that cover it, against the text encoded as a whole, token by token."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2 import data
from gpt2.tokenizer import END_OF_TEXT, WORDS

# Bytes, and merges of what separates words, so that a cut in the wrong place shows in the tokens.
_SPACES = [b"\n ", b"\n\n", b"  ", b" \n", b"\t ", b"\n\n\n", b"   ", b"\n  ", b" a", b" !", b"'s", b"12", b"!!"]
TOKENIZER = tiktoken.Encoding(
    "spaces",
    pat_str=WORDS,
    mergeable_ranks={token: n for n, token in enumerate([bytes([b]) for b in range(256)] + _SPACES)},
    special_tokens={END_OF_TEXT: 256 + len(_SPACES)},
)
EOT = TOKENIZER.eot_token

MARKS = [END_OF_TEXT, f"{END_OF_TEXT}\n", f"\n{END_OF_TEXT}\n"]
TEXT = (
    "It's  what they'd've said,\n\nisn't it?  \n 1984 \t\r\n é 漢字かな交じり文。 \n\n\n  end" * 7
    + f"\n{END_OF_TEXT}\n"
    + "one line " * 60
    + f"\n{END_OF_TEXT}\n{END_OF_TEXT}\n"  # an empty document
    + f"In the middle of a line {END_OF_TEXT} is text\n"
)


def whole(text: str) -> list[int]:
    """The specification: documents between marks, each preceded by <|endoftext|>; empty ones are left out."""
    lines, documents = text.split("\n"), [[]]
    for line in lines:
        if line == END_OF_TEXT:
            documents.append([])
        else:
            documents[-1].append(line)
    texts = ["\n".join(document) for document in documents]
    return [token for text in texts if text for token in (EOT, *TOKENIZER.encode_ordinary(text))]


def tokens_of(path: Path, characters: int) -> list[int]:
    found = []
    for begins, text in data.pieces(path, characters):
        found += ([EOT] if begins else []) + TOKENIZER.encode_ordinary(text)
    return found


@pytest.mark.parametrize("characters", [1, 7, 50, 333, 1 << 20])
def test_pieces_have_the_tokens_of_the_whole(tmp_path: Path, characters: int) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    text = path.read_text(encoding="utf-8")  # \r\n is one line break
    assert tokens_of(path, characters) == whole(text)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([" ", "\n", "a", "It's", "é", "\t", "12", "!", "\u2003", "\x85", *MARKS, "\n"])),
    st.integers(1, 40) | st.just(data.CHARACTERS),
)
@example(["a\n", *4 * [MARKS[1]], "12"], data.CHARACTERS)  # empty documents in the middle, at the start, after a line
@example([*3 * [MARKS[1]], "a"], 9)
@example(["\n", *3 * [MARKS[1]], "a"], data.CHARACTERS)
def test_any_text_has_the_tokens_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], n: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_text("".join(parts), encoding="utf-8", newline="")
    expected = [t for t in whole("".join(parts))]
    assert tokens_of(path, n) == expected


@pytest.mark.parametrize("characters", [1, data.CHARACTERS])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, characters: int) -> None:
    """At the start of each file; a second one, or one in the middle, is a character like any other."""
    for name, content in (("a", "a\ufeff b"), ("b", f"{END_OF_TEXT}\nc"), ("c", "\ufeffd"), ("d", "")):
        path = tmp_path / f"{name}.txt"
        path.write_text(content, encoding="utf-8-sig")
        assert tokens_of(path, characters) == whole(content)
    tokens = data.tokenise(tmp_path, TOKENIZER, tmp_path, "train", False)
    assert tokens.tolist() == whole("a\ufeff b") + whole("c") + whole("\ufeffd")


def test_a_long_text_is_never_whole_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("many words here\n" * 20_000, encoding="utf-8")
    for characters in (1, 1000):
        longest = max(len(text) for _, text in data.pieces(path, characters))
        assert longest <= 100 + characters


def test_a_file_is_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.\n" * 100, encoding="utf-8")
    first = data.tokenise(text, TOKENIZER, tmp_path, "train", False)
    assert first.dtype == np.uint16 and isinstance(first, np.memmap)
    assert first.tolist() == whole(text.read_text())
    monkeypatch.setattr(data, "_encode", lambda *a: pytest.fail("tokenised again"))
    assert data.tokenise(text, TOKENIZER, tmp_path, "train", True).tolist() == first.tolist()


def test_data_changed_before_a_run_began_are_tokenised_again(tmp_path: Path) -> None:
    """The length is the same, so the size does not tell. A run that has begun keeps its tokens."""
    text = tmp_path / "text.txt"
    text.write_text("The first text.")
    data.tokenise(text, TOKENIZER, tmp_path, "train", False)
    text.write_text("A second text..")
    os.utime(text, (1, 1))  # like a copy that preserves timestamps
    assert data.tokenise(text, TOKENIZER, tmp_path, "train", True).tolist() == whole("The first text.")
    assert data.tokenise(text, TOKENIZER, tmp_path, "train", False).tolist() == whole("A second text..")


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "b" / "1.txt").write_text("second")
    (tmp_path / "in" / "a.txt").write_text("first")
    (tmp_path / "in" / "c.md").write_text("not this")
    tokens = data.tokenise(tmp_path / "in", TOKENIZER, tmp_path, "train", False)
    assert tokens.tolist() == whole("first") + whole("second")
    with pytest.raises(ValueError, match=r"must hold \*.txt files, got .*empty"):
        (tmp_path / "empty").mkdir()
        data.tokenise(tmp_path / "empty", TOKENIZER, tmp_path, "x", False)


@pytest.mark.parametrize("damage", ["no note", "short", "killed"])
def test_an_interrupted_tokenisation_is_done_again(tmp_path: Path, damage: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.\n" * 100, encoding="utf-8")
    expected = data.tokenise(text, TOKENIZER, tmp_path, "train", False).tolist()
    if damage == "no note":
        (tmp_path / "train.json").unlink()
        (tmp_path / "train.tokens").write_bytes(b"12")
    elif damage == "short":
        (tmp_path / "train.tokens").write_bytes((tmp_path / "train.tokens").read_bytes()[:-2])
    else:  # while it was written
        (tmp_path / "train.json").unlink()
        (tmp_path / "train.tokens").rename(tmp_path / "train.tmp")
    assert data.tokenise(text, TOKENIZER, tmp_path, "train", False).tolist() == expected
    assert not (tmp_path / "train.tmp").exists()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "note", [b"", b"{}", b"[]", b'{"tokens": 5}', b'{"tokens": null}', b"\xff", b"[" * 100_000, b"9" * 5000],
    ids=["empty", "{}", "[]", "a count alone", "no count", "not UTF-8", "too deep", "too many digits"],
)  # fmt: skip
def test_a_damaged_note_is_made_anew_with_its_tokens(tmp_path: Path, note: bytes, fixed: bool) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.\n" * 100, encoding="utf-8")
    expected = data.tokenise(text, TOKENIZER, tmp_path, "train", False).tolist()
    whole_note = (tmp_path / "train.json").read_bytes()
    (tmp_path / "train.json").write_bytes(note)
    assert data.tokenise(text, TOKENIZER, tmp_path, "train", fixed).tolist() == expected
    assert (tmp_path / "train.json").read_bytes() == whole_note


def test_tokens_and_note_are_on_the_disk_before_they_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, replace, fsync = [], Path.replace, os.fsync
    named: list[str] = []

    def watched(path: Path, target: Path) -> Path:
        assert path.stat().st_ino in synced and path.stat().st_size > 0
        named.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(Path, "replace", watched)
    (tmp_path / "text.txt").write_text("Once upon a time.\n")
    data.tokenise(tmp_path / "text.txt", TOKENIZER, tmp_path, "train", False)
    assert named == ["train.tokens", "train.json"]


def test_an_error_in_the_midst_leaves_nothing_behind(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"good text " * 300_000 + b"\xff\xfe")
    with pytest.raises(ValueError, match=r"text.txt: not UTF-8 text \(invalid start byte, byte 0xff\)"):
        data.tokenise(text, TOKENIZER, tmp_path / "run", "train", False)
    assert not any((tmp_path / "run").iterdir())


def test_other_data_is_refused_in_a_run_that_has_begun(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.\n" * 100, encoding="utf-8")
    data.tokenise(text, TOKENIZER, tmp_path, "train", False)
    text.write_text("Another text.\n" * 10, encoding="utf-8")
    with pytest.raises(ValueError, match="files must be what .*train.tokens was made with, .*1800.*, got .*140"):
        data.tokenise(text, TOKENIZER, tmp_path, "train", True)
    assert data.tokenise(text, TOKENIZER, tmp_path, "train", False).tolist() == whole(text.read_text())
    known = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps({**known, "tokenizer": "another"}))
    with pytest.raises(ValueError, match="tokenizer must be what"):
        data.tokenise(text, TOKENIZER, tmp_path, "train", True)


@pytest.mark.parametrize("content", ["", END_OF_TEXT, *(mark * n for mark in MARKS[1:] for n in (1, 3, 4))], ids=repr)
def test_data_without_text_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(ValueError, match="the data must hold text, got nothing in"):
        data.tokenise(tmp_path / "text.txt", TOKENIZER, tmp_path, "train", False)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """The file being written is on a full device."""
    (tmp_path / "text.txt").write_text("text " * 10)
    (tmp_path / "train.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"train.tokens could not be written: .*[Nn]o space left|requested and 0 written"):
        data.tokenise(tmp_path / "text.txt", TOKENIZER, tmp_path, "train", False)
    assert not (tmp_path / "train.tokens").exists()


@pytest.mark.parametrize("order", ["random", "sequential"])
@pytest.mark.parametrize("tokens", [16, 17, 64, 65, 71])  # just enough, one over, whole windows, one over, the rest
def test_each_token_is_predicted_once_a_pass(order: str, tokens: int) -> None:
    """Token i has value i: a target gives its position, and its input must be the one before it on the ring."""
    windows = data.Windows(np.arange(tokens, dtype=np.uint16), 15, order, seed=3)
    for number in range(2):
        seen: Counter[int] = Counter()
        x, y = windows.batch(number * windows.count, windows.count)
        counted = y != data.IGNORED
        assert ((x + 1) % tokens)[counted].equal(y[counted])
        assert int(counted.sum()) == windows.targets(number * windows.count, windows.count) == tokens
        seen.update(y[counted].tolist())
        assert seen == Counter(range(tokens))


def test_a_batch_depends_on_its_number_alone() -> None:
    tokens = np.random.default_rng(0).integers(0, 100, 200).astype(np.uint16)
    together = data.Windows(tokens, 16, "random", 5).batch(3, 30)  # across two passes
    again = data.Windows(tokens, 16, "random", 5)
    apart = [again.batch(n, 1) for n in reversed(range(3, 33))][::-1]
    for i in range(2):
        assert torch.equal(together[i], torch.cat([pair[i] for pair in apart]))
    other = data.Windows(tokens, 16, "random", 6).batch(3, 30)
    assert not torch.equal(together[0], other[0])
    first, second = (again.batch(n * again.count, again.count)[0] for n in range(2))
    assert not torch.equal(first, second)


def test_sequential_windows_follow_the_text() -> None:
    windows = data.Windows(np.arange(64, dtype=np.uint16), 16, "sequential", seed=1)
    x, _ = windows.batch(0, 4)
    assert x.flatten().tolist() == list(range(64))


def test_too_little_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least context \+ 1 = 65 tokens, got 64"):
        data.Windows(np.zeros(64, dtype=np.uint16), 64, "random", 1)


@pytest.mark.parametrize("tokens", [2, 17, 33, 40, 100])
def test_validation_counts_every_token_but_the_first_once(tokens: int) -> None:
    found = []
    for x, y in data.consecutive(np.arange(tokens, dtype=np.uint16), 16, 3):
        assert x.shape == y.shape == (3, min(16, tokens - 1))
        counted = y != data.IGNORED
        assert (x + 1)[counted].equal(y[counted])
        found += y[counted].tolist()
    assert found == list(range(1, tokens))
