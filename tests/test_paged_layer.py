"""paged_layer_: the bits of the operators it stands for, the reference's numbers, and when the model calls it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

import gpt2_kernels as ops
from gpt2 import GPT2, Engine, GPT2Config, SamplingParams
from gpt2.model import LayerCache, PagedBatch
from gpt2_kernels import _native, _runtime, reference

H, D, BLOCK_SIZE = 3, 20, 4  # D pads to 32, C = 60 fills no register, blocks end inside a chunk of keys
C = H * D
KINDS = ["float32", "bfloat16", "int8"]
STATE = ("k_cache", "v_cache")


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    """The compiled operators, if they compute this CPU's matrix products."""
    torch.manual_seed(0)
    if not _native.load():
        pytest.skip(_native.status())
    with _runtime.force("native"):
        if not ops.has_paged_layer(torch.empty(0, dtype=torch.bfloat16)):
            pytest.skip("the CPU has no AVX-512 with BF16 and VNNI")
        yield


def arguments(kind: str, queries: list[int], contexts: list[int]) -> dict[str, Any]:
    """Packed rows of sequences whose earlier keys are in the cache; a context of 0 is an idle row, with no slot."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    shapes = [(C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,), (C,), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]
    weights = [torch.randn(s) * (0.1 if len(s) == 1 else s[1] ** -0.5) for s in shapes]
    for i in (0, 6):
        weights[i] += 1
    scales: list[Tensor] = []
    if kind == "int8":
        for i in (2, 4, 8, 10):
            weights[i], scale = ops.quantize(weights[i])
            scales.append(scale)
    width = 5
    table = torch.randperm(len(queries) * width).view(-1, width)
    positions = [torch.arange(n - q, n) for q, n in zip(queries, contexts)]
    slots = [table[s, p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for s, p in enumerate(positions)]
    slots = [torch.full((q,), -1) if n == 0 else slot for q, n, slot in zip(queries, contexts, slots)]
    pool = (len(queries) * width, H, BLOCK_SIZE, D)
    return {
        "x": torch.randn(sum(queries), C).to(dtype),
        "weights": [w if w.dtype == torch.int8 else w.to(dtype) for w in weights],
        "k_cache": torch.randn(pool).to(dtype).transpose(1, 2),
        "v_cache": torch.randn(pool).to(dtype).transpose(1, 2),
        "slots": torch.cat(slots),
        "block_table": table.int(),
        "context_lens": torch.tensor(contexts, dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, *queries]).cumsum(0).int(),
        "scale": D**-0.5,
        "weight_scales": scales,
    }


def one_by_one(a: dict[str, Any], activation: str) -> Tensor:
    """The same layer through the operators that it stands for."""
    w, scales = a["weights"], a["weight_scales"]

    def product(i: int, x: Tensor, **options: Any) -> Tensor:
        weight, bias = w[(2, 4, 8, 10)[i]], w[(3, 5, 9, 11)[i]]
        return (
            ops.linear_int8(x, weight, scales[i], bias, **options) if scales else ops.linear(x, weight, bias, **options)
        )

    where = a["block_table"], a["context_lens"], a["cu_seqlens_q"]
    q, k, v = product(0, ops.layer_norm(a["x"], w[0], w[1])).unflatten(-1, (3, H, D)).unbind(-3)
    ops.append_kv_(k, v, a["k_cache"], a["v_cache"], a["slots"])
    longest = int(a["cu_seqlens_q"].diff().max())
    y = ops.paged_attention(q, a["k_cache"], a["v_cache"], *where, longest, scale=a["scale"])
    x = product(1, y.flatten(-2), residual=a["x"])
    return product(3, product(2, ops.layer_norm(x, w[6], w[7]), activation=activation), residual=x)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("queries", "contexts"),
    [([1], [1]), ([1, 1, 1], [7, 0, 20]), ([9, 1, 3], [9, 12, 20])],
    ids=["first token", "decode with an idle row", "prompts and decode"],
)
def test_has_the_bits_of_the_operators_it_stands_for(
    kind: str, queries: list[int], contexts: list[int], activation: str
) -> None:
    a = arguments(kind, queries, contexts)
    other = copy.deepcopy(a)
    expected = one_by_one(other, activation)
    assert torch.equal(ops.paged_layer_(**a, activation=activation), expected)
    assert all(torch.equal(a[name], other[name]) for name in STATE)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind: str) -> None:
    a = arguments(kind, [9, 1, 3], [9, 12, 20])
    truth = copy.deepcopy(a)
    expected = reference.paged_layer_(**truth)
    # int8: a row's codes may differ by one where its float32 inputs do; bfloat16: a few roundings of 2^-9 each
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 4e-2}[kind]
    torch.testing.assert_close(ops.paged_layer_(**a), expected, rtol=tolerance, atol=tolerance)
    for name in STATE:
        torch.testing.assert_close(a[name], truth[name], rtol=tolerance, atol=tolerance)


def without(items: list[Tensor], i: int) -> list[Tensor]:
    return items[:i] + items[i + 1 :]


@pytest.mark.parametrize(("kind", "name", "change", "message"), [
    ("float32", "x", lambda t: t.half(),
     r"needs the products .* \(`linear` is PyTorch \(the compiled .*, got torch.float16 weights, x on cpu"),
    ("float32", "x", lambda t: t[:, 1:], r"the cache must have H \* D = C = 59, got 3 \* 20"),
    ("float32", "weights", lambda w: without(w, 3), "weights must be 12 tensors, weight and bias of ln_1, .* got 11"),
    ("float32", "weights", lambda w: [*w[:8], w[8].bfloat16(), *w[9:]],
     r"c_fc.weight must be \(240, 60\) of float32, got \(240, 60\) of bfloat16"),
    ("float32", "weights", lambda w: [*w[:10], w[10][:, 1:], w[11]],
     r"mlp.c_proj.weight must be \(60, 240\) of float32, got \(60, 239\)"),
    ("float32", "weights", lambda w: [*w[:2], w[2][:C], w[3][:C], *w[4:]],
     r"c_attn.weight must be \(180, 60\) of float32, got \(60, 60\)"),
    ("int8", "weight_scales", lambda s: without(s, 0), "number of scales must be 4, got 3"),
    ("int8", "weight_scales", lambda s: [t.double() for t in s],
     "a scale must be a vector of 180 dense float32, got 180 of float64 in 1 axes"),
    ("float32", "k_cache", lambda t: t.bfloat16(), "k_cache must have the dtype of k"),
    ("float32", "v_cache", lambda t: t[:, :2], "v_cache must have k_cache's shape"),
    ("float32", "slots", lambda t: t + 1000, "slots must lie in"),
    ("float32", "slots", lambda t: t[1:], "the length of slots must be 2, got 1"),
    ("float32", "context_lens", lambda t: t.long(), "context_lens must be int32, got int64"),
    ("float32", "block_table", lambda t: t + 1000, "block_table must lie in"),
    ("float32", "weights", lambda w: [*w[:9], w[9][None], *w[10:]],
     "c_fc.bias must be a vector of 240 dense float32, got 240 of float32 in 2 axes"),
    ("float32", "weights", lambda w: [*w[:11], w[11].repeat_interleave(2)[::2]],
     "mlp.c_proj.bias must be a vector of 60 dense float32, got 60 of float32 in 1 axes, strided"),
    ("float32", "weights", lambda w: [*w[:8], w[8].T.contiguous().T, *w[9:]], "last stride of c_fc.weight must be 1"),
    ("float32", "weights", lambda w: [w[0].to("meta"), *w[1:]], r"on the device of x \(cpu\), got meta"),
    ("float32", "scale", lambda _: float("nan"), "scale must be positive and finite, got nan"),
    ("float32", "eps", lambda _: -1.0, "eps must be at least 0, got -1.0"),
    ("float32", "activation", lambda _: "relu", "activation must be 'gelu' or 'gelu_tanh', got 'relu'"),
])  # fmt: skip
def test_bad_input_is_refused_before_the_cache_is_written(kind: str, name: str, change: Any, message: str) -> None:
    a: dict[str, Any] = {**arguments(kind, [1, 1], [3, 9]), "activation": "gelu_tanh", "eps": 1e-5}
    before = [a[n].clone() for n in STATE]
    with pytest.raises(ValueError, match=f"^paged_layer_: .*({message})"):
        ops.paged_layer_(**{**a, name: change(a[name])})
    assert all(torch.equal(a[n], kept) for n, kept in zip(STATE, before))


@pytest.mark.parametrize("name", ["weights", "k_cache"])
def test_records_no_gradient_without_saying_so(name: str) -> None:
    a = arguments("float32", [1], [3])
    (a["weights"][4] if name == "weights" else a[name]).requires_grad_()
    with pytest.raises(ValueError, match=rf"paged_layer_: {name}.* must not require a gradient"):
        ops.paged_layer_(**a)


def test_errors_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def paged_layer_(self, *args: Any) -> Tensor:
            raise RuntimeError("not enough memory")

    monkeypatch.setattr(_native, "ops", Full)
    with pytest.raises(RuntimeError, match="^not enough memory$"):
        ops.paged_layer_(**arguments("float32", [1], [3]))


def test_opcheck() -> None:
    a = arguments("int8", [1, 1], [3, 9])
    order = ("x", "weights", "weight_scales", *STATE, "slots", "block_table", "context_lens", "cu_seqlens_q", "scale")
    given = *(a[name] for name in order), 1e-5, "gelu_tanh"
    torch.library.opcheck(torch.ops.gpt2_kernels.paged_layer_.default, given)


def test_compiles_whole() -> None:
    a = arguments("bfloat16", [1, 1], [3, 9])
    b = copy.deepcopy(a)
    compiled = torch.compile(lambda x: ops.paged_layer_(**{**b, "x": x}), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(b["x"]), ops.paged_layer_(**a))
    assert all(torch.equal(a[name], b[name]) for name in STATE)


def test_what_other_processors_lack_has_no_fake() -> None:
    """PyTorch refuses a fake for an operator that does not exist, and then no other operator would be available."""
    source = (ROOT / "csrc" / "cpu_ops.cpp").read_text()
    definitions = source[source.index("STABLE_TORCH_LIBRARY(") :]
    x86 = definitions[definitions.index("#if GPT2K_PRODUCTS") : definitions.index("#endif")]
    names = re.findall(r'm\.def\(\s*"(\w+)\(', x86)
    assert {"linear", "paged_layer_"} <= set(names)
    fakes = re.findall(r'register_fake\("gpt2_kernels_cpu::(\w+)"', Path(_native.__file__).read_text())
    assert fakes and not set(fakes) & set(names)


# ------------------------------------------------------------------------------------------------ in the model

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=97, eos_token_id=96)


def model(kind: str) -> GPT2:
    made = GPT2(CONFIG).eval()
    return made.quantize_() if kind == "int8" else made.to(getattr(torch, kind))


def generated(model: GPT2) -> list[list[int]]:
    engine = Engine(model, max_batch=4, num_blocks=24, block_size=8)
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
    return [c.outputs[0].tokens for c in engine.generate([[1, 2, 3], [4] * 20, [5]], params)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call of paged_layer_."""
    seen: list[int] = []
    plain = ops.paged_layer_
    monkeypatch.setattr(ops, "paged_layer_", lambda *a, **k: seen.append(1) or plain(*a, **k))
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_says_the_same_through_it(kind: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(kind)
    through_it = generated(made)
    assert len(calls) >= 2 * 12
    monkeypatch.setattr(ops, "has_paged_layer", lambda *a, **k: False)
    calls.clear()
    assert generated(made) == through_it and not calls


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hook(block: nn.Module) -> None:
    block.ln_2.register_forward_hook(lambda module, inputs, output: None)


def prehook(block: nn.Module) -> None:
    block.register_forward_pre_hook(lambda module, inputs: None)


def replaced(block: nn.Module) -> None:
    block.mlp.c_fc.__class__ = Doubled


def rebound(block: nn.Module) -> None:
    block.attn.forward = block.attn.forward


def parametrized(block: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(block.mlp.c_proj)


def unbiased(block: nn.Module) -> None:
    block.attn.c_proj.bias = None


def other_eps(block: nn.Module) -> None:
    block.ln_1.eps = 0.1


def transposed(block: nn.Module) -> None:
    layer = block.mlp.c_fc
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)


def partly_int8(block: nn.Module) -> None:
    layer = block.mlp.c_fc
    weight, scale = ops.quantize(layer.weight)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_buffer("weight_scale", scale)


@pytest.mark.parametrize(
    "change",
    [hook, prehook, replaced, rebound, parametrized, unbiased, other_eps, transposed, partly_int8],
)
def test_a_block_that_somebody_changed_goes_its_own_way(
    change: Any, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model("float32")
    change(made.h[1])
    generated(made)
    untouched = len(calls)
    assert untouched  # the first block still takes it
    change(made.h[0])
    generated(made)
    assert len(calls) == untouched


def put_again(layer: nn.Module) -> None:
    """As torch.nn.utils.prune.remove and remove_parametrizations do: afterwards the weight comes after the bias."""
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.weight = nn.Parameter(weight)


@pytest.mark.parametrize("name", ["ln_1", "ln_2", "attn.c_attn", "mlp.c_proj"])
def test_the_order_in_which_parameters_were_set_means_nothing(name: str, calls: list[int]) -> None:
    made = model("float32")
    nn.init.normal_(made.h[0].get_submodule(name).bias)
    expected = generated(made)
    for block in made.h:
        put_again(block.get_submodule(name))
    calls.clear()
    assert generated(made) == expected and calls


def test_another_buffer_of_a_layer_is_no_scale(calls: list[int]) -> None:
    made = model("int8")
    expected = generated(made)
    made.h[0].mlp.c_fc.register_buffer("calls", torch.zeros(1))
    calls.clear()
    assert generated(made) == expected and calls


def test_the_activation_is_the_blocks_own(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("float32")
    nn.init.normal_(made.h[0].mlp.c_fc.weight, std=2.0)
    seen = []
    plain = ops.paged_layer_
    monkeypatch.setattr(ops, "paged_layer_", lambda *a, **k: seen.append(k["activation"]) or plain(*a, **k))
    made.h[1].mlp.approximate = "none"
    generated(made)
    assert seen[:2] == ["gelu_tanh", "gelu"]


def test_hooks_of_all_modules_are_called(calls: list[int]) -> None:
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(type(module)))
    try:
        generated(model("float32"))
    finally:
        handle.remove()
    assert not calls and nn.LayerNorm not in seen  # the block reads their weights itself
    assert seen


def test_a_forward_that_somebody_put_into_a_class_is_called(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = type(GPT2(CONFIG).h[0].mlp).forward, []
    made = model("float32")
    monkeypatch.setattr(type(made.h[0].mlp), "forward", lambda *a, **k: seen.append(1) or plain(*a, **k))
    generated(made)
    assert seen and not calls


class OwnBlock(nn.Module):
    def forward(self, x: Tensor, attend: Any, products: Any = None) -> Tensor:
        q = x.unflatten(-1, (2, 16))
        return x + attend(torch.stack((q, q, q), -3)).flatten(-2)


def test_a_block_of_ones_own(calls: list[int]) -> None:
    made = model("float32")
    generated(made)
    of_two = len(calls)
    made.h[1] = OwnBlock()
    calls.clear()
    generated(made)
    assert len(calls) == of_two // 2


def test_the_model_compiles_whole() -> None:
    made = model("bfloat16")
    cache = [LayerCache(*(torch.zeros(4, 8, 2, 16, dtype=torch.bfloat16) for _ in range(2))) for _ in range(2)]
    table, lens, cu = torch.tensor([[1, 2]]), torch.tensor([3]), torch.tensor([0, 3])
    batch = PagedBatch(
        torch.tensor([5, 6, 7]), torch.arange(3), 8 + torch.arange(3), table.int(), lens.int(), cu.int(), 3
    )
    expected = made.forward_paged(batch, cache)
    compiled = torch.compile(made.forward_paged, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(batch, cache), expected)


def test_a_cache_in_float8_goes_the_other_way(calls: list[int]) -> None:
    engine = Engine(model("float32"), max_batch=2, num_blocks=8, block_size=8, cache_dtype=torch.float8_e4m3fn)
    calls.clear()  # drop the calls that measured the scales
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert not calls


def test_autocast_goes_the_other_way() -> None:
    x = torch.empty(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops.has_paged_layer(x)
    assert ops.has_paged_layer(x)
    with _runtime.force("torch"):
        assert not ops.has_paged_layer(x)
