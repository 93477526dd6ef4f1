"""ReferenceGPT2 against transformers' GPT-2, an implementation that shares nothing with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import random_checkpoint, random_tokens, tiny_config, transformers_model

from gpt2.config import PRESETS, GPT2Config
from gpt2.reference import ReferenceGPT2, gelu, initialize


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: on a busy machine threads would wait for each other a hundred times longer than work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def published(name: str, **changes: int) -> GPT2Config:
    """A published shape in two layers: width, heads and MLP are what differs between the sizes."""
    return dataclasses.replace(PRESETS[name], n_layer=2, **changes)


SHAPES = {
    "gpt2": published("gpt2"),  # the whole vocabulary, once
    "gpt2-medium": published("gpt2-medium", vocab_size=1000, eos_token_id=999),
    "gpt2-large": published("gpt2-large", vocab_size=1000, eos_token_id=999),
    "gpt2-xl": published("gpt2-xl", vocab_size=1000, eos_token_id=999),  # 25 heads
    "storybook": PRESETS["storybook"],
}


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    config = SHAPES[name]
    ours_folder = random_checkpoint(tmp_path / "random", config, seed=1)
    theirs = transformers_model(ours_folder)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ReferenceGPT2.from_pretrained(tmp_path / "theirs", device="cpu")
    tokens = random_tokens(config, 2, 33)
    with torch.no_grad():
        expected, got = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 1  # the check means something
    assert got.dtype == torch.float32 and got.shape == (2, 33, config.vocab_size)
    assert (got - expected).abs().max() <= 1e-4


VARIANTS = {
    "plain": {},
    "inverse layer": dict(scale_attn_by_inverse_layer_idx=True, n_layer=4),
    "no scale": dict(scale_attn_weights=False),
    "erf gelu": dict(activation_function="gelu"),
    "tanh gelu under its other name": dict(activation_function="gelu_pytorch_tanh"),
    "narrow mlp": dict(n_inner=40),
    "large epsilon": dict(layer_norm_epsilon=0.1),
    "one head of 3": dict(n_embd=3, n_head=1),
    "one token": dict(vocab_size=1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_equals_transformers_to_the_last_digits(variant: str, tmp_path: Path) -> None:
    config = tiny_config(**VARIANTS[variant])
    folder = random_checkpoint(tmp_path, config, seed=2)
    ours, theirs = (
        ReferenceGPT2.from_pretrained(folder, "cpu", torch.float64),
        transformers_model(folder, torch.float64),
    )
    tokens = random_tokens(config, 3, config.n_positions)  # every position
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 1e-10


def test_float64_of_the_smallest_published_size(tmp_path: Path) -> None:
    config = published("gpt2", vocab_size=500, eos_token_id=499)
    folder = random_checkpoint(tmp_path, config, seed=3)
    ours, theirs = (
        ReferenceGPT2.from_pretrained(folder, "cpu", torch.float64),
        transformers_model(folder, torch.float64),
    )
    tokens = random_tokens(config, 1, 20)
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 1e-10


def test_each_variant_changes_the_logits(tmp_path: Path) -> None:
    """Otherwise the comparison above would not notice if both sides ignored an option."""
    tokens = random_tokens(tiny_config(), 1, 16)
    folder = random_checkpoint(tmp_path, tiny_config(n_layer=4), seed=2)
    plain = ReferenceGPT2.from_pretrained(folder, "cpu")
    for name in ("inverse layer", "no scale", "erf gelu", "large epsilon"):
        changed = ReferenceGPT2(tiny_config(**{"n_layer": 4} | VARIANTS[name]))
        changed.load_state_dict(plain.state_dict())
        with torch.no_grad():
            assert (changed(tokens) - plain(tokens)).abs().max() > 1e-4, name


def test_attention_maps_equal_transformers_and_never_look_ahead(tmp_path: Path) -> None:
    config = tiny_config(n_layer=3, n_head=4)
    folder = random_checkpoint(tmp_path, config, seed=4)
    ours, theirs = (
        ReferenceGPT2.from_pretrained(folder, "cpu", torch.float64),
        transformers_model(folder, torch.float64),
    )
    tokens = random_tokens(config, 2, 17)
    with torch.no_grad():
        logits, maps = ours(tokens, return_attention=True)
        expected = theirs(tokens, output_attentions=True).attentions
        assert torch.equal(logits, ours(tokens))
    assert len(maps) == len(expected) == 3
    for got, wanted in zip(maps, expected, strict=True):
        assert got.shape == (2, 4, 17, 17)
        assert (got - wanted).abs().max() <= 1e-12
        assert (got.sum(-1) - 1).abs().max() <= 1e-12
        assert (got.triu(1) == 0).all()
        assert got.tril().max() < 1 or got[..., 1:, :].max() < 1  # not all on one token: the map is worth checking


def test_the_future_changes_nothing(tmp_path: Path) -> None:
    config = tiny_config()
    model = ReferenceGPT2.from_pretrained(random_checkpoint(tmp_path, config), "cpu")
    tokens = random_tokens(config, 1, 20)
    other = tokens.clone()
    other[0, 12:] = (other[0, 12:] + 1) % config.vocab_size
    with torch.no_grad():
        a, b = model(tokens), model(other)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.equal(a[:, 12:], b[:, 12:])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_generation_equals_transformers(seed: int, tmp_path: Path) -> None:
    config = tiny_config(n_positions=48)
    folder = random_checkpoint(tmp_path, config, seed=seed)
    ours, theirs = ReferenceGPT2.from_pretrained(folder, "cpu"), transformers_model(folder)
    prompt = random_tokens(config, 1, 8, seed=seed)
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=40,  # the last of the 48 positions included
        do_sample=False,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id,
    )
    assert ours.generate(prompt[0].tolist(), 40) == expected[0, 8:].tolist()


def test_generation_ends_with_the_end_of_text(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, tiny_config(), seed=5)
    free = ReferenceGPT2.from_pretrained(folder, "cpu").generate([1, 2, 3], 10)
    ending = ReferenceGPT2(tiny_config(eos_token_id=free[4])).eval()
    ending.load_state_dict(ReferenceGPT2.from_pretrained(folder, "cpu").state_dict())
    assert ending.generate([1, 2, 3], 10) == free[: free.index(free[4]) + 1]


def test_too_many_tokens_are_refused() -> None:
    model = ReferenceGPT2(tiny_config(n_positions=8))
    model(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="at most 8 tokens fit, got 9"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_gelu_is_that_of_torch() -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    for form, approximate in (("gelu_tanh", "tanh"), ("gelu", "none")):
        expected = torch.nn.functional.gelu(x, approximate=approximate)
        assert (gelu(x, form) - expected).abs().max() <= 1e-14


def test_every_parameter_gets_a_gradient(tmp_path: Path) -> None:
    config = tiny_config()
    model = ReferenceGPT2.from_pretrained(random_checkpoint(tmp_path, config), "cpu")
    tokens = random_tokens(config, 2, config.n_positions)
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


def test_a_fresh_start_is_that_of_gpt2() -> None:
    config = tiny_config(n_embd=128, n_layer=8)
    torch.manual_seed(0)
    model = ReferenceGPT2(config)
    initialize(model, config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 2 * 8 residual additions: sqrt(16)
            assert abs(parameter.std().item() / std - 1) < 0.05, name
            assert abs(parameter.mean().item()) < std / 10, name
