"""`explain`, `env_report` and `warmup`: what they say is what runs."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import nanogpt
import pytest
import torch
from called import Called
from conftest import GPU, ROOT
from test_structure import run
from torch import nn

import gpt2_kernels as ops
from gpt2_kernels import _operator, env_report, explain, warmup


def test_an_operator_by_name_or_function(path: torch.device) -> None:
    expected = f"attention on {path.type}: {ops.path_of('attention', path.type)}"
    assert expected in explain("attention").splitlines() and explain(ops.attention) == explain("attention")
    assert "attention under another signature" in explain(ops.scaled_dot_product_attention)
    for op in _operator.OPS:
        assert explain(op).startswith(op)
    with pytest.raises(ValueError, match="explain: an operator must be one of .*'softmax'"):
        explain("softmax")
    with pytest.raises(ValueError, match="explain: an operator must be one of"):
        explain(torch.softmax)


def test_a_call_of_an_operator(path: torch.device) -> None:
    q = torch.randn(1, 5, 2, 16, device=path)
    said = explain(ops.attention, q, q, q)
    assert f"called 1x  attention: {ops.path_of('attention', path.type)}" in said
    assert "this call is refused: attention: dtype of q must be float32" in explain("attention", *(3 * [q.double()]))


def test_a_model_before_and_after_apply(path: torch.device) -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.LayerNorm((4, 4))).to(path)
    before = explain(model).splitlines()
    assert before[0].endswith("PyTorch: not replaced yet, gpt2_kernels.apply would take layer_norm")
    assert before[1].endswith("PyTorch: normalized_shape must be one axis in 1..16384, got (4, 4)")
    ops.apply(model)
    after = explain(model).splitlines()
    assert after[0].endswith(f"layer_norm: {ops.path_of('layer_norm', path.type)}") and after[1] == before[1]


def test_a_model_that_is_run(production: torch.device) -> None:
    model = nanogpt.GPT(n_layer=1).to(production)
    tokens = torch.randint(60, (1, 7), device=production)
    before = explain(model, tokens)
    assert "PyTorch's native_layer_norm: not layer_norm" in before and "called 1x  attention" not in before
    ops.apply(model)
    after = explain(model, tokens)
    assert "called 3x  layer_norm: " in after and "called 1x  attention: " in after
    assert "called 2x  linear: " in after and "PyTorch's" not in after  # the MLP's two products
    assert explain(nn.ReLU(), torch.ones(2)).splitlines()[-1] == "this call ran no operator of gpt2_kernels"


def test_environment_report() -> None:
    said = env_report.report()
    for needed in (
        ops.__version__,
        torch.__version__,
        sys.executable,
        "C++ operators",
        "transformers",
        "Triton's cache",
    ):
        assert needed in said
    for op in _operator.OPS:
        assert f"  {op} " in said
    done = run("import runpy; runpy.run_module('gpt2_kernels.env_report', run_name='__main__')",
               PYTHONPATH=str(ROOT / "kernels"), TRITON_PRINT_AUTOTUNING="1")  # fmt: skip
    assert done.returncode == 0 and "TRITON_PRINT_AUTOTUNING=1" in done.stdout, done.stderr[-2000:]
    assert "in interpreter mode" not in done.stdout


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """CUDA sees it, but no kernel compiles for it: each of them says so, with the rule and the capability found."""
    card = SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=2**34, multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (card.major, card.minor))
    refusal = "kernels need a GPU of compute capability 8.0 or later, got 7.5"
    assert ops.path_of("attention", "cuda") == f"none: {refusal}"
    assert explain("attention").splitlines()[0] == f"attention on cuda: none: {refusal}"
    assert explain("linear_int8").splitlines()[0] == "linear_int8 on cuda: none: int8 weights are for CPUs"
    assert f"Tesla T4, sm_75, 16 GiB, 40 multiprocessors\n               refused: {refusal}\n" in env_report.report()
    warmup.main(["--model", "storybook"])
    assert capsys.readouterr().out.startswith(f"no kernel to compile: {refusal}; C++ operators: ")
    card.major, card.minor = 8, 0
    assert "cache needs" in ops.path_of("paged_attention", "cuda", torch.float8_e4m3fn)
    assert explain("attention").splitlines()[0] == "attention on cuda: Triton kernel"


@pytest.mark.parametrize(("capability", "dtype", "need"), [
    ((7, 5), None, "kernels need a GPU of compute capability 8.0 or later"),
    ((8, 0), None, None),
    ((8, 0), torch.bfloat16, None),
    ((8, 6), torch.float8_e4m3fn, "a torch.float8_e4m3fn cache needs a GPU of compute capability 8.9 or later"),
    ((8, 9), torch.float8_e4m3fn, None),
    ((12, 0), torch.float8_e4m3fn, None),
])  # fmt: skip
def test_which_gpus_are_refused(
    capability: tuple[int, int], dtype: torch.dtype | None, need: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    got = ops.gpu_refusal(torch.device("cuda:1"), dtype)
    assert got == (need and f"{need}, got {capability[0]}.{capability[1]}")


def test_warmup_calls_every_kernel(path: torch.device) -> None:
    """Everything it would compile is an operator that runs, and no operator of the model or trainer is left out."""
    with Called() as called:
        for call in warmup.calls(warmup.Widths(16, 2, 50), torch.float32, path).values():
            call()
    ran = {name.split(".")[1] for name in called.names if name.startswith("gpt2_kernels.")}
    # for inspection; logits held in memory; no kernel to compile
    unused = {"attention_map", "attention_map_top", "linear_int8", "paged_layer_", "gelu_mlp"}
    assert {op for op in _operator.OPS if op not in unused and not op.startswith("cross_entropy")} <= ran


def test_warmup_knows_the_sizes_of_the_models() -> None:
    from gpt2.config import PRESETS

    assert {name: tuple(sizes) for name, sizes in warmup.MODELS.items()} == {
        name: (config.n_embd, config.n_head, config.vocab_size) for name, config in PRESETS.items()
    }


def test_warmup_command(capsys: pytest.CaptureFixture[str]) -> None:
    warmup.main(["--model", "storybook", "--dtype", "fp32"])
    said = capsys.readouterr().out
    if GPU:
        assert "variants for storybook in fp32" in said and " s" in said
    else:
        assert said.startswith("no kernel to compile: there is no GPU; C++ operators: ") and "done in" in said
    with pytest.raises(SystemExit):
        warmup.main(["--model", "gpt5"])
    assert os.environ.get("TRITON_INTERPRET") == (None if GPU else "1")
