"""Reading and writing model folders: every format, and every way a folder can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_checkpoint, random_tensors, random_tokens, tiny_config, transformers_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt2 import weights
from gpt2.config import PRESETS, GPT2Config
from gpt2.reference import ReferenceGPT2

CONFIG = tiny_config()


def load(folder: Path, **options: Any) -> ReferenceGPT2:
    return weights.load(ReferenceGPT2, folder, **{"device": "cpu"} | options)


def assert_same(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """`model` holds exactly `tensors`, whose matrices are (in, out)."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, tensor in tensors.items():
        turned = tensor.T if re.search(r"c_(attn|proj|fc)\.weight$", name) else tensor
        assert parameters[name].dtype == dtype, name
        assert torch.equal(parameters[name], turned.to(dtype)), name


# Formats: one writer each. Names may or may not have the prefix.


def write_safetensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def write_bin(folder: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def write_old_bin(folder: Path, tensors: dict[str, Tensor]) -> None:
    """The format of torch before 1.6, and of the published pytorch_model.bin files."""
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def shards(tensors: dict[str, Tensor], stem: str, suffix: str) -> dict[str, dict[str, Tensor]]:
    names = sorted(tensors)
    files = [f"{stem}-{i + 1:05}-of-00003.{suffix}" for i in range(3)]
    return {file: {name: tensors[name] for name in names[i::3]} for i, file in enumerate(files)}


def write_index(path: Path, parts: dict[str, dict[str, Tensor]]) -> None:
    weight_map = {name: file for file, part in parts.items() for name in part}
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_sharded_safetensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    parts = shards(tensors, "model", "safetensors")
    for file, part in parts.items():
        save_file({name: t.contiguous() for name, t in part.items()}, folder / file)
    write_index(folder / "model.safetensors.index.json", parts)


def write_sharded_bin(folder: Path, tensors: dict[str, Tensor]) -> None:
    parts = shards(tensors, "pytorch_model", "bin")
    for file, part in parts.items():
        torch.save(part, folder / file)
    write_index(folder / "pytorch_model.bin.index.json", parts)


WRITERS = [write_safetensors, write_sharded_safetensors, write_bin, write_old_bin, write_sharded_bin]
Writer = Callable[[Path, dict[str, Tensor]], None]


def write_config(folder: Path, config: GPT2Config = CONFIG) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("extras", [False, True])
def test_formats(write: Writer, prefix: str, extras: bool, tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    stored = {prefix + name: tensor for name, tensor in tensors.items()}
    if extras:  # further tensors in older files
        for layer in range(2):
            stored[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
            stored[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        stored["lm_head.weight"] = tensors["wte.weight"].clone()
    write_config(tmp_path)
    write(tmp_path, stored)
    model = load(tmp_path)
    assert_same(model, tensors)
    assert not model.training and all(p.requires_grad and p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_what_transformers_writes(options: dict[str, Any], tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "random", CONFIG)
    transformers_model(folder).save_pretrained(tmp_path / "theirs", **options)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == bool(options)
    assert_same(load(tmp_path / "theirs"), random_tensors(CONFIG))


def test_what_transformers_writes_without_a_head(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "random", CONFIG)
    transformers_model(folder).transformer.save_pretrained(tmp_path / "theirs")  # a GPT2Model: no prefix
    assert_same(load(tmp_path / "theirs"), random_tensors(CONFIG))


def test_safetensors_win_over_a_pickle(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, CONFIG, seed=1)
    write_bin(tmp_path, random_tensors(CONFIG, seed=2))
    assert_same(load(tmp_path), random_tensors(CONFIG, seed=1))


# A model class of any kind, built without random numbers.


class Buffered(ReferenceGPT2):
    """A class with buffers that no checkpoint holds, and a second name for the tied matrix."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.register_buffer("angles", torch.arange(8) / 8, persistent=False)
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril(), persistent=False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight


def test_buffers_are_right_and_ties_stay(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, CONFIG)
    with torch.device("meta"):  # set by the caller; parameters and buffers are real nevertheless
        model = weights.load(Buffered, folder, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(model.angles, (torch.arange(8) / 8).bfloat16())
    assert torch.equal(model.mask, torch.ones(4, 4, dtype=torch.bool).tril())
    assert model.lm_head.weight is model.wte.weight
    assert_same(model, random_tensors(CONFIG), torch.bfloat16)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, CONFIG)
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    torch.nn.init.normal_(fresh := torch.zeros(8))  # and random numbers still work for everybody else
    assert fresh.std() > 0


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path: Path) -> None:
    """safetensors maps the file into memory: a file changed in place must not change the model."""
    folder = random_checkpoint(tmp_path, CONFIG)
    model = load(folder)
    size = (folder / "model.safetensors").stat().st_size
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\0" * size)
    assert_same(model, random_tensors(CONFIG))


def test_gradients_flow(tmp_path: Path) -> None:
    model = load(random_checkpoint(tmp_path, CONFIG))
    model(random_tokens(CONFIG, 1, 5)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# dtype and device.


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(stored: torch.dtype, asked: torch.dtype | None, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, CONFIG, dtype=stored)
    rounded = {name: tensor.to(stored) for name, tensor in random_tensors(CONFIG).items()}
    assert_same(load(folder, dtype=asked), rounded, asked or stored)


@pytest.mark.parametrize("kinds", [(torch.float16, torch.bfloat16), (torch.float64,)])
def test_mixed_and_double_checkpoints_are_float32(kinds: tuple[torch.dtype, ...], tmp_path: Path) -> None:
    tensors = {name: t.to(kinds[i % len(kinds)]) for i, (name, t) in enumerate(random_tensors(CONFIG).items())}
    write_config(tmp_path)
    write_safetensors(tmp_path, tensors)
    assert_same(load(tmp_path), tensors, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "float16"])
def test_other_dtypes_are_refused(dtype: Any, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=f"dtype must be one of torch.float32, .*, got {dtype!r}"):
        load(folder, dtype=dtype)


def test_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_checkpoint(tmp_path, CONFIG)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    model = weights.load(ReferenceGPT2, folder)
    assert {p.device.type for p in model.parameters()} == {expected}
    assert_same(model.cpu(), random_tensors(CONFIG))
    with pytest.raises(ValueError, match="^from_pretrained: device must be .* PyTorch knows, .*, got 'gpu'$"):
        load(folder, device="gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="from_pretrained: device must exist, got 'cuda' with 0 GPUs"):
        load(folder, device="cuda")


# Every tensor is accounted for, in one error.


@pytest.mark.parametrize("write", WRITERS)
def test_all_that_does_not_fit_is_named_at_once(write: Writer, tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    del tensors["ln_f.bias"], tensors["h.1.mlp.c_fc.weight"]
    tensors["h.0.attn.c_attn.weight"] = tensors["h.0.attn.c_attn.weight"].T.contiguous()  # (out, in)
    tensors["h.2.ln_1.weight"] = torch.ones(32)
    tensors["lm_head.weight"] = tensors["wte.weight"] + 1e-6
    tensors["wpe.weight"] = torch.ones(64, 32, dtype=torch.int32)
    write_config(tmp_path)
    write(tmp_path, {f"transformer.{n}" if "head" not in n else n: tensor for n, tensor in tensors.items()})
    with pytest.raises(ValueError) as e:
        load(tmp_path)
    message = str(e.value)
    assert message.startswith(f"{tmp_path}: ") and "\n" not in message
    assert "2 missing: h.1.mlp.c_fc.weight (32, 128), ln_f.bias (32,)" in message
    assert "1 unknown: h.2.ln_1.weight (32,)" in message
    assert "1 of another shape: h.0.attn.c_attn.weight is (96, 32), must be (32, 96)" in message
    assert re.search(r"1 of a type that is not read: wpe.weight (I32|torch.int32)", message)
    assert "1 untied: lm_head.weight differs from wte.weight" in message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    write_config(tmp_path, tiny_config(n_layer=12))
    write_safetensors(tmp_path, random_tensors(CONFIG))
    with pytest.raises(ValueError, match=r"json: 120 missing: h\.2\.ln_1\.weight \(32,\), .*, \.\.\.$") as e:
        load(tmp_path)
    assert str(e.value).count("h.2.") == 4 and "h.3." not in str(e.value)


def test_a_number_of_blocks_that_cannot_be_listed_is_refused_at_once(tmp_path: Path) -> None:
    """A list of a thousand is fine; one of ten to the ninth would use up the memory."""
    for layers, message in ((1000, "11976 missing"), (10**9, "json: n_layer is 1000000000, and there are 28 tensors")):
        write_config(tmp_path, tiny_config(n_layer=layers))
        write_safetensors(tmp_path, random_tensors(CONFIG))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


@pytest.mark.parametrize("shape", [(288, 32), (288, 16), (287, 32)])
def test_an_untied_head_is_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["lm_head.weight"] = torch.zeros(shape)
    write_config(tmp_path)
    write_safetensors(tmp_path, tensors)
    with pytest.raises(ValueError, match="lm_head.weight differs from wte.weight"):
        load(tmp_path)


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    write_config(tmp_path)
    write_safetensors(tmp_path, tensors | {"transformer.ln_f.bias": torch.zeros(32)})
    with pytest.raises(ValueError, match="1 there twice: ln_f.bias"):
        load(tmp_path)


def test_a_config_of_another_size_is_noticed(tmp_path: Path) -> None:
    write_config(tmp_path, tiny_config(vocab_size=300))
    write_safetensors(tmp_path, random_tensors(CONFIG))
    with pytest.raises(ValueError, match=r"wte.weight is \(288, 32\), must be \(300, 32\)$"):
        load(tmp_path)


def test_no_model_is_built_for_a_folder_that_does_not_fit(tmp_path: Path) -> None:
    write_config(tmp_path, tiny_config(vocab_size=300))
    write_safetensors(tmp_path, random_tensors(CONFIG))
    with pytest.raises(ValueError):
        weights.load(lambda config: pytest.fail("built"), tmp_path)


# Damaged and hostile files.


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1])
@pytest.mark.parametrize("write", WRITERS)
def test_truncated_files_are_named(write: Writer, keep: float, tmp_path: Path) -> None:
    write_config(tmp_path)
    write(tmp_path, random_tensors(CONFIG))
    path = max(tmp_path.glob("*model*[ns]"), key=lambda p: (p.suffix != ".json", p.name))  # the last shard, or the file
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: truncated or corrupt"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"<html>not found</html>", bytes(range(256)) * 40, b"version https://git-lfs\n"])
def test_files_that_are_something_else_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: truncated or corrupt"):
        load(tmp_path)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("protocol", ["torch", "torch-old", 2, 4])
def test_a_pickle_that_runs_code_is_refused(protocol: Any, tmp_path: Path) -> None:
    write_config(tmp_path)
    content = random_tensors(CONFIG) | {"evil": Evil(tmp_path / "mark")}
    path = tmp_path / "pytorch_model.bin"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(Evil(tmp_path / "mark"), protocol))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "torch")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin: (holds \w+.mkdir, and nothing but tensors|truncated or co)"
    ):
        load(tmp_path)
    assert not (tmp_path / "mark").exists()
    if protocol == 2:  # the file does run its code where it is allowed to
        pickle.loads(path.read_bytes())
        assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("content", "got"),
    [([torch.ones(2)], "list"), ({"model": {"wte.weight": torch.ones(2)}, "step": 3}, "dict under 'model'")],
)
def test_a_pickle_of_something_else_is_refused(content: Any, got: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pytorch_model.bin: expected a dict of tensors, got {got}"):
        load(tmp_path)


@pytest.mark.parametrize("write", [write_sharded_safetensors, write_sharded_bin])
def test_absent_shards_are_named(write: Writer, tmp_path: Path) -> None:
    write_config(tmp_path)
    write(tmp_path, random_tensors(CONFIG))
    gone = next(tmp_path.glob("*00002-of-00003*"))
    gone.unlink()
    with pytest.raises(ValueError, match=f"index.json: 1 of 3 shards are not there: {gone.name}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "..\\x", "C:x", "..", "", 3, None, []])
def test_shards_outside_the_folder_are_refused(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_config(folder)
    write_safetensors(tmp_path, random_tensors(CONFIG))  # what "../model.safetensors" would read
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(
        ValueError, match="index.json: (a shard must be a file name in the same folder|truncated or cor)"
    ):
        load(folder)


INDICES = [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("content", INDICES, ids=lambda content: repr(content[:20]))
def test_an_index_that_is_none_is_named(content: bytes, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors.index.json: truncated or corrupt"):
        load(tmp_path)


def test_an_index_of_nothing(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="28 missing"):
        load(tmp_path)


def test_folders_without_weights_or_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: no config.json"):
        load(tmp_path)
    write_config(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: no weights there"):
        load(tmp_path)


# Names.


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("storybook", "mine"):
        random_checkpoint(tmp_path / name, CONFIG)
    assert weights.resolve("storybook") == Path(weights.__file__).parent / "storybook"
    assert weights.resolve("./storybook") == Path("storybook")
    assert weights.resolve(Path("storybook")) == Path("storybook")
    assert load(Path("mine")).config == load("./mine").config == CONFIG  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'mine' must be a preset \(gpt2, gpt2-medium, .*\).*write './mine'"):
        weights.resolve("mine")
    with pytest.raises(ValueError, match=r"'gpt3' must be a preset \(gpt2, gpt2-medium, [^;]*$"):
        weights.resolve("gpt3")
    with pytest.raises(ValueError, match="'./gpt3' is not a folder"):
        weights.resolve("./gpt3")


def test_storybook_is_whole() -> None:
    if not (weights.STORYBOOK / "model.safetensors").is_file():
        pytest.skip("gpt2/storybook/model.safetensors is not there")
    model = weights.load(ReferenceGPT2, "storybook", device="cpu", dtype=torch.float32)
    assert model.config == PRESETS["storybook"]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A huggingface_hub without a network: `hub.answer` is the folder, or the exception."""
    state = types.SimpleNamespace(calls=[], answer=None)

    def snapshot_download(repository: str, **options: Any) -> str:
        state.calls.append((repository, options))
        if isinstance(state.answer, Exception):
            raise state.answer
        return str(state.answer)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return state


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_published_models_come_from_the_hub(name: str, hub: types.SimpleNamespace, tmp_path: Path) -> None:
    hub.answer = random_checkpoint(tmp_path, CONFIG)
    assert_same(weights.load(ReferenceGPT2, name, device="cpu"), random_tensors(CONFIG))
    [(repository, options)] = hub.calls
    assert repository == f"openai-community/{name}"
    assert not any("bin" in pattern for pattern in options["allow_patterns"])


def test_a_failed_download_is_one_clear_error(hub: types.SimpleNamespace) -> None:
    hub.answer = ConnectionError("offline mode is on\nand much advice")
    with pytest.raises(
        ValueError, match=r"'gpt2-xl' \(openai-community/gpt2-xl\).*ConnectionError: offline mode is on$"
    ):
        weights.resolve("gpt2-xl")


def test_the_real_hub_package_says_when_it_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'gpt2' \(openai-community/gpt2\) could not be downloaded: \w+: .+"):
        weights.resolve("gpt2")


def test_without_the_hub_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"'gpt2-large'.*pip install gpt2-kernels\[hub\]"):
        weights.resolve("gpt2-large")


# Writing.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_we_write_is_what_we_read(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(random_checkpoint(tmp_path / "random", CONFIG), dtype=dtype)
    weights.save(model, CONFIG, tmp_path / "new" / "folder")
    again = load(tmp_path / "new" / "folder", dtype=dtype)
    assert again.config == CONFIG
    assert_same(again, random_tensors(CONFIG), dtype)
    raw = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert f"torch.{raw['torch_dtype']}" == str(dtype)


def test_what_we_write_is_what_transformers_writes(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "random", CONFIG)
    transformers_model(folder).save_pretrained(tmp_path / "theirs")
    weights.save(load(folder), CONFIG, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers 4 refuses the file


@pytest.mark.parametrize(
    "changes", [{}, dict(n_inner=40, scale_attn_by_inverse_layer_idx=True, layer_norm_epsilon=1e-3)]
)
def test_transformers_loads_what_we_write(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(**changes)
    model = load(random_checkpoint(tmp_path / "random", config), dtype=torch.float64)
    weights.save(model, config, tmp_path / "ours")
    theirs = transformers_model(tmp_path / "ours", dtype="auto")  # asserts that no key is missing or unexpected
    assert theirs.dtype == torch.float64
    tokens = random_tokens(config, 2, 30)
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() <= 1e-10


def test_a_model_with_a_second_name_for_the_tied_matrix_is_written_once(tmp_path: Path) -> None:
    model = weights.load(Buffered, random_checkpoint(tmp_path / "random", CONFIG), device="cpu")
    weights.save(model, CONFIG, tmp_path / "ours")
    assert_same(load(tmp_path / "ours"), random_tensors(CONFIG))


def test_a_failed_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (load(random_checkpoint(tmp_path / str(seed), CONFIG, seed=seed)) for seed in (1, 2))
    weights.save(old, CONFIG, tmp_path / "model")

    def fail(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(weights, "save_file", fail)
        weights.save(new, CONFIG, tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    assert_same(load(tmp_path / "model"), random_tensors(CONFIG, seed=1))
    weights.save(new, CONFIG, tmp_path / "model")  # and a later one replaces them
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    assert_same(load(tmp_path / "model"), random_tensors(CONFIG, seed=2))


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_others_may_read_what_we_write(tmp_path: Path) -> None:
    """safetensors writes files that only the owner may read, which makes a shared model folder useless."""
    weights.save(ReferenceGPT2(CONFIG), CONFIG, tmp_path / "model")
    modes = {stat.S_IMODE((tmp_path / "model" / n).stat().st_mode) for n in ("config.json", "model.safetensors")}
    (tmp_path / "plain").touch()
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_models_that_are_not_of_the_config_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not those of the config: wte.weight \(288, 32\)"):
        weights.save(ReferenceGPT2(CONFIG), tiny_config(vocab_size=300), tmp_path / "model")
    with pytest.raises(ValueError, match=r"not those of the config: h.2.ln_1.weight missing, .*, \.\.\.$"):
        weights.save(ReferenceGPT2(CONFIG), tiny_config(n_layer=3), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        weights.save(ReferenceGPT2(CONFIG), CONFIG, tmp_path / "file")


@pytest.mark.parametrize("config", [CONFIG, tiny_config(n_inner=40, n_layer=3)])
def test_shapes_are_those_of_the_model(config: GPT2Config) -> None:
    model = ReferenceGPT2(config)
    assert weights.shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}


# --- nanoGPT's checkpoints ------------------------------------------------------------------------------------------


def nanogpt_checkpoint(path: Path, vocab_size: int = 60, *, bias: bool = True, prefix: str = "", **changes: Any) -> Any:
    """Writes what nanoGPT's train.py saves, from a model in nanoGPT's own code; returns that model."""
    import nanogpt

    arguments = dict(n_layer=2, n_head=2, n_embd=32, block_size=48, bias=bias, vocab_size=vocab_size, dropout=0.0)
    torch.manual_seed(0)
    model = nanogpt.GPT(**arguments, flash=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    content = {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95)}]},
        "model_args": arguments,
        "iter_num": 3,
        "best_val_loss": torch.tensor(4.2),
        "config": {"dataset": "openwebtext", "compile": True, "out_dir": "out"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | changes, path)
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])  # of a compiled model
@pytest.mark.filterwarnings("ignore:.*is not GPT-2's")
def test_nanogpt_logits(tmp_path: Path, bias: bool, prefix: str) -> None:
    """From the file or its folder: the logits of nanoGPT's own code, whose GELU is the erf form."""
    theirs = nanogpt_checkpoint(tmp_path / "out" / "ckpt.pt", bias=bias, prefix=prefix)
    tokens = torch.randint(60, (2, 11))
    for path in (tmp_path / "out", tmp_path / "out" / "ckpt.pt"):
        model = ReferenceGPT2.from_pretrained(path, device="cpu")
        assert model.config.activation_function == "gelu" and model.config.n_positions == 48
        torch.testing.assert_close(model(tokens), theirs(tokens)[0], rtol=1e-5, atol=1e-5)
    assert weights.config_of(tmp_path / "out") == model.config


def test_nanogpt_padded_vocabulary(tmp_path: Path) -> None:
    """Rows past 50257 stand for no token: they are dropped, so never generated; the tokenizer is GPT-2's."""
    theirs = nanogpt_checkpoint(tmp_path / "ckpt.pt", 50304)
    model = ReferenceGPT2.from_pretrained(tmp_path, device="cpu")
    assert model.config.vocab_size == 50257 and model.config.eos_token_id == 50256
    tokens = torch.randint(50257, (1, 5))
    torch.testing.assert_close(model(tokens), theirs(tokens)[0][..., :50257], rtol=1e-5, atol=1e-5)
    from gpt2 import load_tokenizer

    try:
        expected = load_tokenizer("gpt2")
    except ValueError:
        pytest.skip("GPT-2's vocabulary is not here")
    assert load_tokenizer(tmp_path) is expected and load_tokenizer(tmp_path / "ckpt.pt") is expected


def test_nanogpt_of_another_vocabulary(tmp_path: Path) -> None:
    nanogpt_checkpoint(tmp_path / "ckpt.pt", 65)
    with pytest.warns(UserWarning, match="vocabulary of 65 is not GPT-2's.*ignore_eos"):
        assert ReferenceGPT2.from_pretrained(tmp_path, device="cpu").config.vocab_size == 65
    from gpt2 import load_tokenizer

    with pytest.raises(ValueError, match="vocabulary must be GPT-2's, since there is no tokenizer beside it, got 65"):
        load_tokenizer(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is not GPT-2's")
def test_nanogpt_checkpoints_that_are_broken(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    good = nanogpt_checkpoint(path).state_dict()
    arguments = dict(n_layer=2, n_head=2, n_embd=32, block_size=48, bias=True, vocab_size=60)
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(model_args=None), "expected nanoGPT's dict with model and model_args"),
        (dict(model_args={k: v for k, v in arguments.items() if k != "n_head"}), "model_args has no n_head"),
        (dict(model_args=arguments | {"n_head": 3}), "n_embd must be a multiple of n_head"),
        (dict(model_args=arguments | {"n_layer": 3}), "12 missing: h.2.ln_1.weight"),
        (dict(model_args=arguments | {"n_layer": 10**9, "bias": False}), "n_layer is 1000000000, and there are"),
        (dict(model={k: v for k, v in good.items() if "ln_f" not in k}), "2 missing: ln_f.weight"),
        (dict(model=good | {"lm_head.weight": good["lm_head.weight"] + 1}), "1 untied"),
        (dict(model=good | {"transformer.h.0.gate.weight": torch.zeros(1)}), "1 unknown: h.0.gate.weight"),
        (dict(model=good | {"transformer.ln_f.weight": 3}), "expected tensors under 'model', got int"),
    ]
    for changes, message in cases:
        nanogpt_checkpoint(path, **changes)
        with pytest.raises(ValueError, match=re.escape(message)):
            ReferenceGPT2.from_pretrained(tmp_path, device="cpu")
    nanogpt_checkpoint(path, config={"run": types.SimpleNamespace()})
    with pytest.raises(ValueError, match="nothing but tensors is read from a pickle"):
        ReferenceGPT2.from_pretrained(path, device="cpu")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        ReferenceGPT2.from_pretrained(path, device="cpu")
