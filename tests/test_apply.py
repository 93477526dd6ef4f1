"""`apply`: other people's models before and after it, on both paths, and everything that may be done to a model."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any

import nanogpt
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from conftest import ROOT
from test_structure import run
from torch import Tensor, nn

import gpt2_kernels
from gpt2_kernels._fused import Fused

TOLERANCE = dict(rtol=1e-5, atol=1e-5)  # float32, sums in another order


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make nothing trivial: norms not 1, biases not 0, activations of size 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3 * noise + 0.8)
    return model


def gpt2(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    options: dict[str, Any] = dict(
        n_layer=2, n_embd=32, n_head=2, vocab_size=60, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    rates = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**(options | rates | changes)))).eval()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}")


# --- transformers' GPT-2 --------------------------------------------------------------------------------------------


def padded(tokens: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """The attention mask of rows of different lengths, and labels that leave out padding and what follows it: for a row
    that sees no key, eager attention computes something arbitrary, the mean over all keys."""
    mask = torch.ones_like(tokens)
    for row, pads in enumerate((0, 3, 6)):
        if pads:
            mask[row, :pads] = 0
    mask = mask if side == "left" else mask.flip(1)
    before = F.pad(mask[:, :-1], (1, 0))
    return mask, tokens.masked_fill((mask == 0) | (before == 0), -100)


@pytest.mark.parametrize("padding, implementation", [("none", "eager"), ("left", "sdpa"), ("right", "eager")])
def test_gpt2_of_transformers(path: torch.device, padding: str, implementation: str) -> None:
    """Logits, hidden states, loss and every parameter's gradient."""
    model = gpt2(attn_implementation=implementation, scale_attn_by_inverse_layer_idx=padding == "none").to(path)
    tokens = torch.randint(60, (3, 13), device=path)
    mask, labels = (None, tokens) if padding == "none" else padded(tokens, padding)

    def results() -> tuple[Any, dict[str, Tensor]]:
        out = model(tokens, attention_mask=mask, labels=labels, output_hidden_states=True)
        return out, gradients(model, out.loss)

    theirs, their_gradients = results()
    handle = gpt2_kernels.apply(model)
    assert len(handle.report.replaced) == 2 * 4 + 1 and not handle.report.kept
    ours, our_gradients = results()
    kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(ours.loss, theirs.loss, **TOLERANCE)
    torch.testing.assert_close(ours.logits[kept], theirs.logits[kept], **TOLERANCE)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a[kept], b[kept], **TOLERANCE)
    compare(our_gradients, their_gradients)
    handle.revert()
    again, _ = results()
    assert torch.equal(again.logits[kept], theirs.logits[kept])
    assert model.config._attn_implementation == implementation
    assert not any(isinstance(m, Fused) or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu"])
def test_each_gelu_of_transformers(path: torch.device, activation: str) -> None:
    model = gpt2(activation_function=activation, n_layer=1).to(path)
    tokens = torch.randint(60, (1, 9), device=path)
    expected = model(tokens).logits
    assert gpt2_kernels.apply(model).report.replaced["transformer.h.0.mlp"] == "gelu_mlp"
    torch.testing.assert_close(model(tokens).logits, expected, **TOLERANCE)


def test_thirty_steps_of_training_give_the_same_losses(production: torch.device) -> None:
    """A tiny transformers GPT-2, AdamW, random batches: the whole loss curve to 1e-4 relative."""

    def curve(use_ours: bool) -> list[float]:
        model = gpt2().to(production).train()
        if use_ours:
            gpt2_kernels.apply(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator, losses = torch.Generator().manual_seed(1), []
        batches = torch.randint(60, (3, 4, 24), generator=generator).to(production)
        for step in range(30):
            tokens = batches[step % 3]
            loss = model(tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    theirs, ours = curve(False), curve(True)
    assert theirs[-1] < 0.9 * theirs[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_compiles_whole(production: torch.device, use_cache: bool) -> None:
    model = gpt2(n_layer=1).to(production)
    gpt2_kernels.apply(model)
    tokens = torch.randint(60, (3, 13), device=production)
    expected = model(tokens, use_cache=use_cache).logits
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, use_cache=use_cache).logits, expected, **TOLERANCE)
    if use_cache:
        mask, _ = padded(tokens, "left")
        kept, expected = mask.bool(), model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(compiled(tokens, attention_mask=mask).logits[kept], expected[kept], **TOLERANCE)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_training(production: torch.device) -> None:
    model = gpt2(n_layer=1).to(production).train()
    tokens = torch.randint(60, (2, 13), device=production)

    def step(call: Callable[..., Any]) -> dict[str, Tensor]:
        logits = call(tokens, use_cache=False).logits
        return gradients(model, F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    expected = step(model)
    gpt2_kernels.apply(model)
    torch._dynamo.reset()
    compare(step(torch.compile(model, fullgraph=True, backend="aot_eager")), expected)


def test_a_shared_config_changes_for_the_applied_model_alone(production: torch.device) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=60, bos_token_id=0, eos_token_id=0)
    one, other = transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config)
    gpt2_kernels.apply(one)
    assert one.config._attn_implementation == "gpt2_kernels" and one.config is one.transformer.h[0].attn.config
    assert other.config is config and config._attn_implementation == "sdpa"
    assert type(other.transformer.ln_f) is nn.LayerNorm


@pytest.mark.parametrize("given", ["attention_mask", "position_ids"])
def test_without_a_cache_padding_and_packed_sequences_are_seen(production: torch.device, given: str) -> None:
    """Without a cache a model needs no mask if neither is given: the hook that decides this must look for both."""
    model = randomize(gpt2(use_cache=False)).to(production).eval()
    tokens = torch.randint(60, (2, 9), device=production)
    value = torch.ones_like(tokens) if given == "attention_mask" else torch.arange(9, device=production).repeat(2, 1)
    value[0, :4] = 0 if given == "attention_mask" else torch.arange(4, device=production)
    value[0, 4:] = 1 if given == "attention_mask" else torch.arange(5, device=production)
    expected = model(tokens, **{given: value}).logits
    gpt2_kernels.apply(model)
    found = model(tokens, **{given: value}).logits
    torch.testing.assert_close(found[0, 4:], expected[0, 4:], **TOLERANCE)
    torch.testing.assert_close(found[1], expected[1], **TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_part_of_a_gpt2_leaves_its_attention(production: torch.device, implementation: str) -> None:
    """Its masks are made outside, for the attention implementation chosen there; replaced attention failed on them."""
    model = gpt2(attn_implementation=implementation).to(production)
    tokens = torch.randint(1, 60, (3, 13), device=production)
    mask, _ = padded(tokens, "left")
    kept = mask.bool()
    expected = model(tokens, attention_mask=mask).logits[kept]
    for part in (model.transformer.h[1], model.transformer.h[0].attn):
        report = gpt2_kernels.apply(part).report
        assert list(report.kept.values()) == [
            "its masks are made by a GPT2Model that is not in what apply was given: apply the whole model"
        ]
        torch.testing.assert_close(model(tokens, attention_mask=mask).logits[kept], expected, **TOLERANCE)
    report = gpt2_kernels.apply(model.transformer).report
    assert not report.kept and len(report.replaced) == 9
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits[kept], expected, **TOLERANCE)


def test_generation_gives_the_same_text(production: torch.device) -> None:
    model = gpt2().to(production)
    tokens = torch.randint(1, 60, (3, 13), device=production)
    mask, _ = padded(tokens, "left")
    options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.generate(tokens, **options)
    gpt2_kernels.apply(model)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert torch.equal(model.generate(tokens, **options, cache_implementation="static"), expected)


def test_an_adapter_or_a_hook_put_in_later_is_not_passed_by(production: torch.device) -> None:
    """The fused MLP reads its layers' weights without calling the layers: it must not where somebody changed one."""
    pytest.importorskip("transformers")
    model = gpt2(n_layer=1)
    gpt2_kernels.apply(model)
    mlp, x = model.transformer.h[0].mlp, torch.randn(2, 5, 32)
    before = mlp(x)
    seen: list[int] = []
    hook = mlp.c_fc.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(mlp(x), before, **TOLERANCE)
    assert seen == [1]
    hook.remove()

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias  # adapters expose weights like this

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 1

    mlp.c_fc = Adapter(mlp.c_fc)
    assert not torch.allclose(mlp(x), before)


def test_what_is_left_says_why() -> None:
    transformers = pytest.importorskip("transformers")
    model = gpt2(n_layer=1, activation_function="relu")
    report = gpt2_kernels.apply(model).report
    assert report.kept == {"transformer.h.0.mlp": "its activation must be GELU, got ReLU"}
    assert "transformer.h.0.mlp   kept      its activation must be GELU" in str(report)
    model = gpt2(n_layer=1).double()
    assert all("float64" in why for why in gpt2_kernels.apply(model).report.kept.values())
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=60
        )
    )
    report = gpt2_kernels.apply(llama).report
    assert not report.replaced and "not a kind that apply knows" in report.kept["model.layers.0.self_attn"]
    with pytest.raises(ValueError, match="apply: model must be a torch.nn.Module, got str"):
        gpt2_kernels.apply("gpt2")  # type: ignore[arg-type]


# --- nanoGPT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(path: torch.device, bias: bool, flash: bool) -> None:
    model = randomize(nanogpt.GPT(bias=bias, flash=flash)).to(path)
    tokens = torch.randint(60, (2, 17), device=path)

    def results() -> tuple[Tensor, dict[str, Tensor]]:
        logits, loss = model(tokens, tokens)
        return logits, gradients(model, loss)

    theirs, their_gradients = results()
    state = torch.get_rng_state()
    handle = gpt2_kernels.apply(model)
    assert torch.equal(torch.get_rng_state(), state)  # the trial has its own generator
    assert len(handle.report.replaced) == 2 * 4 + 1 and not handle.report.kept, handle.report
    ours, our_gradients = results()
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    compare(our_gradients, their_gradients)
    handle.revert()
    assert torch.equal(model(tokens)[0], theirs)


def impostor(base: type[nn.Module], forward: Callable[..., Any], name: str) -> type[nn.Module]:
    return type(name, (base,), {"forward": forward})


IMPOSTORS: dict[str, Callable[[], nn.Module]] = {
    "relu in place of gelu": lambda: impostor(
        nanogpt.MLP, lambda self, x: self.dropout(self.c_proj(F.relu(self.c_fc(x)))), "MLP"
    )(32, 0.0, True),
    "another epsilon": lambda: impostor(
        nanogpt.LayerNorm,
        lambda self, x: F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6),
        "LayerNorm",
    )(32, True),
    "root mean square": lambda: impostor(
        nanogpt.LayerNorm, lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, 1e-5), "RMSNorm"
    )(32, False),
    "not causal": lambda: impostor(
        nanogpt.CausalSelfAttention,
        lambda self, x: self.c_proj(
            F.scaled_dot_product_attention(
                *(t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
            )
            .transpose(1, 2)
            .flatten(2)
        ),
        "Attention",
    )(32, 2, 0.0, True, 48, True),
    "dropout before the last product": lambda: impostor(
        nanogpt.MLP, lambda self, x: self.c_proj(self.dropout(self.gelu(self.c_fc(x)))), "MLP"
    )(32, 0.1, True),
    "attention without its dropout": lambda: impostor(
        nanogpt.CausalSelfAttention,
        lambda self, x: self.resid_dropout(
            self.c_proj(
                F.scaled_dot_product_attention(
                    *(t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1)), is_causal=True
                )
                .transpose(1, 2)
                .flatten(2)
            )
        ),
        "Attention",
    )(32, 2, 0.1, True, 48, True),
    "attention that drops in eval": lambda: impostor(
        nanogpt.CausalSelfAttention,
        lambda self, x: self.resid_dropout(
            self.c_proj(
                F.scaled_dot_product_attention(
                    *(t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1)),
                    dropout_p=self.dropout,
                    is_causal=True,
                )
                .transpose(1, 2)
                .flatten(2)
            )
        ),
        "Attention",
    )(32, 2, 0.1, True, 48, True),
    "different in training": lambda: impostor(
        nanogpt.MLP, lambda self, x: nanogpt.MLP.forward(self, x) * (2 if self.training else 1), "MLP"
    )(32, 0.0, True),
}


def attend(self: Any, qkv: Tensor, **options: Any) -> Tensor:
    """nanoGPT's attention by torch's function, with other options if given."""
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    out = F.scaled_dot_product_attention(q, k, v, **(options or {"is_causal": True}))
    return self.c_proj(out.transpose(1, 2).flatten(2))


def local(self: Any, x: Tensor) -> Tensor:
    """Attention within each block of 2048 tokens, if there are several."""
    B, T, C = x.shape
    return attend(self, self.c_attn(x.view(-1, T if T % 2048 else 2048, C))).view(B, T, C)


def by_length(self: Any, x: Tensor) -> Tensor:
    scale = 16**-0.5 * max(1.0, math.log(x.shape[1], 512))
    return attend(self, self.c_attn(x), is_causal=True, scale=scale)


def windowed(self: Any, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return attend(self, self.c_attn(x), attn_mask=(i[:, None] >= i) & (i[:, None] - i < 64))


def masked(fill: float, first: int) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        scores, T = q @ k.transpose(2, 3) * k.shape[-1] ** -0.5, x.shape[1]
        scores = scores.masked_fill(self.bias[:, :, first : T + first, :T] == 0, fill)
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return forward


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-1, 1)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(max=10.0)


def remembering(self: Any, x: Tensor) -> Tensor:
    self.seen = x.shape
    return nanogpt.MLP.forward(self, x)


ATTENTION = nanogpt.CausalSelfAttention, (32, 2, 0.0, True, 48)
MLP = nanogpt.MLP, (32, 0.0, True)

# Modules that agree with nanoGPT's on short inputs of size 1: the forward, and the reason reported.
STRANGE: dict[str, tuple[Any, Callable[..., Any], str]] = {
    "a clamp": (MLP, lambda self, x: self.c_proj(F.gelu(self.c_fc(x)).clamp(max=10)), "calls clamp"),
    "a clamp in a script": (MLP, lambda self, x: self.c_proj(scripted(self.c_fc(x))), "calls aten."),
    "no gradient": (MLP, lambda self, x: self.c_proj(F.gelu(self.c_fc(x)).detach()), "calls detach"),
    "a gradient of its own": (
        MLP,
        lambda self, x: nanogpt.MLP.forward(self, Clipped.apply(x)),
        "a backward of its own",
    ),
    "it depends on the device": (MLP, lambda self, x: nanogpt.MLP.forward(self, x * (1 + x.is_cuda)), "reads is_cuda"),
    "it depends on the values": (MLP, lambda self, x: nanogpt.MLP.forward(self, x) if x.max() < 9 else x, "calls max"),
    "state": (MLP, remembering, "sets seen"),
    "a clamp of keys": (ATTENTION, lambda self, x: attend(self, self.c_attn(x).clamp(-8, 8)), "calls clamp"),
    "a window": (ATTENTION, windowed, "calls arange"),
    "blocks of long inputs": (ATTENTION, local, r"attends with a query \(8, 2, 2048, 16\) at length 8192"),
    "a scale by the length": (ATTENTION, by_length, "does something else at length 1025"),
    "a finite mask": (ATTENTION, masked(-1e4, 0), "masks scores by something else than its causal mask and -inf"),
    "a shifted mask": (ATTENTION, masked(-torch.inf, 1), "takes another part of its mask"),
    "capped scores": (
        ATTENTION,
        lambda self, x: attend(self, 1e3 * (self.c_attn(x) / 1e3).tanh()),
        "calls tanh",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_shows_at_other_lengths_and_scales_is_left(name: str) -> None:
    (base, arguments), forward, reason = STRANGE[name]
    if base is nanogpt.CausalSelfAttention:
        arguments = (*arguments, "mask" not in name)
    report = gpt2_kernels.apply(impostor(base, forward, base.__name__)(*arguments)).report
    assert not report.replaced
    assert "computes something else: it" in report.kept[""] and re.search(reason, report.kept[""])


def test_a_classs_attributes_count_like_the_instances() -> None:
    """`window = 64` in a class body used to be overlooked."""
    kind = type("CausalSelfAttention", (nanogpt.CausalSelfAttention,), {"window": 64, "helper": lambda self: None})
    report = gpt2_kernels.apply(kind(32, 2, 0.0, True, 48, True)).report
    assert report.kept == {"": "it has window, which nanoGPT's module of this shape has not"}
    numbered = type("LayerNorm", (nanogpt.LayerNorm,), {"eps": 1e-5})  # the replacement reads eps
    assert gpt2_kernels.apply(numbered(32, True)).report.replaced


def published(self: Any, x: Tensor) -> Tensor:
    """nanoGPT's attention in its own words."""
    B, T, C = x.size()
    q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
    k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
    q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
    v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
    if self.flash:
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True
        )
    else:
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
    return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


def new_gelu(x: Tensor) -> Tensor:
    """GELU as nanoGPT first had it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def by_hand(self: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return self.weight * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() + self.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_words_for_the_same_are_taken(dtype: torch.dtype) -> None:
    spelled = impostor(nanogpt.MLP, lambda self, x: self.dropout(self.c_proj(new_gelu(self.c_fc(x)))), "MLP")
    modules = [
        impostor(nanogpt.CausalSelfAttention, published, "Attention")(32, 2, 0.1, True, 1024, True),
        impostor(nanogpt.CausalSelfAttention, published, "Attention")(32, 2, 0.1, True, 16, False),  # short
        spelled(768, 0.1, True),
        impostor(nanogpt.LayerNorm, by_hand, "LayerNorm")(32, True),
    ]
    for module in modules:
        with torch.inference_mode():
            report = gpt2_kernels.apply(module.to(dtype)).report
        assert report.replaced, report
    assert report.replaced and "tanh" in gpt2_kernels.apply(modules[2]).report.replaced[""]


def test_a_trial_is_no_call_of_the_users() -> None:
    """Hooks on a module and its layers neither run in the trial nor stand in its way."""
    mlp, seen = nanogpt.MLP(32, 0.0, True), []
    for module in mlp.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    assert gpt2_kernels.apply(mlp).report.replaced and not seen
    mlp(torch.randn(1, 2, 32))
    assert len(seen) == sum(1 for _ in mlp.modules())


def test_a_forward_put_on_a_layer_is_not_passed_by() -> None:
    """As accelerate and some adapters do; the layer's weights used to be read all the same."""
    mlp, x = randomize(nanogpt.MLP(32, 0.0, True)), torch.randn(2, 5, 32)
    gpt2_kernels.apply(mlp)
    before, own = mlp(x), mlp.c_proj.forward
    mlp.c_proj.forward = lambda x: own(x) + 1  # type: ignore[method-assign]
    torch.testing.assert_close(mlp(x), before + 1, **TOLERANCE)


@pytest.mark.parametrize("name", IMPOSTORS)
def test_what_only_looks_like_nanogpt_is_left(name: str) -> None:
    """Judged by what it computes, even where its own weights are zeros, which show nothing."""
    module = IMPOSTORS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    report = gpt2_kernels.apply(module).report
    assert not report.replaced and "computes something else" in report.kept[""]


@pytest.mark.parametrize("width", [64, 768])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("flash", [True, False])
def test_nanogpts_own_modules_are_recognised(width: int, dropout: float, flash: bool) -> None:
    """Rounding in wide sums, some of which cancel to almost nothing, was once mistaken for a different computation."""
    for module in (
        nanogpt.LayerNorm(width, True),
        nanogpt.MLP(width, dropout, True),
        nanogpt.CausalSelfAttention(width, width // 16, dropout, True, 64, flash),
    ):
        report = gpt2_kernels.apply(module).report
        assert report.replaced, report


def test_a_mask_that_is_not_nanogpts_is_left() -> None:
    """A band wider than any input that the trial uses: it would be computed as if the whole past were visible."""
    module = nanogpt.CausalSelfAttention(32, 2, 0.0, True, 128, False)
    module.bias -= module.bias.tril(-64)
    report = gpt2_kernels.apply(module).report
    assert report.kept == {"": "its buffer bias is not nanoGPT's causal mask"} and not report.replaced


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(32), lambda: nanogpt.LayerNorm(32, True)], ids=["torch", "nano"])
def test_norms_take_what_torchs_take(production: torch.device, make: Callable[[], nn.Module]) -> None:
    """float32 weights on bfloat16 activations, and a model made float64 later, use the module's own forward."""
    plain = randomize(make()).to(production)
    ours = copy.deepcopy(plain)
    gpt2_kernels.apply(ours)
    x = torch.randn(3, 32, device=production)
    assert torch.equal(ours(x.bfloat16()), plain(x.bfloat16()))
    assert torch.equal(ours.double()(x.double()), plain.double()(x.double()))


def test_reverting_leaves_what_others_made_of_the_class() -> None:
    """A parametrization registered afterwards derives a new class from the replaced one."""

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.Sequential(randomize(nn.LayerNorm(32)), nn.LayerNorm(32))
    handle = gpt2_kernels.apply(model)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    x = torch.randn(3, 32)
    before = model(x)
    handle.revert()
    assert not any(isinstance(module, Fused) for module in model.modules())
    torch.testing.assert_close(model(x), before, **TOLERANCE)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is type(model[1]) is nn.LayerNorm
    torch.testing.assert_close(model(x), before, **TOLERANCE)


def test_zero_weights_do_not_hide_which_gelu_it_is() -> None:
    tanh = impostor(nanogpt.MLP, lambda self, x: self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), "MLP")(
        32, 0.0, True
    )
    nn.init.zeros_(tanh.c_proj.weight)
    assert "tanh" in gpt2_kernels.apply(tanh).report.replaced[""]
    assert "none" in gpt2_kernels.apply(nanogpt.MLP(32, 0.0, True)).report.replaced[""]


def test_unknown_attributes_children_and_devices_are_named() -> None:
    windowed, gated, meta = nanogpt.GPT().transformer.h[0].attn, nanogpt.MLP(32, 0.0, True), nanogpt.MLP(32, 0.0, True)
    windowed.window = 8
    gated.gate = nn.Linear(32, 128)
    whys = [gpt2_kernels.apply(m).report.kept[""] for m in (windowed, gated, meta.to("meta"))]
    assert "it has window" in whys[0] and "it has gate" in whys[1] and "meta device" in whys[2]
    swapped = nanogpt.MLP(32, 0.0, True)
    swapped.c_fc = nn.Bilinear(32, 32, 128)  # type: ignore[assignment]
    assert "its c_fc is a Bilinear" in gpt2_kernels.apply(swapped).report.kept[""]
    pruned = nanogpt.MLP(32, 0.0, True)
    nn.utils.prune.l1_unstructured(pruned.c_fc, "weight", 0.5)  # its weight, which has a gradient, cannot be copied
    assert "its c_fc has a weight that is no parameter" in gpt2_kernels.apply(pruned).report.kept[""]


# --- torch's modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_layer(
    path: torch.device, training: bool, norm_first: bool, causal: bool, batch_first: bool
) -> None:
    layer = randomize(
        nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=batch_first, norm_first=norm_first)
    )
    layer = layer.to(path).train(training)
    x = torch.randn(3, 9, 32, device=path)
    T = x.shape[1 if batch_first else 0]
    mask = nn.Transformer.generate_square_subsequent_mask(T, device=path) if causal else None
    with torch.set_grad_enabled(training):
        expected = layer(x, mask, is_causal=causal)
        report = gpt2_kernels.apply(layer).report
        assert set(report.replaced) == {"", "self_attn", "norm1", "norm2"} and not report.kept
        torch.testing.assert_close(layer(x, mask, is_causal=causal), expected, **TOLERANCE)


@pytest.mark.parametrize("padding", [False, True])
def test_transformer_encoder_in_inference(production: torch.device, padding: bool) -> None:
    """There torch packs padded batches for its own fast path; the layers are then torch's, and the results the same."""
    layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=True)
    encoder = randomize(nn.TransformerEncoder(layer, 2)).to(production).eval()
    x = torch.randn(3, 9, 32, device=production)
    mask = torch.zeros(3, 9, dtype=torch.bool, device=production)
    mask[1, 5:] = True
    given = mask if padding else None
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=given)
        gpt2_kernels.apply(encoder)
        torch.testing.assert_close(encoder(x, src_key_padding_mask=given), expected, **TOLERANCE)
        alone = encoder.layers[0](x, src_key_padding_mask=mask)  # without that packing
        expected = copy_reverted(encoder).layers[0](x, src_key_padding_mask=mask)
        torch.testing.assert_close(alone[~mask], expected[~mask], **TOLERANCE)


def copy_reverted(model: Any) -> Any:
    duplicate = copy.deepcopy(model)
    gpt2_kernels.apply(duplicate).revert()
    assert not any(isinstance(m, Fused) for m in duplicate.modules())
    return duplicate


MASKS: dict[str, dict[str, Any]] = {
    "none": dict(need_weights=False),
    "weights": dict(need_weights=True),
    "causal": dict(need_weights=False, attn_mask=torch.ones(5, 7, dtype=torch.bool).triu(1), is_causal=True),
    "any mask": dict(need_weights=False, attn_mask=torch.randn(5, 7)),
    "padding": dict(need_weights=False, key_padding_mask=torch.arange(7).expand(3, 7) > 4),
}


@pytest.mark.parametrize("mask", MASKS)
def test_multihead_attention(path: torch.device, mask: str) -> None:
    """Cross-attention with other widths and more keys than queries: torch's causal mask is aligned top-left."""
    module = randomize(nn.MultiheadAttention(32, 4, kdim=24, vdim=40, batch_first=True)).to(path)
    x, k, v = (torch.randn(shape, device=path) for shape in ((3, 5, 32), (3, 7, 24), (3, 7, 40)))
    options = {name: o.to(path) if isinstance(o, Tensor) else o for name, o in MASKS[mask].items()}
    expected = module(x, k, v, **options)
    assert gpt2_kernels.apply(module).report.replaced[""].startswith("attention (torch's own for calls")
    for ours, theirs in zip(module(x, k, v, **options), expected):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    with pytest.raises(RuntimeError, match="Need attn_mask"):  # as torch has it
        module(x, k, v, need_weights=False, is_causal=True)


def test_torch_modules_that_are_left() -> None:
    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        dict(
            two_axes=nn.LayerNorm((3, 4)),
            subclass=Doubled(4),
            extra_keys=nn.MultiheadAttention(8, 2, add_bias_kv=True),
            wide_heads=nn.MultiheadAttention(257, 1),
            good=nn.LayerNorm(4, elementwise_affine=False),
        )
    )
    hooked = nn.LayerNorm(4)
    hooked.forward = lambda x: x  # type: ignore[method-assign]  as accelerate's hooks do
    model["forward_on_the_instance"] = hooked
    report = gpt2_kernels.apply(model).report
    assert set(report.kept) == {"two_axes", "subclass", "extra_keys", "wide_heads", "forward_on_the_instance"}
    assert report.replaced == {"good": "layer_norm"}
    x = torch.randn(3, 4)
    torch.testing.assert_close(model["good"](x), F.layer_norm(x, (4,)))


# --- what is done to models -----------------------------------------------------------------------------------------


def test_twice_is_once_and_any_handle_reverts() -> None:
    model = nanogpt.GPT()
    first, second = gpt2_kernels.apply(model), gpt2_kernels.apply(model)
    assert first.report == second.report
    assert all(sum(issubclass(c, Fused) for c in type(m).__mro__[:2]) <= 2 for m in model.modules())
    second.revert()
    assert not any(isinstance(m, Fused) for m in model.modules())
    first.revert()  # nothing is left to revert
    assert type(model.transformer.ln_f) is nanogpt.LayerNorm


@pytest.mark.parametrize("make", [nanogpt.GPT, gpt2], ids=["nanoGPT", "transformers"])
def test_copies_checkpoints_and_pickles(make: Callable[[], Any]) -> None:
    model = randomize(make())
    keys, tokens = list(model.state_dict()), torch.randint(60, (2, 11))
    identities = [id(p) for p in model.parameters()]
    gpt2_kernels.apply(model)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == identities

    def logits(m: nn.Module) -> Tensor:
        out = m(tokens)
        return out[0] if isinstance(out, tuple) else out.logits

    duplicate = copy.deepcopy(model)
    assert torch.equal(logits(duplicate), logits(model))
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(logits(duplicate), logits(model))  # bound to its own parameters
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh.eval()), logits(model.eval()), **TOLERANCE)
    model.load_state_dict(duplicate.state_dict())
    assert torch.equal(logits(duplicate.eval()), logits(model))
    reread = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(reread), logits(model))
    assert sum(isinstance(m, Fused) for m in reread.modules()) == 9
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), logits(model))


def test_under_ddp(tmp_path: Any) -> None:
    if not torch.distributed.is_available() or sys.platform == "win32":
        pytest.skip("torch without distributed")
    from torch.nn.parallel import DistributedDataParallel

    tokens = torch.randint(60, (2, 11))
    model = randomize(nanogpt.GPT())
    expected = gradients(model, model(tokens, tokens)[1])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for before in (True, False):
            duplicate = copy.deepcopy(model)
            if before:
                gpt2_kernels.apply(duplicate)
            wrapped = DistributedDataParallel(duplicate)
            report = gpt2_kernels.apply(wrapped).report
            assert len(report.replaced) == 9 and all(name.startswith("module.") for name in report.replaced)
            compare(gradients(duplicate, wrapped(tokens, tokens)[1]), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("make", [nanogpt.GPT, gpt2], ids=["nanoGPT", "transformers"])
def test_under_autocast(production: torch.device, make: Callable[[], Any]) -> None:
    """Within bfloat16's rounding of float32, as the plain model is."""
    model = randomize(make()).to(production).train()
    tokens = torch.randint(60, (2, 11), device=production)

    def run() -> tuple[float, dict[str, Tensor]]:
        out = model(tokens, tokens) if make is nanogpt.GPT else model(tokens, labels=tokens)
        loss = out[1] if make is nanogpt.GPT else out.loss
        return loss.item(), gradients(model, loss)

    exact, exact_gradients = run()
    gpt2_kernels.apply(model)
    with torch.autocast(production.type, torch.bfloat16):
        ours, our_gradients = run()
    assert abs(ours - exact) < 0.02 * exact
    for name, truth in exact_gradients.items():
        assert our_gradients[name].dtype == torch.float32
        torch.testing.assert_close(our_gradients[name], truth, rtol=0.1, atol=0.05 * truth.abs().max().item())


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(production: torch.device, reentrant: bool) -> None:
    """Padded, with dropout: recomputation drops the same elements."""
    model = gpt2(attn_pdrop=0.3, resid_pdrop=0.2, embd_pdrop=0.1).to(production).train()
    gpt2_kernels.apply(model)
    tokens = torch.randint(60, (3, 13), device=production)
    mask, labels = padded(tokens, "right")

    def run() -> dict[str, Tensor]:
        torch.manual_seed(5)
        return gradients(model, model(tokens, attention_mask=mask, labels=labels, use_cache=False).loss)

    expected = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    compare(run(), expected)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_dropout_is_honoured_in_training_and_off_in_eval(production: torch.device, padding: str) -> None:
    """The mean over many draws of one layer's attention is its result without dropout, within the standard error."""
    model = gpt2(n_layer=1, attn_pdrop=0.4).to(production)
    attn, x = model.transformer.h[0].attn, torch.randn(1, 12, 32, device=production)
    gpt2_kernels.apply(model)
    mask = None
    if padding == "left":
        mask = torch.ones(1, 1, 1, 12, dtype=torch.int8, device=production)
        mask[..., :3] = 0
    with torch.no_grad():
        exact = attn(x, attention_mask=mask)[0]
        assert torch.equal(attn(x, attention_mask=mask)[0], exact)
        attn.train()
        draws = torch.stack([attn(x, attention_mask=mask)[0] for _ in range(64)])
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(0) - exact)[:, 3:].abs().mean()
    assert error < 0.25 * draws.std(0)[:, 3:].mean()
    assert error > 0.01 * draws.std(0)[:, 3:].mean()


def test_nanogpt_dropout(production: torch.device) -> None:
    model = randomize(nanogpt.GPT(dropout=0.3)).to(production)
    for name, module in model.named_modules():  # of attention probabilities only
        if isinstance(module, nn.Dropout) and not name.endswith("attn_dropout"):
            module.p = 0.0
    gpt2_kernels.apply(model)
    tokens = torch.randint(60, (2, 11), device=production)
    torch.manual_seed(0)
    first = model(tokens)[0]
    assert not torch.equal(model(tokens)[0], first)
    torch.manual_seed(0)
    assert torch.equal(model(tokens)[0], first)
    attn = model.eval().transformer.h[0].attn
    attn.attn_dropout.p = 0.5  # and not self.dropout, which nanoGPT's two ways would take each for itself
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_torch_models_do_not_import_transformers() -> None:
    code = """
import sys
import torch, gpt2_kernels
print(gpt2_kernels.apply(torch.nn.Sequential(torch.nn.LayerNorm(4))).report)
assert "transformers" not in sys.modules
"""
    done = run(code, PYTHONPATH=str(ROOT / "kernels"))
    assert done.returncode == 0, done.stderr[-2000:]
