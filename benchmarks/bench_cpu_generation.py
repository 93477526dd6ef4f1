"""Generation on a CPU against transformers and CTranslate2, all in one run, on one random GPT-2 124M.

    python -m benchmarks.bench_cpu_generation --out benchmarks/results/cpu/generation/DATE.json

Every contender continues the same prompts of 64 tokens with 32 new ones, greedily, at batch 1, 16 and 64; a number is
total new tokens over wall time, prefill included. Contenders take turns (A B C .. A B C ..), and the best of `--rounds`
counts for each: on a shared machine the best run is the least disturbed one, and every contender gets as many tries.
Each has its own process, asleep while another computes: in one process, the OpenMP thread pools of two libraries are
more threads than cores, and libgomp then puts a waiting thread to sleep at once, 30 us at every parallel loop.
Peers run where they are installed (`pip install '.[bench]'`).

What limits us: decoding one sequence reads all matrices once per token, 124M elements (`bytes`). The row "decode" gives
this as a share of the machine's read bandwidth, measured here by summing a large tensor.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gpt2 import GPT2, PRESETS, Engine, SamplingParams
from gpt2_kernels import _native

BATCHES = (1, 16, 64)
PROMPT, NEW = 64, 32
Contender = Callable[[list[list[int]]], list[list[int]]]  # prompts -> new tokens


def ours(folder: Path, kind: str) -> tuple[Contender, Engine]:
    model = GPT2.from_pretrained(folder, device="cpu", dtype=getattr(torch, kind))
    blocks = max(BATCHES) * -(-(PROMPT + NEW) // 16)
    engine = Engine(model, max_batch=max(BATCHES), num_blocks=blocks, prefix_caching=False)
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    return lambda prompts: [c.outputs[0].tokens for c in engine.generate(prompts, params)], engine


def transformers_generate(folder: Path, kind: str) -> Contender:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, kind)).eval()

    @torch.no_grad()
    def generate(prompts: list[list[int]]) -> list[list[int]]:
        tokens = torch.tensor(prompts)
        options: dict[str, Any] = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, PROMPT:].tolist()

    return generate


def ctranslate2_generate(folder: Path, kind: str) -> Contender:
    import ctranslate2

    threads = torch.get_num_threads()
    generator = ctranslate2.Generator(str(folder), compute_type=kind, inter_threads=1, intra_threads=threads)

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        results = generator.generate_batch(
            [[f"t{token}" for token in prompt] for prompt in prompts],
            max_length=NEW,
            min_length=NEW,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return [result.sequences_ids[0] for result in results]

    return generate


def convert_for_ctranslate2(source: Path, target: Path) -> None:
    """Runs CTranslate2's own converter, with a vocabulary t0, t1 .. in place of tokenizer files."""
    import ctranslate2.converters.transformers as converters
    from transformers import GPT2LMHeadModel

    class Vocabulary:
        bos_token = eos_token = unk_token = f"t{PRESETS['gpt2'].eos_token_id}"

        def get_vocab(self) -> dict[str, int]:
            return {f"t{token}": token for token in range(PRESETS["gpt2"].vocab_size)}

    spec = converters._MODEL_LOADERS["GPT2Config"](GPT2LMHeadModel.from_pretrained(source), Vocabulary())
    spec.validate()
    spec.optimize(quantization="float32")
    target.mkdir()
    spec.save(str(target))


def read_bandwidth() -> float:
    """Bytes per second that all threads together read, at best."""
    x = torch.ones(256 * 2**20 // 4)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return x.numel() * 4 / min(times)


def decode_step(engine: Engine, rounds: int) -> tuple[float, int]:
    """Seconds of the fastest decode step of one sequence, and the bytes of the matrices that it reads."""
    best = float("inf")
    for _ in range(rounds):
        engine.add(list(range(PROMPT)), SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True))
        engine.step()
        while engine.unfinished:
            start = time.perf_counter()
            engine.step()
            best = min(best, time.perf_counter() - start)
    matrices = [p for p in engine.model.parameters() if p.dim() == 2 and p is not engine.model.wpe.weight]
    return best, sum(p.numel() * p.element_size() for p in matrices)


def serve(name: str, folder: Path, converted: Path, requests: Connection) -> None:
    """The loop of a contender's process: prompts -> (seconds, answers), or a number of rounds -> `decode_step`."""
    (who, kind), engine = name.split(), None
    if who == "ours":
        contender, engine = ours(folder, kind)
    elif who == "transformers":
        contender = transformers_generate(folder, kind)
    else:
        contender = ctranslate2_generate(converted, kind)
    requests.send("ready")
    while (request := requests.recv()) is not None:
        if isinstance(request, int):
            assert engine is not None
            requests.send(decode_step(engine, request))
        else:
            start = time.perf_counter()
            answers = contender(request)
            requests.send((time.perf_counter() - start, answers))


class Process:
    """A contender in its own process."""

    def __init__(self, name: str, folder: Path, converted: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=serve, args=(name, folder, converted, there), daemon=True)
        self._process.start()
        there.close()  # so that the end of the other process is seen here
        self._name = name
        self._answer()

    def __call__(self, request: Any) -> Any:
        self._here.send(request)
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self._here.recv()
        except EOFError:
            raise RuntimeError(f"{self._name} ended before it answered; its own message is above") from None

    def end(self) -> None:
        self._here.send(None)
        self._process.join()


def contenders() -> list[str]:
    """The contenders that are installed."""
    found = [f"ours {kind}" for kind in ("float32", "bfloat16", "int8")]
    for library, names in (
        ("transformers", ["transformers float32", "transformers bfloat16"]),
        ("ctranslate2", ["CTranslate2 float32", "CTranslate2 int8"]),
    ):
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed and left out")
        else:
            found += names
    return found


def measure(batches: list[int], rounds: int) -> dict[str, Any]:
    names = contenders()
    with tempfile.TemporaryDirectory() as scratch:
        folder, converted = Path(scratch) / "gpt2", Path(scratch) / "ctranslate2"
        torch.manual_seed(0)
        GPT2(PRESETS["gpt2"]).save_pretrained(folder)
        if any(name.startswith("CTranslate2") for name in names):
            convert_for_ctranslate2(folder, converted)
        processes = {name: Process(name, folder, converted) for name in names}
        speeds: dict[str, dict[str, float]] = {}
        for batch in batches:
            generator = torch.Generator().manual_seed(batch)
            vocabulary = PRESETS["gpt2"].vocab_size - 1  # no <|endoftext|> inside a prompt
            prompts = torch.randint(vocabulary, (batch, PROMPT), generator=generator).tolist()
            for process in processes.values():  # warms caches, allocators and thread pools
                process(prompts[:4])
            best = dict.fromkeys(names, float("inf"))
            for _ in range(rounds):
                for name, process in processes.items():
                    time.sleep(0.3)  # until the previous contender's threads have stopped waiting for work
                    seconds, answers = process(prompts)
                    best[name] = min(best[name], seconds)
                    if [len(a) for a in answers] != [NEW] * batch:
                        raise RuntimeError(f"{name}: {NEW} tokens a prompt were asked for, got {answers}")
            speeds[str(batch)] = {name: batch * NEW / seconds for name, seconds in best.items()}
        results: dict[str, Any] = {"tokens_per_second": speeds}
        if 1 in batches:
            time.sleep(0.3)
            bandwidth = read_bandwidth()
            results |= {"read_GB_per_s": bandwidth / 1e9, "decode_batch_1": {}}
            for name in names:
                if name.startswith("ours"):
                    seconds, size = processes[name](rounds)
                    share = size / seconds / bandwidth
                    results["decode_batch_1"][name] = {"ms": seconds * 1e3, "bytes": size, "share_of_bandwidth": share}
        for process in processes.values():
            process.end()
    return results


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "ctranslate2"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(results: dict[str, Any]) -> str:
    speeds = results["tokens_per_second"]
    batches = sorted(speeds, key=int)
    names = list(speeds[batches[0]])
    peers = [name for name in names if not name.startswith("ours")]
    lines = [f"{'tokens/s':24}" + "".join(f"{f'batch {batch}':>12}" for batch in batches)]
    lines += [f"{name:24}" + "".join(f"{speeds[b][name]:12.1f}" for b in batches) for name in names]
    for name in names if peers else ():
        same = [p for p in peers if p.split()[-1] == name.split()[-1]]
        for label, rivals in (("the best peer of that precision", same), ("the best peer of all", peers)):
            if name not in peers:
                shares = (speeds[b][name] / max(speeds[b][p] for p in rivals) for b in batches)
                lines.append(f"{name} / {label}: " + ", ".join(f"{share:.2f}" for share in shares))
    if "read_GB_per_s" in results:
        lines.append(f"read bandwidth {results['read_GB_per_s']:.1f} GB/s")
        for name, row in results["decode_batch_1"].items():
            lines.append(
                f"{name}: a decode step of one text {row['ms']:.2f} ms, {row['share_of_bandwidth']:.0%} of that"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write results there, as JSON, beside other batches'")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="tries of each contender (default 3)")
    parser.add_argument("--batch", type=int, nargs="+", choices=BATCHES, default=list(BATCHES), help="default all")
    options = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    results: dict[str, Any] = {
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "operators": _native.status().split(" from ")[0],
        "versions": versions(),
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
    }
    before = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    if before and (other := [key for key in results if before.get(key) != results[key]]):
        parser.error(f"--out must be a file measured alike, got another {', '.join(other)} in {options.out}")
    measured = measure(options.batch, options.rounds)
    how = {"date": datetime.date.today().isoformat(), "rounds": options.rounds, "load_before": load}
    when = {str(b): how for b in options.batch}
    if before:
        measured["tokens_per_second"] = before["tokens_per_second"] | measured["tokens_per_second"]
        results = before | results | measured | {"measured": before["measured"] | when}
    else:
        results |= measured | {"measured": when}
    print(f"{results['cpu']}; {results['versions']}; load before {load}")
    print(report(results))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
