"""The options of every command. Nothing heavy is imported here, so `--help` and a mistyped option answer at once."""

from __future__ import annotations

import argparse

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="gpt2",
        description="GPT-2 on fused kernels.",
        epilog="Models: storybook ships with the package and needs no network; gpt2, gpt2-medium, gpt2-large and "
        "gpt2-xl come from the Hugging Face hub (pip install 'gpt2-kernels[hub]'); a local folder in Hugging Face "
        "format is named with a path separator, like ./my-model.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text; the prompt and its continuation are written to stdout as they are generated.",
        epilog="With -n, samples are separated by lines of <|endoftext|>.",
    )
    _prompt_option(generate)
    _model_options(generate)
    _sampling_options(generate, max_tokens="200, or as many as the context holds")
    _profile_option(generate)
    generate.set_defaults(run="gpt2.commands:generate")

    batch = commands.add_parser(
        "batch",
        help="answer a file of prompts",
        description='Answer every line of a file of prompts, {"id": .., "prompt": .., and parameters}, with one line '
        "of the output, written as results come in. A run that was stopped resumes when it is started again.",
        epilog="Beside OUT.jsonl, OUT.manifest.json records what was run, and OUT.errors.jsonl lists bad lines, if "
        "any. The options above apply to lines that do not say otherwise; a line without a seed gets one from --seed "
        "and its line number.",
    )
    batch.add_argument("input", metavar="IN.jsonl", help="one JSON object per line; a prompt is text or token ids")
    batch.add_argument("-o", "--output", required=True, metavar="OUT.jsonl", help="where results go")
    batch.add_argument("--max-batch", type=int, default=256, metavar="N", help="most samples at a time (default 256)")
    _model_options(batch)
    _sampling_options(batch, max_tokens="64")
    _profile_option(batch)
    batch.set_defaults(run="gpt2.batch:batch")

    following = commands.add_parser(
        "next",
        help="show the ten likeliest next tokens; choose one, repeat",
        description="Show the ten likeliest next tokens with their probabilities; type a number to append one, u to "
        "take the last one back, q to quit.",
    )
    _prompt_option(following)
    _model_options(following)
    following.set_defaults(run="gpt2.commands:next_tokens")

    train = commands.add_parser(
        "train",
        help="train a model, or fine-tune one",
        description="Train a GPT-2 on a text; the result is RUN/final, a folder for --model. After an interruption, "
        "the same command with --resume continues, bit for bit except with --compile on a GPU. Under torchrun it uses "
        "all processes.",
        argument_default=argparse.SUPPRESS,  # what is not given keeps Recipe's default
    )
    what = train.add_argument_group("data and model")
    what.add_argument(
        "--data", required=True, metavar="TEXT", help="a text file, or a folder of *.txt; documents are separated by "
        "lines of <|endoftext|>",
    )  # fmt: skip
    what.add_argument("--val-data", metavar="TEXT", help="text for the validation loss")
    what.add_argument("--model", metavar="NAME", help="shape and tokenizer: preset or folder (default storybook)")
    what.add_argument(
        "--init", metavar="FOLDER", help="start from these weights (preset or folder), not from random ones"
    )
    what.add_argument("--context", type=int, metavar="N", help="tokens per sequence (default: all positions)")
    what.add_argument(
        "--order", choices=("random", "sequential"), help="order of the training windows (default random)"
    )
    what.add_argument("--seed", type=int, metavar="N", help="seed of the initial weights and the order (default 1)")
    how = train.add_argument_group("training")
    how.add_argument("--steps", type=int, metavar="N", help="updates of the weights (default 1000)")
    how.add_argument("--batch-size", type=int, metavar="N", help="sequences per update, over all processes (default 8)")
    how.add_argument("--micro-batch", type=int, metavar="N", help="sequences a process computes at a time")
    how.add_argument("--optimizer", choices=("adamw", "muon"), help="default adamw")
    how.add_argument("--lr", type=float, metavar="X", help="peak learning rate (default 6e-4)")
    how.add_argument("--min-lr", type=float, metavar="X", help="final learning rate (default 0)")
    how.add_argument("--schedule", choices=("cosine", "trapezoid"), help="learning-rate schedule (default cosine)")
    how.add_argument("--warmup", type=int, metavar="N", help="warm-up steps (default: 1/20 of all, at most 100)")
    how.add_argument("--weight-decay", type=float, metavar="X", help="weight decay of matrices (default 0.1)")
    how.add_argument("--clip", type=float, metavar="X", help="largest gradient norm; 0 is off (default 1)")
    how.add_argument(
        "--dtype", choices=DTYPES[:2], help="compute dtype (default float32 on a CPU, bfloat16 on a GPU); the weights "
        "are float32",
    )  # fmt: skip
    how.add_argument(
        "--device", default=None, metavar="DEVICE", help="cpu, cuda or cuda:N (default: GPUs if there are any)"
    )
    how.add_argument(
        "--parallel", choices=("ddp", "fsdp"), help="under torchrun: weights replicated or sharded (default ddp)"
    )
    how.add_argument(
        "--checkpoint-activations", action="store_true", help="recompute activations: less memory, a third more work"
    )
    how.add_argument(
        "--compile", action="store_true", help="use torch.compile; on a GPU two runs then differ in the last bits"
    )
    kept = train.add_argument_group("output")
    kept.add_argument("--out", required=True, metavar="RUN", help="folder of the run: checkpoints, metrics, final")
    kept.add_argument("--resume", action="store_true", default=False, help="continue where RUN was interrupted")
    kept.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default 100)")
    kept.add_argument("--keep", type=int, metavar="N", help="newest checkpoints kept, besides the best (default 2)")
    kept.add_argument("--eval-every", type=int, metavar="N", help="steps between validations and samples")
    kept.add_argument("--log-every", type=int, metavar="N", help="steps between progress lines (default 10)")
    _profile_option(kept)
    train.set_defaults(run="gpt2.commands:train")

    evaluate = commands.add_parser(
        "eval",
        help="measure how well a model predicts a text",
        description="Print the perplexity of a text: every token is scored once, with a sliding window.",
    )
    evaluate.add_argument("--data", required=True, metavar="TEXT", help="a UTF-8 text file")
    evaluate.add_argument("--context", type=int, metavar="N", help="tokens in a window (default: all positions)")
    evaluate.add_argument(
        "--stride", type=int, metavar="N", help="tokens the window moves by (default: half the context)"
    )
    evaluate.add_argument("--batch-size", type=int, default=4, metavar="N", help="windows at a time (default 4)")
    _model_options(evaluate)
    evaluate.set_defaults(run="gpt2.evaluate:evaluate")

    serve = commands.add_parser(
        "serve",
        help="the Explorer page and an OpenAI-compatible API",
        description="Serve a model: a page on which to watch it think, and OpenAI's completions protocol under /v1. "
        "Needs the extra `serve`: pip install 'gpt2-kernels[serve]'.",
    )
    _model_options(serve)
    network = serve.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (default 127.0.0.1)")
    network.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one (default 8000)")
    network.add_argument(
        "--api-key", metavar="KEY", help="require this bearer key; @FILE reads it from a file (default: none)"
    )
    network.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="let web pages of this origin use the API; repeatable (default: none)",
    )
    limits = serve.add_argument_group("limits")
    limits.add_argument(
        "--max-batch", type=int, default=64, metavar="N", help="sequences that run at once (default 64)"
    )
    limits.add_argument("--max-requests", type=int, default=256, metavar="N", help="requests at once (default 256)")
    limits.add_argument("--time-limit", type=float, default=600, metavar="S", help="seconds per request (default 600)")
    serve.set_defaults(run="gpt2.explorer:serve")

    info = commands.add_parser("info", help="show versions, devices, and what computes each operator here")
    info.set_defaults(run="gpt2.commands:info")
    return top


def _profile_option(parser: argparse._ActionsContainer) -> None:
    """For every command that computes: `gpt2.profiling.profile(options.profile)`."""
    parser.add_argument(
        "--profile", default=None, metavar="FILE", help="write a Chrome trace (.json or .json.gz) of where time goes"
    )


def _prompt_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt",
        nargs="?",
        default="",
        metavar="PROMPT",
        help="text to continue; - reads stdin; without one, a new text begins",
    )


def _sampling_options(parser: argparse.ArgumentParser, *, max_tokens: str) -> None:
    number = parser.add_argument_group("output")
    number.add_argument("-n", type=int, default=1, metavar="N", help="samples of the same prompt (default 1)")
    number.add_argument("--max-tokens", type=int, metavar="N", help=f"most tokens to generate (default {max_tokens})")
    number.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; repeatable")
    number.add_argument("--ignore-eos", action="store_true", help="continue past <|endoftext|>")
    choice = parser.add_argument_group("sampling")
    choice.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 is greedy (default 1)")
    choice.add_argument(
        "--top-k", type=int, default=40, metavar="K", help="only the K likeliest tokens; 0 is off (default 40)"
    )
    choice.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the fewest tokens whose probabilities reach P (default 1)",
    )
    choice.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="only tokens with at least P times the highest probability (default 0)",
    )
    choice.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: fewer repeats")
    choice.add_argument("--seed", type=int, metavar="N", help="same seed, same text (default: a fresh one)")


def _model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="storybook", metavar="NAME", help="preset or folder (default storybook)")
    model.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    model.add_argument(
        "--dtype",
        choices=(*DTYPES, "int8"),
        help="compute dtype (default bfloat16 on a GPU or a CPU that multiplies it, else float32); int8 is for CPUs",
    )
