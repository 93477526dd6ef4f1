"""GELU and its derivative, for the epilogues of products. ACTIVATION is the number that `_check.ACTIVATIONS` gives.

Specification: gpt2_kernels.reference.gelu.
"""

from __future__ import annotations

from gpt2_kernels._runtime import tl, triton


@triton.jit
def gelu(x, ACTIVATION: tl.constexpr):
    """1 is the erf form, 2 the tanh form as x * sigmoid(2u), since 0.5 (1 + tanh u) = sigmoid(2u)."""
    if ACTIVATION == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    return x / (1.0 + tl.exp2(u * -2.8853900817779268))  # -2 log2(e)


@triton.jit
def gelu_derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)  # -log2(e) / 2
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    s = 1.0 / (1.0 + tl.exp2(u * -2.8853900817779268))
    # x (1 - s) before s: far out on the left s is 0, and x 2u' alone may be infinite
    return s + 1.5957691216057308 * (1.0 + 0.134145 * x * x) * (x * (1.0 - s) * s)
