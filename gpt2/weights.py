"""Model folders in Hugging Face's format: found, read and written, with every tensor accounted for.

A folder holds `config.json` and the weights, in the first of these that it has:

    model.safetensors                   one file
    model.safetensors.index.json        several, named in the index
    pytorch_model.bin                   one pickle, from which only tensors are read
    pytorch_model.bin.index.json        several of them

The names inside are those of the model's parameters (`h.0.attn.c_attn.weight`), with or without `transformer.` before
them. Matrices of the blocks are stored (in, out), as the original TensorFlow code had them, where `nn.Linear` keeps
(out, in); they are transposed on the way in and out.

nanoGPT's `ckpt.pt` is read too, given as the file or as its folder. Its matrices are (out, in). Missing biases become
zeros, the prefix `_orig_mod.` that torch.compile puts before names is removed, and the surplus rows of a vocabulary
padded from 50257 to a multiple of 64, which stand for no token, are left out.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpt2.config import GPT2Config, preset_or_folder
from gpt2.device import device_of

Model = TypeVar("Model", bound=nn.Module)

STORYBOOK = Path(__file__).parent / "storybook"  # the model that ships with the package
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_PREFIX = "transformer."
_HEAD = "lm_head.weight"  # the output embedding, if a checkpoint repeats the input embedding under this name
_STORED_IN_OUT = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
_MASK = re.compile(r"^h\.\d+\.attn\.(masked_)?bias$")  # the causal mask, which old checkpoints carry along
_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_TOKENS = GPT2Config().vocab_size  # of GPT-2's encoding, which nanoGPT pads
_LISTED = 1000  # blocks that cost nothing to list
_NAMED_AT_MOST = 4  # tensors of each kind that an error names


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a model: a preset's name, or the path of a local folder.

    "storybook" is in the package; the four published sizes are downloaded once into the Hugging Face cache. A preset's
    name wins over a folder of the same name, so a folder is given with a path separator ("./gpt2") or as a Path.
    """
    found = preset_or_folder(name_or_path, "from_pretrained")
    if isinstance(found, Path):
        return found
    return STORYBOOK if found == "storybook" else _download(found)


def config_of(name_or_path: str | os.PathLike[str]) -> GPT2Config:
    """The shape of a preset, of a folder, or of a nanoGPT checkpoint."""
    path = resolve(name_or_path)
    checkpoint = nanogpt_checkpoint(path)
    return GPT2Config.from_folder(path) if checkpoint is None else nanogpt_config(checkpoint)


def load(
    cls: Callable[[GPT2Config], Model],
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """`cls(config)` with the weights of a preset or folder, in eval mode.

    `cls` is any module whose parameters are named and shaped as `shapes(config)` says. `device` is as for
    `gpt2.device.device_of`; `dtype` None is that of the file (float32 where the file mixes several, or holds float64).

    Raises ValueError naming the file or the tensors, and loads nothing, if anything is missing, unknown, of another
    shape, truncated, or refused.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"from_pretrained: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    target = device_of(device, "from_pretrained: device")
    folder = resolve(name_or_path)
    checkpoint = nanogpt_checkpoint(folder)
    if checkpoint is None:
        config = GPT2Config.from_folder(folder)
        stored = _match(_open(folder), config, folder)
    else:
        config, tensors = _open_nanogpt(checkpoint)
        stored = _match(tensors, config, checkpoint)
    if dtype is None:
        found = {tensor.dtype for tensor in stored.values()}
        dtype = next((kind for kind in DTYPES[:3] if found == {kind}), torch.float32)

    # The model is built on the CPU without random numbers: its parameters are untouched memory, which costs nothing.
    # Each is then replaced on its final device, so that at most one tensor exists twice.
    with _NoRandomStart(), torch.device("cpu"):
        model = cls(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = stored[name].read()
            loaded = torch.empty(parameter.shape, dtype=dtype, device=target)
            parameter.data = loaded.copy_(tensor.T if _STORED_IN_OUT.search(name) else tensor)
    return model.to(device=target, dtype=dtype).eval()  # what is left: buffers


def save(model: nn.Module, config: GPT2Config, folder: str | os.PathLike[str]) -> None:
    """Write `config.json` and `model.safetensors`, as transformers' GPT2LMHeadModel writes and reads them.

    Files appear under their names only once complete; existing ones are replaced.
    """
    parameters = dict(model.named_parameters())
    expected = shapes(config)
    have = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if have != expected:
        wrong = [f"{n} {have.get(n, 'missing')}" for n in {**expected, **have} if have.get(n) != expected.get(n)]
        raise ValueError(f"save_pretrained: parameters are not those of the config: {_few(wrong)}")
    tensors = {}
    for name, parameter in parameters.items():
        if parameter.dtype not in DTYPES:
            raise ValueError(f"save_pretrained: {name} must be floating point, got {parameter.dtype}")
        tensor = parameter.detach().cpu()
        tensors[_PREFIX + name] = (tensor.T if _STORED_IN_OUT.search(name) else tensor).contiguous()

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_pretrained: {folder} is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    drafts = {name: folder / f".{name}.{os.getpid()}.tmp" for name in ("model.safetensors", "config.json")}
    try:
        dtype = str(parameters["wte.weight"].dtype).removeprefix("torch.")
        drafts["config.json"].write_text(json.dumps(config.to_json(dtype), indent=2) + "\n", encoding="utf-8")
        save_file(tensors, drafts["model.safetensors"], metadata={"format": "pt"})
        shutil.copymode(drafts["config.json"], drafts["model.safetensors"])  # safetensors lets only the owner read
        for name, draft in drafts.items():
            draft.replace(folder / name)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of a GPT-2 and its shape, matrices (out, in)."""
    c, inner = config.n_embd, config.mlp_width
    block = {
        "ln_1.weight": (c,),
        "ln_1.bias": (c,),
        "attn.c_attn.weight": (3 * c, c),
        "attn.c_attn.bias": (3 * c,),
        "attn.c_proj.weight": (c, c),
        "attn.c_proj.bias": (c,),
        "ln_2.weight": (c,),
        "ln_2.bias": (c,),
        "mlp.c_fc.weight": (inner, c),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (c, inner),
        "mlp.c_proj.bias": (c,),
    }
    return {
        "wte.weight": (config.vocab_size, c),
        "wpe.weight": (config.n_positions, c),
        **{f"h.{layer}.{name}": shape for layer in range(config.n_layer) for name, shape in block.items()},
        "ln_f.weight": (c,),
        "ln_f.bias": (c,),
    }


class _NoRandomStart(TorchFunctionMode):
    """Modules built inside leave random parameters uninitialised: filling 1.5 billion takes half a minute.

    Constants and buffers are filled as usual.
    """

    SKIPPED = frozenset(
        "normal_ uniform_ trunc_normal_ kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_".split()
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.SKIPPED:  # torch.nn.init.normal_(tensor=...) and Tensor.normal_
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"from_pretrained: {name!r} comes from the Hugging Face hub, which needs `pip install gpt2-kernels[hub]`; "
            "a local folder and 'storybook' do not"
        ) from None
    repository = f"openai-community/{name}"
    try:
        wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as e:  # from any library underneath: no connection, no disk space, a proxy's refusal
        raise ValueError(f"from_pretrained: {name!r} ({repository}) could not be downloaded: {_reason(e)}") from e


class _Stored(NamedTuple):
    """A tensor in a file, known by its header and read on demand."""

    name: str  # without prefix
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a str if we do not read that type
    read: Callable[[], Tensor]


def _open(folder: Path) -> list[_Stored]:
    """All tensors of a folder's weights, except the mask buffers."""
    for stem, suffix, reader in (("model", "safetensors", _open_safetensors), ("pytorch_model", "bin", _open_bin)):
        if (folder / f"{stem}.{suffix}").is_file():
            paths = [folder / f"{stem}.{suffix}"]
        elif (folder / f"{stem}.{suffix}.index.json").is_file():
            paths = _shards(folder / f"{stem}.{suffix}.index.json")
        else:
            continue
        return [tensor for path in paths for tensor in reader(path) if not _MASK.match(tensor.name)]
    raise ValueError(f"{folder}: no weights there (model.safetensors or pytorch_model.bin, whole or with an index)")


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: truncated or corrupt: no JSON object with a weight_map of file names") from None
    for name in names:
        if not isinstance(name, str) or not name or name in (".", "..") or re.search(r"[/\\:\0]", name):
            raise ValueError(f"{index}: a shard must be a file name in the same folder, got {name!r}")
    if missing := sorted(name for name in names if not (index.parent / name).is_file()):
        raise ValueError(f"{index}: {len(missing)} of {len(names)} shards are not there: {_few(missing)}")
    return [index.parent / name for name in sorted(names)]


def _open_safetensors(path: Path) -> list[_Stored]:
    tensors = []
    try:
        file = safe_open(path, framework="pt")
        for key in file.keys():  # noqa: SIM118 - not a dict
            header = file.get_slice(key)
            dtype = header.get_dtype()
            read = functools.partial(file.get_tensor, key)
            name = key.removeprefix(_PREFIX)
            tensors.append(_Stored(name, tuple(header.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype), read))
    except SafetensorError as e:
        raise ValueError(f"{path}: truncated or corrupt: {_reason(e)}") from None
    return tensors


def _unpickle(path: Path) -> Any:
    """What torch.save wrote, if it is tensors, numbers, text and containers of them: nothing that could run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        if forbidden := re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(e)):
            raise ValueError(f"{path}: holds {forbidden[1]}, and nothing but tensors is read from a pickle") from None
        raise ValueError(f"{path}: truncated or corrupt, or no file of tensors that torch.save wrote") from None
    except (MemoryError, PermissionError):
        raise
    except Exception as e:  # struct.error, OverflowError, ...: what half a pickle raises depends on where it ends
        raise ValueError(f"{path}: truncated or corrupt: {_reason(e)}") from None


def _open_bin(path: Path) -> list[_Stored]:
    content = _unpickle(path)
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{path}: expected a dict of tensors, got {_describe(content)}")
    tensors = []
    for key, tensor in content.items():
        dtype = tensor.dtype if tensor.dtype in DTYPES else str(tensor.dtype)
        tensors.append(_Stored(str(key).removeprefix(_PREFIX), tuple(tensor.shape), dtype, tensor.detach))
    return tensors


def nanogpt_checkpoint(path: Path) -> Path | None:
    """The nanoGPT checkpoint that a path names: the file itself, or the `ckpt.pt` of a folder without config.json."""
    if path.is_file():
        return path
    inside = path / "ckpt.pt"
    return inside if inside.is_file() and not (path / "config.json").is_file() else None


def nanogpt_config(path: Path, content: Any = None) -> GPT2Config:
    """The shape a nanoGPT checkpoint declares, with a padded vocabulary cut to GPT-2's. `content`, if already read."""
    content = _unpickle(path) if content is None else content
    arguments = content.get("model_args") if isinstance(content, Mapping) else None
    if not isinstance(arguments, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{path}: expected nanoGPT's dict with model and model_args, got {type(content).__name__}")
    try:
        sizes = {name: arguments[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
        positions, vocab = arguments["block_size"], sizes["vocab_size"]
    except KeyError as e:
        raise ValueError(f"{path}: model_args has no {e.args[0]}") from None
    if isinstance(vocab, int) and _TOKENS < vocab < _TOKENS + 1024 and vocab % 64 == 0:
        sizes["vocab_size"] = vocab = _TOKENS
    try:
        # nanoGPT's GELU is the erf form. If the vocabulary is not GPT-2's, nothing says which token ends a text.
        return GPT2Config(**sizes, n_positions=positions, activation_function="gelu", eos_token_id=vocab - 1)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: {e}") from None


def _open_nanogpt(path: Path) -> tuple[GPT2Config, list[_Stored]]:
    """A nanoGPT checkpoint as if Hugging Face's library had stored it."""
    content = _unpickle(path)
    config = nanogpt_config(path, content)
    padded = content["model_args"]["vocab_size"]
    if config.vocab_size != _TOKENS:
        warnings.warn(
            f"{path}: the vocabulary of {padded} is not GPT-2's, and nothing says which token ends a text: token "
            f"{config.eos_token_id}, the last, is taken for it, unless generation is told ignore_eos=True",
            stacklevel=4,
        )
    tensors: list[_Stored] = []
    for key, tensor in content["model"].items():
        name = str(key).removeprefix("_orig_mod.").removeprefix(_PREFIX)
        if _MASK.match(name):
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: expected tensors under 'model', got {type(tensor).__name__} under {key!r}")
        if name in ("wte.weight", _HEAD) and len(tensor) == padded:
            tensor = tensor[: config.vocab_size]
        tensor = tensor.T if _STORED_IN_OUT.search(name) else tensor
        dtype = tensor.dtype if tensor.dtype in DTYPES else str(tensor.dtype)
        tensors.append(_Stored(name, tuple(tensor.shape), dtype, tensor.detach))
    if content["model_args"].get("bias") is False:  # of Linear and LayerNorm alike
        kind = tensors[0].dtype if tensors and isinstance(tensors[0].dtype, torch.dtype) else torch.float32
        for name, shape in _expected(config, tensors, path).items():
            if name.endswith(".bias"):
                tensors.append(_Stored(name, shape, kind, functools.partial(torch.zeros, shape, dtype=kind)))
    return config, tensors


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        key = next(k for k, value in content.items() if not isinstance(value, Tensor))
        return f"{type(content[key]).__name__} under {key!r}"
    return type(content).__name__


def _expected(config: GPT2Config, tensors: list[_Stored], folder: Path) -> dict[str, tuple[int, ...]]:
    """`shapes`, unless config.json asks for so many blocks that listing them would take minutes, or forever."""
    if config.n_layer > max(_LISTED, len(tensors)):
        asked = f"n_layer is {config.n_layer}, and there are {len(tensors)} tensors in all"
        raise ValueError(f"{folder}: the weights are not those of config.json: {asked}")
    return shapes(config)


def _match(tensors: list[_Stored], config: GPT2Config, folder: Path) -> dict[str, _Stored]:
    """The tensors by parameter name, if the two match one to one; otherwise one error that lists every mismatch."""
    expected = _expected(config, tensors, folder)
    found = {tensor.name: tensor for tensor in tensors}
    count = Counter(tensor.name for tensor in tensors)
    head = found.pop(_HEAD, None)
    problems = {
        "missing": [f"{name} {_stored_shape(name, shape)}" for name, shape in expected.items() if name not in found],
        "unknown": [f"{name} {tensor.shape}" for name, tensor in found.items() if name not in expected],
        "of another shape": [
            f"{name} is {found[name].shape}, must be {_stored_shape(name, shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != _stored_shape(name, shape)
        ],
        "of a type that is not read": [f"{t.name} {t.dtype}" for t in found.values() if t.dtype not in DTYPES],
        "there twice": [name for name, times in count.items() if times > 1],
    }
    if head and "wte.weight" in found and not _equal(head, found["wte.weight"]):
        problems["untied"] = [f"{_HEAD} differs from wte.weight, and GPT-2 has one matrix for both"]
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {kind}: {_few(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{folder}: the weights are not those of config.json: {listed}")
    return found


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if _STORED_IN_OUT.search(name) else shape


def _equal(a: _Stored, b: _Stored) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.read(), b.read())


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED_AT_MOST]) + (", ..." if len(names) > _NAMED_AT_MOST else "")


def _reason(e: BaseException) -> str:
    """The first line of an exception's text; libraries append pages of advice."""
    text = str(e).strip()
    return f"{type(e).__name__}: {text.splitlines()[0]}" if text else type(e).__name__
