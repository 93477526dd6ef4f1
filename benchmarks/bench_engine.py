"""Generation by whole models: prefill, decode at several batch sizes, a batch job. Wall time, host included.

All rivals get the same weights, prompts and lengths, decode greedily and never stop early. The weights are random:
no network is needed, and the time does not depend on them. Decode time is that of a whole generation minus the time to
its first token. A result is right when float64 finds each chosen token as likely as the likeliest one, within the
precision of the dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import peers
from benchmarks.measure import Case, Inputs, Run
from benchmarks.timing import Call
from gpt2 import GPT2, PRESETS, Engine, GPT2Config, ReferenceGPT2, SamplingParams
from gpt2_kernels import _overlap

Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts, int], list[list[int]]]

TINY = GPT2Config(vocab_size=101, n_positions=64, n_embd=64, n_layer=1, n_head=1, eos_token_id=0)
CHECKED = 2  # sequences that are checked in float64


@functools.lru_cache(maxsize=1)
def _model(run_key: tuple[str, torch.device, torch.dtype]) -> GPT2:
    name, device, dtype = run_key
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws even the largest model's weights quickly
        return GPT2(TINY if name == "tiny" else PRESETS[name]).to(dtype).eval()


def inputs(run: Run, name: str, lengths: Sequence[int]) -> Inputs:
    model = _model((name, run.device, run.dtype))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return model, prompts


def ours(model: GPT2, prompts: Prompts, new: int) -> Generate:
    """Without prefix caching, since every turn repeats the same prompts."""
    blocks = sum(-(-(len(p) + new) // 16) for p in prompts)
    engine = Engine(model, max_batch=len(prompts), num_blocks=blocks, prefix_caching=False)

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        return [completion.outputs[0].tokens for completion in engine.generate(prompts, params)]

    return generate


def in_turn(model: GPT2, prompts: Prompts, new: int) -> Generate:
    """Without programmatic dependent launch, to show what it saves."""
    generate = ours(model, prompts, new)

    def call(prompts: Prompts, new: int) -> list[list[int]]:
        with _overlap.disabled():
            return generate(prompts, new)

    return call


def transformers(model: GPT2, prompts: Prompts, new: int, **options: Any) -> Generate:
    peer = peers.Transformers(model)
    return functools.partial(peer.generate, **options)


def transformers_continuous(model: GPT2, prompts: Prompts, new: int) -> Generate:
    return peers.Transformers(model, attention="paged|sdpa").generate_batch


def rivals(run: Run, name: str, batch: int = 0) -> dict[str, Callable[..., Generate]]:
    """For `batch` prompts of one length; 0: for a batch job, whose prompts transformers' plain generate would pad.

    On a GPU the larger models have no rivals except in the batch job: those would take minutes.
    """
    found: dict[str, Callable[..., Generate]] = {"ours": ours}
    gpu = run.device.type == "cuda"
    if batch and not (gpu and name != "gpt2"):
        found["transformers"] = transformers
        if gpu and batch == 1:
            found["kernels in turn"] = in_turn
            found["transformers, static cache + compile"] = functools.partial(
                transformers, cache_implementation="static"
            )
    if not batch and gpu:
        found["transformers, continuous batching"] = transformers_continuous
    return found


def whole(make: Callable[..., Generate], new: int) -> Callable[..., Call]:
    def bind(model: GPT2, prompts: Prompts) -> Call:
        generate = make(model, prompts, new)
        return lambda: generate(prompts, new)

    return bind


def after_the_first(make: Callable[..., Generate], new: int) -> Callable[..., tuple[Call, Call]]:
    """`new` + 1 tokens, minus the time of the first."""

    def bind(model: GPT2, prompts: Prompts) -> tuple[Call, Call]:
        generate = make(model, prompts, new + 1)
        return lambda: generate(prompts, new + 1), lambda: generate(prompts, 1)

    return bind


@functools.lru_cache(maxsize=1)
def _truth(model: GPT2) -> ReferenceGPT2:
    with torch.device(model.device):
        truth = ReferenceGPT2(model.config).double()
    truth.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    return truth.eval()


def check(inputs: Inputs, texts: list[list[int]]) -> float:
    """How far the chosen tokens' logits lie below the largest ones, as a share of the logits' spread."""
    model, prompts = inputs
    worst = 0.0
    if len(texts) != len(prompts) or len({len(t) for t in texts}) != 1:
        raise ValueError(f"generate: {len(prompts)} texts of one length were asked for, got {list(map(len, texts))}")
    for prompt, text in list(zip(prompts, texts))[:CHECKED]:
        tokens = torch.tensor([[*prompt, *text]], device=model.device)
        with torch.no_grad():
            logits = _truth(model)(tokens)[0, len(prompt) - 1 : -1]
        best, own = logits.amax(-1), logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]
        worst = max(worst, ((best - own) / (best - logits.mean(-1))).max().item())
    return worst


def bytes_of(config: GPT2Config, lengths: Sequence[int], new: int, size: int) -> float:
    """What `new` decode steps have to read: at each step all weights (except positions), and every key and value."""
    weights = config.num_parameters - config.n_positions * config.n_embd
    keys = 2 * config.n_layer * config.n_embd * sum(n + t for n in lengths for t in range(1, new + 1))
    return float(size * (new * weights + keys))


def flops_of(config: GPT2Config, lengths: Sequence[int]) -> float:
    """FLOPs of prefill: two per weight and token, with logits for the last token only, plus attention."""
    inner = config.num_parameters - (config.vocab_size + config.n_positions) * config.n_embd
    attention = 2 * config.n_layer * config.n_embd * sum(n * n for n in lengths)
    return 2.0 * (inner * sum(lengths) + config.vocab_size * config.n_embd * len(lengths)) + attention


def cases(run: Run) -> Iterator[Case]:
    size = run.dtype.itemsize
    # Model, batch, prompt tokens, new tokens.
    decode = run.pick(
        [("gpt2", 1, 512, 128), ("gpt2", 64, 512, 64), ("gpt2", 256, 512, 64), ("gpt2", 8, 512, 64)]
        + [("gpt2-medium", 1, 512, 64), ("gpt2-large", 1, 512, 64), ("gpt2-xl", 1, 512, 64)],
        [("storybook", 1, 64, 32), ("storybook", 8, 64, 32), ("storybook", 64, 64, 8), ("gpt2", 1, 32, 8)],
        [("tiny", 2, 8, 4)],
    )
    for name, batch, prompt, new in decode:
        config = TINY if name == "tiny" else PRESETS[name]
        yield Case(
            name=f"decode {name} batch={batch} context={prompt}..{prompt + new}",
            make=lambda name=name, batch=batch, prompt=prompt: inputs(run, name, [prompt] * batch),
            rivals={n: after_the_first(make, new) for n, make in rivals(run, name, batch).items()},
            check=check,
            moved=bytes_of(config, [prompt] * batch, new, size),
            units=batch * new,
            clock="wall",
            whole=True,
        )
    prefill = run.pick([("gpt2", 16, 1000), ("gpt2-xl", 16, 1000)], [("storybook", 8, 200)], [("tiny", 2, 8)])
    for name, batch, prompt in prefill:
        config = TINY if name == "tiny" else PRESETS[name]
        yield Case(
            name=f"prefill {name} {batch}x{prompt}",
            make=lambda name=name, batch=batch, prompt=prompt: inputs(run, name, [prompt] * batch),
            rivals={n: whole(make, 1) for n, make in rivals(run, name, batch).items()},
            check=check,
            flops=flops_of(config, [prompt] * batch),
            units=batch * prompt,
            clock="wall",
            whole=True,
        )
    jobs = run.pick([("gpt2", 256, 256), ("gpt2-xl", 256, 128)], [("storybook", 32, 32)], [("tiny", 3, 4)])
    for name, requests, new in jobs:
        config = TINY if name == "tiny" else PRESETS[name]
        longest = run.pick(512, 128, 16)
        lengths = [1 + (37 * i) % longest for i in range(requests)]
        yield Case(
            name=f"batch job {name} {requests} requests of 1..{longest} + {new}",
            make=lambda name=name, lengths=lengths: inputs(run, name, lengths),
            rivals={n: whole(make, new) for n, make in rivals(run, name).items()},
            check=check,
            moved=bytes_of(config, lengths, new, size),
            units=requests * new,
            clock="wall",
            whole=True,
        )


def test_speed(measured) -> None:
    assert measured.right, measured.why
