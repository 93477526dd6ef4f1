"""TextStream: whole characters and stop strings, over tokens cut at any byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpt2 import load_tokenizer
from gpt2.text import TextStream


class Bytes:
    """A tokenizer whose token b is the byte b."""

    def decode_single_token_bytes(self, token: int) -> bytes:
        return bytes([token])


def pieces(text: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(Bytes(), stop)  # type: ignore[arg-type]
    out = []
    for b in text:
        out.append(stream.push(b))
        if stream.stopped:
            break
    out.append(stream.finish())
    return out, stream


def test_a_character_comes_whole() -> None:
    out, _ = pieces("aé🤖b".encode())
    assert [p for p in out if p] == ["a", "é", "🤖", "b"]


def test_half_a_character_at_the_end_is_replaced() -> None:
    out, stream = pieces("a🤖".encode()[:-1])
    assert "".join(out) == stream.text == "a\ufffd"


def test_a_stop_string_is_found_across_tokens_and_is_not_part_of_the_text() -> None:
    out, stream = pieces(b"once upon a time", ("upon",))
    assert "".join(out) == stream.text == "once " and stream.stopped


def test_a_beginning_of_a_stop_string_is_held_back_and_released() -> None:
    stream = TextStream(Bytes(), ("END",))  # type: ignore[arg-type]
    seen = [stream.push(b) for b in b"aENxEN"]
    assert seen == ["a", "", "", "ENx", "", ""]
    assert stream.finish() == "EN" and stream.text == "aENxEN" and not stream.stopped


def test_the_earliest_stop_string_wins() -> None:
    _, stream = pieces(b"abcdef", ("de", "bc"))
    assert stream.text == "a"


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None)
    assert stream.push(5) == stream.finish() == stream.text == ""


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_add_up_to_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    data = text.encode("utf-8", errors="ignore")
    text = data.decode("utf-8")
    out, stream = pieces(data, tuple(stop))
    assert "".join(out) == stream.text
    # A stream stops at the stop string completed first; of several, at the one that starts first.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    if not ends:
        assert stream.text == text and not stream.stopped
    else:
        first_end = min(end for end, _ in ends)
        assert stream.stopped
        assert stream.text == text[: min(start for end, start in ends if end == first_end)]


def test_many_tokens_at_once_are_the_same_tokens_one_by_one() -> None:
    """Characters split over tokens, stop strings split over tokens and chunks, refused chunks left untouched."""
    tokenizer = load_tokenizer("storybook")
    tokens = tokenizer.encode("Once upon a time — the bear said: “no”, and 🐻 went\n\nhome.")
    for stop in ((), ("went\n\nh",), ("zzz", "said: “"), ("🐻",), ("no match",)):
        for size in (1, 2, 3, 7, len(tokens)):
            whole, chunked = TextStream(tokenizer, stop), TextStream(tokenizer, stop)
            for token in tokens:
                whole.push(token)
            for first in range(0, len(tokens), size):
                chunk = tokens[first : first + size]
                if not chunked.extend(chunk):
                    for token in chunk:
                        chunked.push(token)
            assert (chunked.text, chunked.stopped) == (whole.text, whole.stopped)
            whole.finish(), chunked.finish()
            assert chunked.text == whole.text
            assert whole.stopped == any(s in tokenizer.decode(tokens) for s in stop)
