"""Incremental detokenisation: whole characters only, and stop strings found across token boundaries."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import tiktoken


class TextStream:
    """The text of one output, token by token.

    `text` is all that is certain. A character whose last byte has not come and a tail that may yet turn into a stop
    string are held back; `finish` releases them. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: tiktoken.Encoding | None, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False  # a stop string was found; `text` ends before it
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # decoded, and perhaps the beginning of a stop string

    def push(self, token: int) -> str:
        """Take a token; returns the text that has become certain."""
        if self._tokenizer is None or self.stopped:
            return ""
        return self._take(self._decoder.decode(self._bytes(token)))

    def extend(self, tokens: Sequence[int]) -> bool:
        """Take many tokens at once; if a stop string would be found, take nothing and return False."""
        if self._tokenizer is None or self.stopped:
            return True
        before = self._decoder.getstate()
        text = self._held + self._decoder.decode(b"".join(map(self._bytes, tokens)))
        if any(s in text for s in self._stop):
            self._decoder.setstate(before)
            return False
        self._keep(text)
        return True

    def finish(self) -> str:
        """End the output; returns the text that was held back."""
        if self._tokenizer is None or self.stopped:
            return ""
        certain = self._take(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        if self.stopped:
            return certain
        self.text += rest
        return certain + rest

    def _take(self, new: str) -> str:
        text = self._held + new
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            text = text[: min(found)]
            self.text += text
            return text
        return self._keep(text)

    def _keep(self, text: str) -> str:
        """Take text without a stop string, holding back a tail that may begin one."""
        held = self._open_tail(text)
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text

    def _bytes(self, token: int) -> bytes:
        assert self._tokenizer is not None
        try:
            return self._tokenizer.decode_single_token_bytes(token)
        except KeyError:  # a model whose vocabulary was padded can draw a token that stands for nothing
            return b""

    def _open_tail(self, text: str) -> int:
        """Length of the longest suffix of `text` that begins a stop string."""
        longest = min(len(text), max((len(s) for s in self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stop):
                return length
        return 0
