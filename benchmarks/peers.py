"""The rivals we are measured against: all optional, and the results say which are not installed.

torch      PyTorch's own operator, eager; SDPA with its backend forced
compiled   torch.compile of the plain formula, with static shapes
flex       flex_attention, compiled, with a causal block mask
liger, flashinfer, transformers   those packages' public functions
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import Absent, Bind, Run, forward

PACKAGES = ("pytest", "pytest-benchmark", "transformers", "liger-kernel", "flashinfer-python", "ctranslate2")


def versions() -> dict[str, str | None]:
    """Versions of the packages that benchmarks use where installed; None for those that are not."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def package(module: str) -> Any:
    """The imported module; raises Absent where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise Absent(f"{module.split('.')[0]} is not installed ({problem})") from None


def compiled(
    function: Callable[..., Any], bind: Callable[[Callable[..., Any]], Bind] = forward, **options: Any
) -> Bind:
    """torch.compile of a function, compiled for each case's shape alone; all sets of inputs share the code."""
    once = functools.cache(lambda: torch.compile(function, dynamic=False, **options))

    def bound(*inputs: Any) -> Any:
        torch._functorch.config.donated_buffer = False  # a backward pass that is called again needs its buffers
        return bind(once())(*inputs)

    return bound


def attention_rivals(run: Run, bind: Callable[[Callable[..., Any]], Bind]) -> dict[str, Bind]:
    """Causal attention of (B, T, H, D) views, or its backward pass, by `bind`."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if run.device.type == "cuda":
        backends |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    rivals = {name: bind(functools.partial(sdpa, backend)) for name, backend in backends.items()}
    if run.device.type == "cuda":
        rivals["flex"] = lambda *inputs: bind(_flex(inputs[0].shape[1], run.device))(*inputs)
    return rivals


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


@functools.lru_cache(maxsize=1)
def _flex(T: int, device: torch.device) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=str(device))
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: attend(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask).transpose(1, 2)


def liger(name: str) -> Callable[..., Any]:
    """A function of Liger-Kernel, imported when it is called."""
    return lambda *args, **options: getattr(package("liger_kernel.transformers.functional"), name)(*args, **options)


def flashinfer_decode(block_table: Tensor, context_lens: Tensor, H: int, D: int, size: int, dtype: torch.dtype) -> Any:
    """A planned FlashInfer decode: `.run(q, (k_cache, v_cache))`, caches (num_blocks, size, H, D)."""
    flashinfer = package("flashinfer")
    S = block_table.shape[0]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=block_table.device), "NHD"
    )
    blocks = (context_lens + size - 1) // size
    starts = torch.zeros(S + 1, dtype=torch.int32, device=block_table.device)
    starts[1:] = blocks.cumsum(0)
    indices = torch.cat([row[: int(n)] for row, n in zip(block_table, blocks)])
    last = context_lens - (blocks - 1) * size
    wrapper.plan(starts, indices, last.to(torch.int32), H, H, D, size, q_data_type=dtype, kv_data_type=dtype)
    return wrapper


# --- whole models: GPT-2 in plain PyTorch on the same parameters, and transformers -----------------------------------


def plain_loss(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss of a `gpt2.GPT2`, computed from its parameters with PyTorch's operators alone."""
    config = model.config
    x = F.embedding(tokens, model.wte.weight) + model.wpe.weight[: tokens.shape[1]]
    for block in model.h:
        attention, mlp = block.attn, block.mlp
        normed = F.layer_norm(x, x.shape[-1:], block.ln_1.weight, block.ln_1.bias, config.layer_norm_epsilon)
        qkv = F.linear(normed, attention.c_attn.weight, attention.c_attn.bias)
        q, k, v = (t.transpose(1, 2) for t in qkv.unflatten(-1, (3, config.n_head, -1)).unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, attention.c_proj.weight, attention.c_proj.bias)
        normed = F.layer_norm(x, x.shape[-1:], block.ln_2.weight, block.ln_2.bias, config.layer_norm_epsilon)
        hidden = F.gelu(F.linear(normed, mlp.c_fc.weight, mlp.c_fc.bias), approximate="tanh")
        x = x + F.linear(hidden, mlp.c_proj.weight, mlp.c_proj.bias)
    x = F.layer_norm(x, x.shape[-1:], model.ln_f.weight, model.ln_f.bias, config.layer_norm_epsilon)
    return F.cross_entropy(F.linear(x, model.wte.weight).flatten(0, 1).float(), targets.flatten())


class Transformers:
    """transformers' GPT-2 with the weights of a `gpt2.GPT2`; it generates greedily and never stops early."""

    def __init__(self, model: Any, attention: str = "sdpa"):
        import tempfile

        transformers = package("transformers")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = transformers.GPT2LMHeadModel.from_pretrained(
                folder, dtype=model.dtype, attn_implementation=attention
            )
        self.model = loaded.to(model.device).eval()
        self.model.generation_config.pad_token_id = model.config.eos_token_id

    def generate(self, prompts: Sequence[Sequence[int]], new: int, **options: Any) -> list[list[int]]:
        """Prompts of one length, as one batch."""
        tokens = torch.tensor(list(map(list, prompts)), device=self.model.device)
        mask = torch.ones_like(tokens)
        out = self.model.generate(
            tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
        )
        return out[:, tokens.shape[1] :].tolist()

    def generate_batch(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Continuous batching, prompts of any length."""
        config = package("transformers").GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=self.model.config.eos_token_id
        )
        outputs = self.model.generate_batch([list(p) for p in prompts], generation_config=config)
        return [list(outputs[key].generated_tokens) for key in sorted(outputs, key=lambda k: int(k.split("_")[-1]))]
