"""attn_implementation="gpt2_kernels" against transformers' own eager attention, in every model and mask it takes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor

import gpt2_kernels

transformers = pytest.importorskip("transformers")

gpt2_kernels.integrations.transformers.register()
gpt2_kernels.integrations.transformers.register()  # registering twice is harmless

TOLERANCE = dict(rtol=1e-5, atol=1e-5)

COMMON: dict[str, Any] = dict(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
MODELS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, scale_attn_by_inverse_layer_idx=True,
    ),
    "llama, grouped": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2, grouped, a window in the second layer": lambda: transformers.Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "mistral, window": lambda: transformers.MistralConfig(**COMMON, sliding_window=4),
}  # fmt: skip


def pair(name: str, device: torch.device, **changes: Any) -> tuple[Any, Any]:
    """The same random model with transformers' eager attention and with ours."""
    config = MODELS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3 * noise + 0.8)
    ours = transformers.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="gpt2_kernels")
    for key, value in changes.items():
        setattr(ours.config, key, value)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device).eval(), theirs.to(device).eval()


def padding_mask(side: str, rows: int, length: int, device: torch.device) -> Tensor | None:
    if side == "none":
        return None
    pads = torch.tensor([0, 3, 6, 1])[:rows, None]
    mask = (torch.arange(length)[None] >= pads).long()
    return (mask if side == "left" else mask.flip(1)).to(device)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_hidden_states_loss_and_gradients(path: torch.device, name: str, side: str) -> None:
    ours, theirs = pair(name, path)
    tokens = torch.randint(1, 60, (3, 11), device=path)
    mask = padding_mask(side, 3, 11, path)
    kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    before = torch.nn.functional.pad(kept[:, :-1], (1, 0), value=False)
    labels = tokens.masked_fill(~(kept & before), -100)
    results = []
    for model in (ours, theirs):
        out = model(tokens, attention_mask=mask, labels=labels, output_hidden_states=True)
        out.loss.backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters()}))
    (out, gradients), (expected, their_gradients) = results
    torch.testing.assert_close(out.loss, expected.loss, **TOLERANCE)
    for a, b in zip((out.logits, *out.hidden_states), (expected.logits, *expected.hidden_states), strict=True):
        torch.testing.assert_close(a[kept], b[kept], **TOLERANCE)
    for key, gradient in their_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, **TOLERANCE, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache(production: torch.device, name: str, cache: str) -> None:
    """Left-padded prompts of different lengths, longer than the window; with transformers' caches."""
    ours, theirs = pair(name, production)
    tokens = torch.randint(1, 60, (3, 9), device=production)
    for mask in (padding_mask("left", 3, 9, production), torch.ones_like(tokens)):
        options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        options |= dict(return_dict_in_generate=True, output_logits=True)
        got = ours.generate(tokens, **options, cache_implementation=cache)
        want = theirs.generate(tokens, **options, cache_implementation=cache)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), **TOLERANCE)


def test_a_chunk_over_a_cache(path: torch.device) -> None:
    """More than one query over earlier keys: the last query is aligned with the last key."""
    ours, theirs = pair("llama, grouped", path)
    tokens = torch.randint(1, 60, (3, 12), device=path)
    mask = padding_mask("left", 3, 12, path)
    assert mask is not None
    for model_mask in (None, mask):
        outs = []
        for model in (ours, theirs):
            first = model(tokens[:, :7], attention_mask=None if model_mask is None else mask[:, :7], use_cache=True)
            outs.append(model(tokens[:, 7:], attention_mask=model_mask, past_key_values=first.past_key_values).logits)
        torch.testing.assert_close(outs[0], outs[1], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama, grouped", "mistral, window"])
def test_packed_sequences(path: torch.device, name: str) -> None:
    """Positions that restart: each sequence of a row attends to itself alone, as in padding-free training."""
    ours, theirs = pair(name, path)
    tokens = torch.randint(1, 60, (2, 12), device=path)
    positions = torch.tensor([[*range(5), *range(7)], [*range(1), *range(11)]], device=path)
    got = ours(tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, theirs(tokens, position_ids=positions, use_cache=False).logits, **TOLERANCE)
    alone = ours(tokens[:1, 5:], use_cache=False).logits
    torch.testing.assert_close(got[:1, 5:], alone, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama, grouped", "mistral, window"])
def test_compiles_whole(production: torch.device, name: str) -> None:
    """With a cache; without one, where transformers must assume packed sequences; padded."""
    ours, _ = pair(name, production)
    ours.model.layers = ours.model.layers[:1]
    tokens = torch.randint(1, 60, (3, 11), device=production)
    mask = padding_mask("left", 3, 11, production)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for options in (dict(use_cache=name == "llama, grouped"), dict(attention_mask=mask)):
        kept = torch.ones_like(tokens, dtype=torch.bool) if "attention_mask" not in options else mask.bool()
        expected = ours(tokens, **options).logits
        torch.testing.assert_close(compiled(tokens, **options).logits[kept], expected[kept], **TOLERANCE)


def test_an_encoder_looks_both_ways(path: torch.device) -> None:
    """BERT, padded on the right: padding rows see the tokens too, as they do in transformers."""
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    theirs = transformers.BertModel._from_config(config, attn_implementation="eager").to(path).eval()
    ours = transformers.BertModel._from_config(config, attn_implementation="gpt2_kernels").to(path).eval()
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(1, 60, (3, 11), device=path)
    for side in ("none", "right"):
        mask = padding_mask(side, 3, 11, path)
        got, expected = (m(tokens, attention_mask=mask).last_hidden_state for m in (ours, theirs))
        torch.testing.assert_close(got, expected, **TOLERANCE)


def test_cross_attention(path: torch.device) -> None:
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
        add_cross_attention=True,
    )  # fmt: skip
    theirs = transformers.GPT2Model._from_config(config, attn_implementation="eager").to(path).eval()
    ours = transformers.GPT2Model._from_config(config, attn_implementation="gpt2_kernels").to(path).eval()
    ours.load_state_dict(theirs.state_dict())
    tokens, states = torch.randint(1, 60, (3, 7), device=path), torch.randn(3, 11, 32, device=path)
    options = dict(encoder_hidden_states=states, encoder_attention_mask=padding_mask("right", 3, 11, path))
    got, expected = (m(tokens, **options).last_hidden_state for m in (ours, theirs))
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("width", [12, 40], ids=["narrower", "wider"])
def test_values_of_another_width_than_keys(path: torch.device, width: int) -> None:
    """DeepSeek-V3's latent attention, 24 wide in queries and keys; it used to be refused."""
    config = transformers.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4}, first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=width,
    )  # fmt: skip
    theirs = transformers.DeepseekV3ForCausalLM._from_config(config, attn_implementation="eager").to(path).eval()
    ours = transformers.DeepseekV3ForCausalLM._from_config(config, attn_implementation="gpt2_kernels").to(path).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(1, 60, (3, 11), device=path)
    for side in ("none", "left", "right"):
        mask = padding_mask(side, 3, 11, path)
        kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        got, expected = (m(tokens, attention_mask=mask).logits[kept] for m in (ours, theirs))
        torch.testing.assert_close(got, expected, **TOLERANCE)
        weights = [model.model.layers[0].self_attn.kv_b_proj.weight for model in (ours, theirs)]
        mine, other = (torch.autograd.grad(out.square().mean(), w)[0] for out, w in zip((got, expected), weights))
        torch.testing.assert_close(mine, other, **TOLERANCE)
    mask = padding_mask("left", 3, 11, path)
    first, second = (m.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False) for m in (ours, theirs))
    assert torch.equal(first, second)
    q, v = torch.randn(1, 2, 6, 16, device=path), torch.randn(1, 2, 6, width, device=path)  # with the scale of the keys
    forward = gpt2_kernels.integrations.transformers.attention_forward
    out = forward(ours.model.layers[0].self_attn, q, q, v, None)[0].transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True)
    torch.testing.assert_close(out, expected, **TOLERANCE)


def test_a_decoder_told_to_look_both_ways(production: torch.device) -> None:
    ours, theirs = pair("llama, grouped", production, is_causal=False)
    tokens = torch.randint(1, 60, (3, 11), device=production)
    for side in ("none", "right"):
        mask = padding_mask(side, 3, 11, production)
        got, expected = (m(tokens, attention_mask=mask).logits for m in (ours, theirs))
        torch.testing.assert_close(got, expected, **TOLERANCE)


def test_dropout_of_training_is_honoured(production: torch.device) -> None:
    ours, _ = pair("llama, grouped", production, attention_dropout=0.5)
    for layer in ours.model.layers:
        layer.self_attn.attention_dropout = 0.5
    tokens = torch.randint(1, 60, (2, 11), device=production)
    assert torch.equal(ours(tokens).logits, ours(tokens).logits)
    ours.train()
    torch.manual_seed(3)
    first = ours(tokens).logits
    assert not torch.equal(ours(tokens).logits, first)
    torch.manual_seed(3)
    assert torch.equal(ours(tokens).logits, first)


def test_what_is_not_computed_raises_and_names_the_alternative(production: torch.device) -> None:
    ours, theirs = pair("gpt2", production)
    mistral, _ = pair("mistral, window", production)
    tokens = torch.randint(1, 60, (1, 6), device=production)
    gap = torch.tensor([[1, 1, 0, 1, 1, 1]], device=production)
    any_mask = torch.zeros(1, 1, 6, 6, device=production)
    forward = gpt2_kernels.integrations.transformers.attention_forward
    q = torch.randn(1, 2, 6, 16, device=production)
    module = ours.transformer.h[0].attn
    cases: list[tuple[Any, str]] = [
        (lambda: ours(tokens, output_attentions=True), 'output_attentions must be False .*"eager".*attention_map'),
        (
            lambda: ours(tokens, attention_mask=any_mask),
            r'mask must be made by transformers .*"sdpa".*\(1, 1, 6, 6\)',
        ),
        (lambda: mistral(tokens, attention_mask=gap), "padding must be at the ends of a row"),
        (lambda: forward(module, q, q, q, None, softcap=30.0), "softcap must be None"),
        (lambda: forward(module, q, q, q, None, s_aux=q), "s_aux must be None"),
        (lambda: forward(module, q, q, q, None, position_bias=q), "position_bias must be None"),
        (lambda: forward(mistral.model.layers[0].self_attn, q, q, q, None), "must hand it on"),
        (lambda: forward(module, q, q, q, None, is_causal=False, sliding_window=3), "a sliding window must be causal"),
        (lambda: ours(tokens, attention_mask=any_mask.bool()), "a mask must be made by"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    gapped = ours(tokens, attention_mask=gap).logits  # without a window a gap is one token fewer
    kept = gap.bool()
    torch.testing.assert_close(gapped[kept], theirs(tokens, attention_mask=gap).logits[kept], **TOLERANCE)

    from transformers.masking_utils import create_causal_mask

    embeds = torch.empty(1, 6, 32, device=production)
    with pytest.raises(ValueError, match="masks must be causal, sliding-window or full ones"):
        create_causal_mask(ours.config, embeds, None, past_key_values=None, or_mask_function=lambda b, h, q, k: k == 0)


def test_float64_is_refused(production: torch.device) -> None:
    ours, _ = pair("gpt2", production)
    with pytest.raises(ValueError, match="attention: dtype of q must be"):
        ours.double()(torch.randint(1, 60, (1, 6), device=production))


@pytest.mark.parametrize("version", ["4.57.6", "5.3.0"])
def test_an_older_transformers_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `register`; `apply` leaves transformers' modules, says why, and takes all others."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    monkeypatch.delitem(sys.modules, "gpt2_kernels.integrations.transformers", raising=False)
    monkeypatch.delattr(gpt2_kernels.integrations, "transformers", raising=False)
    message = f"transformers must be 5.4 or later, got {version}"
    with pytest.raises(ImportError, match=message):
        gpt2_kernels.integrations.transformers.register()
    with pytest.raises(ImportError, match=message):
        from gpt2_kernels.integrations.transformers import register  # noqa: F401
    report = gpt2_kernels.apply(transformers.GPT2LMHeadModel(MODELS["gpt2"]())).report
    assert report.kept["transformer.h.0.attn"] == report.kept["transformer.h.0.mlp"] == f"gpt2_kernels: {message}"
    assert "transformer.h.0.ln_1" in report.replaced


def test_a_transformers_that_numbers_no_positions_anew() -> None:
    """Versions up to at least 5.22 lack the function; without our module, `apply` would fail on every model."""
    code = (
        "from transformers import masking_utils as m; vars(m).pop('remap_positions_for_packed_sequence', None); "
        "import sys; sys.path[:0] = ['kernels']; import gpt2_kernels; gpt2_kernels.integrations.transformers.register()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
