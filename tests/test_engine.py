"""Engine: the same tokens as the naive models, whatever the batch, and nothing is lost."""

from __future__ import annotations

import dataclasses
import math
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_checkpoint, tiny_config, transformers_model

import gpt2_kernels as ops
from gpt2 import GPT2, Engine, ReferenceGPT2, SamplingParams, load_tokenizer
from gpt2.text import TextStream

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
LENGTHS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40, 45, 50)  # below, at and past blocks of 8 and 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(n_embd=32, n_head=2, n_layer=2, vocab_size=300, n_positions=64)
    return random_checkpoint(tmp_path_factory.mktemp("model"), config, tokenizer=True)


@pytest.fixture
def model(folder: Path, production: torch.device) -> Iterator[GPT2]:
    yield GPT2.from_pretrained(folder, device=production, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in LENGTHS]


def tokens_of(engine: Engine, prompts: list, params: Any = GREEDY) -> list[list[int]]:
    found = [c.outputs[0].tokens for c in engine.generate(prompts, params)]
    whole(engine)
    return found


def whole(engine: Engine) -> None:
    """After a run every block is free again."""
    engine._scheduler.pool.check()
    assert engine.stats()["free_blocks"] == engine.stats()["num_blocks"]
    assert engine.unfinished == 0 and not engine._sample_of


def test_greedy_equals_the_naive_models_and_transformers(folder: Path, model: GPT2, prompts: list[list[int]]) -> None:
    """16 prompts of different lengths at once = one by one without a cache = transformers' generate."""
    oracle, reference = transformers_model(folder, torch.float32), ReferenceGPT2.from_pretrained(folder, device="cpu")
    found = tokens_of(Engine(model, block_size=8, num_blocks=64), prompts)
    for prompt, tokens in zip(prompts, found):
        assert tokens == reference.generate(prompt, 12)
        assert tokens == model.generate(prompt, 12)
        ids = torch.tensor([prompt])
        options = dict(attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=12, do_sample=False)
        theirs = oracle.generate(ids, **options)
        assert tokens == theirs[0, len(prompt) :].tolist()


def test_on_the_kernels(path: torch.device, folder: Path, prompts: list[list[int]]) -> None:
    """The engine over the Triton kernels (interpreted where there is no GPU): prefill, append and decode."""
    model = GPT2.from_pretrained(folder, device=path, dtype=torch.float32)
    reference = ReferenceGPT2.from_pretrained(folder, device="cpu")
    params = SamplingParams(max_tokens=3, temperature=0.0)
    chosen = [prompts[0], prompts[9]]
    found = tokens_of(Engine(model, block_size=8, num_blocks=16), chosen, params)
    assert found == [reference.generate(p, 3) for p in chosen]


@pytest.mark.parametrize("options", [
    {"max_batch": 1},
    {"max_batch": 3},
    {"num_blocks": 8, "block_size": 8},  # room for one long text at a time
    {"block_size": 16},
    {"block_size": 33},
    {"prefix_caching": False},
], ids=str)  # fmt: skip
def test_tokens_do_not_depend_on_the_engine(model: GPT2, prompts: list[list[int]], options: dict) -> None:
    params = [
        SamplingParams(max_tokens=8, seed=i, temperature=1.0 if i % 3 else 0.0, top_k=(0, 40, 5)[i % 3])
        for i in range(len(prompts))
    ]
    expected = [tokens_of(Engine(model, num_blocks=16, block_size=8), [p], q)[0] for p, q in zip(prompts, params)]
    engine = Engine(model, **{"num_blocks": 64, **options})
    assert tokens_of(engine, prompts, params) == expected
    backwards = tokens_of(engine, prompts[::-1], params[::-1])  # another order, and prefixes in the cache
    assert backwards == expected[::-1]


def test_chunked_prefill_changes_nothing(
    model: GPT2, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens_of(Engine(model, num_blocks=64), prompts)
    for budget in (1, 7, 16):
        monkeypatch.setattr("gpt2.engine.PREFILL_TOKENS", budget)
        assert tokens_of(Engine(model, num_blocks=64), prompts) == expected


def test_prefix_hits_change_nothing(model: GPT2) -> None:
    shared = list(range(40))
    prompts = [shared + [i] for i in range(6)]
    params = [SamplingParams(max_tokens=6, seed=i) for i in range(6)]
    expected = tokens_of(Engine(model, num_blocks=64, block_size=8, prefix_caching=False), prompts, params)
    engine = Engine(model, num_blocks=64, block_size=8, max_batch=2)
    assert tokens_of(engine, prompts, params) == expected
    assert engine.stats()["prefix_hits"] >= 4 * 40


def test_samples_of_one_prompt(model: GPT2) -> None:
    prompt = list(range(30))
    engine = Engine(model, num_blocks=64, block_size=8)
    (completion,) = engine.generate([prompt], SamplingParams(max_tokens=8, n=4, seed=3))
    whole(engine)
    outputs = [o.tokens for o in completion.outputs]
    assert len(outputs) == 4 and len({tuple(o) for o in outputs}) == 4
    assert engine.stats()["prefix_hits"] == 3 * 29  # three samples take all of the prompt but its last token
    assert outputs[0] == tokens_of(engine, [prompt], SamplingParams(max_tokens=8, seed=3))[0]
    again = engine.generate([prompt], SamplingParams(max_tokens=8, n=4, seed=3))[0]
    assert [o.tokens for o in again.outputs] == outputs


def test_seed_is_reported_and_repeats(model: GPT2) -> None:
    engine = Engine(model, num_blocks=64)
    first = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=10))[0]
    again = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=10, seed=first.seed))[0]
    assert first.outputs == again.outputs
    other = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=10))[0]
    assert other.seed != first.seed


def test_sampling_equals_the_naive_model(model: GPT2, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=10, temperature=0.8, top_k=20, top_p=0.9, seed=9)
    found = tokens_of(Engine(model, num_blocks=64), prompts, params)
    for prompt, tokens in zip(prompts, found):
        assert tokens == model.generate(prompt, 10, temperature=0.8, top_k=20, top_p=0.9, seed=9)


def test_end_of_text_and_stop_tokens(model: GPT2) -> None:
    engine = Engine(model, num_blocks=64)
    (free,) = tokens_of(engine, [[5]], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    assert len(free) == 20
    third = free[2]
    (completion,) = engine.generate([[5]], SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=(third,)))
    assert completion.outputs[0].finish_reason == "stop"
    assert completion.outputs[0].tokens == free[: free.index(third) + 1]
    with torch.no_grad():  # a model that always ends: its last hidden state points at <|endoftext|>
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(model.wte.weight[299])
        model.wte.weight[299] *= 100
    (ended,) = engine.generate([[5]], SamplingParams(max_tokens=20, temperature=0.0))
    assert ended.outputs[0].tokens == [299] and ended.outputs[0].finish_reason == "stop"
    (long,) = engine.generate([[5]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert long.outputs[0].tokens == [299] * 4 and long.outputs[0].finish_reason == "length"


def test_logprobs(model: GPT2) -> None:
    prompt = [7, 8, 9]
    (completion,) = Engine(model, num_blocks=64).generate([prompt], SamplingParams(max_tokens=5, seed=1, logprobs=3))
    output = completion.outputs[0]
    assert output.logprobs is not None and [entry.token for entry in output.logprobs] == output.tokens
    with torch.no_grad():
        text = torch.tensor([prompt + output.tokens], device=model.device)
        truth = torch.log_softmax(model(text)[0].double(), -1).cpu()
    for i, entry in enumerate(output.logprobs):
        row = truth[len(prompt) - 1 + i]
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
    (plain,) = Engine(model, num_blocks=64).generate([prompt], SamplingParams(max_tokens=5, seed=1))
    assert plain.outputs[0].logprobs is None and plain.outputs[0].tokens == output.tokens


def test_repetition_penalty_sees_prompt_and_output(model: GPT2) -> None:
    engine = Engine(model, num_blocks=64)
    params = SamplingParams(max_tokens=30, temperature=0.0, repetition_penalty=1e6, ignore_eos=True)
    prompt = [5, 6]
    (tokens,) = tokens_of(engine, [prompt], params)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens], device=model.device))[0]
    if bool((logits.amax(-1) > 0).all()):
        assert len(set(prompt + tokens)) == 32  # nothing is written twice


def test_text_and_stop_strings(folder: Path, model: GPT2) -> None:
    tokenizer = load_tokenizer(folder)
    engine = Engine(model, tokenizer, num_blocks=64)
    params = SamplingParams(max_tokens=20, seed=4, ignore_eos=True, top_k=0)
    (completion,) = engine.generate(["Once upon"], params)
    text = completion.outputs[0].text
    assert completion.prompt_tokens == tokenizer.encode("Once upon")
    assert text == tokenizer.decode_bytes(completion.outputs[0].tokens).decode("utf-8", errors="replace")
    assert "".join(engine.stream("Once upon", params)) == text
    middle = text[6:9]
    stopped = engine.generate(
        ["Once upon"], SamplingParams(max_tokens=20, seed=4, ignore_eos=True, top_k=0, stop=(middle,))
    )
    assert stopped[0].outputs[0].text == text[: text.index(middle)] and stopped[0].outputs[0].finish_reason == "stop"
    whole(engine)


def test_empty_things(folder: Path, model: GPT2) -> None:
    engine = Engine(model, load_tokenizer(folder), num_blocks=64)
    assert engine.generate([]) == []
    for prompt in ("", []):
        (completion,) = engine.generate([prompt], GREEDY)
        assert completion.prompt_tokens == [299] and completion.outputs[0].tokens
    (special,) = engine.generate(["<|endoftext|>a"], GREEDY)
    assert special.prompt_tokens == [299, *load_tokenizer(folder).encode("a")]


def test_overflow(model: GPT2) -> None:
    engine = Engine(model, num_blocks=64)
    with pytest.raises(ValueError, match=r"prompt and max_tokens must fit in 64 positions, got 60 \+ 12"):
        engine.add([1] * 60, GREEDY)
    stop = SamplingParams(max_tokens=12, temperature=0.0, on_overflow="stop", ignore_eos=True)
    (completion,) = engine.generate([[1] * 60], stop)
    assert len(completion.outputs[0].tokens) == 4 and completion.outputs[0].finish_reason == "length"
    (full,) = engine.generate([[1] * 64], stop)
    assert full.outputs[0].tokens == [] and full.outputs[0].finish_reason == "length"
    with pytest.raises(ValueError, match=r"a prompt must be at most 64 tokens, got 65"):
        engine.add([1] * 65, stop)
    whole(engine)


def test_requests_by_hand(model: GPT2) -> None:
    """add, step and abort; a stream or a job in between loses nobody's result."""
    engine = Engine(model, num_blocks=64)
    first, second = engine.add([1, 2], GREEDY), engine.add([3, 4], GREEDY)
    engine.step()
    engine.abort(second)
    engine.abort(999)
    assert len(engine.generate([[5], [6]], GREEDY)) == 2
    done = {}
    while engine.unfinished:
        done.update({c.request_id: c for c in engine.step()})
    assert set(done) == {first, second}
    assert done[second].outputs[0].finish_reason == "abort" and len(done[second].outputs[0].tokens) <= 1
    assert done[first].outputs[0].tokens == tokens_of(engine, [[1, 2]])[0]


def test_progress_of_many_requests(folder: Path, model: GPT2) -> None:
    """Each view of a running request is a prefix of its final result; a stop string is never half shown."""
    engine = Engine(model, load_tokenizer(folder), num_blocks=64)
    params = SamplingParams(max_tokens=20, n=2, seed=4, ignore_eos=True, logprobs=2)
    whole_text = engine.generate(["Once upon"], params)[0].outputs[0].text
    params = dataclasses.replace(params, stop=(whole_text[5:9],))
    numbers = [engine.add(prompt, params) for prompt in ("Once upon", "a")]
    seen: dict[int, list] = {number: [engine.progress(number)] for number in numbers}
    assert [[o.tokens for o in seen[n][0]] for n in numbers] == [[[], []]] * 2
    done = {}
    while engine.unfinished:
        done.update({c.request_id: c for c in engine.step()})
        for number in numbers:
            if (outputs := engine.progress(number)) is not None:
                seen[number].append(outputs)
    for number in numbers:
        assert len(seen[number]) > 3 and engine.progress(number) is None
        for outputs in seen[number]:
            for part, end in zip(outputs, done[number].outputs, strict=True):
                assert end.text.startswith(part.text) and end.tokens[: len(part.tokens)] == part.tokens
                assert end.logprobs[: len(part.logprobs)] == part.logprobs and len(part.logprobs) == len(part.tokens)
                assert part.finish_reason == "" or part == end
    assert done[numbers[0]].outputs[0].text == whole_text[: whole_text.index(whole_text[5:9])]
    whole(engine)


def test_streams_beside_other_requests(folder: Path, model: GPT2) -> None:
    """Nothing is lost or duplicated: finished neighbours wait, and a stream may be read late or never."""
    engine = Engine(model, load_tokenizer(folder), num_blocks=64)
    params = SamplingParams(max_tokens=20, seed=4, ignore_eos=True)
    expected = engine.generate(["Once upon"], params)[0].outputs[0].text
    neighbour = engine.add([1, 2], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    late, never = engine.stream("Once upon", params), engine.stream("Once upon", params)
    first = next(late)
    engine.generate([[3], [4]], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))  # finishes `late` too
    assert first + "".join(late) == expected
    del never
    assert [c.request_id for c in engine.step()] == [neighbour]
    whole(engine)


def test_a_token_without_a_text(folder: Path, model: GPT2) -> None:
    """A vocabulary padded beyond the tokenizer's: such a token is kept and adds nothing to the text."""
    stream = TextStream(load_tokenizer(folder))
    assert stream.push(10_000) == "" and stream.push(65) == "A"


def test_nothing_is_recorded_for_gradients(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden, **how: seen.append(real(hidden, **how)) or seen[-1])
    Engine(model, num_blocks=64).generate([[1]], GREEDY)
    assert seen and not any(logits.requires_grad for logits in seen)


def test_products_of_prompts_and_of_generated_tokens(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a kernel of its own: a token's bits depend on which it is, and on nothing else."""
    engine = Engine(model, num_blocks=64, cuda_graphs=False)  # graph replays would not be seen
    seen: list[list[bool]] = []
    monkeypatch.setattr(ops, "has_paged_layer", lambda x: False)
    for name in ("linear", "gelu_mlp"):
        real = getattr(ops, name)

        def watched(*args: Any, real: Any = real, decode: bool = False, **options: Any) -> torch.Tensor:
            seen[-1].append(decode)
            return real(*args, decode=decode, **options)

        monkeypatch.setattr(ops, name, watched)
    forward = model.forward_paged
    monkeypatch.setattr(model, "forward_paged", lambda b, c: seen.append([]) or forward(b, c))
    engine.generate([[1]], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    products = 3 * model.config.n_layer + 1  # per layer two of attention and the MLP as one; and the logits
    assert seen == [[False] * products, [True] * products, [True] * products]


def test_a_prompt_is_always_prefill(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even its last token alone, when a prefix is shared: decode may use another tile, with other bits."""
    engine = Engine(model, num_blocks=64, block_size=8, cuda_graphs=False)  # graph replays would not be seen
    seen = []
    real = model.forward_paged
    monkeypatch.setattr(model, "forward_paged", lambda b, c: seen.append((len(b.tokens), b.max_seqlen)) or real(b, c))
    for _ in range(2):
        engine.generate([list(range(17))], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    assert seen == [(17, 17), (1, 1), (1, 2), (1, 1)]


def test_integers_of_numpy_and_torch_are_tokens(model: GPT2) -> None:
    engine = Engine(model, num_blocks=64)
    expected = tokens_of(engine, [[1, 2]])
    assert tokens_of(engine, [torch.tensor([1, 2])]) == tokens_of(engine, torch.tensor([[1, 2]]).numpy()) == expected


def test_a_closed_stream_frees_its_blocks(folder: Path, model: GPT2) -> None:
    engine = Engine(model, load_tokenizer(folder), num_blocks=64)
    stream = engine.stream("abc", SamplingParams(max_tokens=40, seed=0, ignore_eos=True))
    next(stream)
    assert engine.stats()["free_blocks"] < 64
    stream.close()
    whole(engine)


def test_an_error_in_a_step_ends_all_and_leaves_the_engine_usable(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, num_blocks=64)
    expected = tokens_of(engine, [[1, 2, 3]])
    real, calls = model.forward_paged, []

    def broken(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return real(*args)

    monkeypatch.setattr(model, "forward_paged", broken)
    waiting = engine.add([9, 9], GREEDY)
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.generate([[1, 2, 3], [4]], GREEDY)
    assert engine.unfinished == 0 and waiting not in engine._requests
    whole(engine)
    assert tokens_of(engine, [[1, 2, 3]]) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be a number in 0..1e30, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number in 0..1e30, got nan"),
        ({"temperature": 1e300}, "temperature must be a number in 0..1e30, got 1e+300".replace("+", r"\+")),
        ({"top_k": -1}, "top_k must be an integer in 0..2^31 - 1, got -1".replace("^", r"\^")),
        ({"top_k": 2**70}, "top_k must be an integer in 0"),
        ({"top_p": 0}, r"top_p must be a number in \(0, 1\], got 0"),
        ({"min_p": 1.5}, r"min_p must be a number in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number in 1e-30..1e30, got 0.0"),
        ({"seed": -1}, "seed must be None or an integer"),
        ({"n": 0}, "n must be an integer in 1..4096, got 0"),
        ({"n": 4097}, "n must be an integer in 1..4096, got 4097"),
        ({"stop": ("a",) * 17}, "stop must be at most 16 strings"),
        ({"stop": ("",)}, "stop must be strings that are not empty"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids must be integers of at least 0"),
        ({"logprobs": True}, "logprobs must be an integer in 0..1024, got True"),
        ({"on_overflow": "ignore"}, "on_overflow must be 'error' or 'stop', got 'ignore'"),
    ],
    ids=str,
)
def test_bad_sampling_params(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"SamplingParams: {message}"):
        SamplingParams(**changes)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 10**5000, math.inf, -math.inf], ids=["1e400", "-1e400", "1e5000", "inf", "-inf"]
)
def test_numbers_that_no_float_holds(name: str, value: float) -> None:
    """The message is short, although Python prints integers in full, and refuses to print one of 5000 digits."""
    with pytest.raises(ValueError, match=f"^SamplingParams: {name} must be a number in .*, got ") as e:
        SamplingParams(**{name: value})
    assert len(str(e.value)) < 200


def test_unknown_parameter() -> None:
    with pytest.raises(TypeError, match="beam_width"):
        SamplingParams(beam_width=3)  # type: ignore[call-arg]


def test_bad_requests_are_refused_before_any_work(folder: Path, model: GPT2) -> None:
    engine = Engine(model, num_blocks=4, block_size=8)
    for call, message in [
        (lambda: engine.add("text", GREEDY), "a prompt in text needs a tokenizer"),
        (lambda: engine.add([300], GREEDY), r"token ids must be integers in 0..299, got 300"),
        (lambda: engine.add([1.5], GREEDY), r"token ids must be integers in 0..299, got 1.5"),
        (lambda: engine.add([1], {"max_tokens": 3}), "params must be SamplingParams, got dict"),
        (lambda: engine.add([1], SamplingParams(max_tokens=9, stop=("x",))), "stop strings need a tokenizer"),
        (lambda: engine.add([1], SamplingParams(max_tokens=9, logprobs=301)), "logprobs must be at most 300, got 301"),
        (
            lambda: engine.add([1], SamplingParams(max_tokens=9, stop_token_ids=(300,))),
            "stop_token_ids must be below 300, got 300",
        ),
        (lambda: engine.add([1] * 30, GREEDY), "the cache must hold prompt and max_tokens"),
        (lambda: engine.generate(None, GREEDY), "prompts must be a list, got None"),
        (lambda: engine.generate([7], GREEDY), "a prompt must be text or token ids, got 7"),
        (lambda: engine.generate("text", GREEDY), "prompts must be a list, got one string"),
        (lambda: engine.generate([[1], [2]], [GREEDY]), r"params must be one or one per prompt \(2\), got 1"),
        (lambda: engine.generate([[1], [999]], GREEDY), "prompt 1: Engine: token ids must be integers"),
        (lambda: engine.stream([1], SamplingParams(n=2)), "n must be 1, got 2"),
        (lambda: engine.stream([1], GREEDY), "a tokenizer is needed"),
        (lambda: Engine(model, max_batch=0), "max_batch must be a positive integer, got 0"),
        (lambda: Engine(model, load_tokenizer("storybook")), "tokens must exist in the model"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    whole(engine)
    with pytest.raises(ValueError, match="lone surrogate"):
        Engine(model, load_tokenizer(folder), num_blocks=4).add("\ud800", GREEDY)


def test_an_error_while_results_are_on_their_way(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the engine works ahead: afterwards no result goes to the wrong request."""
    engine = Engine(model, num_blocks=16, block_size=8, cuda_graphs=False)  # graph replays would not fail
    engine._steps, engine._most_unread = 4, 1
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, n=3)
    expected = engine.generate([[1, 2, 3], [4, 5]], params)
    real, calls = model.forward_paged, []

    def broken(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("out of luck")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward_paged", broken)
        with pytest.raises(RuntimeError, match="out of luck"):
            engine.generate([[1, 2, 3], [4, 5]], params)
    whole(engine)
    again = engine.generate([[1, 2, 3], [4, 5]], params)
    assert [[o.tokens for o in c.outputs] for c in again] == [[o.tokens for o in c.outputs] for c in expected]


def test_an_abort_while_results_are_on_their_way(model: GPT2) -> None:
    engine = Engine(model, num_blocks=16, block_size=8)
    engine._steps, engine._most_unread = 3, 1
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    (expected,) = tokens_of(engine, [[2]], params)
    first, second = (engine.add([i], params) for i in (1, 2))
    for _ in range(3):
        engine.step()
    engine.abort(first)
    done = {}
    while engine.unfinished:
        done.update({c.request_id: c for c in engine.step()})
    assert done[first].outputs[0].finish_reason == "abort" and done[second].outputs[0].tokens == expected
    whole(engine)


def test_text_is_made_when_it_is_asked_for(folder: Path, model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 256 sequences the host has no time to decode each token: without stop strings that waits for the end."""
    engine = Engine(model, load_tokenizer(folder), num_blocks=64)
    seen = []
    real = TextStream.extend
    monkeypatch.setattr(TextStream, "extend", lambda self, tokens: seen.append(len(tokens)) or real(self, tokens))
    engine.generate(["abc"], SamplingParams(max_tokens=12, seed=0, ignore_eos=True))
    assert seen == [12]


def test_an_fp8_cache(model: GPT2, prompts: list[list[int]]) -> None:
    """Close to the exact texts, in half the bytes of bfloat16, and as independent of the batch as any cache."""
    params = [SamplingParams(max_tokens=8, seed=i, ignore_eos=True, logprobs=1) for i in range(len(prompts))]
    exact = Engine(model, num_blocks=64, block_size=8)
    rounded = Engine(model, num_blocks=64, block_size=8, cache_dtype=torch.float8_e4m3fn)
    assert rounded.stats()["cache_bytes"] * model.dtype.itemsize == exact.stats()["cache_bytes"]
    together = rounded.generate(prompts, params)
    whole(rounded)
    for prompt, own, completion in zip(prompts, params, together):
        engine = Engine(model, num_blocks=12, block_size=8, max_batch=1, cache_dtype=torch.float8_e4m3fn)
        assert engine.generate([prompt], own)[0].outputs == completion.outputs
    # Even the first new token depends on a rounded cache. Where it is the same token, its probability is nearly so too.
    firsts = [
        (c.outputs[0].logprobs[0], e.outputs[0].logprobs[0]) for c, e in zip(together, exact.generate(prompts, params))
    ]
    pairs = [(a.logprob, b.logprob) for a, b in firsts if a.token == b.token]
    assert len(pairs) >= len(prompts) // 2 and any(a != b for a, b in pairs)
    assert max(abs(a - b) for a, b in pairs) < 0.3  # 4 bits of precision; without the scales it is 1 or more


def test_a_cache_dtype_that_is_not_to_be_had(model: GPT2) -> None:
    with pytest.raises(ValueError, match="Engine: cache_dtype must be torch.float32 or torch.float8_e4m3fn, got"):
        Engine(model, num_blocks=4, cache_dtype=torch.float16)


@pytest.mark.parametrize("place", [
    "gpt2.scheduler.BlockPool.allocate", "gpt2.scheduler.BlockPool.release", "gpt2.scheduler.Scheduler._admit",
    "gpt2.scheduler.Scheduler.commit", "gpt2.decode.Decoder.join", "gpt2.decode.Decoder.keep",
    "gpt2.decode.Rows.advance", "gpt2.request.Sample.take", "gpt2.engine.Engine._read",
])  # fmt: skip
@pytest.mark.parametrize("after", [True, False])
def test_an_interrupt_anywhere_loses_nothing(
    model: GPT2, monkeypatch: pytest.MonkeyPatch, place: str, after: bool
) -> None:
    """Ctrl-C before or after a function's work: every block is free, and the engine then writes the same texts."""
    engine = Engine(model, num_blocks=10, block_size=8, max_batch=3)
    engine._steps, engine._most_unread = 2, 1
    prompts, params = [[1, 2, 3], [4, 5], [6] * 20, [7]], SamplingParams(max_tokens=12, seed=1, n=2)
    expected = [[o.tokens for o in c.outputs] for c in engine.generate(prompts, params)]
    owner, name = place.rpartition(".")[::2]
    real = getattr(pkgutil.resolve_name(owner), name)
    for at in (1, 3, 4):
        calls = []

        def interrupted(*args: Any, at: int = at, calls: list = calls) -> Any:
            calls.append(1)
            if len(calls) == at and not after:
                raise KeyboardInterrupt
            result = real(*args)
            if len(calls) == at:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(place, interrupted)
            try:
                engine.generate(prompts, params)
            except KeyboardInterrupt:
                pass
            else:
                assert len(calls) < at
        whole(engine)
        assert [[o.tokens for o in c.outputs] for c in engine.generate(prompts, params)] == expected
