"""The Explorer: the page shows what the reference model computes, and a person can use all of it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import random_checkpoint, tiny_config

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

from browser import Page, browser  # noqa: E402
from serving import command  # noqa: E402

from gpt2 import GPT2, ReferenceGPT2, load_tokenizer  # noqa: E402
from gpt2.explorer import look  # noqa: E402
from gpt2.tokenizer import STORYBOOK  # noqa: E402

PROMPT = "The little robot was lost, and"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(n_positions=160, n_layer=3, n_embd=48, n_head=3)
    return random_checkpoint(tmp_path_factory.mktemp("models") / "tiny", config)


@pytest.fixture
def model(folder: Path, production: torch.device) -> GPT2:
    return GPT2.from_pretrained(folder, device=production, dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(folder: Path) -> ReferenceGPT2:
    return ReferenceGPT2.from_pretrained(folder, device="cpu", dtype=torch.float64)


def maps_of(reference: ReferenceGPT2, tokens: list[int]) -> torch.Tensor:
    """(layers, heads, T, T)."""
    with torch.no_grad():
        return torch.cat(reference(torch.tensor([tokens]), return_attention=True)[1])


def mean_of(maps: torch.Tensor, layer: int | None, head: int | None) -> torch.Tensor:
    maps = maps if layer is None else maps[layer : layer + 1]
    return (maps if head is None else maps[:, head : head + 1]).mean((0, 1))


def test_look_is_exact(model: GPT2, reference: ReferenceGPT2) -> None:
    """Scores and the next token's distribution, reshaped as the page does it, against float64."""
    tokens = [5, 17, 200, 5, 90] * 20  # more rows than are scored at once
    with torch.no_grad():
        truth = torch.log_softmax(reference(torch.tensor([tokens]))[0], -1)
    scores, following = look.look(model, tokens)
    assert [s.token for s in scores] == tokens[1:]
    assert max(abs(s.logprob - truth[i, tokens[i + 1]]) for i, s in enumerate(scores)) < 1e-4
    assert sorted(following.tokens) == list(range(288))  # fewer than LIKELIEST
    assert following.logprobs == sorted(following.logprobs, reverse=True)
    for temperature in (0.1, 0.7, 1.0, 2.0):
        expected = torch.softmax(truth[-1] / temperature, -1)[following.tokens]
        z = following.log_sums[look.TEMPERATURES.index(temperature)]
        found = (torch.tensor(following.logprobs, dtype=torch.float64) / temperature - z).exp()
        assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("layer", [None, 0, 2])
@pytest.mark.parametrize("head", [None, 0, 2])
@pytest.mark.parametrize(
    "length", [1, 7, 100, 150]
)  # one token; a few; more rows than a piece; more than is shown whole
def test_attention_is_exact(
    model: GPT2, reference: ReferenceGPT2, length: int, layer: int | None, head: int | None
) -> None:
    tokens = torch.randint(0, 288, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    truth = mean_of(maps_of(reference, tokens), layer, head)
    found = look.attention(model, tokens, layer, head)
    assert found.whole == (length <= look.WHOLE) and len(found.keys) == len(found.shares) == length
    for i, (keys, shares) in enumerate(zip(found.keys, found.shares)):
        assert len(set(keys)) == len(keys) == min(i + 1, length if found.whole else look.TOP_M) and max(keys) <= i
        assert shares == sorted(shares, reverse=True)
        assert (torch.tensor(shares) - truth[i, keys]).abs().max() < 1e-5
        assert abs(shares[-1] - truth[i, : i + 1].sort(descending=True).values[len(keys) - 1]) < 1e-5  # the largest


def test_attention_on_the_kernels(path: torch.device, folder: Path, reference: ReferenceGPT2) -> None:
    """From the Triton kernels (interpreted where there is no GPU), and from the CPU path."""
    tokens = [3, 1, 4, 1, 5]
    found = look.attention(GPT2.from_pretrained(folder, device=path, dtype=torch.float32), tokens, layer=1)
    truth = mean_of(maps_of(reference, tokens), 1, None)
    for i, (keys, shares) in enumerate(zip(found.keys, found.shares)):
        assert (torch.tensor(shares) - truth[i, keys]).abs().max() < 1e-5


# -- the page, in a browser


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if not (STORYBOOK / "model.safetensors").exists():
        pytest.skip("the shipped model is not in this checkout")
    with browser() as page, command() as (_, url):
        page.url = url  # type: ignore[attr-defined]
        yield page


class Reader:
    """What the page must show, according to the reference model in float64."""

    def __init__(self) -> None:
        self.model = ReferenceGPT2.from_pretrained("storybook", device="cpu", dtype=torch.float64)
        self.tokenizer = load_tokenizer("storybook")

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(self.model(torch.tensor([tokens]))[0], -1)

    def visible(self, token: int) -> str:
        return self.tokenizer.decode([token]).replace(" ", "·").replace("\n", "⏎")


def percent(text: str) -> float:
    return float(text.removesuffix(" %"))


def near(found: str, share: float) -> bool:
    return abs(percent(found) - 100 * share) < 0.0501


def shown(page: Page) -> list[int]:
    """The ids of the tokens on the page, as they are told to a screen reader."""
    labels = page.js("[...document.querySelectorAll('#tokens .token')].map((e) => e.getAttribute('aria-label'))")
    return [int(re.search(r"token (\d+)", label)[1]) for label in labels]  # type: ignore[index]


def settled(page: Page, tokens: list[int]) -> None:
    """Waits until the text is these tokens, and the candidates for the next one have arrived."""
    end = time.monotonic() + 60
    while shown(page) != tokens or page.js("document.getElementById('next').getAttribute('aria-busy')") != "false":
        assert time.monotonic() < end, (shown(page), tokens)
        time.sleep(0.02)


def check_bars(page: Page, reader: Reader, tokens: list[int], temperature: float = 1.0, top_k: int = 0) -> list[int]:
    """The ten bars are the reference's ten likeliest, with its probabilities; returns their ids."""
    logprobs = reader.logprobs(tokens)[-1]
    ids = logprobs.topk(10).indices.tolist()
    shaped = logprobs / temperature
    if top_k:
        shaped = shaped.masked_fill(logprobs < logprobs.topk(top_k).values[-1], -math.inf)
    shares = torch.softmax(shaped, -1)[ids].tolist()
    assert page.texts("#next .name") == [reader.visible(t) for t in ids]
    texts = page.texts("#next .share")
    assert all(near(text, share) for text, share in zip(texts, shares, strict=True)), (texts, shares)
    widths = page.js("[...document.querySelectorAll('#next .fill')].map((e) => e.style.width)")
    assert [percent(w.replace("%", " %")) for w in widths] == [percent(text) for text in texts]
    return ids


def put(page: Page, name: str, value: int | None, event: str = "input") -> None:
    """Sets a control's value, as its own mouse handling would."""
    page.js(
        f"(() => {{ const c = document.getElementById('{name}'); c.value = '{'' if value is None else value}';"
        f" c.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"
    )


def test_a_visit(page: Page, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A person types a prompt, appends three tokens, undoes one, reshapes, continues, and opens the attention view."""
    reader = Reader()
    page.open(page.url)  # type: ignore[attr-defined]
    page.until("document.querySelectorAll('#next li').length === 10")
    page.click("#prompt")
    page.js("document.getElementById('prompt').select()")
    page.type(PROMPT)
    tokens = reader.tokenizer.encode(PROMPT)
    settled(page, tokens)
    page.js("document.activeElement.blur()")

    for key in ("1", "3", "0"):  # the likeliest, the third, the tenth
        ids = check_bars(page, reader, tokens)
        tokens.append(ids[(int(key) + 9) % 10])
        page.press(key)
        settled(page, tokens)
    page.press("u")
    gone = tokens.pop()
    settled(page, tokens)
    ids = check_bars(page, reader, tokens)
    page.click("#next li:nth-child(2) button")  # beside the one taken back: a branch
    tokens.append(ids[1])
    settled(page, tokens)
    leaves = page.texts("#tree ul button")
    assert [reader.tokenizer.decode([t]) for t in (gone, tokens[-1])] == leaves[-2:]
    assert page.texts("#tree [aria-current]") == leaves[-1:]
    page.click("#tree li li li:first-child button")
    settled(page, [*tokens[:-1], gone])
    page.click("#tree li li li:last-child button")
    settled(page, tokens)

    for temperature, top_k in ((8, 11), (38, 5), (18, 1)):  # 0.5; 2.0 among 40; the likeliest alone
        put(page, "temperature", temperature)
        put(page, "top-k", top_k)
        check_bars(page, reader, tokens, look.TEMPERATURES[temperature], {11: 0, 5: 20, 1: 2}[top_k])
    put(page, "temperature", 18)
    put(page, "top-k", 11)

    logprobs = reader.logprobs(tokens)
    labels = page.js("[...document.querySelectorAll('#tokens .token')].map((e) => e.getAttribute('aria-label'))")
    surprise = page.js(
        "[...document.querySelectorAll('#tokens .token')].map((e) => e.style.getPropertyValue('--surprise'))"
    )
    for i, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        content = reader.tokenizer.decode_single_token_bytes(token)
        assert f"token {token}, bytes {content.hex(' ')}" in label
        if i:
            truth = float(logprobs[i - 1, token])
            assert near(re.search(r"probability (.* %)", label)[1], math.exp(truth))  # type: ignore[index]
            assert abs(float(surprise[i]) - min(1, -truth / 9)) < 1e-4
    page.move(*page.center(".token:nth-of-type(2)"))
    page.until("!document.getElementById('tip').hidden")
    assert page.texts("#tip")[0].replace("\n", ", ") == labels[1]
    pictures = {"explorer.png": page.screenshot()}

    attention(page, reader, tokens, pictures)
    writing(page, reader, tokens)
    everything_has_a_name(page)
    assert page.errors == []
    assert page.requests and all(r.startswith(page.url + "/") or r == "data:," for r in page.requests)  # type: ignore[attr-defined]

    target = Path(request.config.getoption("--screenshots") or tmp_path)
    for name, content in pictures.items():
        (target / name).write_bytes(content)
        width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
        assert content.startswith(b"\x89PNG") and width > 1000 and height > 400 and 20_000 < len(content) < 400_000


def attention(page: Page, reader: Reader, tokens: list[int], pictures: dict[str, bytes]) -> None:
    """A row's percentages, in words and on the tokens, and a cell of the matrix; then by keyboard."""
    maps = maps_of(reader.model, tokens)
    chosen = len(tokens) - 2
    page.click(f".token:nth-of-type({chosen + 1})")
    for layer, head in ((None, None), (0, None), (4, 3), (None, 2)):
        for name, value in (("layer", layer), ("head", head)):
            put(page, name, value, "change")
        truth = mean_of(maps, layer, head)[chosen]
        end = time.monotonic() + 60
        while True:
            texts = page.texts("#shares small")
            if len(texts) == len(tokens) and all(near(t, s) for t, s in zip(texts, truth[: chosen + 1].tolist())):
                break
            assert time.monotonic() < end, (layer, head, texts, truth)
            time.sleep(0.05)
        assert texts[chosen + 1 :] == [""]
        best = int(truth.argmax())
        word = reader.tokenizer.decode([tokens[best]])
        assert f"attends to “{word}” {percent(texts[best])} %," in page.texts("#summary")[0]
    page.move(*page.center("#matrix"))
    cell, margin = page.js(
        "[document.getElementById('matrix').dataset.cell, document.getElementById('matrix').dataset.margin]"
    )
    x, y = page.js(
        "(() => { const b = document.getElementById('matrix').getBoundingClientRect(); return [b.x, b.y]; })()"
    )
    row, key = len(tokens) - 1, 3
    page.move(x + float(margin) + (key + 0.5) * float(cell), y + (row + 0.5) * float(cell))
    page.until("document.getElementById('cell').textContent")
    assert near(page.texts("#cell")[0].partition(": ")[2], mean_of(maps, None, 2)[row, key])
    page.move(2, 2)
    pictures["attention.png"] = page.screenshot("#attention", 8)
    page.dark(True)
    pictures["dark.png"] = page.screenshot()
    page.dark(False)
    page.press("Escape")
    page.until("document.getElementById('attention').hidden")
    page.js("document.querySelector('#tokens .token[tabindex=\"0\"]').focus()")
    page.press("ArrowLeft")
    page.press("Enter")
    page.until("!document.getElementById('attention').hidden")
    assert page.texts("#attention-title") == [f"What “{reader.tokenizer.decode([tokens[-2]])}” attends to"]
    page.press("Escape")


def writing(page: Page, reader: Reader, tokens: list[int]) -> None:
    """A continuation grows token by token, can be stopped, and greedy sampling writes what the reference writes."""
    put(page, "top-k", 0)  # the likeliest alone
    page.press("w")
    page.until(f"document.querySelectorAll('#tokens .token').length > {len(tokens) + 2}")
    page.until("document.getElementById('write').textContent.startsWith('Write on')", 60)
    written = shown(page)
    expected = reader.model.generate(tokens, 40)
    assert written == tokens + expected
    settled(page, written)
    put(page, "top-k", 11)


def everything_has_a_name(page: Page) -> None:
    """Everything that a screen reader reaches by keyboard has a name."""
    page.call("Accessibility.enable")
    found = 0
    for node in page.call("Accessibility.getFullAXTree")["nodes"]:
        properties = {p["name"]: p["value"].get("value") for p in node.get("properties", [])}
        if not node.get("ignored") and properties.get("focusable") and node["role"]["value"] != "RootWebArea":
            assert node.get("name", {}).get("value"), node
            found += 1
    assert found > 20
    page.call("Accessibility.disable")


def test_a_hurried_person(page: Page) -> None:
    """A digit pressed twice before the answer appends one token; a prompt typed while the model writes is kept."""
    reader = Reader()
    page.open(page.url)  # type: ignore[attr-defined]
    page.until("document.querySelectorAll('#next li').length === 10")
    before = shown(page)
    ids = check_bars(page, reader, before)
    page.js(
        "['1', '1'].forEach((key) => document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true})))"
    )
    settled(page, [*before, ids[0]])
    check_bars(page, reader, [*before, ids[0]])
    page.press("w")
    page.until(f"document.querySelectorAll('#tokens .token').length > {len(before) + 2}")
    page.js("document.getElementById('prompt').value = 'A new text'")
    page.js("document.getElementById('prompt').dispatchEvent(new Event('input'))")
    tokens = reader.tokenizer.encode("A new text")
    settled(page, tokens)
    page.until("document.getElementById('write').textContent.startsWith('Write on')")
    settled(page, tokens)
    check_bars(page, reader, tokens)
    assert page.errors == []
