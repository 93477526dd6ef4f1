"""`gpt2 serve` with 1, 8 and 64 clients at once: time to the first byte of text, and total tokens per second.

The server runs in its own process on 127.0.0.1, with the model that ships; the clients are plain sockets in this one.
Each streams a fixed number of tokens, greedily, from its own prompt, and all start at once. A round is right when the
usage sent to every client counts as many tokens as it asked for, and the client reads the same text as the first time.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

WORDS = "fox bear robot king queen river forest castle ship storm".split()


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    for extra in ("starlette", "uvicorn"):
        pytest.importorskip(extra)
    command = [sys.executable, "-m", "gpt2", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = [process.stderr.readline() for _ in range(3)]
            found = re.search(r"http://(.+):(\d+)/v1", lines[2])
            assert found, lines
            yield found[1], int(found[2])
        finally:
            process.terminate()


async def stream(address: tuple[str, int], body: bytes) -> tuple[float, int, str]:
    """One client: (seconds to the first event, tokens, text)."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    head = "POST /v1/completions HTTP/1.0\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    first, tokens, text = 0.0, 0, ""
    async for line in reader:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - started
            event = json.loads(line[6:])
            text += "".join(choice["text"] for choice in event["choices"])
            tokens += (event.get("usage") or {}).get("completion_tokens", 0)
    writer.close()
    return first, tokens, text


async def together(address: tuple[str, int], bodies: list[bytes]) -> list[tuple[float, int, str]]:
    return await asyncio.gather(*(stream(address, body) for body in bodies))


@pytest.mark.parametrize("clients", [1, 8, 64])
@pytest.mark.benchmark(group="serve storybook")
def test_serve(benchmark: Any, address: tuple[str, int], clients: int, pytestconfig: pytest.Config) -> None:
    new = 4 if pytestconfig.getoption("--sizes") == "tiny" else 64
    options = {"max_tokens": new, "temperature": 0, "ignore_eos": True}
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    prompts = [f"Once upon a time {i} {WORDS[i % 10]}s" for i in range(clients)]
    bodies = [json.dumps({"prompt": prompt, **options}).encode() for prompt in prompts]
    expected = [text for _, _, text in asyncio.run(together(address, bodies))]  # and warms up
    firsts: list[float] = []
    rates: list[float] = []

    def once() -> None:
        started = time.perf_counter()
        answers = asyncio.run(together(address, bodies))
        rates.append(clients * new / (time.perf_counter() - started))
        firsts.extend(first for first, _, _ in answers)
        assert [tokens for _, tokens, _ in answers] == [new] * clients
        assert [text for _, _, text in answers] == expected

    benchmark.pedantic(once, rounds=1 if new == 4 else 5)
    benchmark.extra_info.update(
        first_byte_ms=1e3 * statistics.median(firsts),
        first_byte_ms_worst=1e3 * max(firsts),
        tokens_per_second=statistics.median(rates),
    )
    print(f"\n{clients} clients: {json.dumps(benchmark.extra_info)}")
