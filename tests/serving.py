"""A server for a test to talk to, in a thread, and many clients at once.

    with serving(create_app(engine, "tiny")) as url: ...

By hand, against any server, whose answers must equal those of an engine in this process:
    gpt2 serve --port 8000 --dtype float32
    python tests/serving.py http://127.0.0.1:8000 --clients 64 --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import torch

from gpt2 import GPT2, Engine, SamplingParams, load_tokenizer

_ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serves the application on a port of 127.0.0.1; yields its URL."""
    import uvicorn

    from gpt2.explorer.server import Server

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_level="error", timeout_graceful_shutdown=2)
    server = Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def command(*options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`gpt2 serve` on a free port, in float32 like what it is compared with, and its URL."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(_ROOT / "kernels"), str(_ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2", "serve", "--port", "0", "--dtype", "float32", *options],
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        url = re.search(r"http://127\.0\.0\.1:\d+", lines[1])
        assert url, lines + process.stderr.readlines()
        yield process, url.group()
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=120)
        assert process.returncode == 130 and rest == ("", ""), (process.returncode, rest)


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, and the answer it must get."""

    prompt: str
    params: SamplingParams
    expected: list[str]


def cases(engine: Engine, prompts: Sequence[str], max_tokens: int, count: int = 48) -> list[Case]:
    """Requests of many kinds, each answered by the engine alone."""
    kinds = [dict(temperature=0.0), dict(temperature=0.9, n=2), dict(top_k=0, top_p=0.9), dict(min_p=0.05)]
    found = []
    for number in range(count):
        options = dict(max_tokens=max_tokens - number % 7, seed=number, ignore_eos=number % 2 == 0)
        params = SamplingParams(**{**options, **kinds[number % len(kinds)]})
        prompt = prompts[number % len(prompts)]
        (completion,) = engine.generate([prompt], params)
        found.append(Case(prompt, params, [o.text for o in completion.outputs]))
    return found


async def load(url: str, model: str, cases: Sequence[Case], clients: int, seconds: float) -> dict[str, Any]:
    """Lets `clients` send requests for `seconds`, each at least one, half of them streamed; compares every answer.

    Returns a summary.
    """
    end = time.monotonic() + seconds
    counts = {"requests": 0, "streams": 0, "tokens": 0}
    started = time.monotonic()

    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        generator, answered = random.Random(number), 0
        while not answered or time.monotonic() < end:
            case = generator.choice(cases)
            p = case.params
            extra = {"top_k": p.top_k, "min_p": p.min_p, "ignore_eos": p.ignore_eos}
            stream = generator.random() < 0.5
            answer = await client.completions.create(
                model=model, prompt=case.prompt, max_tokens=p.max_tokens, temperature=p.temperature, top_p=p.top_p,
                n=p.n, seed=p.seed, stream=stream, extra_body=extra,
                **({"stream_options": {"include_usage": True}} if stream else {}),
            )  # fmt: skip
            texts = [""] * p.n
            if stream:
                async for event in answer:
                    for choice in event.choices:
                        texts[choice.index] += choice.text
                    counts["tokens"] += event.usage.completion_tokens if event.usage else 0
            else:
                texts = [choice.text for choice in sorted(answer.choices, key=lambda c: c.index)]
                counts["tokens"] += answer.usage.completion_tokens
            assert texts == case.expected, (case, texts)
            answered += 1
            counts["requests"] += 1
            counts["streams"] += stream

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        await asyncio.gather(*(one(client, number) for number in range(clients)))
    return counts | {"seconds": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--model", default="storybook")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    model = GPT2.from_pretrained(options.model, device="cpu", dtype=torch.float32)  # as the server
    engine = Engine(model, load_tokenizer(options.model))
    prompts = [
        "Once upon a time",
        "The fox said",
        "",
        "In the deep forest there lived a bear who",
        "Der Bär \U0001f43b",
    ]
    done = asyncio.run(load(options.url, options.model, cases(engine, prompts, 40), options.clients, options.seconds))
    print(f"{options.clients} clients: {done}, every answer as from an engine alone")


if __name__ == "__main__":
    main()
