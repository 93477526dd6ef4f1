"""GPT-2 on the operators of `gpt2_kernels`: a thin module, one page of model code.

The same blocks serve three ways of running. `forward` takes whole sequences (B, T), for training and evaluation;
`hidden_packed` takes whole sequences of different lengths, packed (N,), for scoring many of them.
`forward_paged` takes packed tokens of many sequences (N,) and a paged key-value cache, for generation: the keys and
values of earlier tokens are read from the cache, so a new token costs one row. Only attention differs between them.

Parameter names are those of the published checkpoints; `gpt2.reference.ReferenceGPT2` is the same model in plain
PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import gpt2_kernels as ops
from gpt2 import weights
from gpt2.config import GPT2Config
from gpt2.layer import (
    DECODE,
    PROMPT,
    TRAINING,
    Block,
    LayerCache,
    PagedBatch,
    attend_paged,
    in_one_call,
    linear,
    normalize,
    plain_block,
)
from gpt2.reference import initialize

Watch = Callable[[int, Tensor, Tensor, float, Tensor], None]  # layer, q, k, scale, logsumexp


class GPT2(nn.Module):
    """GPT-2 with fused operators; `config` gives its shape, `from_pretrained` its weights."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        initialize(self, config)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the activations, keys and values included; the weights may be int8."""
        return self.ln_f.weight.dtype

    @property
    def is_int8(self) -> bool:
        # Not by the weight's dtype: under a parametrization every access recomputes the weight.
        return "weight_scale" in self.wte._buffers

    def quantize_(self) -> GPT2:
        """Round all matrices but wpe to int8, with a scale per output, for generation on a CPU; the rest is bfloat16.

        The parameters keep their names; each matrix gets a buffer `weight_scale` beside it. Such a model can neither be
        trained nor saved as a checkpoint; a second call changes nothing.
        """
        if self.device.type != "cpu":
            raise ValueError(f"GPT2.quantize_: int8 weights are for CPUs, got a model on {self.device}")
        if self.is_int8:
            return self
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module is not self.wpe:
                weight, scale = ops.quantize(module.weight)
                module.weight = nn.Parameter(weight, requires_grad=False)
                module.register_buffer("weight_scale", scale)
        for parameter in self.parameters():
            if parameter.dtype != torch.int8:
                parameter.data = parameter.data.to(torch.bfloat16)
            parameter.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> GPT2:
        """As in nn.Module; int8 weights cannot be trained."""
        if mode and self.is_int8:
            raise ValueError("GPT2.train: int8 weights cannot be trained; load the model in float32")
        return super().train(mode)

    @property
    def cache_heads(self) -> int:
        """Heads whose keys and values are kept here: all, unless several processes share the model."""
        block = self.h[0]
        assert isinstance(block, Block)
        return block.attn.heads[1]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of token ids (B, T) int64: row t scores what may follow tokens[:, :t + 1].

        Raises ValueError if T is larger than the config's n_positions or tokens are not (B, T).
        """
        return self.logits(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, float32, of targets (B, T) int64, with -100 ignored.

        It materialises no logits, except with int8 weights.
        """
        if targets.shape != tokens.shape:
            raise ValueError(f"GPT2.loss: targets must be the shape of tokens, got {targets.shape} and {tokens.shape}")
        hidden = self.hidden(tokens, batch_invariant=False)
        if self.is_int8:
            return ops.cross_entropy(self.logits(hidden).flatten(0, 1), targets.flatten())
        return ops.linear_cross_entropy(hidden, self.wte.weight, targets)

    def hidden(self, tokens: Tensor, *, batch_invariant: bool = True, watch: Watch | None = None) -> Tensor:
        """Final hidden states (B, T, C), which `logits` turns into scores; watch sees every layer's attention.

        watch is called with the layer, q and k (B, T, H, D), the scale of their products and the logsumexp (B, H, T),
        from which `gpt2_kernels.attention_map` computes probabilities.
        """
        if tokens.dim() != 2 or tokens.shape[1] > self.config.n_positions:
            raise ValueError(
                f"GPT2: tokens must be (B, T) with T <= {self.config.n_positions}, got {tuple(tokens.shape)}"
            )
        x = self._embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        for layer, block in enumerate(self.h):
            scale = self.config.attention_scale(layer)

            def attend(qkv: Tensor, layer: int = layer, scale: float = scale) -> Tensor:
                y = ops.attention_qkvpacked(qkv, scale=scale, return_lse=watch is not None)
                if watch is not None:
                    watch(layer, qkv[:, :, 0], qkv[:, :, 1], scale, y[1])
                return y if isinstance(y, Tensor) else y[0]

            x = block(x, attend, PROMPT if batch_invariant else TRAINING)
        return normalize(self.ln_f, x)

    def hidden_packed(self, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Final hidden states (N, C) of whole sequences of any lengths, packed without padding: tokens (N,) int64.

        Sequence s owns rows cu_seqlens[s] to cu_seqlens[s + 1], (S + 1,) int32 from 0 to N; none is longer than
        max_seqlen, which must not be above the config's n_positions.
        """
        if tokens.dim() != 1 or max_seqlen > self.config.n_positions:
            raise ValueError(
                f"GPT2.hidden_packed: tokens must be (N,) and max_seqlen at most {self.config.n_positions}, "
                f"got {tuple(tokens.shape)} and {max_seqlen}"
            )
        firsts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(tokens))
        x = self._embed(tokens, torch.arange(len(tokens), device=tokens.device) - firsts)
        packing = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen  # queries and keys alike
        for layer, block in enumerate(self.h):
            scale = self.config.attention_scale(layer)

            def attend(qkv: Tensor, scale: float = scale) -> Tensor:
                q, k, v = qkv.unbind(1)
                y = ops.attention_varlen(q, k, v, *packing, scale=scale)
                return y if isinstance(y, Tensor) else y[0]

            x = block(x, attend)
        return normalize(self.ln_f, x)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if not self.is_int8:
            return self.wte(tokens) + self.wpe(positions)
        scale = self.wte.get_buffer("weight_scale")[tokens].unsqueeze(-1)
        return (self.wte.weight[tokens] * scale).to(self.dtype) + self.wpe(positions)

    @torch.no_grad()
    def forward_paged(self, batch: PagedBatch, cache: Sequence[LayerCache]) -> Tensor:
        """Final hidden states (N, C) of packed tokens; their keys and values are written to the cache of each layer."""
        x = self._embed(batch.tokens, batch.positions)
        fits = (
            cache[0].keys.dtype == x.dtype
            and ops.has_paged_layer(x)
            and not torch.compiler.is_compiling()
            and not nn.modules.module._has_any_global_hook()
        )
        heads, eps = (3, *cache[0].keys.shape[2:]), self.config.layer_norm_epsilon
        products = DECODE if batch.max_seqlen == 1 else PROMPT
        for layer, block in enumerate(self.h):
            scale = self.config.attention_scale(layer)
            plain = plain_block(block, heads, eps) if fits else None
            if plain is None:
                x = block(x, functools.partial(attend_paged, batch=batch, cache=cache[layer], scale=scale), products)
            else:
                x = in_one_call(x, plain, batch, cache[layer], scale=scale, eps=eps)
        return normalize(self.ln_f, x)

    def logits(self, hidden: Tensor, *, decode: bool = False) -> Tensor:
        """Scores (..., V) of every token: the output embedding is the input embedding. decode: for generated tokens."""
        return linear(self.wte, hidden, DECODE if decode else PROMPT)

    @torch.no_grad()
    def generate(
        self,
        tokens: Sequence[int],
        max_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> list[int]:
        """Continue one sequence naively, recomputing all of it for each token: the oracle for `gpt2.Engine`.

        Stops after <|endoftext|>, which is then the last token, or after `max_tokens`. temperature 0 is greedy.
        """
        text = list(tokens) or [self.config.eos_token_id]
        start = len(text)
        if start + max_tokens > self.config.n_positions:
            raise ValueError(
                f"GPT2.generate: prompt and max_tokens must fit in {self.config.n_positions} positions, "
                f"got {start} + {max_tokens}"
            )
        device = self.device
        for _ in range(max_tokens):
            chosen, _, _ = ops.sample(
                self(torch.tensor([text], device=device))[:, -1],
                temperature=torch.tensor([temperature], dtype=torch.float32, device=device),
                top_k=torch.tensor([top_k], device=device),
                top_p=torch.tensor([top_p], dtype=torch.float32, device=device),
                min_p=torch.tensor([min_p], dtype=torch.float32, device=device),
                seeds=torch.tensor([seed], device=device),
                positions=torch.tensor([len(text)], device=device),
            )
            text.append(int(chosen))
            if text[-1] == self.config.eos_token_id:
                break
        return text[start:]

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> GPT2:
        """The model of a preset name or of a local folder in Hugging Face's format, ready to generate.

        Names: "storybook" (ships with the package), "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" (from the Hugging
        Face hub, with the extra `hub`). A folder needs a path separator in its name, like "./gpt2". device defaults to
        the GPU if there is one that the kernels compile for; dtype (float32, float16, bfloat16, or int8 on a CPU: see
        `quantize_`) defaults to the file's.
        Raises ValueError, naming what is wrong, for an unknown name, a broken file or tensors that do not fit.
        """
        if dtype == torch.float64:
            raise ValueError(
                "GPT2.from_pretrained: dtype must be float32, float16, bfloat16 or int8, got torch.float64"
            )
        if dtype == torch.int8:
            device = "cpu" if device is None else device
            if torch.device(device).type != "cpu":
                raise ValueError(f"GPT2.from_pretrained: dtype int8 is for CPUs, got device {device!r}")
            return weights.load(cls, name_or_path, device=device).quantize_()
        return weights.load(cls, name_or_path, device=device, dtype=dtype)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors to a folder that transformers and `from_pretrained` load.

        Raises ValueError for int8 weights: rounded weights must not become a checkpoint.
        """
        if self.is_int8:
            raise ValueError("GPT2.save_pretrained: int8 weights are not saved; save the model they were made from")
        weights.save(self, self.config, path)
