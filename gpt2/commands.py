"""What `gpt2 generate`, `next`, `train` and `info` do.

PyTorch, which takes seconds to import, is imported only once all options have been checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from gpt2.config import PRESETS, preset_or_folder
from gpt2.profiling import profile
from gpt2.sampling import SamplingParams

if TYPE_CHECKING:
    import tiktoken


def _prompt(text: str) -> str:
    """The prompt as given, or read from stdin."""
    if text != "-":
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the prompt is not valid UTF-8") from None
        return text
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"stdin is not valid UTF-8 (byte {e.start})") from None


def load(options: argparse.Namespace) -> tuple[Any, tiktoken.Encoding]:
    """The model and its tokenizer. torch is imported here, so that `--help` and bad options are answered at once."""
    preset_or_folder(options.model, "--model")
    _check_device(options.device)

    import torch

    from gpt2.device import device_of
    from gpt2.model import GPT2
    from gpt2.tokenizer import load_tokenizer
    from gpt2_kernels import _runtime

    device = device_of(options.device, "--device")
    if options.dtype == "int8" and device.type != "cpu":
        raise ValueError(f"--dtype int8 is for CPUs, got --device {device}")
    default = torch.bfloat16 if device.type == "cuda" else _runtime.cpu_dtype()
    dtype = getattr(torch, options.dtype) if options.dtype else default
    model = GPT2.from_pretrained(options.model, device=device, dtype=dtype)
    return model, load_tokenizer(options.model)


def _check_device(device: str | None) -> None:
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device!r}")


def sampling_params(options: argparse.Namespace, **others: Any) -> SamplingParams:
    """SamplingParams from the command line's options, and others."""
    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        n=options.n,
        stop=tuple(options.stop),
        ignore_eos=options.ignore_eos,
        **others,
    )


def generate(options: argparse.Namespace) -> None:
    profiling = profile(options.profile)
    prompt = _prompt(options.prompt)
    if options.max_tokens is None:
        params = sampling_params(options, max_tokens=200, on_overflow="stop")
    else:
        params = sampling_params(options, max_tokens=options.max_tokens)
    model, tokenizer = load(options)

    from gpt2.engine import Engine
    from gpt2.tokenizer import END_OF_TEXT

    engine = Engine(model, tokenizer, max_batch=min(params.n, 256))
    out = sys.stdout
    with profiling:
        if params.n == 1:
            pieces = engine.stream(prompt, params)  # checks the prompt before anything is written
            _write(out, prompt)
            for piece in pieces:
                _write(out, piece)
            _write(out, "\n")
            return
        (completion,) = engine.generate([prompt], params)
    texts = [prompt + output.text for output in completion.outputs]
    _write(out, f"\n{END_OF_TEXT}\n".join(texts) + "\n")


def _write(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()


def next_tokens(options: argparse.Namespace) -> None:
    prompt = _prompt(options.prompt)
    model, tokenizer = load(options)

    import torch

    from gpt2.tokenizer import END_OF_TEXT

    limit = model.config.n_positions
    tokens = tokenizer.encode(prompt, allowed_special={END_OF_TEXT}, disallowed_special=())
    tokens = tokens or [model.config.eos_token_id]
    if len(tokens) > limit:
        raise ValueError(f"a prompt must be at most {limit} tokens, got {len(tokens)}")
    start = len(tokens)
    answers = _answers("choose 1-10, u to undo, q to quit: ")
    while True:
        with torch.no_grad():
            logits = model(torch.tensor([tokens], device=model.device))[0, -1].float()
        probabilities, ids = torch.softmax(logits, dim=-1).topk(min(10, logits.numel()))
        print(tokenizer.decode_bytes(tokens).decode("utf-8", errors="replace"))
        for rank, (token, share) in enumerate(zip(ids.tolist(), probabilities.tolist()), 1):
            print(f"{rank:3d}  {100 * share:5.1f} %  {_visible(tokenizer, token)}")
        sys.stdout.flush()
        while True:
            answer = answers()
            if answer is None or answer == "q":
                return
            if answer == "u" and len(tokens) > start:
                tokens.pop()
                break
            if answer.isdecimal() and 1 <= int(answer) <= len(ids):
                if len(tokens) == limit:
                    raise ValueError(f"the text fills all {limit} positions of the model")
                tokens.append(int(ids[int(answer) - 1]))
                break
            print(f"gpt2 next: not a choice: {answer!r}", file=sys.stderr)


def _answers(question: str) -> Callable[[], str | None]:
    """A function that prompts on a terminal, or else just reads a line; None at the end of the input."""

    def ask() -> str | None:
        if sys.stdin.isatty():
            print(question, end="", flush=True)
        line = sys.stdin.readline()
        return line.strip() if line else None

    return ask


def _visible(tokenizer: tiktoken.Encoding, token: int) -> str:
    """A token as a quoted string, or as its bytes if it is only part of a character."""
    content = tokenizer.decode_single_token_bytes(token)
    try:
        return repr(content.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(content)


def train(options: argparse.Namespace) -> None:
    from gpt2.recipe import Recipe, check_out

    values = vars(options)
    recipe = Recipe(**{field.name: values[field.name] for field in dataclasses.fields(Recipe) if field.name in values})
    _check_device(options.device)
    out = check_out(options.out, options.resume)
    profiling = profile(options.profile)

    from gpt2.training import train

    with profiling:
        status = train(recipe, out, resume=options.resume, device=options.device)
    sys.exit(status)


def info(options: argparse.Namespace) -> None:
    from gpt2_kernels import env_report

    print(env_report.report())
    print(f"models         {', '.join(PRESETS)}, or a folder")
