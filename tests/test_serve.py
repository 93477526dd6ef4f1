"""The server: OpenAI's protocol with OpenAI's client, limits, and clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_checkpoint, tiny_config
from conftest import ROOT

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from serving import cases, command, load, serving  # noqa: E402

from gpt2 import (  # noqa: E402
    GPT2,
    Engine,
    SamplingParams,
    cli,
    explorer,
    load_tokenizer,
)
from gpt2.decode import Decoder  # noqa: E402
from gpt2.explorer import api  # noqa: E402
from gpt2.explorer.server import Limits, create_app  # noqa: E402
from gpt2.tokenizer import STORYBOOK  # noqa: E402

PROMPTS = ("Once upon", "a", "", "12 \u00e9\u00e9", "the end")


@pytest.fixture(autouse=True)
def _production(production: torch.device) -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tiny_config(n_positions=128), tokenizer=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> GPT2:
    return GPT2.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


class Slow(Engine):
    """An engine with slow steps, so that a test can act in the meantime; a step can be made to fail."""

    pause = 0.02
    fail = False

    def step(self) -> list:
        time.sleep(self.pause)
        return super().step()

    def _advance(self) -> None:
        if self.fail:
            self.fail = False
            raise RuntimeError("out of luck")
        super()._advance()


@pytest.fixture
def engine(model: GPT2, tokenizer: Any) -> Engine:
    return Engine(model, tokenizer, num_blocks=512)


@pytest.fixture
def slow(model: GPT2, tokenizer: Any) -> Slow:
    return Slow(model, tokenizer, num_blocks=512)


def client_of(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300)


def ask(
    url: str, method: str, path: str, body: bytes | str | None = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, Any]:
    """Sends one request: (status, body, headers); a JSON body is decoded."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=300)
    with contextlib.closing(connection):
        given = {"content-type": "application/json"} if body is not None else {}
        connection.request(method, path, body, given | (headers or {}))
        answer = connection.getresponse()
        content: Any = answer.read()
        if answer.headers.get_content_type() == "application/json":
            content = json.loads(content)
        return answer.status, content, answer.headers


def post(url: str, **body: Any) -> tuple[int, Any]:
    status, content, _ = ask(url, "POST", "/v1/completions", json.dumps(body))
    return status, content


def metrics(url: str) -> dict[str, float]:
    text = ask(url, "GET", "/metrics")[1].decode()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")}


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def idle_and_whole(url: str) -> bool:
    """Nothing is running and every block is free."""
    now = metrics(url)
    busy = ("gpt2_requests_active", "gpt2_jobs", "gpt2_sequences_running", "gpt2_sequences_waiting")
    return not any(now[name] for name in busy) and now["gpt2_cache_blocks"] == now["gpt2_cache_blocks_free"]


# -- OpenAI's protocol


def test_answers_equal_the_engine(engine: Engine, model: GPT2, tokenizer: Any) -> None:
    """n, seeds, stop, several prompts, token ids: texts and finish reasons as from an engine alone, and the usage."""
    alone = Engine(model, tokenizer, num_blocks=512)
    with serving(create_app(engine, "tiny")) as url, client_of(url) as client:
        assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
        params = SamplingParams(max_tokens=30, n=3, seed=7, top_k=0, temperature=0.8)
        (expected,) = alone.generate(["Once upon"], params)
        options: dict[str, Any] = dict(model="tiny", max_tokens=30, seed=7, temperature=0.8)
        answer = client.completions.create(prompt="Once upon", n=3, **options)
        assert [c.text for c in answer.choices] == [o.text for o in expected.outputs]
        assert [c.finish_reason for c in answer.choices] == [o.finish_reason for o in expected.outputs]
        assert [c.index for c in answer.choices] == [0, 1, 2] and answer.object == "text_completion"
        written = sum(len(o.tokens) for o in expected.outputs)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(expected.prompt_tokens), written)

        stop = expected.outputs[0].text[4:7]
        (cut,) = alone.generate(["Once upon"], dataclasses.replace(params, stop=(stop,)))
        answer = client.completions.create(prompt="Once upon", n=3, stop=stop, **options)
        assert [c.text for c in answer.choices] == [o.text for o in cut.outputs]
        assert answer.choices[0].finish_reason == "stop" and stop not in answer.choices[0].text

        both = client.completions.create(prompt=["Once upon", "a"], n=2, **options)
        single = [client.completions.create(prompt=p, n=2, **options) for p in ("Once upon", "a")]
        assert [c.text for c in both.choices] == [c.text for one in single for c in one.choices]
        assert [c.index for c in both.choices] == [0, 1, 2, 3]
        ids = tokenizer.encode("Once upon")
        by_ids = client.completions.create(prompt=ids, n=2, **options)
        assert [c.text for c in by_ids.choices] == [c.text for c in single[0].choices]
        assert client.completions.create(prompt=[ids, ids], **options).choices[1].text == by_ids.choices[0].text
        until(lambda: idle_and_whole(url))


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_answer_in_pieces(engine: Engine, n: int) -> None:
    options: dict[str, Any] = dict(model="tiny", prompt="12 \u00e9", max_tokens=40, seed=3, n=n, logprobs=2, echo=True)
    options["extra_body"] = {"ignore_eos": True, "return_token_ids": True}
    with serving(create_app(engine, "tiny")) as url, client_of(url) as client:
        whole = client.completions.create(**options)
        texts, reasons, tokens, events = [""] * n, [[] for _ in range(n)], [[] for _ in range(n)], 0
        logprobs: list[dict[str, list]] = [{} for _ in range(n)]
        for event in client.completions.create(stream=True, stream_options={"include_usage": True}, **options):
            events += 1
            if event.usage:
                assert event.usage == whole.usage and event.choices == []
            for choice in event.choices:
                texts[choice.index] += choice.text
                tokens[choice.index] += getattr(choice, "token_ids", [])
                reasons[choice.index].append(choice.finish_reason)
                for name, values in choice.logprobs.model_dump().items():
                    logprobs[choice.index].setdefault(name, []).extend(values)
        assert events > 5 and texts == [c.text for c in whole.choices]
        assert tokens == [c.token_ids for c in whole.choices]
        assert [r[-1] for r in reasons] == [c.finish_reason for c in whole.choices]
        assert all(r is None for each in reasons for r in each[:-1])
        assert logprobs == [c.logprobs.model_dump() for c in whole.choices]


def test_the_stream_on_the_wire(engine: Engine) -> None:
    """Server-sent events: `data:` lines with an empty line after each, and [DONE] at the end."""
    with serving(create_app(engine, "tiny")) as url:
        body = json.dumps(dict(prompt="a", max_tokens=3, stream=True))
        status, content, headers = ask(url, "POST", "/v1/completions", body)
        assert status == 200 and headers.get_content_type() == "text/event-stream"
        *events, done, empty = content.decode().split("\n\n")
        assert done == "data: [DONE]" and empty == "" and events
        assert all(json.loads(e.removeprefix("data: "))["object"] == "text_completion" for e in events)


def test_logprobs(engine: Engine, model: GPT2, tokenizer: Any) -> None:
    """Of prompt and output: the model's own, at their offsets in the text; 0 reports the chosen token alone."""
    with serving(create_app(engine, "tiny")) as url, client_of(url) as client:
        options: dict[str, Any] = dict(model="tiny", prompt="Once \u00e9", max_tokens=9, seed=5, echo=True)
        choice = client.completions.create(logprobs=3, extra_body={"return_token_ids": True}, **options).choices[0]
        ids = tokenizer.encode("Once \u00e9") + choice.token_ids
        with torch.no_grad():
            truth = torch.log_softmax(model(torch.tensor([ids]))[0].double(), -1)
        found = choice.logprobs
        assert len(found.tokens) == len(ids) and found.token_logprobs[0] is None and found.top_logprobs[0] is None
        for i in range(1, len(ids)):
            assert abs(found.token_logprobs[i] - truth[i - 1, ids[i]]) < 1e-4
            values, likeliest = truth[i - 1].topk(3)
            expected = dict(zip(likeliest.tolist(), values.tolist())) | {ids[i]: float(truth[i - 1, ids[i]])}
            assert list(found.top_logprobs[i]) == [api.token_text(tokenizer, t) for t in expected]
            assert max(abs(a - b) for a, b in zip(found.top_logprobs[i].values(), expected.values())) < 1e-4
        for place, name in zip(found.text_offset, found.tokens):
            if not name.startswith("bytes:") and name != "<|endoftext|>":
                assert choice.text[place:].startswith(name)
        assert any(name.startswith("bytes:\\x") for name in found.tokens)  # the two halves of an e with an accent
        bare = client.completions.create(logprobs=0, **options).choices[0].logprobs
        assert bare.token_logprobs == found.token_logprobs and not bare.top_logprobs
        assert client.completions.create(**options).choices[0].logprobs is None
        scored = client.completions.create(**(options | {"max_tokens": 0, "logprobs": 3}))
        assert scored.choices[0].text == "Once \u00e9" and scored.choices[0].finish_reason == "length"
        assert scored.choices[0].logprobs.token_logprobs == found.token_logprobs[: len(ids) - len(choice.token_ids)]
        assert scored.usage.completion_tokens == 0


@pytest.mark.parametrize(
    ("changes", "status", "message", "param"),
    [
        ({"temperature": -1}, 400, "temperature must be a number in 0..1e30, got -1", "temperature"),
        ({"temperature": float("nan")}, 400, "temperature must be a number", "temperature"),
        ({"temperature": 10**400}, 400, "temperature must be a number in 0..1e30, got 1000", "temperature"),
        ({"top_p": 0}, 400, "top_p must be a number in", "top_p"),
        ({"n": 0}, 400, "n must be an integer in", "n"),
        ({"n": 129}, 400, "prompts times n must be at most 128, got 1 * 129", "n"),
        ({"prompt": ["a"] * 65, "n": 2}, 400, "prompts times n must be at most 128, got 65 * 2", "n"),
        ({"prompt": {}}, 400, "prompt must be a string, token ids, or a list of these, got an object", "prompt"),
        ({"prompt": []}, 400, "prompt must be", "prompt"),
        ({"prompt": [1, "a"]}, 400, "prompt must be", "prompt"),
        ({"prompt": [1.5]}, 400, "prompt must be", "prompt"),
        ({"prompt": [True]}, 400, "prompt must be", "prompt"),
        ({"prompt": [288]}, 400, "token ids must be in 0..287, got 288", "prompt"),
        ({"prompt": [-1]}, 400, "token ids must be in 0..287, got -1", "prompt"),
        ({"prompt": "\ud800"}, 400, "prompt must be valid Unicode, got a lone surrogate", "prompt"),
        ({"prompt": "a" * 100_000}, 400, "must fit in 128 tokens, got 100000 characters", "prompt"),
        ({"prompt": [1] * 100}, 400, "must fit in 128 tokens, got 100 tokens and max_tokens = 30", "prompt"),
        ({"max_tokens": -1}, 400, "max_tokens must be an integer in", "max_tokens"),
        ({"max_tokens": "9"}, 400, "max_tokens must be an integer in", "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens must be an integer in", "max_tokens"),
        ({"logprobs": 21}, 400, "logprobs must be an integer in 0..20, got 21", "logprobs"),
        ({"stop": ["x"] * 17}, 400, "stop must be at most 16 strings", "stop"),
        ({"stop": [""]}, 400, "stop must be strings that are not empty", "stop"),
        ({"stop": "\udfff"}, 400, "stop must be valid Unicode", "stop"),
        ({"stop": {"a": 1}}, 400, "stop must be a list", "stop"),
        ({"seed": -1}, 400, "seed must be", "seed"),
        ({"stop_token_ids": [999]}, 400, "stop_token_ids must be below 288", None),
        ({"echo": 1}, 400, "echo must be true or false, got 1", "echo"),
        ({"stream": "yes"}, 400, "stream must be true or false", "stream"),
        ({"stream_options": {"include_usage": 1}}, 400, "stream_options must be", "stream_options"),
        ({"best_of": 2}, 400, "best_of is not supported, got 2", "best_of"),
        ({"suffix": "x"}, 400, "suffix is not supported", "suffix"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported", "presence_penalty"),
        ({"logit_bias": {"1": 5}}, 400, "logit_bias is not supported", "logit_bias"),
        ({"model": "gpt-4"}, 404, "the model 'gpt-4' does not exist", "model"),
        ({"model": ["\ud800"]}, 404, "does not exist", "model"),
        ({"top-k": 3}, 400, "unrecognized request argument: 'top-k'", "'top-k'"),
    ],
)
def test_bad_requests(shared_url: str, changes: dict[str, Any], status: int, message: str, param: str | None) -> None:
    for stream in (False, True):  # a stream has not begun either
        found, content = post(shared_url, **({"prompt": "a", "max_tokens": 30, "stream": stream} | changes))
        assert found == status, content
        error = content["error"]
        assert message in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "changes",
    [
        dict(top_k=None, stop=None, seed=None, logprobs=None, n=None, suffix=None, stream=None, stream_options=None),
        dict(best_of=1, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, user="me", suffix=""),
        dict(best_of=2, n=2),
        dict(model="tiny", prompt=None),
        dict(prompt=[[]]),
    ],
)
def test_harmless_fields(shared_url: str, changes: dict[str, Any]) -> None:
    """null means the default everywhere, and a field that asks for nothing is not an error."""
    status, content = post(shared_url, **({"prompt": "a", "max_tokens": 3} | changes))
    assert status == 200, content


@pytest.fixture(scope="module")
def shared_url(folder: Path) -> Iterator[str]:
    """The command itself, in its own process."""
    with command("--model", str(folder)) as (_, url):
        yield url


def test_other_routes(shared_url: str) -> None:
    status, content, _ = ask(shared_url, "POST", "/v1/chat/completions", '{"messages": []}')
    assert status == 400 and "no chat template" in content["error"]["message"]
    assert ask(shared_url, "GET", "/health")[:2] == (200, {"status": "ok"})
    assert ask(shared_url, "GET", "/v1/models/other")[0] == 404
    status, content, _ = ask(shared_url, "GET", "/v1/engines")
    assert status == 404 and content["error"]["message"] == "there is no /v1/engines here"
    status, content, headers = ask(shared_url, "GET", "/v1/completions")
    assert status == 405 and "GET is not allowed" in content["error"]["message"] and headers["allow"] == "POST"
    text = ask(shared_url, "GET", "/metrics")[1].decode()
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [-+.e\d]+', line), line
    assert 'gpt2_requests_total{path="other",status="404"}' in text


# -- many clients, and bad ones


def test_64_clients_at_once(engine: Engine, model: GPT2, tokenizer: Any) -> None:
    """Nothing is lost, and every answer is that of an engine alone. By hand for a minute: serving.py."""
    alone = Engine(model, tokenizer, num_blocks=512)
    with serving(create_app(engine, "tiny")) as url:
        done = asyncio.run(load(url, "tiny", cases(alone, PROMPTS, 16, count=20), clients=64, seconds=0.5))
        assert done["requests"] >= 64
        until(lambda: idle_and_whole(url))
        answered = metrics(url)['gpt2_requests_total{path="/v1/completions",status="200"}']
        assert answered == done["requests"]
    engine._scheduler.pool.check()


def test_1000_fuzzed_requests(shared_url: str) -> None:
    """Whatever is wrong gets a 4xx and an explanation; the pool is whole afterwards."""
    generator = random.Random(0)
    values = (
        None,
        True,
        -1,
        0,
        3,
        1e308,
        2**70,
        "",
        "x",
        "\u0000",
        [],
        [[]],
        [None],
        {},
        {"a": [1]},
        [2**70],
        "é" * 999,
    )
    names = [*api._SAMPLING, *api._REFUSED, *api._OTHERS, "", "\ud800", "messages"]
    good = {"prompt": "a", "max_tokens": 4}
    seen: dict[int, int] = {}

    def note(status: int, content: Any) -> None:
        seen[status] = seen.get(status, 0) + 1
        assert status == 200 or 400 <= status < 500, (status, content)
        assert status == 200 or content["error"]["message"], content

    for number in range(1000):
        kind = number % 10
        path = generator.choice(("/v1/completions", "/explorer/look", "/explorer/attention"))
        text = json.dumps(good | {generator.choice(names): generator.choice(values) for _ in range(3)})
        if kind < 4:  # wrong types and values
            note(*ask(shared_url, "POST", path, text)[:2])
        elif kind == 4:  # JSON that breaks off
            note(*ask(shared_url, "POST", path, text[: generator.randrange(len(text))])[:2])
        elif kind == 5:  # bytes that are not text
            note(*ask(shared_url, "POST", path, generator.randbytes(generator.randrange(1, 3000)))[:2])
        elif kind == 6:  # deep, long, odd
            body = generator.choice(("[" * 50_000, '{"prompt":' * 5000, "9" * 5000, '{"n":1e999}', "\ufeff{}", "null"))
            note(*ask(shared_url, "POST", path, body.encode())[:2])
        elif kind == 7:  # wrong content types and methods
            method, headers = generator.choice((("POST", {"content-type": "text/plain"}), ("PUT", {}), ("DELETE", {})))
            note(*ask(shared_url, method, path, text, headers)[:2])
        elif kind == 8 and number % 100 == 8:  # 10 MB, with a declared length or in chunks
            body = b'{"prompt": "' + b"a" * 10_000_000
            status, content, _ = ask(shared_url, "POST", path, body if number % 200 == 8 else iter([body]))
            assert status == 413, (status, content)
            note(status, content)
        else:
            abrupt(shared_url, generator, text if kind == 8 else json.dumps(good | {"stream": True}))
    assert seen[413] == 10 and seen[415] > 0 and seen[405] > 0 and seen[400] > 300, seen
    until(lambda: idle_and_whole(shared_url))
    assert ask(shared_url, "GET", "/health")[0] == 200 and post(shared_url, **good)[0] == 200
    assert not any('status="5' in name for name in metrics(shared_url))


def abrupt(url: str, generator: random.Random, body: str) -> None:
    """Leaves in the middle of a request, right after it, in the middle of the answer, or speaks no HTTP at all."""
    host, _, port = url.removeprefix("http://").partition(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    content = f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        way = generator.randrange(4)
        if way == 0:
            connection.sendall(content[: generator.randrange(1, len(content))])
        elif way == 1:
            connection.sendall(generator.randbytes(100) + b"\r\n\r\n")
            assert connection.recv(100)[9:12] in (b"400", b"")
        else:
            connection.sendall(content)
            if way == 3:
                connection.recv(generator.randrange(1, 300))
        if generator.random() < 0.5:  # a reset instead of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(slow: Slow, stream: bool) -> None:
    with serving(create_app(slow, "tiny")) as url:
        body = json.dumps(dict(prompt=["a", "b"], n=2, max_tokens=120, ignore_eos=True, stream=stream))
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        until(lambda: metrics(url)["gpt2_sequences_running"] == 4)
        connection.close()
        until(lambda: idle_and_whole(url))
        now = metrics(url)
        assert 0 < now["gpt2_output_tokens_total"] < 4 * 100
        status = 200 if stream else 499
        assert now[f'gpt2_requests_total{{path="/v1/completions",status="{status}"}}'] == 1


def test_limits(slow: Slow) -> None:
    limits = Limits(body_bytes=1000, body_seconds=0.3, requests=2, seconds=1.0)
    on = {"ignore_eos": True}
    endless: dict[str, Any] = dict(prompt="a", max_tokens=120) | on
    slow.pause = 0.1  # 12 s for 120 tokens, or 1.6 s on a GPU, which makes eight per step
    with serving(create_app(slow, "tiny", limits=limits)) as url, client_of(url) as client:
        assert post(url, prompt="a" * 2000)[0] == 413
        with socket.create_connection((url.split("/")[2].split(":")[0], int(url.rsplit(":")[-1])), timeout=300) as one:
            one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n")
            one.sendall(b"content-length: 50\r\n\r\n{")
            answers: list[tuple[int, Any]] = []
            threads = [threading.Thread(target=lambda: answers.append(post(url, **endless))) for _ in range(2)]
            for thread in threads:
                thread.start()
            until(lambda: metrics(url)["gpt2_requests_active"] == 2)
            status, content, headers = ask(url, "POST", "/v1/completions", json.dumps(endless))
            assert status == 429 and headers["retry-after"] == "1" and "2 requests are at work" in str(content)
            assert ask(url, "POST", "/explorer/look", '{"prompt": "a"}')[0] == 429
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model="tiny", prompt="a")
            for thread in threads:
                thread.join()
            assert [status for status, _ in answers] == [504, 504] and "may take 1 s" in str(answers)
            assert b" 408 " in one.recv(1000)
        until(lambda: idle_and_whole(url))
        with pytest.raises(openai.APIError, match="may take 1 s"):
            list(client.completions.create(model="tiny", prompt="a", max_tokens=120, stream=True, extra_body=on))
        until(lambda: idle_and_whole(url))


def test_stopped_with_requests_at_work(slow: Slow, capfd: pytest.CaptureFixture[str]) -> None:
    """All clients are told, and nothing is logged."""
    slow.pause = 0.1  # uvicorn's own shutdown would wait for 2 s of the 12, then cancel
    answers: list[Any] = []
    with serving(create_app(slow, "tiny")) as url:
        assert post(url, prompt="a", max_tokens=2)[0] == 200
        threads = []
        for stream in (False, True, False, True):
            body = json.dumps(dict(prompt="a", max_tokens=120, ignore_eos=True, stream=stream))
            work = functools.partial(lambda b: answers.append(ask(url, "POST", "/v1/completions", b)[:2]), body)
            threads.append(threading.Thread(target=work))
            threads[-1].start()
        until(lambda: metrics(url)["gpt2_sequences_running"] == 4)
    for thread in threads:
        thread.join()
    assert sorted(status for status, _ in answers) == [200, 200, 503, 503]
    for status, content in answers:
        text = content.decode() if status == 200 else content["error"]["message"]
        assert "the engine has stopped" in text and "[DONE]" not in text
    assert capfd.readouterr().err == ""


def test_a_failing_step_is_told_and_survived(slow: Slow) -> None:
    with serving(create_app(slow, "tiny")) as url:
        slow.fail = True
        status, content = post(url, prompt="a", max_tokens=9)
        assert status == 503 and content["error"]["message"] == "the engine failed: out of luck"
        slow.fail = True
        body = json.dumps(dict(prompt="a", max_tokens=9, stream=True))
        answer = ask(url, "POST", "/v1/completions", body)[1].decode()
        assert "the engine failed: out of luck" in answer and "[DONE]" not in answer
        assert post(url, prompt="a", max_tokens=9)[0] == 200
        until(lambda: idle_and_whole(url))


def test_the_warm_up_decodes(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token comes from prefill: if it were the only one, the first client would wait for decode kernels."""
    steps: list[int] = []
    run = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda self, count: steps.append(count) or run(self, count))
    explorer.warm_up(model)
    assert sum(steps) == 1


def test_a_lost_gpu_ends_the_engine(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the GPU takes no more work nothing can succeed, and /health says so; other errors are survived."""
    synchronized: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    gpu = torch.device("cuda", 1)
    with serving(create_app(slow, "tiny")) as url:
        slow.model = types.SimpleNamespace(device=gpu, config=slow.model.config)  # type: ignore[assignment]
        slow.fail = True
        assert post(url, prompt="a", max_tokens=9)[0] == 503
        assert synchronized == [gpu] and ask(url, "GET", "/health")[0] == 200

        def synchronize(device: torch.device) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        slow.fail = True
        status, content = post(url, prompt="a", max_tokens=9)
        assert status == 503 and content["error"]["message"] == "the engine has stopped"
        assert ask(url, "GET", "/health")[0] == 503


def test_an_engine_that_stopped_is_told(engine: Engine) -> None:
    app = create_app(engine, "tiny")
    with serving(app) as url:
        engine.stats = None  # type: ignore[method-assign]  # what its thread cannot survive
        assert post(url, prompt="a")[0] == 503
        assert ask(url, "GET", "/health")[0] == 503
        status, content = post(url, prompt="a")
        assert status == 503 and content["error"]["message"] == "the engine has stopped"


def test_a_key(engine: Engine) -> None:
    with serving(create_app(engine, "tiny", api_key="sesame")) as url:
        assert ask(url, "GET", "/health")[0] == ask(url, "GET", "/")[0] == 200
        for path in ("/v1/models", "/metrics", "/explorer/model", "/nowhere"):
            status, content, headers = ask(url, "GET", path)
            assert status == 401 and "bearer key" in str(content) and headers["www-authenticate"] == "Bearer"
        assert post(url, prompt="a" * 2_000_000)[0] == 401  # the body is not even considered
        for given in ("Bearer sesame", "bearer sesame", "BEARER sesame"):
            assert ask(url, "GET", "/v1/models", headers={"authorization": given})[0] == 200
        for given in ("Bearer Sesame", "Bearersesame", "Bearer", "Basic sesame", "sesame", " sesame", ""):
            assert ask(url, "GET", "/v1/models", headers={"authorization": given})[0] == 401
        for key in ("sesam", "sesame2"):
            with client_of(url, key) as client, pytest.raises(openai.AuthenticationError):
                client.models.list()
        with client_of(url, "sesame") as client:
            assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices


def test_other_web_pages(engine: Engine) -> None:
    """CORS is off unless an origin is named; another page's form, and DNS rebinding, are refused."""
    origin = {"origin": "https://example.org"}
    preflight = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with serving(create_app(engine, "tiny", hosts=("127.0.0.1",))) as url:
        assert "access-control-allow-origin" not in ask(url, "GET", "/v1/models", headers=origin)[2]
        assert ask(url, "OPTIONS", "/v1/completions", headers=preflight)[0] == 405
        form = {"content-type": "application/x-www-form-urlencoded"}
        assert ask(url, "POST", "/v1/completions", '{"prompt": "a"}', form)[0] == 415
        assert ask(url, "GET", "/", headers={"host": "rebound.example.org"})[0] == 400
    app = create_app(Engine(engine.model, engine.tokenizer), "tiny", origins=["https://example.org"], api_key="k")
    with serving(app) as url:
        status, _, headers = ask(url, "OPTIONS", "/v1/completions", headers=preflight)
        assert status == 200 and headers["access-control-allow-origin"] == "https://example.org"
        other = ask(url, "GET", "/health", headers={"origin": "https://evil.example"})[2]
        assert "access-control-allow-origin" not in other


# -- the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port must be in 0..65535, got 70000"),
        (["--host", "256.0.0.1"], "--host must be a name or address of this machine, got '256.0.0.1'"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1, port 8000"),
        (["--api-key", ""], "--api-key must be printable ASCII and not empty"),
        (["--api-key", "@/no/such/file"], "No such file"),
        (["--max-requests", "0"], "--max-requests must be above 0, got 0"),
        (["--time-limit", "nan"], "--time-limit must be above 0, got nan"),
        (["--model", "gpt5", "--port", "0"], "gpt5"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", *options])
    err = capsys.readouterr().err
    assert end.value.code == 2 and message in err and len(err.splitlines()) == 1


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(SystemExit) as end:
            cli.main(["serve", "--port", str(other.getsockname()[1])])
        assert end.value.code == 2 and "Address already in use" in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "starlette" or n == "gpt2.explorer.server"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(SystemExit) as end:
        cli.main(["serve"])
    message = "gpt2 serve: starlette is not installed: pip install 'gpt2-kernels[serve]'\n"
    assert end.value.code == 2 and capsys.readouterr().err.startswith(message)


def test_a_key_from_a_file(tmp_path: Path) -> None:
    """So that other users of the machine cannot read it in the process list."""
    (tmp_path / "key").write_text("open sesame\n")
    assert explorer._key(f"@{tmp_path / 'key'}") == "open sesame"
    assert explorer._key("plain") == "plain" and explorer._key(None) is None
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ValueError, match="--api-key must be printable ASCII and not empty"):
        explorer._key(f"@{tmp_path / 'key'}")


def test_the_benchmark_runs() -> None:
    pytest.importorskip("pytest_benchmark")
    if not (STORYBOOK / "model.safetensors").exists():
        pytest.skip("the shipped model is not in this checkout")
    command = ["-m", "pytest", "benchmarks/bench_serve.py::test_serve[1]"]
    command += ["--sizes", "tiny", "-s", "-p", "no:cacheprovider"]
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    environment = {**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "1 passed" in done.stdout and done.stdout.count("first_byte_ms_worst") == 1, done.stdout + done.stderr
