"""`gpt2.evaluate`: windows, and the loss against transformers and against every token computed alone."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import random_checkpoint, random_tokens, tiny_config, transformers_model

from gpt2 import GPT2, ReferenceGPT2
from gpt2.cli import main
from gpt2.evaluate import log_likelihoods, score, windows


@pytest.mark.parametrize(
    "length, context, stride", [(10, 5, 3), (10, 5, 1), (4, 8, 4), (9, 3, 2), (2, 2, 1), (65, 16, 8)]
)
def test_every_token_is_scored_once_with_as_much_past_as_promised(length: int, context: int, stride: int) -> None:
    seen: list[int] = []
    for first, last, scored in windows(length, context, stride):
        assert 0 <= first < last <= length and last - first <= context
        for token in range(last - scored, last):
            seen.append(token)
            assert token - first >= min(token, context - stride) and token > first
    assert seen == list(range(1, length))


def test_documented_example() -> None:
    assert windows(10, 5, 3) == [(0, 5, 4), (3, 8, 3), (5, 10, 2)]


@pytest.mark.parametrize("stride", [1, 7, 15])
def test_loss_is_that_of_transformers(tmp_path: Path, production: torch.device, stride: int) -> None:
    """Token by token, each in the window that scores it; batches of windows change nothing."""
    config = tiny_config()
    folder = random_checkpoint(tmp_path, config)
    model, theirs = GPT2.from_pretrained(folder, device=production), transformers_model(folder)
    tokens = random_tokens(config, 50)
    losses = []
    with torch.no_grad():
        for first, last, scored in windows(len(tokens), 16, stride):
            logits = theirs(tokens[None, first:last]).logits[0]
            losses += F.cross_entropy(logits[:-1], tokens[first + 1 : last], reduction="none")[-scored:].tolist()
    assert len(losses) == 49
    for batch_size in (1, 3):
        result = score(model, tokens.tolist(), context=16, stride=stride, batch_size=batch_size)
        assert result.tokens == 49
        assert result.loss == pytest.approx(sum(losses) / 49, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 49), rel=1e-4)


def test_a_text_within_the_context_needs_no_window(tmp_path: Path, production: torch.device) -> None:
    config = tiny_config()
    model = GPT2.from_pretrained(random_checkpoint(tmp_path, config), device=production)
    tokens = random_tokens(config, 40).to(production)
    with torch.no_grad():
        expected = model.loss(tokens[None, :-1], tokens[None, 1:]).item()
    assert score(model, tokens.tolist()).loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(context=65), r"context must lie in 2..64, got 65"),
        (dict(context=1), "context must lie in 2..64, got 1"),
        (dict(context=8, stride=8), "stride must lie in 1..7, below the context of 8, got 8"),
        (dict(stride=0), "stride must lie in 1..63"),
        (dict(batch_size=0), "batch size must be at least 1"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    model = SimpleNamespace(config=tiny_config(), device="cpu")
    with pytest.raises(ValueError, match=message):
        score(model, [1, 2, 3], **options)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        score(model, [1])
    with pytest.raises(ValueError, match=r"tokens must lie in 0..287, got 300"):
        score(model, [1, 300])
    with pytest.raises(ValueError, match=r"tokens must lie in 0..287, got -1"):
        score(model, [1, -1])


def test_command(tmp_path: Path, production: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    folder = random_checkpoint(tmp_path / "model", tiny_config(), tokenizer=True)
    text = tmp_path / "text.txt"
    text.write_text("Ein Bär, and so on. " * 12, encoding="utf-8-sig")  # its byte-order mark is no text
    main(
        [
            "eval",
            "--data",
            str(text),
            "--model",
            str(folder),
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--context",
            "32",
        ]
    )
    out = capsys.readouterr().out.splitlines()
    model = GPT2.from_pretrained(folder, device="cpu")
    from gpt2 import load_tokenizer

    tokens = load_tokenizer(folder).encode("Ein Bär, and so on. " * 12)
    expected = score(model, [model.config.eos_token_id, *tokens], context=32)
    assert out[0] == f"perplexity {expected.perplexity:.4f}"
    assert out[2] == f"{len(tokens)} tokens, {text.stat().st_size - 3} bytes, context 32, stride 16"


@pytest.mark.parametrize("content, message", [(b"", "file is empty"), (b"\xff", "not UTF-8"), (None, "No such")])
def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--data", str(text)])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and message in captured.err and captured.err.count("\n") == 1 and not captured.out


# Lengths of context and continuation for `log_likelihoods`, with a model of 64 positions: one token each; two pairs
# that read the same tokens; all positions and one token more, without loss; a context that loses its first 38 tokens; a
# continuation that fills every position, after the last token of its context.
LENGTHS = [(1, 1), (7, 1), (7, 1), (40, 25), (90, 13), (5, 64), (30, 3)]


def pairs_of(config: Any) -> list[tuple[list[int], list[int]]]:
    pairs = []
    for number, (context, continuation) in enumerate(LENGTHS):
        tokens = random_tokens(config, context + continuation, seed=number).tolist()
        pairs.append((tokens[:context], tokens[context:]))
    pairs[2] = (pairs[1][0], pairs[2][1])
    return pairs


def true_log_likelihood(model: ReferenceGPT2, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    tokens = (context + continuation)[-model.config.n_positions - 1 :]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]))[0][-len(continuation) :]
    wanted = torch.tensor(continuation)
    loss = F.cross_entropy(logits, wanted, reduction="sum")
    return -float(loss), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("max_batch", [1, 3, 256])
def test_log_likelihoods_are_those_of_float64(
    tmp_path: Path, production: torch.device, max_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5 of the sum; rounding 64 float32 log-probabilities costs about 1e-6. Batching changes no bit."""
    config = tiny_config()
    folder = random_checkpoint(tmp_path, config)
    model = GPT2.from_pretrained(folder, device=production)
    truth = ReferenceGPT2.from_pretrained(folder, device="cpu", dtype=torch.float64)
    pairs = pairs_of(config)
    for context, length in (([5, 9, 200], 1), ([17], 12)):  # greedy ones; the second takes several passes of logits
        pairs.append((context, truth.generate(context, length)))
    pairs.append((pairs[-1][0], pairs[-1][1][:-1] + [(pairs[-1][1][-1] + 1) % 288]))  # all but the last
    monkeypatch.setattr("gpt2.evaluate.PACKED_TOKENS", 100)
    monkeypatch.setattr("gpt2.evaluate.SCORED_ROWS", 10)
    expected = [true_log_likelihood(truth, *pair) for pair in pairs]
    assert [is_greedy for _, is_greedy in expected[-3:]] == [True, True, False]
    found = log_likelihoods(model, pairs, max_batch=max_batch)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert found == [log_likelihoods(model, [pair])[0] for pair in pairs]


def test_pairs_that_read_the_same_are_computed_once(tmp_path: Path, production: torch.device) -> None:
    config = tiny_config()
    model = GPT2.from_pretrained(random_checkpoint(tmp_path, config), device=production)
    computed = []
    whole = model.hidden_packed
    model.hidden_packed = lambda tokens, *rest: computed.append(len(tokens)) or whole(tokens, *rest)  # type: ignore
    log_likelihoods(model, [([1, 2, 3], [answer]) for answer in (4, 5, 6)] + [([1, 2], [3, 7])])
    assert computed == [3]
    assert log_likelihoods(model, []) == []


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([([1], [2]), ([], [1])], "pair 1: a context must not be empty.* got 0 and 1"),
        ([([1], [])], "pair 0: a context must not be empty and a continuation have 1..64 tokens, got 1 and 0"),
        ([([1], [2] * 65)], "got 1 and 65"),
        ([([1], [288])], "pair 0: tokens must lie in 0..287, got 1..288"),
    ],
)
def test_pairs_that_cannot_be_scored_are_refused(pairs: Any, message: str) -> None:
    model = GPT2(tiny_config())
    with pytest.raises(ValueError, match=message):
        log_likelihoods(model, pairs)
    with pytest.raises(ValueError, match="max_batch must be an integer of at least 1, got 0"):
        log_likelihoods(model, [([1], [2])], max_batch=0)
