"""The bookkeeping between two decode steps: each text takes its sampled token, and finished ones stop.

A decode step reads, for each of S texts, its last token, that token's position and cache slot, and how many keys it
attends to. `advance_` moves all of them forward by a token, in place and in one launch, so that a captured step feeds
the next one and the host sends nothing. About 80 bytes per text and no arithmetic: the time is the launch's.
Specification: gpt2_kernels.reference.advance_.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_kernels import _check, _native, _overlap, _runtime, reference
from gpt2_kernels._launch import launch
from gpt2_kernels._operator import register
from gpt2_kernels._overlap import wait
from gpt2_kernels._runtime import tl, triton

BLOCK = 256  # texts at a time: enough for the batches there are, and the launch is all the time it takes


@triton.jit(
    do_not_specialize=["S", "stride_table", "stride_record", "block_size"],
    do_not_specialize_on_alignment=[
        "drawn_ptr", "tokens_ptr", "positions_ptr", "slots_ptr", "context_lens_ptr", "limits_ptr", "ends_ptr",
        "table_ptr", "record_ptr", "count_ptr",
    ],
)  # fmt: skip
def advance_kernel(
    drawn_ptr,  # (S,) int64
    tokens_ptr,  # (S,) int64
    positions_ptr,  # (S,) int64
    slots_ptr,  # (S,) int64
    context_lens_ptr,  # (S,) int32
    limits_ptr,  # (S,) int64
    ends_ptr,  # (S,) int64
    table_ptr,  # (S, max_blocks) int32
    record_ptr,  # (steps, S) int64
    count_ptr,  # (1,) int64
    S,
    stride_table,
    stride_record,
    block_size,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program owns all texts, so that the count moves on when all of them have read it."""
    wait(OVERLAP)
    count = tl.load(count_ptr)
    for first in range(0, S, BLOCK):
        s = first + tl.arange(0, BLOCK)
        inside = s < S
        active = inside & (tl.load(context_lens_ptr + s, mask=inside, other=0) > 0)
        drawn = tl.load(drawn_ptr + s, mask=active, other=-1)
        position = tl.load(positions_ptr + s, mask=active, other=0) + 1
        ended = (drawn == tl.load(ends_ptr + s, mask=active, other=0)) | (
            position + 1 >= tl.load(limits_ptr + s, mask=active, other=0)
        )
        goes_on = active & (ended == 0)
        at = s.to(tl.int64) * stride_table + position // block_size
        block = tl.load(table_ptr + at, mask=goes_on, other=0).to(tl.int64)
        tl.store(tokens_ptr + s, drawn, mask=active)
        tl.store(positions_ptr + s, position, mask=active)
        slot = tl.where(goes_on, block * block_size + position % block_size, -1)
        tl.store(slots_ptr + s, slot, mask=inside)
        tl.store(context_lens_ptr + s, tl.where(goes_on, position + 1, 0).to(tl.int32), mask=inside)
        tl.store(record_ptr + count * stride_record + s, tl.where(active, drawn, -1), mask=inside)
    tl.debug_barrier()  # a warp that is ahead must not write it before the others have read it
    tl.store(count_ptr, count + 1)


def _advance_triton(
    drawn: Tensor,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    limits: Tensor,
    ends: Tensor,
    block_table: Tensor,
    record: Tensor,
    count: Tensor,
    block_size: int,
) -> None:
    launch(
        advance_kernel,
        (1,),
        drawn.contiguous(),
        tokens,
        positions,
        slots,
        context_lens,
        limits.contiguous(),
        ends.contiguous(),
        _check.unit_last_stride(block_table),
        record,
        count,
        drawn.shape[0],
        block_table.stride(0),
        record.stride(0),
        block_size,
        BLOCK=BLOCK,
        **_overlap.options(drawn.device),
        num_warps=4,
    )


def _advance_cpu(
    drawn: Tensor,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    limits: Tensor,
    ends: Tensor,
    block_table: Tensor,
    record: Tensor,
    count: Tensor,
    block_size: int,
) -> None:
    written = tokens, positions, slots, context_lens
    if not _runtime.native_indices(drawn):
        advance = reference.advance_
    else:
        advance = _native.ops().advance_
        drawn, limits, ends = drawn.contiguous(), limits.contiguous(), ends.contiguous()
    advance(drawn, *written, limits, ends, block_table, record, count, block_size)


register(
    "advance_(Tensor drawn, Tensor(a!) tokens, Tensor(b!) positions, Tensor(c!) slots, Tensor(d!) context_lens,"
    " Tensor limits, Tensor ends, Tensor block_table, Tensor(e!) record, Tensor(f!) count, int block_size) -> ()",
    triton_impl=_advance_triton,
    cpu_impl=_advance_cpu,
    fake=lambda *args: None,
    cpu="native",
)


def advance_(
    drawn: Tensor,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    limits: Tensor,
    ends: Tensor,
    block_table: Tensor,
    record: Tensor,
    count: Tensor,
    block_size: int,
) -> None:
    """Move the state of S decoding texts forward by one token, in place.

    drawn (S,) int64: the token that follows each text's last one. Written: tokens, positions, slots (S,) int64 and
    context_lens (S,) int32 become those of the drawn token, which the next step feeds to the model. A text ends with
    the token ends[s], or when its length reaches limits[s] (both (S,) int64): its context_lens becomes 0 and its slot
    -1, and a text whose context_lens is 0 is left as it is. block_table (S, max_blocks) int32 gives the slot, and must
    hold the block of the next position. record (steps, S) int64 takes what was appended, -1 for texts that had ended,
    in row count (1,) int64, which then is one larger.
    What is written must be dense along the texts. Raises ValueError on a shape, dtype or device that does not fit.
    """
    op = "advance_"
    _check.rank(op, "drawn", drawn, "(S,)")
    _check.rank(op, "block_table", block_table, "(S, max_blocks)")
    _check.rank(op, "record", record, "(steps, S)")
    S = drawn.shape[0]
    rows = {"tokens": tokens, "positions": positions, "slots": slots, "limits": limits, "ends": ends}
    for name, tensor in {"drawn": drawn, **rows, "record": record, "count": count}.items():
        _check.index(op, name, tensor, torch.int64, drawn)
    for name, tensor in {**rows, "context_lens": context_lens}.items():
        _check.shape(op, name, tensor, (S,), "(S,)")
    for name, tensor in (("context_lens", context_lens), ("block_table", block_table)):
        _check.index(op, name, tensor, torch.int32, drawn)
    _check.shape(op, "block_table", block_table, (S, block_table.shape[1]), "(S, max_blocks)")
    _check.shape(op, "record", record, (record.shape[0], S), "(steps, S)")
    _check.shape(op, "count", count, (1,), "(1,)")
    written = {"tokens": tokens, "positions": positions, "slots": slots, "context_lens": context_lens, "record": record}
    for name, tensor in written.items():
        if tensor.stride(-1) != 1 and S > 1:
            _check.fail(op, f"{name} must be dense along the texts, since it is written in place", tensor.stride())
    if block_size < 1:
        _check.fail(op, "block_size must be at least 1", block_size)
    torch.ops.gpt2_kernels.advance_(
        drawn, tokens, positions, slots, context_lens, limits, ends, block_table, record, count, block_size
    )
