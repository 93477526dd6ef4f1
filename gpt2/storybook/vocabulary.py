"""How `tokenizer.tiktoken` in this folder was made: a byte-level BPE learned from storybook's training texts.

pip install tokenizers
python -m gpt2.storybook.vocabulary storybook.txt tokenizer.tiktoken
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from gpt2.config import PRESETS
from gpt2.data import pieces
from gpt2.tokenizer import byte_characters


def learn(data: Path, out: Path, vocab_size: int) -> None:
    """Learn `vocab_size - 1` byte-level tokens, in tiktoken's format; the last number is <|endoftext|>."""
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    texts = (text for _, text in pieces(data))
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size - 1, min_frequency=2, show_progress=False)
    to_byte = {c: b for b, c in byte_characters().items()}
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if len(vocab) != vocab_size - 1:
        raise ValueError(f"vocabulary: the text must have {vocab_size - 1} tokens that occur twice, got {len(vocab)}")
    lines = [base64.b64encode(bytes(to_byte[c] for c in text)) + f" {rank}".encode() for text, rank in vocab]
    out.write_bytes(b"\n".join(lines) + b"\n")


if __name__ == "__main__":
    learn(Path(sys.argv[1]), Path(sys.argv[2]), PRESETS["storybook"].vocab_size)
