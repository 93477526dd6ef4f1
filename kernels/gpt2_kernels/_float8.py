"""Rounding to float8_e4m3fn inside kernels."""

from __future__ import annotations

from gpt2_kernels._runtime import tl, triton


@triton.jit
def to_float8(x, scale):
    """Divided as IEEE says, so that every path writes the same bits; a NaN stays one."""
    x = tl.clamp(
        tl.div_rn(x.to(tl.float32), scale + tl.zeros_like(x).to(tl.float32)), -448.0, 448.0, tl.PropagateNan.ALL
    )
    return x.to(tl.float8e4nv)
