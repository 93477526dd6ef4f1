"""`gpt2.harness` against float64, the engine, and the harness's own Hugging Face model on the same checkpoint."""

from __future__ import annotations

import functools
import json
import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_checkpoint, tiny_config, transformers_model
from conftest import ROOT

from gpt2 import Engine, ReferenceGPT2, SamplingParams
from gpt2.tokenizer import END_OF_TEXT, byte_characters

TEXT = "the bear asked a fox: who is it that sings? "


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH")]))
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)


def test_without_the_harness_one_line_names_the_extra() -> None:
    code = "import sys, runpy; sys.modules['lm_eval'] = None; runpy.run_module('gpt2.harness', run_name='__main__')"
    done = run("-c", code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpt2.harness: lm_eval is not installed: pip install 'gpt2-kernels[eval]'\n"
    code = "import sys; sys.modules['lm_eval'] = None; import gpt2, gpt2.cli; import gpt2.harness"
    done = run("-c", code)
    message = "ModuleNotFoundError: gpt2.harness: lm_eval is not installed: pip install 'gpt2-kernels[eval]'"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == message


@pytest.fixture(scope="module")
def harness() -> Any:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'gpt2-kernels[eval]'")
    import gpt2.harness

    return gpt2.harness


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 positions, with its tokenizer in a format that transformers also reads."""
    path = random_checkpoint(tmp_path_factory.mktemp("harness") / "model", tiny_config(), tokenizer=True)
    from gpt2 import load_tokenizer

    tokens = load_tokenizer(path)
    written = byte_characters()
    words = ["".join(written[b] for b in tokens.decode_single_token_bytes(number)) for number in range(287)]
    vocab = {word: number for number, word in enumerate(words)} | {END_OF_TEXT: 287}
    (path / "vocab.json").write_text(json.dumps(vocab))
    merges = "".join(f"{word[0]} {word[1]}\n" for word in words[256:])
    (path / "merges.txt").write_text("#version: 0.2\n" + merges)
    return path


@pytest.fixture
def ours(harness: Any, folder: Path, production: torch.device) -> Any:
    from lm_eval.api.registry import get_model

    arguments = f"model={folder},dtype=float32,max_batch=4"
    return get_model("gpt2-kernels").create_from_arg_string(arguments, {"device": str(production), "batch_size": 1})


@pytest.fixture
def theirs(harness: Any, folder: Path) -> Any:
    """The harness's own model class, with transformers' own GPT-2."""
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.GPT2Tokenizer.from_pretrained(str(folder), local_files_only=True)
    return HFLM(pretrained=transformers_model(folder), tokenizer=tokenizer, device="cpu", batch_size=3)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=own, idx=i) for i, own in enumerate(arguments)]


# A word after its space; the space in the context; four answers to a question, two of one token; no context; a context
# far longer than the model's positions; <|endoftext|> inside a text; characters of several bytes.
PAIRS = [
    ("the bear", " asked"),
    ("the bear ", "asked"),
    *((TEXT, answer) for answer in (" a", " b", " the fox", " c d")),
    ("", "the fox"),
    (TEXT * 4, "the bear"),
    (f"the end{END_OF_TEXT}", f"the fox{END_OF_TEXT}"),
    ("Der Bär", " fährt"),
]


def test_log_likelihoods_are_those_of_float64_and_of_the_harness(ours: Any, theirs: Any, folder: Path) -> None:
    """To 1e-5 of a sum of float32 log-probabilities, whose rounding costs about 1e-6."""
    pairs = [*PAIRS]
    truth = ReferenceGPT2.from_pretrained(folder, device="cpu", dtype=torch.float64)
    for text in ("the fox", *string.ascii_lowercase):  # until the greedy text encodes to the same tokens again
        context = ours.tok_encode(text)
        written = truth.generate(context, 1)
        if ours.tok_encode(text + ours.encoding.decode(written)) == context + written:
            break
    pairs.append((text, ours.encoding.decode(written)))
    found = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1] and not found[0][1]
    for (before, after), (value, _) in zip(pairs, found):
        context, continuation = ours._encode_pair(before, after) if before else ([287], ours.tok_encode(after))
        read = torch.tensor([([*context, *continuation])[-65:]])
        with torch.no_grad():
            logprobs = truth(read[:, :-1])[0].log_softmax(-1)[-len(continuation) :]
        assert value == pytest.approx(float(logprobs.gather(1, read[0, -len(continuation) :, None]).sum()), rel=1e-5)


def test_rolling_windows_are_those_of_the_harness(ours: Any, theirs: Any) -> None:
    """A text within the positions, one that fills them, one of several windows, and an empty one."""
    filling = ours.encoding.decode(ours.tok_encode(TEXT * 4)[:64])
    texts = [("the bear",), (filling,), (TEXT * 5,), ("",)]
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(ours.tok_encode(TEXT * 5)) > 128 and found[3] == 0


# No stop string; one string, not reached; a list of strings, one reached; a context too long for the positions.
GENERATED = [
    ("the bear", {"max_gen_toks": 12}),
    ("the fox", {"until": "e", "max_gen_toks": 30, "do_sample": False}),
    ("who is", {"until": ["a", "l", "zz"], "max_new_tokens": 20, "temperature": 0.0}),
    (TEXT * 4, {"until": ["q"], "max_gen_toks": 20}),
]


def test_generated_texts_are_the_engine_s_and_the_harness_s(ours: Any, theirs: Any) -> None:
    found = ours.generate_until(requests("generate_until", *GENERATED), disable_tqdm=True)
    assert len(set(found)) == len(found)
    engine = Engine(ours.model, ours.encoding)
    for (context, asked), text in zip(GENERATED, found):
        most = asked.get("max_gen_toks") or asked["max_new_tokens"]
        until = asked.get("until", ())
        stop = (until,) if isinstance(until, str) else tuple(until)
        params = SamplingParams(max_tokens=most, temperature=0, stop=stop)
        (completion,) = engine.generate([ours.tok_encode(context)[-(64 - most) :]], params)
        assert text == completion.outputs[0].text
        assert not any(s in text for s in stop)
    expected = theirs.generate_until(requests("generate_until", *GENERATED), disable_tqdm=True)
    assert found == expected


def test_answers_go_to_the_harness_s_cache(ours: Any) -> None:
    kept = []

    class Hook:
        def add_partial(self, *entry: Any) -> None:
            kept.append(entry)

    ours.set_cache_hook(Hook())
    values = ours.loglikelihood(requests("loglikelihood", ("a", " b")), disable_tqdm=True)
    totals = ours.loglikelihood_rolling(requests("loglikelihood_rolling", ("a b",)), disable_tqdm=True)
    texts = ours.generate_until(requests("generate_until", ("a", {"max_gen_toks": 2})), disable_tqdm=True)
    assert kept == [
        ("loglikelihood", ("a", " b"), values[0]),
        ("loglikelihood_rolling", ("a b",), totals[0]),
        ("generate_until", ("a", {"max_gen_toks": 2}), texts[0]),
    ]


def test_sampling_is_asked_for_and_seeded_by_torch(harness: Any) -> None:
    draw = functools.partial(harness.sampling_params, n_positions=64)
    assert draw({"top_p": 0.5}) == SamplingParams(max_tokens=32, temperature=0, seed=0)  # half of the positions
    assert harness.sampling_params({}, 1024).max_tokens == 256
    assert draw({"until": ["a", ""]}).stop == ("a",)  # the harness ignores it too where it cuts a text
    assert draw({"do_sample": False, "temperature": 0.7}).temperature == 0
    torch.manual_seed(1)
    first, second = draw({"do_sample": True}), draw({"temperature": 0.5, "top_k": 3})
    assert (first.temperature, first.top_k, second.temperature, second.top_k) == (1, 0, 0.5, 3)
    torch.manual_seed(1)
    assert draw({"do_sample": True}).seed == first.seed != second.seed


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"max_gen_toks": 64}, "max_gen_toks must lie in 1..63, got 64"),
        ({"num_beams": 2}, "unknown generation argument num_beams"),
        ({"until": 3}, "until must be a string or a list of strings, got 3"),
        ({"until": [3]}, "stop must be strings that are not empty"),
        ({"do_sample": True, "top_p": 2}, r"top_p must be a number in \(0, 1\], got 2"),
    ],
)
def test_generation_arguments_that_cannot_be_are_refused(harness: Any, asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.sampling_params(asked, 64)


def test_arguments_of_the_model_are_checked(harness: Any, folder: Path) -> None:
    make = harness.HarnessLM.create_from_arg_string
    for arguments, message in (
        ("dtype=int3", "dtype must be one of float32, bfloat16, float16, got 'int3'"),
        ("max_batch=0", "max_batch must be an integer of at least 1, got 0"),
        ("device=tpu", "device must be cpu, cuda or cuda:N, got 'tpu'"),
        ("model=elephant", "elephant"),
    ):
        with pytest.raises(ValueError, match=message):
            make(arguments)
    with pytest.raises(TypeError, match="colour"):
        make("colour=red")
    sizes = [make(f"model={folder}", {"batch_size": size}).max_batch for size in (None, 1, "auto", "8", 32)]
    assert sizes == [256, 256, 256, 8, 32]


def test_the_command_line_runs_a_task(harness: Any, folder: Path, tmp_path: Path) -> None:
    """A custom task, from a file: the harness reports what the model's methods return."""
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in (("the bear", "asked"), ("a fox", "sings")))
    )
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'data.jsonl'}\ntest_split: test\noutput_type: loglikelihood\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\nmetric_list:\n  - metric: perplexity\n  - metric: acc\n"
    )
    done = run(
        *("-m", "gpt2.harness", "--model", "gpt2-kernels", "--model_args", f"model={folder},dtype=float32"),
        *("--tasks", "tiny", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json")),
        *("--device", "cpu"),
        HF_HOME=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.rglob("out*.json")
    scores = json.loads(written.read_text())["results"]["tiny"]
    model = harness.HarnessLM(model=str(folder), device="cpu", dtype="float32")
    pairs = [("the bear", "asked"), ("a fox", "sings")]
    values = [value for value, _ in model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)]
    assert scores["perplexity,none"] == pytest.approx(torch.tensor(values).mean().neg().exp().item(), rel=1e-5)
    assert scores["acc,none"] == 0
