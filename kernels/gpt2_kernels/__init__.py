"""Fused GPU kernels for GPT-style transformers: attention, layer normalisation, GELU MLP and a paged key-value cache.

Every function takes and returns plain tensors, works under torch.compile, and means what the function of the same name
in `gpt2_kernels.reference` computes in plain PyTorch. Importing this package needs no GPU.
"""

from gpt2_kernels import (
    attention_backward,  # noqa: F401  registers the operator
    compat,
    integrations,
    modules,
    reference,
)
from gpt2_kernels._operator import OPS, path_of
from gpt2_kernels._runtime import gpu_refusal
from gpt2_kernels.attentionmap import attention_map
from gpt2_kernels.crossentropy import cross_entropy, linear_cross_entropy
from gpt2_kernels.decoding import advance_
from gpt2_kernels.dropin import apply
from gpt2_kernels.explanation import explain
from gpt2_kernels.fused_attention import attention, attention_qkvpacked, attention_varlen
from gpt2_kernels.gemm import gelu_mlp, linear
from gpt2_kernels.int8 import linear_int8, quantize
from gpt2_kernels.kv_cache import append_kv_
from gpt2_kernels.layernorm import add_layer_norm, layer_norm
from gpt2_kernels.paged import paged_attention, paged_decode_
from gpt2_kernels.paged_layer import has_paged_layer, paged_layer_
from gpt2_kernels.sampling import sample
from gpt2_kernels.sdpa import scaled_dot_product_attention

__version__ = "0.1.0"

__all__ = [
    "OPS",
    "add_layer_norm",
    "advance_",
    "append_kv_",
    "apply",
    "attention",
    "attention_map",
    "attention_qkvpacked",
    "attention_varlen",
    "compat",
    "cross_entropy",
    "explain",
    "gelu_mlp",
    "gpu_refusal",
    "has_paged_layer",
    "integrations",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_int8",
    "modules",
    "paged_attention",
    "paged_decode_",
    "paged_layer_",
    "path_of",
    "quantize",
    "reference",
    "sample",
    "scaled_dot_product_attention",
]
