"""GPT-2 in plain PyTorch, to be read from top to bottom beside a text that explains the model.

No kernels, no cache, no batching tricks: every formula appears once, in the order in which a token meets it. It is the
yardstick that the fast model is measured against, in float32 or, where more digits are wanted, in float64.

    tokens -> token embedding + position embedding -> block 0 -> ... -> block n-1 -> layer norm -> scores for each token

Shapes: B sequences, T tokens each, C = n_embd, H heads of D = C / H, V tokens in the vocabulary.
Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2 import weights
from gpt2.config import GPT2Config


def gelu(x: Tensor, form: str = "gelu_tanh") -> Tensor:
    """Gaussian error linear unit (Hendrycks & Gimpel, 2016). GPT-2 uses the approximation by tanh."""
    if form == "gelu_tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


class SelfAttention(nn.Module):
    """Masked self-attention: every token gathers what it needs from itself and the tokens before it.

    Each token makes a query ("what am I looking for?"), a key ("what do I have?") and a value ("what do I pass on?").
    The dot product of a query with all earlier keys says how much of each value to take.
    """

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.scale = config.attention_scale(layer)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one projection
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (t.view(B, T, self.n_head, self.head_dim).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)

        scores = q @ k.transpose(2, 3) * self.scale  # (B, H, T, T): row i is what token i thinks of every token j
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # j > i has not been written yet
        scores = scores.masked_fill(future, -math.inf)
        attention = torch.softmax(scores, dim=-1)  # each row sums to 1
        y = attention @ v  # (B, H, T, D)

        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y), attention


class MLP(nn.Module):
    """Two layers with a GELU between them, applied to every token by itself."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.form = config.activation
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(x), self.form))


class Block(nn.Module):
    """One layer: attention, then MLP; each reads a normalised copy of the stream and adds its result to it."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, attention = self.attn(self.ln_1(x))
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return x, attention


class ReferenceGPT2(nn.Module):
    """GPT-2 as the paper describes it: the oracle of this package.

    `forward(tokens)` takes (B, T) int64 token ids and returns (B, T, V) logits: row t scores every token as the one
    that follows tokens[:, :t + 1].
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # what a token means
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)  # where it stands
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        initialize(self, config)

    def forward(self, tokens: Tensor, *, return_attention: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits (B, T, V); with `return_attention` also the attention of each layer, (B, H, T, T)."""
        T = tokens.shape[1]
        if T > self.config.n_positions:
            raise ValueError(f"ReferenceGPT2: at most {self.config.n_positions} tokens fit, got {T}")
        positions = torch.arange(T, device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        maps = []
        for block in self.h:
            x, attention = block(x)
            if return_attention:
                maps.append(attention)
        logits = self.ln_f(x) @ self.wte.weight.T  # the output embedding is the input embedding
        return (logits, maps) if return_attention else logits

    @torch.no_grad()
    def generate(self, tokens: list[int], max_tokens: int) -> list[int]:
        """Greedy continuation, one token at a time, everything recomputed for each: slow, but beyond doubt."""
        device = self.wte.weight.device
        text = list(tokens)
        for _ in range(max_tokens):
            logits = self(torch.tensor([text], device=device))
            text.append(int(logits[0, -1].argmax()))
            if text[-1] == self.config.eos_token_id:
                break
        return text[len(tokens) :]

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ReferenceGPT2:
        """As `GPT2.from_pretrained`; float32 unless `dtype` asks for float64."""
        return weights.load(cls, name_or_path, device=device, dtype=dtype or torch.float32)


def initialize(model: nn.Module, config: GPT2Config, std: float = 0.02) -> None:
    """Initial weights: N(0, 0.02), residual projections smaller by sqrt(number of residual additions), biases 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            nn.init.constant_(parameter, 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0)
        else:
            residual = name.endswith("c_proj.weight")
            nn.init.normal_(parameter, std=std / math.sqrt(2 * config.n_layer) if residual else std)
