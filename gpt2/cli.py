"""The command `gpt2`: generate text, look at the next token, and see what this machine runs on.

Text goes to stdout and nothing else does. A mistake of the user's is one line on stderr and exit status 2; Ctrl-C ends
with 130, a reader that leaves early with 141. PyTorch, which takes seconds to import, is asked for once all options
have been checked.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from gpt2.config import PRESETS, preset_or_folder

if TYPE_CHECKING:
    import tiktoken

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit."""
    try:
        options = _parser().parse_args(arguments)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer characters than a model writes
        try:
            options.run(options)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except (ValueError, OSError) as e:
            fail(options.command, str(e))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only disturb the exit
        sys.exit(130)


def fail(command: str, message: str) -> NoReturn:
    print(f"gpt2 {command}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpt2",
        description="GPT-2 on fused kernels.",
        epilog="Models: storybook ships with the package and needs no network; gpt2, gpt2-medium, gpt2-large and "
        "gpt2-xl come from the Hugging Face hub (pip install 'gpt2-kernels[hub]'); a local folder in Hugging Face "
        "format is named with a path separator, like ./my-model.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text; the prompt and what follows it are written to stdout as they come.",
        epilog="With -n, samples are separated by lines that are <|endoftext|>.",
    )
    _model_options(generate)
    number = generate.add_argument_group("what is written")
    number.add_argument("-n", type=int, default=1, metavar="N", help="samples of the same prompt (default 1)")
    number.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="most tokens to write (default 200, or as many as the context holds)",
    )
    number.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    number.add_argument("--ignore-eos", action="store_true", help="write on after <|endoftext|>")
    choice = generate.add_argument_group("how tokens are chosen")
    choice.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 takes the likeliest (default 1)")
    choice.add_argument(
        "--top-k", type=int, default=40, metavar="K", help="among the K likeliest; 0 is off (default 40)"
    )
    choice.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="among the fewest that reach P (default 1)"
    )
    choice.add_argument("--min-p", type=float, default=0.0, metavar="P", help="at least P of the likeliest (default 0)")
    choice.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: fewer repeats")
    choice.add_argument("--seed", type=int, metavar="N", help="same seed, same text (default: a fresh one)")
    generate.set_defaults(run=_generate)

    following = commands.add_parser(
        "next",
        help="the ten likeliest next tokens; choose one, and so on",
        description="Show the ten likeliest next tokens with their probabilities; type a number to append one, u to "
        "take the last one back, q to quit.",
    )
    _model_options(following)
    following.set_defaults(run=_next)

    info = commands.add_parser("info", help="versions, devices, and what computes each operator here")
    info.set_defaults(run=_info)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt",
        nargs="?",
        default="",
        metavar="PROMPT",
        help="text to continue; - reads stdin; none starts a new text",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="storybook", metavar="NAME", help="preset or folder (default storybook)")
    model.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    model.add_argument("--dtype", choices=DTYPES, help="arithmetic (default float32 on a CPU, bfloat16 on a GPU)")


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


def _load(options: argparse.Namespace) -> tuple[Any, tiktoken.Encoding]:
    """The model and its tokenizer. torch is imported here: `--help` and bad options answer at once."""
    preset_or_folder(options.model, "--model")
    if options.device is not None and not re.fullmatch(r"cpu|cuda(:\d{1,3})?", options.device):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")

    import torch

    from gpt2.model import GPT2
    from gpt2.tokenizer import load_tokenizer

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device must exist, got {options.device!r} with {torch.cuda.device_count()} GPUs")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = GPT2.from_pretrained(options.model, device=device, dtype=dtype)
    return model, load_tokenizer(options.model)


def _generate(options: argparse.Namespace) -> None:
    from gpt2.sampling import SamplingParams

    prompt = _prompt(options.prompt)
    params = SamplingParams(
        max_tokens=200 if options.max_tokens is None else options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        n=options.n,
        stop=tuple(options.stop),
        ignore_eos=options.ignore_eos,
        on_overflow="stop" if options.max_tokens is None else "error",
    )
    model, tokenizer = _load(options)

    from gpt2.engine import Engine
    from gpt2.tokenizer import END_OF_TEXT

    engine = Engine(model, tokenizer, max_batch=min(params.n, 256))
    out = sys.stdout
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


def _next(options: argparse.Namespace) -> None:
    prompt = _prompt(options.prompt)
    model, tokenizer = _load(options)

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
    """A function that asks a person, or reads a line where nobody sits; None at the end of the input."""

    def ask() -> str | None:
        if sys.stdin.isatty():
            print(question, end="", flush=True)
        line = sys.stdin.readline()
        return line.strip() if line else None

    return ask


def _visible(tokenizer: tiktoken.Encoding, token: int) -> str:
    """A token as a quoted string; one that is only a part of a character as its bytes."""
    content = tokenizer.decode_single_token_bytes(token)
    try:
        return repr(content.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(content)


def _info(options: argparse.Namespace) -> None:
    import torch

    import gpt2_kernels as ops
    from gpt2_kernels import _native, _runtime

    triton = _runtime.triton.__version__ if _runtime.HAS_TRITON else "not installed"
    print(
        f"gpt2-kernels {ops.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    print(f"torch {torch.__version__}, triton {triton}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            memory = torch.cuda.get_device_properties(i).total_memory / 2**30
            print(f"cuda:{i}  {torch.cuda.get_device_name(i)}, sm_{major}{minor}, {memory:.0f} GiB")
    else:
        print("no CUDA device: everything runs on the CPU")
    print(f"cpu     {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"C++ operators: {_native.status()}")
    print()
    width = max(len(op) for op in ops.OPS) + 2
    print(f"{'operator':{width}}" + "".join(f"{'on ' + device:28}" for device in devices))
    for op in sorted(ops.OPS):
        print(f"{op:{width}}" + "".join(f"{ops.path_of(op, device):28}" for device in devices).rstrip())
    print()
    print(f"models: {', '.join(PRESETS)}, or a folder")
