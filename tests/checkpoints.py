"""Small random GPT-2s for tests, as folders in Hugging Face's format.

    folder = random_checkpoint(tmp_path / "model", tiny_config(n_layer=3), seed=1, tokenizer=True)
    model = ReferenceGPT2.from_pretrained(folder)
    theirs = transformers_model(folder)  # skips the test if transformers is not installed

Written with numpy and safetensors alone, so that it shares no line with `gpt2.weights`, which it tests.
"""

from __future__ import annotations

import base64
import itertools
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gpt2.config import GPT2Config


def tiny_config(**changes: Any) -> GPT2Config:
    """Two layers of width 32 with two heads, 288 tokens, the last of which ends a text, and 64 positions."""
    values: dict[str, Any] = dict(vocab_size=288, n_positions=64, n_embd=32, n_layer=2, n_head=2) | changes
    values.setdefault("eos_token_id", values["vocab_size"] - 1)
    return GPT2Config(**values)


def random_checkpoint(
    folder: Path, config: GPT2Config, seed: int = 0, *, tokenizer: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """Write `config` and random weights to `folder`; with `tokenizer` also `byte_tokenizer`'s file."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = config.to_json(str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {f"transformer.{name}": tensor.to(dtype) for name, tensor in random_tensors(config, seed).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        byte_tokenizer(folder / "tokenizer.tiktoken", config.vocab_size)
    return folder


def random_tensors(config: GPT2Config, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, matrices (in, out), scaled so that nothing is trivial at any width.

    LayerNorm weights are around 1 and no bias is 0; attention differs from token to token; logits have a standard
    deviation of about 2, so that rounding does not decide the likeliest token.
    """
    generator = np.random.default_rng(seed)
    c, inner = config.n_embd, config.mlp_width

    def normal(*shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) * std + mean

    def affine(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": normal(c, std=0.3, mean=1.0), f"{name}.bias": normal(c, std=0.2)}

    def matrix(name: str, into: int, out: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": normal(into, out, std=into**-0.5), f"{name}.bias": normal(out, std=0.2)}

    tensors = {
        "wte.weight": normal(config.vocab_size, c, std=2 * c**-0.5),
        "wpe.weight": normal(config.n_positions, c, std=c**-0.5),
    }
    for layer in range(config.n_layer):
        block = affine("ln_1") | matrix("attn.c_attn", c, 3 * c) | matrix("attn.c_proj", c, c)
        block |= affine("ln_2") | matrix("mlp.c_fc", c, inner) | matrix("mlp.c_proj", inner, c)
        tensors |= {f"h.{layer}.{name}": tensor for name, tensor in block.items()}
    return tensors | affine("ln_f")


def byte_tokenizer(path: Path, vocab_size: int) -> Path:
    """Write a rank file: the 256 bytes, then pairs of letters (" a", " b", ..); `<|endoftext|>` has the last id."""
    pairs = [(a + b).encode() for a, b in itertools.product(" " + string.ascii_lowercase, string.ascii_lowercase)]
    if not 257 <= vocab_size <= 257 + len(pairs):
        raise ValueError(f"byte_tokenizer: vocab_size must lie in 257..{257 + len(pairs)}, got {vocab_size}")
    tokens = [bytes([b]) for b in range(256)] + pairs[: vocab_size - 257]
    path.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)))
    return path


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """transformers' own GPT2LMHeadModel from a folder, which must hold exactly the tensors that it asks for."""
    transformers = pytest.importorskip("transformers")
    options.setdefault("attn_implementation", "eager")
    model, info = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def random_tokens(config: GPT2Config, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(config.vocab_size, size=shape))
