"""sample: filters against a plain float64 construction, the distribution, the kernel against the reference, and
independence of the batch.

Interpreting a row takes 20 ms for a small vocabulary and 100 ms for GPT-2's, so there are few rows here.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import GPU
from tolerance import DTYPES, assert_accurate
from torch import Tensor
from torch.library import opcheck

import gpt2_kernels as ops
from gpt2_kernels import reference

FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")
# Every option alone, and combinations.
OPTIONS: tuple[dict, ...] = (
    {},
    {"temperature": 0.6},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.6},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 0.6},
)


def draw(logits: Tensor, **changes: object) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """sample with one value for all rows, or a list with one per row."""
    return ops.sample(logits, **options(logits, **changes))


def options(logits: Tensor, **changes: object) -> dict:
    S, device = logits.shape[0], logits.device
    values: dict = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 0, "positions": 0, **changes}
    for name, value in values.items():
        if isinstance(value, (int, float, list)) and name != "top_logprobs":
            dtype = torch.float32 if name in FLOATS else torch.int64
            values[name] = torch.tensor(value if isinstance(value, list) else [value] * S, dtype=dtype, device=device)
    return values


def by_reference(logits: Tensor, **changes: object) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    values = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options(logits, **changes).items()}
    return reference.sample(logits.cpu(), **values)


def random_rows(S: int, V: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(S, V, generator=torch.Generator().manual_seed(seed))).to(dtype).to(device)


def random_options(S: int, seed: int) -> dict:
    """A mix of greedy rows and of every filter, some off."""
    g = torch.Generator().manual_seed(seed)

    def some(values: Tensor, off: float) -> list:
        return torch.where(torch.rand(S, generator=g) < 0.6, values, off).tolist()

    return {
        "temperature": some(0.1 + 2 * torch.rand(S, generator=g), 0.0),
        "top_k": [int(k) for k in some(torch.randint(1, 60, (S,), generator=g), 0)],
        "top_p": some(torch.rand(S, generator=g), 1.0),
        "min_p": some(0.2 * torch.rand(S, generator=g), 0.0),
        "seeds": torch.randint(-(2**62), 2**62, (S,), generator=g).tolist(),
        "positions": torch.randint(0, 2**32, (S,), generator=g).tolist(),
    }


# --- the random numbers ---------------------------------------------------------------------------------------------


def philox_4x32(counter: int, key: int) -> int:
    """First word of Philox-4x32-10, on Python's own integers: independent of the package."""
    c, k = [counter & 0xFFFFFFFF, 0, 0, 0], [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


SEEDS = [0, 1, 2**62 + 12345, 2**63 - 1, -1, -(2**63)]
POSITIONS = [0, 7, 1023, 2**31, 5, 2**32 - 1]


def test_uniform_is_philox() -> None:
    expected = [(philox_4x32(p, s & (2**64 - 1)) >> 8) / 2**24 for s, p in zip(SEEDS, POSITIONS)]
    assert reference.uniform(torch.tensor(SEEDS), torch.tensor(POSITIONS)).tolist() == expected
    # The published test vector of counter 0 and key 0 (Salmon et al., 2011).
    assert philox_4x32(0, 0) == 0x6627E8D5


def test_the_draw_is_the_inverse_of_the_distribution(path: torch.device) -> None:
    """Of 4096 equally likely tokens, floor(4096 u) is drawn: the first twelve bits of the number, in every row."""
    tokens, _, _ = draw(torch.zeros(6, 4096, device=path), seeds=SEEDS, positions=POSITIONS)
    assert tokens.tolist() == [philox_4x32(p, s & (2**64 - 1)) >> 20 for s, p in zip(SEEDS, POSITIONS)]


@pytest.mark.parametrize(("V", "parts"), [(4096, 4096), (2**18, 64)], ids=["of tokens", "of tiles"])
def test_the_number_that_is_a_border(path: torch.device, V: int, parts: int) -> None:
    """A number where the share of one token, or of a tile of 4096, ends and the next begins belongs to the next."""
    seeds = torch.arange(1_000_000)
    numbers = reference.uniform(seeds, torch.zeros_like(seeds)) * parts
    chosen = int((numbers == numbers.floor()).nonzero()[0])
    assert numbers[chosen] > 0
    tokens, _, _ = draw(torch.zeros(1, V, device=path), seeds=chosen)
    assert tokens.item() == int(numbers[chosen]) * (V // parts)


# --- what is kept, and how often it is drawn ------------------------------------------------------------------------


def allowed(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    history: np.ndarray | None = None,
    repetition_penalty: float = 1.0,
) -> np.ndarray:
    """Probabilities after the filters, built by sorting in float64."""
    scores = logits.astype(np.float64)
    if history is not None:
        penalised = np.where(scores > 0, scores / repetition_penalty, scores * repetition_penalty)
        scores = np.where(history, penalised, scores)
    scores /= temperature
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


def chi_square(tokens: Tensor, p: np.ndarray) -> None:
    """Checks that tokens were drawn with probabilities p; those expected fewer than ten times are pooled."""
    N = len(tokens)
    counts = np.bincount(tokens.numpy(), minlength=len(p)).astype(float)
    assert counts[p == 0].sum() == 0, "a token that the filters exclude was drawn"
    common = p * N >= 10
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * N
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    # About the 1 - 1e-5 quantile of chi-square, by the approximation of Wilson and Hilferty (1931)
    limit = freedom * (1 - 2 / (9 * freedom) + 4.26 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    assert statistic <= limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, limit {limit:.1f}"


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_distribution_of_the_reference(changes: dict) -> None:
    """20,000 draws with fixed seeds against the float64 probabilities. The kernel draws what the reference draws."""
    rng = np.random.default_rng(3)
    logits, history = (2 * rng.standard_normal(24)).astype(np.float32), rng.random(24) < 0.4
    seen = {"history": history} if "repetition_penalty" in changes else {}
    N = 20_000
    rows = torch.from_numpy(logits).expand(N, 24)
    seen_rows = {name: torch.from_numpy(value).expand(N, 24) for name, value in seen.items()}
    tokens, _, _ = by_reference(rows, **changes, **seen_rows, seeds=11, positions=list(range(N)))
    chi_square(tokens, allowed(logits, **changes, **seen))


@pytest.mark.parametrize("changes", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_distribution(path: torch.device, changes: dict) -> None:
    """On every path, with fewer draws where they are interpreted, which finds only gross mistakes."""
    rng = np.random.default_rng(4)
    logits, history = (1.5 * rng.standard_normal(64)).astype(np.float32), rng.random(64) < 0.4
    seen = {"history": history} if "repetition_penalty" in changes else {}
    N = 20_000 if path.type == "cuda" else 80
    rows = torch.from_numpy(logits).to(path).expand(N, 64)
    seen_rows = {name: torch.from_numpy(value).to(path).expand(N, 64) for name, value in seen.items()}
    tokens, _, _ = draw(rows, **changes, **seen_rows, seeds=list(range(N)), positions=5)
    chi_square(tokens.cpu(), allowed(logits, **changes, **seen))


def test_distribution_over_the_vocabulary_of_gpt2(production: torch.device) -> None:
    """No draw from the cut-off tail (top_p 0.9 of 50,257), and common tokens come as often as they should."""
    logits = random_rows(1, 50257, production, seed=5)
    N = 20_000 if GPU else 400
    tokens, _, _ = draw(logits.expand(N, -1), top_p=0.9, seeds=3, positions=list(range(N)))
    chi_square(tokens.cpu(), allowed(logits[0].cpu().numpy(), top_p=0.9))


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_what_is_drawn_is_allowed(path: torch.device, changes: dict) -> None:
    """And if min_p, top_k and top_p leave few enough tokens, all that are allowed are drawn."""
    logits = random_rows(1, 33, path, seed=6)  # one past a warp
    history = torch.rand(1, 33, generator=torch.Generator().manual_seed(6)).to(path) < 0.4
    seen = {"history": history.expand(30, -1)} if "repetition_penalty" in changes else {}
    tokens, _, _ = draw(logits.expand(30, -1), **changes, **seen, seeds=list(range(30)))
    p = allowed(logits[0].cpu().numpy(), **changes, **({"history": history[0].cpu().numpy()} if seen else {}))
    drawn = set(tokens.tolist())
    assert drawn <= set(np.flatnonzero(p).tolist())
    assert drawn >= set(np.flatnonzero(p > 0.25).tolist())


# --- the kernel and the reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("V", "S"),
    [
        (1, 4),  # a single token
        (50, 10),  # a part of a tile; top_k on either side of V
        (4097, 4),  # one past a tile
        (50257, 2),  # GPT-2: thirteen tiles, and lanes that may not hold the token sought
    ],
)
def test_the_reference_draws_the_same(path: torch.device, V: int, S: int, dtype: torch.dtype, penalised: bool) -> None:
    logits = random_rows(S, V, path, dtype, seed=V)
    values = random_options(S, V + penalised)
    if penalised:
        g = torch.Generator().manual_seed(V)
        values["history"] = (torch.rand(S, V, generator=g) < 0.3).to(path)
        values["repetition_penalty"] = [1.0 if i % 3 == 2 else 0.7 + 0.3 * i for i in range(S)]
    m = min(V, 3)
    tokens, logprobs, top = draw(logits, **values, top_logprobs=m)
    expected, _, expected_top = by_reference(logits, **values, top_logprobs=m)
    assert tokens.cpu().tolist() == expected.tolist()
    truth = torch.log_softmax(logits.double(), -1)
    theirs = torch.log_softmax(logits.float(), -1)
    at = tokens[:, None]
    assert_accurate(logprobs, theirs.gather(1, at)[:, 0], truth.gather(1, at)[:, 0], what="logprobs")
    assert top is not None and expected_top is not None
    assert top[0].tolist() == expected_top[0].tolist()
    assert_accurate(top[1], theirs.gather(1, top[0]), truth.gather(1, top[0]), what="top_logprobs")


@pytest.mark.parametrize(
    ("V", "changes"),
    [
        (65537, {"top_k": 40}),  # in the lanes
        (65537, {"top_k": 5000, "top_p": 0.5}),  # far more than the lanes hold: the search goes on over the row
        (65537, {"top_p": 0.999}),
        (65537, {"top_k": 65000}),
        (65537, {"top_k": 3000, "top_p": 0.9, "min_p": 0.01}),
        (300_000, {"top_k": 300}),
        (300_000, {"top_p": 0.3, "temperature": 1.5}),
    ],
    ids=str,
)
def test_wide_vocabularies(path: torch.device, V: int, changes: dict) -> None:
    logits = random_rows(1, V, path, seed=7)
    values = {**changes, "seeds": 9, "positions": 4}
    assert draw(logits, **values)[0].tolist() == by_reference(logits, **values)[0].tolist()


@pytest.mark.parametrize("changes", [{"top_k": 4}, {"top_p": 0.65}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lane_that_hides_what_is_kept(path: torch.device, dtype: torch.dtype, changes: dict) -> None:
    """Five large scores in one lane, which remembers three of them: the threshold found among the lanes is too low.

    The number drawn is almost 1, so that the last kept token is taken: the fourth, or, if it were wrongly kept, the
    fifth or one of the 40,000 small ones.
    """
    seeds = torch.arange(1000)
    seed = int(seeds[reference.uniform(seeds, torch.zeros_like(seeds)) > 0.99][0])
    places = [17 + 4096 * i for i in range(5)]
    logits = torch.full((1, 40_000), -9.0)
    logits[0, places] = 2.0 + torch.arange(4.0, -1.0, -1.0) / 64
    assert draw(logits.to(dtype).to(path), **changes, seeds=seed)[0].item() == places[3]


# --- borders --------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_first_maximum(path: torch.device) -> None:
    """Also between 0.0 and -0.0, and between tiles."""
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 2.0, 5.0], [-1.0, -0.0, 0.0, -2.0]], device=path)
    tokens, logprobs, top = draw(logits, temperature=0.0)
    assert tokens.tolist() == [1, 0, 1] and top is None
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[[0, 1, 2], [1, 0, 1]])
    wide = torch.zeros(1, 9000, device=path)
    wide[0, [4095, 4096, 8191, 8999]] = 1.0
    assert draw(wide, temperature=0.0)[0].item() == 4095
    wide[0, 4095] = 0.0
    assert draw(wide, temperature=0.0)[0].item() == 4096


def test_ties_at_the_top_k_threshold_stay(path: torch.device) -> None:
    logits = torch.tensor([[4.0, 3.0, 3.0, 3.0, -9.0]], device=path).expand(24, 5)
    tokens, _, _ = draw(logits, top_k=2, seeds=list(range(24)))
    assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_ties_at_the_top_p_threshold_stay(path: torch.device) -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0, -1.0]], device=path).expand(24, 5)
    tokens, _, _ = draw(logits, top_p=0.1, seeds=list(range(24)))
    assert set(tokens.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "changes", [{"top_k": 1}, {"top_p": 1e-7}, {"top_p": 0.0}, {"min_p": 1.0}, {"min_p": 3.0}], ids=str
)
def test_the_smallest_set_is_the_likeliest_token(path: torch.device, changes: dict) -> None:
    logits = random_rows(10, 30, path, seed=8)
    for temperature in (1.0, 1e6):
        if "min_p" in changes and temperature > 1:
            continue  # all have equal weight
        tokens, _, _ = draw(logits, **changes, temperature=temperature, seeds=list(range(10)))
        assert torch.equal(tokens, logits.argmax(-1)), temperature


def test_top_k_larger_than_the_vocabulary(path: torch.device) -> None:
    logits = random_rows(10, 7, path)
    seeds = list(range(10))
    assert torch.equal(draw(logits, top_k=100, seeds=seeds)[0], draw(logits, seeds=seeds)[0])


@pytest.mark.parametrize("temperature", [1e-30, 1e-40])
def test_a_tiny_temperature_is_nearly_greedy(path: torch.device, temperature: float) -> None:
    logits = random_rows(10, 30, path)
    tokens, _, _ = draw(logits, temperature=temperature, seeds=list(range(10)))
    assert torch.equal(tokens, logits.argmax(-1))


def test_masked_logits_are_never_drawn(path: torch.device) -> None:
    """-inf is what a mask leaves. Also if top_k asks for more tokens than are left, and in the last position."""
    logits = torch.full((24, 40), -torch.inf, device=path)
    logits[:, [3, 17]] = torch.tensor([1.0, 0.5], device=path)
    ks = [0, 1, 2, 5] * 6
    tokens, logprobs, _ = draw(logits, top_k=ks, top_p=[1.0, 0.9999999] * 12, seeds=list(range(24)))
    assert set(tokens.tolist()) == {3, 17} and torch.isfinite(logprobs).all()
    assert all(token == 3 for token, k in zip(tokens.tolist(), ks) if k == 1)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's, in the interpreter
def test_rows_without_a_distribution(path: torch.device) -> None:
    """All -inf, a NaN, a +inf: the first maximum, at any temperature; never a fault, and never another row's token."""
    inf, nan = math.inf, math.nan
    rows = [[-inf] * 4, [1.0, nan, 2.0, nan], [1.0, inf, 2.0, inf], [0.0, inf, nan, 1.0], [1.0, 2.0, 3.0, -inf]]
    logits = torch.tensor(rows, device=path)
    for temperature in (0.0, 1.0):
        tokens, logprobs, top = draw(logits, temperature=temperature, top_k=1, top_p=0.5, top_logprobs=4)
        assert tokens.tolist() == [0, 1, 1, 2, 2]
        assert logprobs[:4].isnan().all() and torch.isfinite(logprobs[4])
        assert top is not None and all(sorted(ids) == [0, 1, 2, 3] for ids in top[0].tolist())


def test_repetition_penalty(path: torch.device) -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]], device=path)
    history = torch.tensor([[True, False, True, False]], device=path)
    tokens, logprobs, _ = draw(logits, temperature=0.0, history=history, repetition_penalty=1.5)
    assert tokens.item() == 1  # 2.0 / 1.5 < 1.9
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[:, 1])  # the model's own, without the penalty
    tokens, _, _ = draw(logits[:, 2:], temperature=0.0, history=history[:, 2:], repetition_penalty=1.5)
    assert tokens.item() == 1  # -1.0 * 1.5 < -1.1
    # Penalised scores have more bits than a bfloat16, and top_k goes by those: 3.015625 / 3 > 1.
    logits = torch.tensor([[1.0, 3.015625, -4.0]], dtype=torch.bfloat16, device=path).expand(6, 3)
    history = torch.tensor([[False, True, False]], device=path).expand(6, 3)
    tokens, _, _ = draw(logits, top_k=1, seeds=list(range(6)), history=history, repetition_penalty=3.0)
    assert tokens.tolist() == [1] * 6
    # An exact tie after the penalty: the quotient is rounded as PyTorch rounds it.
    logits = torch.tensor([[3.3, 1.1, 0.0]], device=path)
    logits[0, 1] = (logits[0, 0].cpu() / torch.tensor(3.0)).to(path)
    history = torch.tensor([[True, False, False]], device=path)
    assert draw(logits, temperature=0.0, history=history, repetition_penalty=3.0)[0].item() == 0


@pytest.mark.parametrize(("V", "m"), [(50, 4), (50, 32), (50, 33), (50, 50), (5000, 3)])
def test_top_logprobs(path: torch.device, V: int, m: int) -> None:
    """In order, ties by id: by passes over the row, or by a sort for more than 32."""
    logits = random_rows(2, V, path, seed=1).round()  # many ties
    _, _, top = draw(logits, temperature=0.0, top_logprobs=m)
    assert top is not None
    truth = torch.log_softmax(logits.double(), -1)
    expected = truth.float().sort(descending=True, stable=True).indices[:, :m]
    assert torch.equal(top[0], expected)
    assert_accurate(
        top[1], torch.log_softmax(logits, -1).gather(1, expected), truth.gather(1, expected), what="top_logprobs"
    )


# --- the batch ------------------------------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_the_others(path: torch.device) -> None:
    """Bit for bit; rows have different options, and a penalty in another row selects another kernel."""
    logits = random_rows(6, 5000, path, seed=2)
    values = random_options(6, 2)
    values["temperature"][0], values["temperature"][1], values["top_p"][1] = 0.0, 1.0, 0.9
    tokens, logprobs, _ = draw(logits, **values)
    history = torch.zeros(6, 5000, dtype=torch.bool, device=path)
    history[5] = True
    penalties = [1.0] * 5 + [1.5]
    tokens_2, logprobs_2, _ = draw(logits, **values, history=history, repetition_penalty=penalties)
    assert torch.equal(tokens[:5], tokens_2[:5]) and torch.equal(logprobs[:5], logprobs_2[:5])
    again = draw(logits, **values)
    assert torch.equal(again[0], tokens) and torch.equal(again[1], logprobs)
    for i in range(6):
        alone = draw(logits[i : i + 1], **{k: v[i : i + 1] for k, v in values.items()})
        assert alone[0].item() == tokens[i].item() and alone[1].item() == logprobs[i].item()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_threads(
    threads: int, request: pytest.FixtureRequest, production: torch.device
) -> None:
    """Bit for bit, with any number of threads: PyTorch would sum a row in one order alone, in another among others."""
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    logits = random_rows(12, 50257, production, seed=2)
    values = random_options(12, 3)
    tokens, logprobs, _ = draw(logits, **values)
    for i in range(12):
        alone = draw(logits[i : i + 1], **{k: v[i : i + 1] for k, v in values.items()})
        assert alone[0].item() == tokens[i].item() and alone[1].item() == logprobs[i].item()


def test_seed_and_position_decide(path: torch.device) -> None:
    logits = torch.zeros(20, 1000, device=path)
    first = draw(logits, seeds=7, positions=list(range(20)))[0]
    assert torch.equal(first, draw(logits, seeds=7, positions=list(range(20)))[0])
    assert len(set(first.tolist())) > 15  # another position, another draw
    assert not torch.equal(first, draw(logits, seeds=8, positions=list(range(20)))[0])


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values (S, V) in every layout."""
    S, V = x.shape
    other = torch.nan if x.is_floating_point() else True
    rows, columns = (torch.full((2 * S, V + 47), other, dtype=x.dtype, device=x.device) for _ in range(2))
    rows[::2, :V] = x
    columns[:S, 13 : 13 + V] = x
    return {"rows": rows[::2, :V], "columns": columns[:S, 13 : 13 + V], "transposed": x.t().contiguous().t()}


def test_layouts(path: torch.device) -> None:
    """Logits and history row-sliced, column-sliced, transposed and expanded, and the parameters too: the same bits."""
    S, V = 3, 700
    logits = random_rows(S, V, path, seed=3)
    history = torch.rand(S, V, generator=torch.Generator().manual_seed(3)).to(path) < 0.3
    values = {**random_options(S, 4), "repetition_penalty": [1.3, 0.8, 2.0]}
    expected = draw(logits, **values, history=history, top_logprobs=2)
    strided = {k: v.repeat_interleave(2)[::2] for k, v in options(logits, **values).items()}
    histories = [*layouts(history).values(), history]
    for (name, view), seen in zip(layouts(logits).items(), histories[1:]):  # strides of their own
        got = ops.sample(view, **strided, history=seen, top_logprobs=2)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]), name
        assert got[2] is not None and expected[2] is not None
        assert torch.equal(got[2][0], expected[2][0]) and torch.equal(got[2][1], expected[2][1]), name
    one = {k: v[:1].expand(S) for k, v in options(logits, **values).items()}
    got = ops.sample(logits[:1].expand(S, V), **one, history=history[:1].expand(S, V))
    assert got[0].tolist() == [expected[0][0].item()] * S and got[1].tolist() == [expected[1][0].item()] * S


def test_offsets_past_2_31(path: torch.device) -> None:
    """The third row begins at least 2^31 elements after the first, and the memory in between is never touched.

    The stride itself is smaller: an int32, as its product with an int32 row would be.
    """
    if path.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB on the GPU")
    stride, V = 2**30 + 8, 100
    logits = torch.empty(2 * stride + V, dtype=torch.float16, device=path).as_strided((3, V), (stride, 1))
    history = torch.empty(2 * stride + V, dtype=torch.bool, device=path).as_strided((3, V), (stride, 1))
    logits.copy_(random_rows(3, V, path))
    history.copy_(torch.rand(3, V, device=path) < 0.3)
    values = {"seeds": [1, 2, 3], "top_k": 9, "repetition_penalty": 1.5, "top_logprobs": 2}
    got = draw(logits, **values, history=history)
    expected = by_reference(logits.clone(), **values, history=history.clone())
    assert got[0].tolist() == expected[0].tolist()
    assert got[2] is not None and expected[2] is not None and got[2][0].tolist() == expected[2][0].tolist()


def test_no_rows(path: torch.device) -> None:
    tokens, logprobs, top = draw(torch.empty(0, 10, device=path), top_logprobs=2)
    assert tokens.shape == logprobs.shape == (0,) and top is not None and top[0].shape == top[1].shape == (0, 2)


# --- the operator ---------------------------------------------------------------------------------------------------


def test_opcheck(path: torch.device) -> None:
    logits = random_rows(2, 40, path)
    history = torch.ones(2, 40, dtype=torch.bool, device=path)
    values = options(logits, top_k=5, history=history, repetition_penalty=1.2)
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions", "history", "repetition_penalty")
    arguments = [values[name] for name in names]
    opcheck(torch.ops.gpt2_kernels.sample.default, (logits, *arguments, 3))
    opcheck(torch.ops.gpt2_kernels.sample.default, (logits, *arguments[:6], None, None, 0))


def test_compile(path: torch.device) -> None:
    logits = random_rows(3, 40, path)
    values = options(logits, top_k=5, seeds=[1, 2, 3])

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, logprobs, top = ops.sample(x.sin() * 5, **values, top_logprobs=2)
        assert top is not None
        return tokens + 1, logprobs.exp(), top[0]

    torch._dynamo.reset()
    with torch.no_grad():
        expected = function(logits)
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(logits)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def test_the_kernel_serves() -> None:
    assert ops.OPS["sample"] != "torch only"


def test_bad_input(path: torch.device) -> None:
    logits = torch.zeros(2, 5, device=path)
    for changes, message in [
        ({"temperature": torch.zeros(3)}, r"sample: temperature must be \(S,\) = \(2,\), got \(3,\)"),
        ({"top_k": torch.zeros(2)}, r"sample: top_k must be torch.int64, got torch.float32"),
        ({"top_p": torch.zeros(2, dtype=torch.float64)}, r"sample: top_p must be torch.float32, got torch.float64"),
        ({"min_p": torch.zeros(2, device="meta")}, r"sample: min_p must be on the device of the other tensors"),
        ({"seeds": torch.zeros(2, dtype=torch.int32)}, r"sample: seeds must be torch.int64, got torch.int32"),
        ({"top_logprobs": 6}, r"sample: top_logprobs must lie in 0..5, got 6"),
        ({"top_logprobs": -1}, r"sample: top_logprobs must lie in 0..5, got -1"),
        ({"history": torch.zeros(2, 5, dtype=torch.bool)}, r"sample: history and repetition_penalty go together"),
        ({"repetition_penalty": 2.0}, r"sample: history and repetition_penalty go together"),
        (
            {"history": torch.zeros(2, 4, dtype=torch.bool), "repetition_penalty": 2.0},
            r"sample: history must be \(S, V\) = \(2, 5\), got \(2, 4\)",
        ),
        (
            {"history": torch.zeros(2, 5), "repetition_penalty": 2.0},
            r"sample: history must be torch.bool, got torch.float32",
        ),
    ]:
        changes = {k: v.to(path) if isinstance(v, Tensor) and v.device.type == "cpu" else v for k, v in changes.items()}
        with pytest.raises(ValueError, match=message):
            draw(logits, **changes)
    for bad, message in [
        (torch.zeros(5, device=path), r"sample: logits must be \(S, V\), got \(5,\)"),
        (torch.zeros(2, 0, device=path), r"sample: logits must have 1..\d+ columns, got \(2, 0\)"),
        (torch.zeros(2, 5, dtype=torch.float64, device=path), r"sample: dtype of logits must be float32, float16"),
        (torch.zeros(2, 5, device=path, requires_grad=True), r"sample: logits must not require a gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw(bad)
