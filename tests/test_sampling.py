"""sample: greedy, filters against a plain float64 construction, the distribution, and independence of the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import gpt2_kernels as ops
from gpt2_kernels import reference


def draw(logits: Tensor, **changes: object) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """sample with one value for all rows; seeds and positions may be lists."""
    S = logits.shape[0]
    values: dict = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 0, "positions": 0, **changes}
    floats = ("temperature", "top_p", "min_p", "repetition_penalty")
    for name, value in values.items():
        if isinstance(value, (int, float, list)) and name != "top_logprobs":
            dtype = torch.float32 if name in floats else torch.int64
            values[name] = torch.tensor(value if isinstance(value, list) else [value] * S, dtype=dtype)
    return ops.sample(logits, **values)


def philox_4x32(counter: int, key: int) -> int:
    """First word of Philox-4x32-10, on Python's own integers: independent of the package."""
    c, k = [counter & 0xFFFFFFFF, 0, 0, 0], [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def test_uniform_is_philox() -> None:
    seeds = torch.tensor([0, 1, 2**62 + 12345, 2**63 - 1, -1, -(2**63)])
    positions = torch.tensor([0, 7, 1023, 2**31, 5, 2**32 - 1])
    expected = [(philox_4x32(p, s & (2**64 - 1)) >> 8) / 2**24 for s, p in zip(seeds.tolist(), positions.tolist())]
    assert reference.uniform(seeds, positions).tolist() == expected
    # The published test vector of counter 0 and key 0 (Salmon et al., 2011).
    assert philox_4x32(0, 0) == 0x6627E8D5


def test_greedy_takes_the_first_maximum() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 2.0, 5.0]])
    tokens, logprobs, top = draw(logits, temperature=0.0)
    assert tokens.tolist() == [1, 0] and top is None
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[[0, 1], [1, 0]])


def allowed(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Probabilities after the filters, built by sorting in float64."""
    scores = logits.astype(np.float64) / temperature
    keep = np.ones_like(scores, dtype=bool)
    if top_k:
        keep &= scores >= np.sort(scores)[::-1][min(top_k, len(scores)) - 1]
    p = np.where(keep, np.exp(scores - scores.max()), 0.0)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    nucleus = np.zeros_like(keep)
    total = 0.0
    for i in order:
        if total >= top_p:
            break
        nucleus[i] = True
        total += p[i]
    keep &= nucleus | (top_p >= 1)
    keep &= p >= min_p * p.max()
    p = np.where(keep, p, 0.0)
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.3, 0, 0.6, 0.0),
        (1.0, 0, 1.0, 0.2),
        (1.0, 12, 0.8, 0.05),
        (1.0, 1, 1.0, 0.0),
    ],
)
def test_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Chi-square of 20,000 draws with fixed seeds against the float64 probabilities, rare tokens pooled."""
    rng = np.random.default_rng(3)
    logits = (2 * rng.standard_normal(24)).astype(np.float32)
    p = allowed(logits, temperature, top_k, top_p, min_p)
    N = 20_000
    rows = torch.from_numpy(logits).expand(N, 24)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tensors = {k: torch.full((N,), v, dtype=torch.int64 if k == "top_k" else torch.float32) for k, v in options.items()}
    tokens, _, _ = reference.sample(rows, **tensors, seeds=torch.full((N,), 11), positions=torch.arange(N))
    counts = np.bincount(tokens.numpy(), minlength=24).astype(float)
    assert counts[p == 0].sum() == 0, "a token that the filters exclude was drawn"
    common = p * N >= 10
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * N
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    # Wilson-Hilferty: about the 1 - 1e-5 quantile of chi-square
    limit = freedom * (1 - 2 / (9 * freedom) + 4.26 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    assert statistic <= limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, limit {limit:.1f}"


def test_ties_at_the_top_k_threshold_stay() -> None:
    logits = torch.tensor([[4.0, 1.0, 1.0, 1.0, -9.0]]).expand(400, 5)
    tokens, _, _ = draw(logits, top_k=2, seeds=list(range(400)))
    assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_top_k_larger_than_the_vocabulary() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    seeds = list(range(50))
    assert torch.equal(draw(logits, top_k=100, seeds=seeds)[0], draw(logits, seeds=seeds)[0])


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    tokens, _, _ = draw(logits, temperature=1e-30, seeds=list(range(40)))
    assert torch.equal(tokens, logits.argmax(-1))


def test_repetition_penalty() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    history = torch.tensor([[True, False, True, False]])
    tokens, logprobs, _ = draw(logits, temperature=0.0, history=history, repetition_penalty=1.5)
    assert tokens.item() == 1  # 2.0 / 1.5 < 1.9
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[:, 1])  # the model's own, without the penalty
    tokens, _, _ = draw(logits[:, 2:], temperature=0.0, history=history[:, 2:], repetition_penalty=1.5)
    assert tokens.item() == 1  # -1.0 * 1.5 < -1.1


def test_top_logprobs() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    _, _, top = draw(logits, temperature=0.0, top_logprobs=4)
    assert top is not None
    expected = torch.log_softmax(logits.double(), -1).topk(4)
    assert torch.equal(top[0], expected.indices)
    torch.testing.assert_close(top[1].double(), expected.values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_the_others(threads: int, request: pytest.FixtureRequest) -> None:
    """Bit for bit, with any number of threads: PyTorch would sum a row alone in another order than among others."""
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(36, 50257, generator=generator)
    options = dict(
        temperature=[0.0, 1.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, 0.1],
        top_k=[0, 40, 0, 3, 0, 0, 7, 0, 0],
        top_p=[1.0, 1.0, 0.9, 1.0, 0.5, 1.0, 0.99, 1.0, 1.0],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0],
        seeds=list(range(9)),
        positions=list(range(100, 109)),
    )
    options = {name: 4 * values for name, values in options.items()}
    tokens, logprobs, _ = draw(logits, **options)
    for i in range(36):
        alone = draw(logits[i : i + 1], **{k: v[i : i + 1] for k, v in options.items()})
        assert alone[0].item() == tokens[i].item() and alone[1].item() == logprobs[i].item()


def test_seed_and_position_decide() -> None:
    logits = torch.zeros(200, 1000)
    seeds = [7] * 200
    first = draw(logits, seeds=seeds, positions=list(range(200)))[0]
    assert torch.equal(first, draw(logits, seeds=seeds, positions=list(range(200)))[0])
    assert len(set(first.tolist())) > 150  # another position, another draw
    assert not torch.equal(first, draw(logits, seeds=[8] * 200, positions=list(range(200)))[0])


def test_bad_input() -> None:
    logits = torch.zeros(2, 5)
    for changes, message in [
        ({"temperature": torch.zeros(3)}, r"sample: temperature must be \(S,\) = \(2,\), got \(3,\)"),
        ({"top_k": torch.zeros(2)}, r"sample: top_k must be torch.int64, got torch.float32"),
        ({"top_logprobs": 6}, r"sample: top_logprobs must lie in 0..5, got 6"),
        ({"history": torch.zeros(2, 5, dtype=torch.bool)}, r"sample: history and repetition_penalty go together"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw(logits, **changes)
