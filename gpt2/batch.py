"""`gpt2 batch IN.jsonl -o OUT.jsonl`: a file of prompts becomes a file of results, in one run or in several.

    IN.jsonl             {"id": "a", "prompt": "Once upon a time", "max_tokens": 20, "seed": 7}
    OUT.jsonl            {"id": "a", "prompt_tokens": [..], "outputs": [{"text": "..", "tokens": [..], ..}]}
    OUT.errors.jsonl     {"line": 2, "id": "b", "error": "SamplingParams: top_p must be .."}
    OUT.manifest.json    what determines the results: input, model, parameters, seed, versions

A line holds a prompt (text, or token ids) and any fields of SamplingParams. A missing id defaults to the line's number;
an id belongs to the first line that has it, good or bad. Results are written as they finish, in any order, and hold
only what input, model and parameters determine. So a killed run resumes where it stopped: lines with a result or an
error are skipped, a torn last line is cut off, and the finished file, sorted by id, is what it would have been without
the kill. `gpt2.batch_files.Journal` says what survives SIGKILL.

Each line handled leaves a 16-byte hash of its id in memory, about a hundred bytes with Python's overhead.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.batch_files import Files, Journal, digest_and_lines, parse, read_lines
from gpt2.commands import load, sampling_params
from gpt2.profiling import profile
from gpt2.sampling import SamplingParams

if TYPE_CHECKING:
    from gpt2.engine import Engine
    from gpt2.model import GPT2
    from gpt2.request import Completion

MIN_CACHE_BYTES = 2**28  # of the key-value cache on a CPU; see `_cache_blocks`
BLOCK_SIZE = 16
MODEL_FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
    "tokenizer.tiktoken", "vocab.json", "merges.txt", "tokenizer.json",
)  # fmt: skip
PARAMETERS = {field.name for field in dataclasses.fields(SamplingParams)}


@dataclasses.dataclass(frozen=True)
class Item:
    """A line of the input to be answered."""

    line: int
    id: str | int
    prompt: str | list[int]
    params: SamplingParams


def batch(options: argparse.Namespace) -> None:
    """The command. Raises ValueError or OSError with one line for the user; Ctrl-C passes through."""
    tokens = SamplingParams.max_tokens if options.max_tokens is None else options.max_tokens
    defaults = sampling_params(options, max_tokens=tokens)
    if options.max_batch < 1:
        raise ValueError(f"--max-batch must be at least 1, got {options.max_batch}")
    files = Files(options.input, options.output)
    profiling = profile(options.profile)
    model, tokenizer = load(options)

    from gpt2.engine import Engine

    blocks = _cache_blocks(model, options.max_batch)
    engine = Engine(model, tokenizer, max_batch=options.max_batch, num_blocks=blocks, block_size=BLOCK_SIZE)
    digest, lines = digest_and_lines(files.input)
    manifest = {
        "input": str(options.input),
        "input_sha256": digest,
        "model": options.model,
        "model_sha256": _model_digest(options.model),
        "dtype": options.dtype or str(model.dtype).removeprefix("torch."),
        "parameters": {key: value for key, value in dataclasses.asdict(defaults).items() if key != "seed"},
        "seed": options.seed,  # None accepts any that an earlier run has drawn
        **_environment(model),
    }
    try:
        with profiling, files.begin(manifest) as (results, errors, seed), _progress(lines) as bar:
            job = Job(files.input, results, errors, seed)
            job.answer(engine, defaults, bar, ahead=2 * options.max_batch)
    except KeyboardInterrupt:
        _say(f"gpt2 batch: stopped; {files.output} holds what was finished, and the same command goes on from there")
        raise
    if job.bad:
        _say(f"gpt2 batch: {job.bad} bad lines, listed in {files.errors}")


class Job:
    """The lines of the input that the output does not answer yet."""

    def __init__(self, source: Path, results: Journal, errors: Journal, seed: int) -> None:
        self._input = source
        self._results = results
        self._errors = errors
        self._seed = seed
        self._done = {_key(value) for value in results.values("id")}  # not met in the input yet
        self._reported = set(errors.values("line"))
        self._seen: set[bytes] = set()  # ids of the lines so far

    @property
    def bad(self) -> int:
        """Lines that are listed among the errors."""
        return len(self._reported)

    def answer(self, engine: Engine, defaults: SamplingParams, bar: Any, *, ahead: int) -> None:
        """Answer all unanswered lines, with about `ahead` samples queued in the engine at any time."""
        items = self._items(defaults, bar)
        waiting: dict[int, Item] = {}
        samples = 0
        started = None
        while True:
            while samples < ahead and (item := next(items, None)):
                try:
                    waiting[engine.add(item.prompt, item.params)] = item
                    samples += item.params.n
                except ValueError as e:
                    self._report(item.line, item.id, str(e), bar)
            if not waiting:
                return
            started = started or time.perf_counter()
            try:
                completions = engine.step()
            except Exception as e:
                reason = f"{type(e).__name__}: {e}"
                raise OSError(f"the engine failed ({reason}); {self._results.path} holds what was finished") from e
            for completion in completions:
                answered = waiting.pop(completion.request_id)
                samples -= answered.params.n
                self._results.append(_record(answered.id, completion))
            speed = engine.stats()["output_tokens"] / (time.perf_counter() - started)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            bar.update(len(completions))

    def _items(self, defaults: SamplingParams, bar: Any) -> Iterator[Item]:
        """Lines without a result, read lazily. Bad ones are reported on the way."""
        with open(self._input, "rb") as file:
            for number, line in enumerate(read_lines(file), 1):
                if not line.strip():
                    _pass_over(bar)
                    continue
                name = None
                try:
                    content = parse(line)
                    name = _id(content, number)
                    key = _key(name)
                    if key in self._seen:
                        raise ValueError(f"id {name!r} is that of an earlier line")
                    self._seen.add(key)
                    if key in self._done:
                        self._done.remove(key)
                        _pass_over(bar)
                        continue
                    item = _item(number, name, content, defaults, self._seed)
                except ValueError as e:
                    self._report(number, name, str(e), bar)
                else:
                    yield item

    def _report(self, line: int, name: str | int | None, error: str, bar: Any) -> None:
        """Write what is wrong with a line, unless an earlier run has done so."""
        _pass_over(bar)
        if line in self._reported:
            return
        self._errors.append({"line": line, **({} if name is None else {"id": name}), "error": error})
        self._reported.add(line)


def _id(content: dict[str, Any], number: int) -> str | int:
    name = content.get("id")
    if name is None:
        return number
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise ValueError(f"id must be a string or an integer, got {type(name).__name__}")
    return name


def _key(name: str | int) -> bytes:
    """What is remembered of an id; 1 and "1" are different ids."""
    return hashlib.blake2b(json.dumps(name).encode(), digest_size=16).digest()


def _item(line: int, name: str | int, content: dict[str, Any], defaults: SamplingParams, seed: int) -> Item:
    """A line's prompt and parameters; ValueError says what is wrong with them."""
    given = {key: value for key, value in content.items() if key not in ("id", "prompt")}
    if unknown := sorted(given.keys() - PARAMETERS):
        raise ValueError(f"unknown parameter {unknown[0]!r}; known are id, prompt, {', '.join(sorted(PARAMETERS))}")
    if "prompt" not in content:
        raise ValueError("prompt is missing")
    prompt = content["prompt"]
    if not isinstance(prompt, (str, list)):
        raise ValueError(f"prompt must be text or a list of token ids, got {type(prompt).__name__}")
    if given.get("seed") is None:
        given["seed"] = _line_seed(seed, line)
    return Item(line, name, prompt, dataclasses.replace(defaults, **given))


def _line_seed(seed: int, line: int) -> int:
    """The seed of a line that sets none: 63 bits of a hash, so that the seeds of neighbours are unrelated."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {line}".encode(), digest_size=8).digest(), "big") >> 1


def _record(name: str | int, completion: Completion) -> dict[str, Any]:
    outputs: list[dict[str, Any]] = []
    for output in completion.outputs:
        outputs.append({"text": output.text, "tokens": output.tokens, "finish_reason": output.finish_reason})
        if output.logprobs is not None:
            outputs[-1]["logprobs"] = [dataclasses.asdict(place) for place in output.logprobs]
    return {"id": name, "prompt_tokens": completion.prompt_tokens, "outputs": outputs}


# -- what determines the results


def _model_digest(name: str) -> str:
    """SHA-256 over the files that a model and its tokenizer are read from."""
    from gpt2.weights import resolve

    folder = resolve(name)
    digest = hashlib.sha256()
    files = {folder} if folder.is_file() else {path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    for path in sorted(files):
        digest.update(f"{path.name} {digest_and_lines(path)[0]}\n".encode())
    return digest.hexdigest()


def _environment(model: GPT2) -> dict[str, Any]:
    """What else the last bit of a logit can depend on."""
    import torch

    import gpt2_kernels as ops

    device = model.device
    cuda = device.type == "cuda"
    versions: dict[str, str | None] = {"gpt2-kernels": ops.__version__, "torch": torch.__version__}  # with its build
    for package in ("triton", "tiktoken"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "operators": {op: ops.path_of(op, device.type).split(" (")[0] for op in sorted(ops.OPS)},
        "versions": versions,
    }


def _cache_blocks(model: GPT2, max_batch: int) -> int | None:
    """Blocks of the engine's cache; None lets the engine take what a GPU has free.

    In a long run every block of a cache is used sooner or later, so on a CPU, whose memory is shared with everything
    else, it is as large as the weights: a decoding step then reads as much of one as of the other, and a larger batch
    gains little. Small models get 256 MiB.
    """
    if model.device.type != "cpu":
        return None
    from gpt2.cache import block_bytes

    config = model.config
    longest = -(-config.n_positions // BLOCK_SIZE)
    wanted = max(MIN_CACHE_BYTES, config.num_parameters * model.dtype.itemsize)
    wanted //= block_bytes(model, BLOCK_SIZE, model.dtype)
    return max(longest, min(wanted, max_batch * longest))


# -- progress and messages


def _progress(lines: int) -> Any:
    """A bar that counts lines; those that need no work are left out of its rate."""
    from tqdm import tqdm
    from tqdm.utils import ObjectWrapper

    class Stderr(ObjectWrapper):
        def write(self, text: str) -> None:
            _say(text, end="")

        def flush(self) -> None:
            pass

    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        total=lines,
        desc="gpt2 batch",
        unit="line",
        file=Stderr(sys.stderr),
        mininterval=0.2 if terminal else 10,  # a log file wants few lines
        miniters=0,  # refreshed by time alone
        smoothing=0,
        dynamic_ncols=True,
    )


def _pass_over(bar: Any) -> None:
    bar.initial += 1
    bar.update(1)


def _say(text: str, end: str = "\n") -> None:
    """Text to stderr. A job outlives its reader: once nobody reads stderr, nothing more is written."""
    if sys.stderr is None:
        return
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
