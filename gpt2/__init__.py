"""GPT-2 on fused kernels: the model, its reference in plain PyTorch, a batch engine and a command line."""

from gpt2.config import PRESETS, GPT2Config
from gpt2.engine import Completion, Engine, Output
from gpt2.model import GPT2
from gpt2.reference import ReferenceGPT2
from gpt2.sampling import SamplingParams
from gpt2.tokenizer import load_tokenizer

__all__ = [
    "GPT2",
    "PRESETS",
    "Completion",
    "Engine",
    "GPT2Config",
    "Output",
    "ReferenceGPT2",
    "SamplingParams",
    "load_tokenizer",
]
