"""What every operator means, in plain PyTorch: the specification that kernels are tested against.

Written for clarity: float32 inside (float64 where the input is), one rounding at the end. Shapes and arguments are
those of the public functions of the same names; nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where the input is float64."""
    return x if x.dtype == torch.float64 else x.float()


def visible(Tq: int, Tk: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """(Tq, Tk) bool: which keys each query sees. The last query is aligned with the last key.

    Tq = 2, Tk = 5, causal:      window = 2:
        1 1 1 1 0                0 0 1 1 0
        1 1 1 1 1                0 0 0 1 1
    """
    i = torch.arange(Tq, device=device)[:, None] + (Tk - Tq)  # position of the query among the keys
    j = torch.arange(Tk, device=device)[None, :]
    keep = torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    if causal:
        keep &= j <= i
    if window:
        keep &= j > i - window
    return keep


def _per_query_head(kv: Tensor, H: int) -> Tensor:
    """(B, T, Hkv, D) -> (B, H, T, D) in float32: each key and value head serves H / Hkv query heads in turn."""
    return wide(kv).transpose(1, 2).repeat_interleave(H // kv.shape[2], dim=1)


def dropout_keep(seed: Tensor, B: int, H: int, Tq: int, Tk: int, dropout_p: float, first: int = 0) -> Tensor:
    """(B, H, Tq, Tk) bool: the probabilities that dropout keeps, each with probability 1 - dropout_p.

    Word j % 4 of Philox at counter (j // 4, i, (first + b) H + h) decides the pair (i, j), so that any tile of it can
    be made anew: by the backward pass, transposed, with other tile sizes.
    """
    heads, i, quad = (torch.arange(n, device=seed.device) for n in (B * H, Tq, -(-Tk // 4)))
    heads = heads + first * H
    words = torch.stack(torch.broadcast_tensors(*philox(seed, quad, i[:, None], heads[:, None, None])), dim=-1)
    return (words.flatten(-2).view(B, H, Tq, 4 * len(quad))[..., :Tk] >> 8) >= int(dropout_p * 2**24)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v -> (B, Tq, H, D) and the logsumexp of the scores (B, H, Tq), natural log.

    With dropout_p the probabilities that `dropout_keep(seed, ...)` leaves are divided by 1 - dropout_p, the others 0;
    `first` is the number of the first sequence there.
    """
    B, Tq, H, D = q.shape
    scores = wide(q).transpose(1, 2) @ _per_query_head(k, H).transpose(2, 3) * (D**-0.5 if scale is None else scale)
    keep = visible(Tq, k.shape[1], causal, window or 0, q.device)
    scores = scores.masked_fill(~keep, -torch.inf)
    logsumexp = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - logsumexp.unsqueeze(-1)).masked_fill(~keep, 0.0)  # a row with no key: all 0, not NaN
    if seed is not None:
        weights = weights * dropout_keep(seed, B, H, Tq, k.shape[1], dropout_p, first) / (1 - dropout_p)
    out = weights @ _per_query_head(v, H)
    return out.transpose(1, 2).to(q.dtype).contiguous(), logsumexp


def attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v by the formulas of FlashAttention (Dao et al., 2022), with the probabilities rebuilt."""
    B, Tk, Hkv, D = k.shape
    Tq, H = q.shape[1:3]
    queries, keys, values = wide(q).transpose(1, 2), _per_query_head(k, H), _per_query_head(v, H)
    dout = wide(grad).transpose(1, 2)
    keep = visible(Tq, Tk, causal, window or 0, q.device)
    weights = torch.exp(queries @ keys.transpose(2, 3) * scale - logsumexp.unsqueeze(-1)).masked_fill(~keep, 0.0)
    dropped, dweights = weights, dout @ values.transpose(2, 3)
    if seed is not None:
        kept = dropout_keep(seed, B, H, Tq, Tk, dropout_p, first) / (1 - dropout_p)
        dropped, dweights = weights * kept, dweights * kept
    delta = (dout * wide(out).transpose(1, 2)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - wide(grad_lse).unsqueeze(-1)  # d lse / d score is the probability itself
    dscores = weights * (dweights - delta) * scale
    dq = (dscores @ keys).transpose(1, 2)
    dk = (dscores.transpose(2, 3) @ queries).view(B, Hkv, H // Hkv, Tk, D).sum(2).transpose(1, 2)
    dv = (dropped.transpose(2, 3) @ dout).view(B, Hkv, H // Hkv, Tk, D).sum(2).transpose(1, 2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def attention_qkvpacked(qkv: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`attention` of the parts of qkv (B, T, 3, H, D)."""
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, **options)


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`attention` of each packed sequence by itself: q (Nq, H, D) -> (Nq, H, D) and the logsumexp (H, Nq)."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    logsumexp = wide(q).new_full(q.shape[1::-1], -torch.inf)
    for s, (rows, keys) in enumerate(zip(spans(cu_seqlens_q), spans(cu_seqlens_k))):
        o, l = attention(q[None, rows], k[None, keys], v[None, keys], first=s, **options)
        out[rows], logsumexp[:, rows] = o[0], l[0]
    return out, logsumexp


def spans(cu_seqlens: Tensor) -> list[slice]:
    """[0, 3, 7] -> rows 0..2 and rows 3..6."""
    ends = cu_seqlens.tolist()
    return [slice(first, last) for first, last in zip(ends, ends[1:])]


def attention_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    heads: Sequence[int] | Tensor | None = None,
    rows: Sequence[int] | Tensor | None = None,
    top_m: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """exp(scale * q k^T - lse) of chosen heads and rows (B, heads, rows, Tk), or each row's top_m (keys, shares)."""
    Tq, H, D = q.shape[1:]
    Tk, Hkv = k.shape[1:3]
    heads = torch.arange(H, device=q.device) if heads is None else torch.as_tensor(heads, device=q.device)
    rows = torch.arange(Tq, device=q.device) if rows is None else torch.as_tensor(rows, device=q.device)
    queries = wide(q[:, rows][:, :, heads]).transpose(1, 2)
    keys = wide(k[:, :, heads % H // (H // Hkv)]).permute(0, 2, 3, 1)  # heads may be negative
    log_total = lse[:, heads][:, :, rows].unsqueeze(-1)
    keep = visible(Tq, Tk, causal, window or 0, q.device)[rows] & (log_total > -torch.inf)
    scores = queries @ keys * (D**-0.5 if scale is None else scale)
    shares = torch.exp(scores - log_total).masked_fill(~keep, 0.0)
    if top_m is None:
        return shares
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)  # of equal shares the lower key comes first
    return order[..., :top_m], ordered[..., :top_m]


scaled_dot_product_attention = F.scaled_dot_product_attention  # the specification is torch's own function


LARGEST_FLOAT8 = 448.0  # that float8_e4m3fn has


def to_float8(x: Tensor, scale: Tensor) -> Tensor:
    """x (N, Hkv, D) / scale (Hkv,) as float8_e4m3fn: what is larger becomes +-448, the rest rounds to nearest even."""
    return (x.float() / scale[:, None]).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn)


def append_kv_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write token n's keys and values into slot slots[n] = block * block_size + offset; -1 writes nothing.

    With scales (Hkv,) the caches are float8_e4m3fn.
    """
    kept = slots >= 0
    block, offset = slots[kept] // k_cache.shape[1], slots[kept] % k_cache.shape[1]
    for cache, x, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        if scale is None:
            cache[block, offset] = x[kept]
        else:  # as bytes, since PyTorch copies no float8 by index
            cache.view(torch.uint8)[block, offset] = to_float8(x[kept], scale).view(torch.uint8)


def gathered(cache: Tensor, table: Tensor, length: int, scale: Tensor | None) -> Tensor:
    """(length, Hkv, D) keys or values of one sequence, whose row of the table names its blocks."""
    blocks = table[: -(-length // cache.shape[1])].long()
    if scale is None:
        return cache[blocks].flatten(0, 1)[:length]
    values = cache.view(torch.uint8)[blocks].view(torch.float8_e4m3fn).float() * scale[:, None]
    return values.flatten(0, 1)[:length]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's last queries over its keys, gathered block by block.

    With scales (Hkv,) the caches are float8_e4m3fn, and stand for what they hold times the scale of its head.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for s, (first, last) in enumerate(zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:])):
        length = int(context_lens[s])
        k, v = gathered(k_cache, block_table[s], length, k_scale), gathered(v_cache, block_table[s], length, v_scale)
        if last > first and length:
            out[first:last] = attention(q[None, first:last], k[None], v[None], scale=scale, window=window)[0][0]
    return out


def paged_decode_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`append_kv_` of one token a sequence, then `paged_attention`; no slot that is written is another sequence's."""
    append_kv_(k, v, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)
    cache = k_cache, v_cache, block_table, context_lens, torch.arange(len(q) + 1, dtype=torch.int32)
    return paged_attention(q, *cache, scale=scale, window=window, k_scale=k_scale, v_scale=v_scale)


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
    """Append each text's drawn token, and stop those that it ends; see gpt2_kernels.advance_."""
    active = context_lens > 0
    positions += active
    goes_on = active & (drawn != ends) & (positions + 1 < limits)
    block = block_table.gather(1, (positions // block_size).clamp_max(block_table.shape[1] - 1).unsqueeze(1)).squeeze(1)
    slots.copy_(torch.where(goes_on, block * block_size + positions % block_size, -1))
    context_lens.copy_(torch.where(goes_on, positions + 1, 0))
    tokens.copy_(torch.where(active, drawn, tokens))
    record.index_copy_(0, count, torch.where(active, drawn, -1).unsqueeze(0))
    count += 1


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al., 2016)."""
    x32 = wide(x)
    centred = x32 - x32.mean(-1, keepdim=True)
    y = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps) * wide(weight)
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual); the sum is rounded to its dtype before it is normalised."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; x and grad (..., C), mean and rstd (rows,)."""
    C = x.shape[-1]
    g, x32 = wide(grad).reshape(-1, C), wide(x).reshape(-1, C)
    normalised = (x32 - mean[:, None]) * rstd[:, None]
    wg = g * wide(weight)
    projection = (wg * normalised).mean(-1, keepdim=True)
    dx = (wg - wg.mean(-1, keepdim=True) - normalised * projection) * rstd[:, None]
    return dx.to(x.dtype).view(x.shape), (g * normalised).sum(0).to(weight.dtype), g.sum(0).to(weight.dtype)


def gelu(x: Tensor, activation: str) -> Tensor:
    """Gaussian error linear unit: "gelu" by erf, "gelu_tanh" by GPT-2's approximation (Hendrycks & Gimpel, 2016)."""
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x weight^T + bias) + residual."""
    y = F.linear(wide(x), wide(weight), None if bias is None else wide(bias))
    if activation is not None:
        y = gelu(y, activation)
    return (y if residual is None else y + wide(residual)).to(x.dtype)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) float32 in int8, and the scale of each row (M, 1): its largest magnitude becomes 127.

    A row of nothing larger than 4e-37, whose 127 / largest is no float32, becomes 0; one with a NaN or an infinity gets
    the scale NaN.
    """
    largest = x.abs().amax(dim=1, keepdim=True)
    largest = largest + (largest - largest)  # infinity becomes NaN
    inverse = torch.where(largest > 4e-37, 127.0 / largest, 0.0)
    rounded = (x * inverse).round().nan_to_num(0.0, 127.0, -127.0).clamp(-128, 127).to(torch.int8)
    return rounded, largest * (1.0 / 127.0)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) in int8, and the scale (N,) of each row."""
    rounded, scale = round_rows(weight.detach().float())
    return rounded, scale.squeeze(1)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation((q weight^T) scale_x scale + bias) + residual, where q and scale_x are the rows of x in int8."""
    rounded, x_scale = round_rows(wide(x).reshape(-1, x.shape[-1]))
    y = (rounded.double() @ weight.double().T).float() * (scale * x_scale)
    y = y.view(*x.shape[:-1], weight.shape[0])
    if bias is not None:
        y = y + wide(bias)
    if activation is not None:
        y = gelu(y, activation)
    return (y if residual is None else y + wide(residual)).to(x.dtype)


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    approximate: str = "tanh",
    residual: Tensor | None = None,
) -> Tensor:
    """gelu(x w1^T + b1) w2^T + b2 + residual; what lies between is rounded to the dtype of x."""
    hidden = linear(x, w1, b1, activation="gelu_tanh" if approximate == "tanh" else "gelu")
    return linear(hidden, w2, b2, residual=residual)


def paged_layer_(
    x: Tensor,
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    eps: float = 1e-5,
    activation: str = "gelu_tanh",
    weight_scales: Sequence[Tensor] = (),
) -> Tensor:
    """One layer of a GPT-2, each step of it rounded to the dtype of x; see gpt2_kernels.paged_layer_."""
    (ln_1, attn, attn_proj, ln_2, fc, mlp_proj), H = zip(weights[::2], weights[1::2]), k_cache.shape[2]

    def product(i: int, x: Tensor, layer: tuple[Tensor, Tensor], **options: Any) -> Tensor:
        if weight_scales:
            return linear_int8(x, layer[0], weight_scales[i], layer[1], **options)
        return linear(x, *layer, **options)

    q, k, v = product(0, layer_norm(x, *ln_1, eps), attn).unflatten(-1, (3, H, -1)).unbind(-3)
    append_kv_(k, v, k_cache, v_cache, slots)
    y = paged_attention(q, k_cache, v_cache, block_table, context_lens, cu_seqlens_q, scale=scale)
    x = product(1, y.flatten(-2), attn_proj, residual=x)
    hidden = product(2, layer_norm(x, *ln_2, eps), fc, activation=activation)
    return product(3, hidden, mlp_proj, residual=x)


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Mean over the rows that count of logsumexp(logits) - logits[target], in nats."""
    kept = targets != ignore_index
    chosen = wide(logits).gather(-1, torch.where(kept, targets, 0).unsqueeze(-1)).squeeze(-1)
    losses = torch.logsumexp(wide(logits), dim=-1) - chosen
    return torch.where(kept, losses, 0.0).sum() / kept.sum()


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """cross_entropy(x weight^T, targets), the logits rounded to the dtype of x."""
    return cross_entropy(linear(x, weight), targets, ignore_index=ignore_index)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
    """The four 32-bit words, as int64, of Philox-4x32-10 (Salmon et al., 2011) at counter (c0, c1, c2, 0).

    The 64 bits of `seed` are its key; counters are int64 in 0..2^32 - 1. All four broadcast.
    """
    low = 0xFFFFFFFF
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        high_a, low_a = _multiply_32(c0, 0xD2511F53)
        high_b, low_b = _multiply_32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for each (seed, position), float32, a multiple of 2^-24.

    The first word of Philox at counter (position, 0, 0).
    """
    zero = torch.zeros_like(positions)
    return (philox(seeds, positions & 0xFFFFFFFF, zero, zero)[0] >> 8).to(torch.float32) * 2.0**-24


def _multiply_32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for a below 2^32 in int64: by halves, since the product needs 64 unsigned bits."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    history: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    top_logprobs: int = 0,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """One token for each row of logits: penalty, top-k, temperature, top-p, min-p, then one draw from what is left.

    A row without a finite logit, or with a NaN or +inf, is greedy whatever its temperature.
    """
    scores = wide(logits)
    log_total = torch.logsumexp(scores, dim=-1)
    top = None
    if top_logprobs:
        ids = torch.stack([_largest(row, top_logprobs) for row in scores])
        top = ids, scores.gather(1, ids) - log_total[:, None]

    adjusted = scores
    if history is not None and repetition_penalty is not None:  # Keskar et al., 2019 (CTRL)
        penalty = repetition_penalty[:, None]
        adjusted = torch.where(history, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    tokens = adjusted.argmax(dim=-1)
    usual = log_total.isfinite() & adjusted.amax(dim=-1).isfinite()
    drawn = ((temperature > 0) & usual).nonzero().squeeze(1)  # the other rows are greedy
    if drawn.numel():
        tokens[drawn] = _draw(
            adjusted[drawn], *(t[drawn] for t in (temperature, top_k, top_p, min_p, seeds, positions))
        )
    logprobs = scores.gather(1, tokens[:, None]).squeeze(1) - log_total
    return tokens, logprobs, top


def _largest(row: Tensor, n: int) -> Tensor:
    """The ids of a row's n largest values in falling order, ties by id. topk alone leaves the order of ties open."""
    row = row.nan_to_num(torch.inf, posinf=torch.inf, neginf=-torch.inf)
    candidates = (row >= row.topk(n).values[-1]).nonzero().squeeze(1)
    return candidates[row[candidates].sort(descending=True, stable=True).indices[:n]]


def _draw(
    scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    V = scores.shape[1]
    limited = (top_k > 0) & (top_k < V)
    if limited.any():
        k = torch.where(limited, top_k, 1)
        smallest = scores.topk(int(k.max()), dim=-1).values.gather(1, k[:, None] - 1)
        scores = scores.masked_fill(limited[:, None] & (scores < smallest), -torch.inf)  # ties at the threshold stay
    # The maximum goes first: dividing by a tiny temperature would make it infinite.
    weights = torch.exp((scores - scores.amax(dim=-1, keepdim=True)) / temperature[:, None])  # the likeliest weighs 1
    kept = (weights > 0) & (weights >= min_p[:, None].clamp(max=1.0))
    if (top_p < 1).any():  # Holtzman et al., 2019: the fewest tokens whose probabilities reach top_p, and ties
        ordered, order = scores.sort(dim=-1, descending=True)
        mass = weights.gather(1, order).double()
        before = mass.cumsum(-1) - mass
        needed = before < top_p[:, None] * mass.sum(-1, keepdim=True)
        needed[:, 0] = True
        smallest = ordered.masked_fill(~needed, torch.inf).amin(-1, keepdim=True)
        kept &= (scores >= smallest) | (top_p >= 1)[:, None]
    cumulative = (weights * kept).double().cumsum(-1)
    point = uniform(seeds, positions).double() * cumulative[:, -1]
    chosen = torch.searchsorted(cumulative, point[:, None], right=True).squeeze(1)
    # A draw that rounds up to the total would fall behind the last token that is left.
    last = V - 1 - kept.flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(chosen, last)
