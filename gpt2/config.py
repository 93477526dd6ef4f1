"""The shape of a GPT-2: one frozen dataclass, and the sizes that exist."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Everything that determines the shape of a GPT-2 and the arithmetic of its forward pass.

    The defaults are the 124M model of the paper (Radford et al., 2019, "Language Models are Unsupervised
    Multitask Learners"). Field names are those of a Hugging Face `config.json`.
    """

    vocab_size: int = 50257  # tokens: 256 bytes + 50,000 merges + <|endoftext|>
    n_positions: int = 1024  # longest sequence; positions are learned, so nothing exists beyond it
    n_embd: int = 768  # width of the residual stream
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads; n_embd / n_head is the head dimension, 64 in every published size
    n_inner: int | None = None  # width of the MLP; None means 4 * n_embd
    layer_norm_epsilon: float = 1e-5  # added to the variance
    activation_function: str = "gelu_new"  # "gelu_new" is GELU's tanh form, which GPT-2 uses; "gelu" the erf form
    scale_attn_weights: bool = True  # divide the scores by sqrt(head dimension)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the layer's number, counted from 1
    eos_token_id: int = 50256  # <|endoftext|>: ends a text, and starts one that has no prompt

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"GPT2Config: {name} must be a positive integer, got {value!r}")
        if self.n_inner is not None and (type(self.n_inner) is not int or self.n_inner < 1):
            raise ValueError(f"GPT2Config: n_inner must be a positive integer or None, got {self.n_inner!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"GPT2Config: n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        epsilon = self.layer_norm_epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon <= _MOST:
            raise ValueError(f"GPT2Config: layer_norm_epsilon must be a positive number, got {epsilon!r}")
        for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"GPT2Config: {name} must be true or false, got {getattr(self, name)!r}")
        if self.activation_function not in _ACTIVATIONS:
            raise ValueError(
                f"GPT2Config: activation_function must be one of {sorted(_ACTIVATIONS)}, "
                f"got {self.activation_function!r}"
            )
        if type(self.eos_token_id) is not int or not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(
                f"GPT2Config: eos_token_id must lie in 0..{self.vocab_size - 1}, got {self.eos_token_id!r}"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def activation(self) -> str:
        """The `activation` of `gpt2_kernels.linear`: "gelu_tanh" or "gelu"."""
        return _ACTIVATIONS[self.activation_function]

    def attention_scale(self, layer: int) -> float:
        """The factor on the scores q.k of block `layer` (counted from 0)."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @property
    def num_parameters(self) -> int:
        """Weights in the model; the output embedding is the input embedding, counted once."""
        c, inner = self.n_embd, self.mlp_width
        block = (3 * c * c + 3 * c) + (c * c + c) + (2 * c * inner + inner + c) + 4 * c
        return (self.vocab_size + self.n_positions) * c + self.n_layer * block + 2 * c

    @classmethod
    def from_folder(cls, folder: str | Path) -> GPT2Config:
        """Read `config.json` of a Hugging Face folder. Raises ValueError if it is not a plain GPT-2."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder}: no config.json there, so not a model folder") from None
        except (ValueError, RecursionError) as e:  # not JSON, not UTF-8, too many digits; too deep
            raise ValueError(f"{path}: not valid JSON ({e})") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
        if raw.get("model_type", "gpt2") != "gpt2":
            raise ValueError(f"{path}: model_type must be 'gpt2', got {raw['model_type']!r}")
        for option in ("add_cross_attention", "is_encoder_decoder"):
            if raw.get(option):
                raise ValueError(f"{path}: {option} is not supported (this is a decoder alone)")
        if not raw.get("tie_word_embeddings", True):
            raise ValueError(
                f"{path}: tie_word_embeddings must be true: GPT-2's output embedding is its input embedding"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        values = {key: value for key, value in raw.items() if key in known and (value is not None or key == "n_inner")}
        if "n_ctx" in raw:  # the older name of n_positions
            values.setdefault("n_positions", raw["n_ctx"])
        if isinstance(values.get("eos_token_id"), list) and values["eos_token_id"]:
            values["eos_token_id"] = values["eos_token_id"][0]
        try:
            values.setdefault("eos_token_id", values.get("vocab_size", cls.vocab_size) - 1)
            return cls(**values)
        except (TypeError, ValueError) as e:
            raise ValueError(f"{path}: {e}") from None

    def to_json(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        fields = dataclasses.asdict(self)
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            **fields,
            "n_ctx": self.n_positions,
            "bos_token_id": self.eos_token_id,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "torch_dtype": dtype,
        }


_MOST = sys.float_info.max  # an integer may be larger
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}

PRESETS: dict[str, GPT2Config] = {
    "gpt2": GPT2Config(n_layer=12, n_embd=768, n_head=12),  # 124M parameters
    "gpt2-medium": GPT2Config(n_layer=24, n_embd=1024, n_head=16),  # 355M
    "gpt2-large": GPT2Config(n_layer=36, n_embd=1280, n_head=20),  # 774M
    "gpt2-xl": GPT2Config(n_layer=48, n_embd=1600, n_head=25),  # 1.5B
    # The one that ships with this package: GPT-2's architecture in miniature, with its own vocabulary.
    "storybook": GPT2Config(vocab_size=4096, n_layer=5, n_embd=256, n_head=4, eos_token_id=4095),
}


def preset_or_folder(name_or_path: str | os.PathLike[str], caller: str) -> str | Path:
    """A preset's name, unchanged, or the Path of an existing folder; ValueError for anything else.

    A preset's name wins over a folder of the same name, since a clone of this package holds a folder `gpt2`. So a
    folder's name needs a path separator ("./gpt2", "models/mine"); a Path object is always a folder. A `*.pt` file,
    nanoGPT's checkpoint, is accepted too.
    """
    if isinstance(name_or_path, str):
        name = name_or_path
        if name in PRESETS:
            return name
        if name not in (".", "..") and "/" not in name and os.sep not in name:
            hint = f"; for the folder of that name write './{name}'" if name and Path(name).is_dir() else ""
            raise ValueError(f"{caller}: {name!r} must be a preset ({', '.join(PRESETS)}) or a folder's path{hint}")
    elif not isinstance(name_or_path, os.PathLike):
        raise ValueError(f"{caller}: expected a preset's name or a folder's path, got {name_or_path!r}")
    path = Path(name_or_path)
    if not path.is_dir() and not (path.suffix == ".pt" and path.is_file()):
        raise ValueError(f"{caller}: {str(name_or_path)!r} is not a folder" + (", but a file" if path.exists() else ""))
    return path
