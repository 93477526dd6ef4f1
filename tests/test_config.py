"""GPT2Config: what it refuses, what it computes, and config.json as transformers reads and writes it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_config

from gpt2.config import PRESETS, GPT2Config, preset_or_folder


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6)],  # of the published files
)
def test_published_sizes(name: str, millions: float) -> None:
    config = PRESETS[name]
    assert round(config.num_parameters / 1e6, 1) == millions
    assert config.head_dim == 64
    assert (config.vocab_size, config.n_positions, config.eos_token_id) == (50257, 1024, 50256)


@pytest.mark.parametrize("changes", [{}, dict(n_inner=40), dict(n_layer=3, n_embd=24, n_head=3)])
def test_number_of_parameters_is_that_of_transformers(changes: dict[str, int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny_config(**changes)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_json()))
    assert config.num_parameters == model.num_parameters()


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
def test_attention_scale(scale: bool, inverse: bool) -> None:
    config = tiny_config(scale_attn_weights=scale, scale_attn_by_inverse_layer_idx=inverse)
    for layer in range(2):
        expected = (1 / 4 if scale else 1) / (layer + 1 if inverse else 1)  # heads of 16
        assert config.attention_scale(layer) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_layer=0), "n_layer must be a positive integer, got 0"),
        (dict(n_embd=32.0), "n_embd must be a positive integer, got 32.0"),
        (dict(n_head=True), "n_head must be a positive integer, got True"),
        (dict(n_positions="64"), "n_positions must be a positive integer, got '64'"),
        (dict(n_inner=0), "n_inner must be a positive integer or None, got 0"),
        (dict(n_inner=True), "n_inner must be a positive integer or None, got True"),
        (dict(n_head=3), "n_embd must be a multiple of n_head, got 32 and 3"),
        (dict(activation_function="relu"), "activation_function must be one of .*got 'relu'"),
        (dict(layer_norm_epsilon="1e-5"), "layer_norm_epsilon must be a positive number, got '1e-5'"),
        (dict(layer_norm_epsilon=0), "layer_norm_epsilon must be a positive number, got 0"),
        (dict(layer_norm_epsilon=float("nan")), "layer_norm_epsilon must be a positive number, got nan"),
        (dict(layer_norm_epsilon=10**400), "layer_norm_epsilon must be a positive number, got 1000"),
        (dict(scale_attn_weights="no"), "scale_attn_weights must be true or false, got 'no'"),
        (dict(eos_token_id=288), "eos_token_id must lie in 0..287, got 288"),
        (dict(eos_token_id=-1), "eos_token_id must lie in 0..287, got -1"),
        (dict(eos_token_id="x"), "eos_token_id must lie in 0..287, got 'x'"),
    ],
)
def test_values_that_make_no_model_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"GPT2Config: {message}"):
        tiny_config(**changes)
    if changes != changes | {"layer_norm_epsilon": float("nan")}:
        (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_json() | changes))
        with pytest.raises(ValueError, match=f"config.json: GPT2Config: {message}"):
            GPT2Config.from_folder(tmp_path)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().n_layer = 3  # type: ignore[misc]


UNUSUAL = dict(
    n_inner=40,
    layer_norm_epsilon=3e-4,
    activation_function="gelu",
    scale_attn_weights=False,
    scale_attn_by_inverse_layer_idx=True,
    eos_token_id=5,
)


@pytest.mark.parametrize("changes", [{}, UNUSUAL])
def test_written_and_read_again(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(**changes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json("bfloat16")))
    assert GPT2Config.from_folder(tmp_path) == config


@pytest.mark.parametrize("changes", [{}, UNUSUAL])
def test_transformers_reads_what_we_write_and_writes_what_we_read(changes: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny_config(**changes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json("bfloat16")))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "GPT2Config" and str(theirs.dtype).endswith("bfloat16")
    for field in dataclasses.fields(config):
        assert getattr(theirs, field.name) == getattr(config, field.name), field.name
    theirs.save_pretrained(tmp_path / "theirs")
    assert GPT2Config.from_folder(tmp_path / "theirs") == config


def read(folder: Path, **content: Any) -> GPT2Config:
    raw = {**tiny_config().to_json(), **content}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return GPT2Config.from_folder(folder)


def test_older_and_sparser_files(tmp_path: Path) -> None:
    assert read(tmp_path, n_positions=..., n_ctx=32).n_positions == 32
    assert read(tmp_path, n_positions=16, n_ctx=32).n_positions == 16
    assert read(tmp_path, eos_token_id=...).eos_token_id == 287  # the last token, as in the published vocabulary
    assert read(tmp_path, eos_token_id=None).eos_token_id == 287
    assert read(tmp_path, eos_token_id=[3, 4]).eos_token_id == 3
    assert read(tmp_path, model_type=..., n_inner=None, unknown_option=1) == tiny_config()
    (tmp_path / "config.json").write_text("{}")
    assert GPT2Config.from_folder(tmp_path) == PRESETS["gpt2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dict(model_type="llama"), "model_type must be 'gpt2', got 'llama'"),
        (dict(add_cross_attention=True), "add_cross_attention is not supported"),
        (dict(is_encoder_decoder=True), "is_encoder_decoder is not supported"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings must be true"),
        (dict(vocab_size="many", eos_token_id=...), "config.json: "),
        (dict(eos_token_id=[]), r"eos_token_id must lie in 0..287, got \[\]"),
    ],
)
def test_folders_that_hold_another_model_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"n_layer": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "list"),
    ],
    ids=["half", "not UTF-8", "too deep", "too many digits", "a list"],
)
def test_files_that_are_no_json_object_are_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        GPT2Config.from_folder(tmp_path)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: no config.json"):
        GPT2Config.from_folder(tmp_path)


def test_presets_win_over_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "mine"):
        (tmp_path / name).mkdir()
    assert preset_or_folder("gpt2", "test") == "gpt2"
    assert preset_or_folder("./gpt2", "test") == Path("gpt2")
    assert preset_or_folder(Path("gpt2"), "test") == Path("gpt2")  # Path drops the "./"
    assert preset_or_folder(str(tmp_path / "mine"), "test") == tmp_path / "mine"
    assert preset_or_folder("mine/", "test") == Path("mine")
    assert preset_or_folder(".", "test") == Path(".")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", r"test: 'mine' must be a preset \(gpt2, .*storybook\).*folder of that name write './mine'"),
        ("absent", r"test: 'absent' must be a preset \(gpt2, .*storybook\) or a folder's path$"),
        ("", r"test: '' must be a preset"),
        ("./absent", "test: './absent' is not a folder$"),
        ("./file", "test: './file' is not a folder, but a file"),
        (Path("absent"), "test: 'absent' is not a folder$"),
        (None, "test: expected a preset's name or a folder's path, got None"),
        (3, "test: expected a preset's name or a folder's path, got 3"),
    ],
)
def test_names_of_nothing(name: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        preset_or_folder(name, "test")
