"""Tokenizers against the `tokenizers` library, and against byte-pair encoding written out in a few lines."""

from __future__ import annotations

import base64
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
import tiktoken
from checkpoints import byte_tokenizer, random_checkpoint, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2.config import PRESETS
from gpt2.storybook import vocabulary
from gpt2.tokenizer import END_OF_TEXT, STORYBOOK, byte_characters, load_tokenizer, save_tokenizer

ROOT = Path(__file__).parents[1]
CACHE = ROOT.parent / "shared" / "tiktoken-cache"

TEXTS = [
    "",
    "Hello world",
    "It's what they'd've said, isn't it? I'LL see: we're 2nd in 1984.",
    "emoji 🙂👩‍👩‍👧 and flags 🇨🇭, half-width ｱ, combining e\u0301",
    "漢字かな交じり文。中文字符，한국어",
    "  two  three   \n\n\t tabs \r\n end   ",
    "\x00\x01\x07\x1b[0m\x7f\u0085\u00a0\u200b\ufeff",
    "a" * 300 + "0" * 50 + "!" * 50,
    "def f(x):\n    return x**2  # ünïcode",
]

# Characters in both sides' Unicode tables; lone surrogates are not text.
unicode_text = st.text(st.characters(exclude_categories=("Cn", "Cs")), max_size=40)
word_text = st.lists(
    st.sampled_from(
        ["the", " the", " ", "  ", "\n", "'s", "'S", "'ll", "1", " 23", "!", "é", "é", "🙂", "語", "t", "h"]
    )
).map("".join)


@pytest.fixture
def gpt2_cache(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two files of GPT-2's vocabulary, as tiktoken keeps them."""
    if CACHE.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    elif not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's vocabulary is not here: neither ../shared/tiktoken-cache nor TIKTOKEN_CACHE_DIR")
    return Path(os.environ["TIKTOKEN_CACHE_DIR"])


def assert_round_trip(encoding: tiktoken.Encoding) -> None:
    for text in TEXTS:
        assert encoding.decode(encoding.encode(text)) == text


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_gpt2_ids_are_the_published_ones(name: str, gpt2_cache: Path) -> None:
    encoding = load_tokenizer(name)
    assert encoding.n_vocab == PRESETS[name].vocab_size
    assert encoding.encode("Hello world") == [15496, 995]
    assert encoding.encode("Hello, world!") == [15496, 11, 995, 0]
    assert encoding.encode(END_OF_TEXT, allowed_special="all") == [PRESETS[name].eos_token_id]
    assert len(encoding.encode_ordinary(END_OF_TEXT)) > 1  # as text it is text
    assert_round_trip(encoding)


def test_gpt2_equals_the_tokenizers_library(gpt2_cache: Path, tmp_path: Path) -> None:
    """By preset and by folder, on the published files themselves."""
    tokenizers = pytest.importorskip("tokenizers")
    files = [path for path in gpt2_cache.iterdir() if path.is_file()]
    vocab = next((p for p in files if p.read_bytes()[:1] == b"{"), None)
    merges = next((p for p in files if p.read_bytes()[:8] == b"#version"), None)
    if vocab is None or merges is None:
        pytest.skip("the cache does not hold encoder.json and vocab.bpe")
    shutil.copy(vocab, tmp_path / "vocab.json")
    shutil.copy(merges, tmp_path / "merges.txt")
    library = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    preset, folder = load_tokenizer("gpt2"), load_tokenizer(tmp_path)
    assert folder.n_vocab == 50257 and folder.encode(END_OF_TEXT, allowed_special="all") == [50256]

    @given(st.one_of(unicode_text, word_text))
    @settings(max_examples=300, deadline=None, database=None)
    def check(text: str) -> None:
        assert preset.encode_ordinary(text) == folder.encode_ordinary(text) == library.encode(text).ids

    check()
    for text in TEXTS:
        assert preset.encode_ordinary(text) == folder.encode_ordinary(text) == library.encode(text).ids


def test_an_absent_vocabulary_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ConnectionError("no route to host\nand much advice")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(ValueError, match="'gpt2-xl'.*TIKTOKEN_CACHE_DIR.*ConnectionError: no route to host$"):
        load_tokenizer("gpt2-xl")


def test_a_vocabulary_is_learned_from_the_documents_alone(tmp_path: Path) -> None:
    """Not from a byte-order mark, nor from the marks between documents, however many there are."""
    pytest.importorskip("tokenizers")
    documents = ["the cat sat on the mat", "a dog sat\non a log"] * 10
    learned = []
    for start, between in (("", "\n<|endoftext|>\n"), ("\ufeff<|endoftext|>\n", "\n" + 3 * "<|endoftext|>\n")):
        (tmp_path / "text.txt").write_text(start + between.join(documents), encoding="utf-8")
        vocabulary.learn(tmp_path / "text.txt", tmp_path / "out", 265)
        learned.append((tmp_path / "out").read_bytes())
    assert learned[0] == learned[1]


# A vocabulary learned by the tokenizers library, with the special token before the bytes or after the merges.


def learn(position: str) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.ByteLevelBPETokenizer()
    text = [
        " ".join(TEXTS),
        "the theme then there these 漢字 漢字 éé 🙂🙂 's 's 'll  \n\n  23 23 " * 3,
        "<b> [x] <b> [x]",
    ]
    special = [END_OF_TEXT] if position == "first" else []
    library.train_from_iterator(text, vocab_size=420, min_frequency=2, special_tokens=special, show_progress=False)
    if position == "last":
        library.add_special_tokens([END_OF_TEXT])
    return library


def write_vocab_and_merges(library: Any, folder: Path) -> None:
    library.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab.setdefault(END_OF_TEXT, len(vocab))  # the library leaves added tokens out of this file
    (folder / "vocab.json").write_text(json.dumps(vocab))


def write_tokenizer_json(library: Any, folder: Path) -> None:
    library.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("write", [write_vocab_and_merges, write_tokenizer_json])
@pytest.mark.parametrize("position", ["first", "last"])
def test_a_folder_equals_the_tokenizers_library(position: str, write: Callable[..., None], tmp_path: Path) -> None:
    library = learn(position)
    write(library, tmp_path)
    encoding = load_tokenizer(tmp_path)
    size = library.get_vocab_size()
    assert size > 300  # there are merges
    assert encoding.n_vocab == size
    eos = encoding.encode(END_OF_TEXT, allowed_special="all")
    assert eos == [0 if position == "first" else size - 1] == library.encode(END_OF_TEXT).ids

    @given(st.one_of(unicode_text, word_text))
    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    def check(text: str) -> None:
        ids = encoding.encode_ordinary(text)
        assert ids == library.encode(text).ids
        assert encoding.decode(ids) == text

    check()
    for text in TEXTS:
        assert encoding.encode_ordinary(text) == library.encode(text).ids
    mixed = f"one{END_OF_TEXT}two"
    assert encoding.encode(mixed, allowed_special="all") == library.encode(mixed).ids


def test_merges_as_pairs_or_as_text(tmp_path: Path) -> None:
    """tokenizer.json held merges as "a b" until 2024, and as ["a", "b"] since."""
    library = learn("first")
    write_tokenizer_json(library, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    other = [" ".join(m) if isinstance(m, list) else m.split(" ") for m in content["model"]["merges"]]
    content["model"]["merges"] = other
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).encode("the theme 漢字") == library.encode("the theme 漢字").ids


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer.type", "Whitespace"),
        ("pre_tokenizer.add_prefix_space", True),
        ("pre_tokenizer.use_regex", False),
        ("model.type", "Unigram"),
        ("model.end_of_word_suffix", "</w>"),
    ],
)
def test_a_tokenizer_json_that_is_not_gpt2s_is_refused(path: str, value: Any, tmp_path: Path) -> None:
    """Read as GPT-2's, it would silently give other tokens than its model was trained with."""
    write_tokenizer_json(learn("first"), tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    *parents, key = path.split(".")
    target = content
    for parent in parents:
        target = target[parent]
    target[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer.json: .*got"):
        load_tokenizer(tmp_path)


# Folders written by hand: errors say what is wrong, with the file's name.


def handmade(folder: Path, vocab: dict[str, Any] | None = None, merges: str = "a b\nab c\n") -> None:
    characters = byte_characters()
    plain = {characters[b]: b for b in range(256)} | {"ab": 256, "abc": 257, END_OF_TEXT: 258}
    (folder / "vocab.json").write_text(json.dumps(plain | (vocab or {})), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


def test_a_handmade_folder(tmp_path: Path) -> None:
    handmade(tmp_path)
    encoding = load_tokenizer(tmp_path)
    assert encoding.encode("abcab b\n") == [257, 256, 32, 98, 10]
    assert encoding.encode(f"a{END_OF_TEXT}", allowed_special="all") == [97, 258]
    assert [encoding.decode_single_token_bytes(i) for i in range(256)] == [bytes([b]) for b in range(256)]


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ({}, "a b\n", "vocab.json: no merge makes 'abc'"),  # merges.txt is cut off
        ({"word": 259}, "a b\nab c\n", "vocab.json: no merge makes 'word'"),
        ({}, "a b\nab c\nab d\n", "vocab.json: merge 'ab d' makes no token"),
        ({"ab": 257, "abc": 256}, "a b\nab c\n", "token numbers do not follow the order of the merges"),
        ({"ab": 257}, "a b\nab c\n", "two tokens have the same number"),
        ({"ab": "256"}, "a b\nab c\n", "'ab' must have a number, got '256'"),
        ({"漢": 259}, "a b\nab c\n", "'漢' holds '漢', which stands for no byte"),
    ],
)
def test_vocabularies_that_do_not_fit_their_merges(vocab: Any, merges: str, message: str, tmp_path: Path) -> None:
    handmade(tmp_path, vocab, merges)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_vocabulary_of_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(ValueError, match=r"vocab.json: not a byte-level vocabulary, bytes \[0, 1, .*have no token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_files_that_are_not_text(name: str, tmp_path: Path) -> None:
    handmade(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"{name}: not UTF-8 text"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["{", "[" * 100_000, "9" * 5000], ids=["half", "too deep", "too many digits"])
def test_files_that_are_not_json(name: str, text: str, tmp_path: Path) -> None:
    if name == "vocab.json":
        handmade(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: not valid JSON"):
        load_tokenizer(tmp_path)


def lines(*tokens: tuple[bytes, Any]) -> bytes:
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in tokens)


BYTES = [(bytes([b]), b) for b in range(256)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(*BYTES) + b"YWI=\n", "line 257 is not 'base64 rank'"),
        (lines(*BYTES, (b"ab", "x")), "line 257 is not 'base64 rank'"),
        (lines(*BYTES) + b"Y!WI= 256\n", "line 257 is not 'base64 rank'"),
        (lines(*BYTES) + b"YWI= 256 3\n", "line 257 is not 'base64 rank'"),
        (lines(*BYTES, (b"ab", 257)), r"ranks must be 0\.\.256, each once"),
        (lines(*BYTES, (b"ab", 255)), r"ranks must be 0\.\.256, each once"),
        (lines(*BYTES, (b"a", 256)), r"ranks must be 0\.\.255, each once"),
        (lines(*BYTES)[:1000], "tokenizer.tiktoken: "),  # cut off
        (lines(*BYTES[:100]), r"not a byte-level vocabulary, bytes \[100, 101"),
        (b"", r"not a byte-level vocabulary, bytes \[0, 1"),
    ],
)
def test_rank_files_with_errors(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_rank_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.tiktoken").write_bytes(lines(*BYTES, (b"ab", 256), (b" ab", 257)))
    encoding = load_tokenizer(str(tmp_path))
    assert encoding.encode("ab abab\xff") == [256, 257, 256, 0xC3, 0xBF]
    assert encoding.encode(END_OF_TEXT, allowed_special="all") == [258]


def test_a_rewritten_folder_is_read_again(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path / "tokenizer.tiktoken", 257)
    assert load_tokenizer(tmp_path).n_vocab == 257
    byte_tokenizer(tmp_path / "tokenizer.tiktoken", 300)
    assert load_tokenizer(tmp_path).n_vocab == 300


def test_the_end_of_text_must_be_that_of_the_config(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, tiny_config(), tokenizer=True)
    assert load_tokenizer(folder).encode(END_OF_TEXT, allowed_special="all") == [tiny_config().eos_token_id]
    byte_tokenizer(folder / "tokenizer.tiktoken", 300)
    with pytest.raises(ValueError, match=r"<\|endoftext\|> is token 299, but config.json says 287"):
        load_tokenizer(folder)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: no tokenizer there"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["gpt3", "./absent", "/absent/folder"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"load_tokenizer: '{name}'"):
        load_tokenizer(name)


def test_a_presets_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("storybook", "mine"):
        (tmp_path / name).mkdir()
        byte_tokenizer(tmp_path / name / "tokenizer.tiktoken", 257)
    assert load_tokenizer("storybook").n_vocab == PRESETS["storybook"].vocab_size
    assert load_tokenizer("./storybook").n_vocab == 257
    with pytest.raises(ValueError, match="write './mine'"):
        load_tokenizer("mine")


# The tokenizer that ships with the package.


def byte_pair_encoding(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """By definition: merge the neighbours whose union has the lowest rank, leftmost first, until no union has one."""
    parts = [bytes([b]) for b in word]
    while len(parts) > 1:
        rank, i = min((ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)))
        if rank == 1 << 30:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


# Copied from OpenAI's encoder.py (github.com/openai/gpt-2), not from our own module.
OPENAI_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def test_storybook_is_byte_pair_encoding() -> None:
    encoding = load_tokenizer("storybook")
    file = (STORYBOOK / "tokenizer.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in file}
    assert len(ranks) == 4095

    @given(st.one_of(unicode_text, word_text))
    @settings(max_examples=200, deadline=None, database=None)
    def check(text: str) -> None:
        words = OPENAI_WORDS.findall(text)
        assert encoding.encode_ordinary(text) == [i for w in words for i in byte_pair_encoding(w.encode(), ranks)]

    check()


def test_storybook_fits_its_preset_and_english() -> None:
    encoding, config = load_tokenizer("storybook"), PRESETS["storybook"]
    assert encoding.n_vocab == config.vocab_size
    assert encoding.encode(END_OF_TEXT, allowed_special="all") == [config.eos_token_id]
    assert_round_trip(encoding)
    story = "Once upon a time there was an old king who lived in a castle by the sea with his three daughters."
    assert len(encoding.encode(story)) <= len(story) / 3.5


def test_byte_characters_are_those_of_the_tokenizers_library() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ours = byte_characters()
    assert sorted(ours) == list(range(256))
    assert set(ours.values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert all(unicodedata.category(c)[0] not in "CZ" for b, c in ours.items() if b != 0xAD)
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in TEXTS[1:]:
        assert split.pre_tokenize_str(text)[0][0] == "".join(ours[b] for b in text.encode())


def test_a_saved_tokenizer_is_the_same(tmp_path: Path, gpt2_cache: Path) -> None:
    """GPT-2's vocabulary as a rank file; a folder's own files as they are, which order tokens otherwise."""
    save_tokenizer("gpt2", tmp_path)
    saved, original = load_tokenizer(tmp_path), load_tokenizer("gpt2")
    assert saved.eot_token == original.eot_token == 50256
    assert [saved.encode_ordinary(text) for text in TEXTS] == [original.encode_ordinary(text) for text in TEXTS]


@pytest.mark.parametrize("names", [["tokenizer.tiktoken"], ["vocab.json", "merges.txt"], ["tokenizer.json"]])
def test_a_folder_s_tokenizer_is_copied(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text(f"content of {name}")
    (tmp_path / "other").mkdir()
    save_tokenizer(tmp_path, tmp_path / "other")
    assert {p.name: p.read_text() for p in (tmp_path / "other").iterdir()} == {n: f"content of {n}" for n in names}
    with pytest.raises(ValueError, match="no tokenizer there"):
        (tmp_path / "none").mkdir()
        save_tokenizer(tmp_path / "none", tmp_path)


def test_the_vocabulary_of_storybook_is_learned(tmp_path: Path) -> None:
    """By its recipe on a small text: every byte, then merges; too small a text is refused."""
    pytest.importorskip("tokenizers")
    from gpt2.storybook import vocabulary

    (tmp_path / "text.txt").write_text("low lower lowest\n<|endoftext|>\nnew newer newest " * 3)
    vocabulary.learn(tmp_path / "text.txt", tmp_path / "tokenizer.tiktoken", 260)
    encoding = load_tokenizer(tmp_path)
    assert encoding.eot_token == 259 and len(encoding.encode_ordinary(" low")) < 4
    with pytest.raises(ValueError, match="the text must have 3999 tokens that occur twice, got"):
        vocabulary.learn(tmp_path / "text.txt", tmp_path / "x", 4000)
