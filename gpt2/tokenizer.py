"""Text to tokens and back: GPT-2's byte-level byte-pair encoding, read by tiktoken.

A text is split into words by one regular expression, each word is taken as its UTF-8 bytes, and adjacent pairs are
merged in the order of a table learned once from data. Any text can be encoded, since the 256 bytes are tokens too.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import tiktoken

from gpt2.config import GPT2Config, preset_or_folder

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 splits a text into words: contractions; letters, digits or other marks, with at most one space before them.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

_FILES = (("tokenizer.tiktoken",), ("vocab.json", "merges.txt"), ("tokenizer.json",))  # the first set there is used

STORYBOOK = Path(__file__).parent / "storybook"  # the model that ships with the package


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> tiktoken.Encoding:
    """The tokenizer of a preset name or of a local model folder.

    The four sizes of GPT-2 share one vocabulary, which tiktoken downloads once (or finds in TIKTOKEN_CACHE_DIR);
    "storybook" has its own, in the package. A folder is read from the first of these that it holds:
    `tokenizer.tiktoken`, `vocab.json` with `merges.txt`, `tokenizer.json`. A folder needs a path separator in its name
    ("./gpt2"), since a preset's name wins. nanoGPT's `ckpt.pt` with GPT-2's vocabulary has GPT-2's encoding.

    Raises ValueError, naming the file, if there is no tokenizer or it is not GPT-2's kind of byte-level BPE.
    """
    found = preset_or_folder(name_or_path, "load_tokenizer")
    if isinstance(found, Path):
        return _from_folder(found.resolve())
    if found == "storybook":
        return _from_folder(STORYBOOK)
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as e:  # of tiktoken's download
        reason = str(e).splitlines()[0] if str(e) else ""
        raise ValueError(
            f"load_tokenizer: {found!r}: GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR and could not be downloaded: "
            f"{type(e).__name__}: {reason}"
        ) from e


def save_tokenizer(name_or_path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Put the tokenizer of a preset or model folder into another folder, for `load_tokenizer` to read.

    A folder's files are copied; GPT-2's vocabulary becomes `tokenizer.tiktoken`. Raises as load_tokenizer does.
    """
    found = preset_or_folder(name_or_path, "save_tokenizer")
    source = STORYBOOK if found == "storybook" else found
    if isinstance(source, Path):
        for names in _FILES:
            if all((source / name).is_file() for name in names):
                for name in names:
                    shutil.copyfile(source / name, Path(folder) / name)
                return
    encoding = load_tokenizer(name_or_path)  # raises for a folder that has none
    tokens = sorted((encoding.encode_single_token(token), token) for token in encoding.token_byte_values())
    lines = [base64.b64encode(token) + b" %d\n" % number for number, token in tokens]
    (Path(folder) / "tokenizer.tiktoken").write_bytes(b"".join(lines))


def _from_folder(folder: Path) -> tiktoken.Encoding:
    if (folder / "tokenizer.tiktoken").is_file():
        ranks = _read_tiktoken(folder / "tokenizer.tiktoken")
        special = {END_OF_TEXT: len(ranks)}
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = _read_json(folder / "vocab.json")
        lines = _read_text(folder / "merges.txt").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        ranks, special = _from_vocab(vocab, merges, folder / "vocab.json")
    elif (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        ranks, special = _from_tokenizer_json(_read_json(path), path)
    elif folder.is_file() or (folder / "ckpt.pt").is_file():
        return _of_nanogpt(folder)
    else:
        raise ValueError(
            f"{folder}: no tokenizer there (tokenizer.tiktoken, vocab.json and merges.txt, tokenizer.json)"
        )
    if (folder / "config.json").is_file():
        eos = GPT2Config.from_folder(folder).eos_token_id
        if special.get(END_OF_TEXT) != eos:
            raise ValueError(f"{folder}: {END_OF_TEXT} is token {special.get(END_OF_TEXT)}, but config.json says {eos}")
    return tiktoken.Encoding(folder.name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)


def _of_nanogpt(path: Path) -> tiktoken.Encoding:
    """GPT-2's encoding, if a nanoGPT checkpoint, which has no tokenizer beside it, was trained with it."""
    from gpt2.weights import nanogpt_checkpoint, nanogpt_config  # reads the file; nothing else here needs torch

    checkpoint = nanogpt_checkpoint(path)
    size = None if checkpoint is None else nanogpt_config(checkpoint).vocab_size
    if size != GPT2Config().vocab_size:
        raise ValueError(f"{path}: its vocabulary must be GPT-2's, since there is no tokenizer beside it, got {size}")
    return load_tokenizer("gpt2")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e})") from None


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_tiktoken(path: Path) -> dict[bytes, int]:
    """tiktoken's rank format: a line per token, its bytes in base64, a space and its number."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}: line {number} is not 'base64 rank'") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks must be 0..{len(ranks) - 1}, each once, and so must be the tokens")
    _check_bytes(ranks, path)
    return ranks


def _from_tokenizer_json(content: dict[str, Any], path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ranks and special tokens of the file that the `tokenizers` library writes, if it describes what GPT-2 does."""
    model = content.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{path}: expected a BPE model, got {model.get('type')!r}")
    words = content.get("pre_tokenizer") or {}
    for what, value, wanted in (
        ("normalizer", content.get("normalizer"), None),
        ("pre_tokenizer", words.get("type"), "ByteLevel"),
        ("pre_tokenizer.add_prefix_space", words.get("add_prefix_space", True), False),
        ("pre_tokenizer.use_regex", words.get("use_regex", True), True),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix") or None, None),
        ("model.end_of_word_suffix", model.get("end_of_word_suffix") or None, None),
    ):
        if value != wanted:
            raise ValueError(f"{path}: {what} must be {wanted!r}, as in GPT-2, got {value!r}")
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    vocab = {text: number for text, number in model["vocab"].items() if text not in added}
    ranks, special = _from_vocab(vocab, merges, path)
    return ranks, special | added


def _from_vocab(
    vocab: dict[str, int], merges: list[tuple[str, ...]], path: Path
) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ranks and special tokens of GPT-2's own format, in which each byte is written as one printable character."""
    if wrong := [text for text, number in vocab.items() if type(number) is not int or number < 0]:
        raise ValueError(f"{path}: {wrong[0]!r} must have a number, got {vocab[wrong[0]]!r}")
    if len(set(vocab.values())) != len(vocab):
        raise ValueError(f"{path}: two tokens have the same number")
    to_byte = {c: b for b, c in byte_characters().items()}
    made = {"".join(pair) for pair in merges}
    ranks: dict[bytes, int] = {}
    special: dict[str, int] = {}
    for text, number in vocab.items():
        if text in made or len(text) == 1:
            try:
                ranks[bytes(to_byte[c] for c in text)] = number
            except KeyError as e:
                raise ValueError(f"{path}: {text!r} holds {e.args[0]!r}, which stands for no byte") from None
        elif text[:1] + text[-1:] in ("<>", "[]"):
            special[text] = number
        else:
            raise ValueError(f"{path}: no merge makes {text!r}, and it does not look like a special token")
    _check_bytes(ranks, path)
    # tiktoken merges in the order of the numbers, so these must follow the order of the merges.
    order = [vocab.get("".join(pair), -1) for pair in merges]
    if -1 in order:
        raise ValueError(f"{path}: merge {' '.join(merges[order.index(-1)])!r} makes no token of the vocabulary")
    if any(b <= a for a, b in itertools.pairwise(order)):
        raise ValueError(f"{path}: token numbers do not follow the order of the merges")
    return ranks, special


def _check_bytes(ranks: dict[bytes, int], path: Path) -> None:
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise ValueError(f"{path}: not a byte-level vocabulary, bytes {missing[:8]} have no token")


def byte_characters() -> dict[int, str]:
    """The printable character that GPT-2's vocabulary files write for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
