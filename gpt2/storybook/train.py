"""How `storybook`, the model in this folder, was made, from a text file to the files beside this one.

    pip install tokenizers
    python -m gpt2.storybook.train --data storybook.txt --validation storybook.val.txt --out RUN

The text is documents between lines that are exactly <|endoftext|>. The run learns a byte-level BPE, trains from a fresh
start, writes `RUN/checkpoint.pt` as it goes, resumes from it when started again, and ends with the model folder
`RUN/final/`. Weights are float32, arithmetic is bfloat16, matrices are updated by Muon and the rest by AdamW.

The learning rate is constant after a warm-up and falls to zero over the last part of the run, so a run that has not
yet begun to cool may be resumed with another number of epochs.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2 import weights
from gpt2.config import PRESETS, GPT2Config
from gpt2.reference import MLP, ReferenceGPT2, SelfAttention
from gpt2.tokenizer import END_OF_TEXT, byte_characters, load_tokenizer

COOLING = 0.35  # share of the run over which the learning rate falls to zero
WARMUP_STEPS = 60


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt2.storybook.train", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="text to train on")
    parser.add_argument("--validation", type=Path, required=True, help="text to measure the loss on")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; resumed where it holds a checkpoint"
    )
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    args = parser.parse_args()

    config = PRESETS["storybook"]
    folder = args.out / "final"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.tiktoken").exists():
        learn_tokenizer(args.data, folder / "tokenizer.tiktoken", config.vocab_size)
    train, validation = (tokenize(path, folder, args.out) for path in (args.data, args.validation))
    run(config, train, validation, args, folder)


def learn_tokenizer(data: Path, out: Path, vocab_size: int) -> None:
    """Learn `vocab_size - 1` byte-level tokens, in tiktoken's format; the last number is <|endoftext|>."""
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    documents = data.read_text(encoding="utf-8").split(f"\n{END_OF_TEXT}\n")
    tokenizer.train_from_iterator(documents, vocab_size=vocab_size - 1, min_frequency=2, show_progress=False)
    to_byte = {c: b for b, c in byte_characters().items()}
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [base64.b64encode(bytes(to_byte[c] for c in text)) + f" {rank}".encode() for text, rank in vocab]
    assert len(lines) == vocab_size - 1
    out.write_bytes(b"\n".join(lines) + b"\n")


def tokenize(data: Path, folder: Path, cache: Path) -> np.ndarray:
    """Token numbers of a text, each document led by <|endoftext|>; kept as uint16 beside the run."""
    path = cache / f"{data.name}.u16"
    if not path.exists():
        encoding = load_tokenizer(str(folder.resolve()))
        documents = data.read_text(encoding="utf-8").split(f"\n{END_OF_TEXT}\n")
        tokens: list[int] = []
        for ids in encoding.encode_ordinary_batch(documents, num_threads=2):
            tokens += [encoding.eot_token, *ids]
        np.array(tokens, dtype=np.uint16).tofile(path)
    return np.fromfile(path, dtype=np.uint16)


def sequences(tokens: np.ndarray, context: int, epoch: int, seed: int) -> np.ndarray:
    """(N, context + 1) windows that cover the text once, from an offset and in an order that differ by epoch."""
    rng = np.random.default_rng((seed, epoch))
    offset = int(rng.integers(context))
    count = (len(tokens) - offset - 1) // context
    starts = offset + context * rng.permutation(count)
    return np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64)


def batches(tokens: np.ndarray, context: int, size: int, seed: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (inputs, targets) from batch number `first` on: what step n sees depends on n alone."""
    step, epoch = 0, 0
    while True:
        windows = sequences(tokens, context, epoch, seed)
        epoch += 1
        for i in range(0, len(windows) - size + 1, size):
            if step >= first:
                batch = torch.from_numpy(windows[i : i + size])
                yield batch[:, :-1], batch[:, 1:]
            step += 1


def fuse(model: ReferenceGPT2) -> None:
    """Give the reference model PyTorch's fused attention and GELU: the same numbers without the T x T matrix."""

    def attend(layer: SelfAttention, x: Tensor) -> tuple[Tensor, None]:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, layer.n_head, layer.head_dim).transpose(1, 2) for t in layer.c_attn(x).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale)
        return layer.c_proj(y.transpose(1, 2).reshape(B, T, C)), None

    def feed(layer: MLP, x: Tensor) -> Tensor:
        return layer.c_proj(F.gelu(layer.c_fc(x), approximate="tanh"))

    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.forward = functools.partial(attend, module)  # type: ignore[method-assign,assignment]
        elif isinstance(module, MLP):
            module.forward = functools.partial(feed, module)  # type: ignore[method-assign]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def validate(model: nn.Module, tokens: np.ndarray, context: int) -> float:
    """Mean loss in nats per token over the whole text, cut into consecutive windows."""
    count = (len(tokens) - 1) // context
    windows = np.stack([tokens[i * context : (i + 1) * context + 1] for i in range(count)]).astype(np.int64)
    batch = torch.from_numpy(windows)
    losses = [loss_of(model, b[:, :-1], b[:, 1:]) * len(b) for b in batch.split(8)]
    return float(sum(losses) / count)


def save(path: Path, content: dict) -> None:
    """Write beside the file, then rename over it: a run that is cut off leaves the previous checkpoint whole."""
    torch.save(content, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def run(config: GPT2Config, train: np.ndarray, validation: np.ndarray, args: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(args.seed)
    tokens_a_step = args.batch_size * args.context
    steps = int(args.epochs * len(train) / tokens_a_step)
    master = ReferenceGPT2(config)  # float32: what the optimisers update
    model = ReferenceGPT2(config).to(torch.bfloat16)  # bfloat16: what computes
    fuse(model)
    pairs = list(zip(master.parameters(), model.parameters()))

    matrices = [p for n, p in master.named_parameters() if p.dim() == 2 and n.startswith("h.")]
    rest = [p for n, p in master.named_parameters() if not (p.dim() == 2 and n.startswith("h."))]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.02, nesterov=True),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    rates = [group["lr"] for o in optimizers for group in o.param_groups]

    first, seconds = 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        master.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
        print(f"resumed at step {first}", flush=True)
    print(f"{config.num_parameters:,} parameters, {len(train):,} tokens, {steps} steps of {tokens_a_step}", flush=True)

    log = (args.out / "log.jsonl").open("a")
    source = batches(train, args.context, args.batch_size, args.seed, first)
    started = time.perf_counter()
    for step in range(first, steps):
        factor = min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (COOLING * steps))
        for group, rate in zip((g for o in optimizers for g in o.param_groups), rates):
            group["lr"] = rate * factor
        with torch.no_grad():
            for p, q in pairs:
                q.copy_(p)
        loss = loss_of(model, *next(source))
        loss.backward()
        for p, q in pairs:
            assert q.grad is not None
            p.grad = q.grad.float()
            q.grad = None
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()

        done = step + 1
        if not torch.isfinite(loss):
            raise SystemExit(f"the loss became {loss.item()} at step {done}; the last checkpoint is {checkpoint}")
        elapsed = seconds + time.perf_counter() - started
        if done % 10 == 0:
            entry = {"step": done, "loss": round(loss.item(), 4), "seconds": round(elapsed, 1), "lr": round(factor, 4)}
            log.write(json.dumps(entry) + "\n")
            log.flush()
            rate = (done - first) * tokens_a_step / (time.perf_counter() - started)
            print(
                f"step {done}/{steps}  loss {loss.item():.3f}  {rate:,.0f} tokens/s  {elapsed / 60:.1f} min", flush=True
            )
        if done % args.save_every == 0 or done == steps:
            optimizer_states = [o.state_dict() for o in optimizers]
            save(checkpoint, dict(model=master.state_dict(), optimizers=optimizer_states, step=done, seconds=elapsed))
        if done % (args.save_every * 5) == 0 or done == steps:
            with torch.no_grad():
                for p, q in pairs:
                    q.copy_(p)
            value = validate(model, validation, args.context)
            log.write(json.dumps({"step": done, "validation": round(value, 4)}) + "\n")
            print(f"step {done}/{steps}  validation loss {value:.4f} nats/token", flush=True)

    finish(master, config, folder)


def finish(master: ReferenceGPT2, config: GPT2Config, folder: Path) -> None:
    """The model folder: weights in bfloat16, matrices in the (in, out) layout of the published GPT-2 files."""
    weights.save(master.to(torch.bfloat16), config, folder)
    print(f"wrote {folder}: {json.dumps(dataclasses.asdict(config))}")


if __name__ == "__main__":
    main()
