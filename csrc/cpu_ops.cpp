// The CPU operators of gpt2_kernels: paged attention over a block cache, the write of new keys and values into it,
// products with a fused epilogue, in int8 too, layer norm and its gradients, GELU, a whole layer of these;
// cross-entropy; sampling, and the step from one token to the next. cpu_checks.h looks at the arguments;
// cpu_attention.h, cpu_layernorm.h, cpu_linear.h and cpu_sample.h split the work; the _tile.h files hold the arithmetic
// over the registers of cpu_lanes.h, which cpu_tiles.h includes once for each instruction set of cpu_simd.h.
//
// Written against LibTorch's stable ABI (torch/csrc/stable, target 2.11), so one binary serves torch 2.11 to 2.15;
// compiled at first use by gpt2_kernels/_native.py, which says why.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_attention.h"
#include "cpu_checks.h"
#include "cpu_layernorm.h"
#include "cpu_linear.h"
#include "cpu_sample.h"

namespace {

constexpr int kMaxHeadDim = 256;
constexpr int64_t kMaxWindow = int64_t(1) << 40;  // more than any position, and far from overflow

struct RowCopy {  // copies (kv heads, D) of one token; strides in bytes
  const char* source;
  char* target;
  int64_t source_row, source_head, target_block, target_slot, target_head;

  RowCopy(const Tensor& from, const Tensor& to, int64_t bytes)
      : source(static_cast<const char*>(from.const_data_ptr())),
        target(static_cast<char*>(to.mutable_data_ptr())),
        source_row(from.stride(0) * bytes),
        source_head(from.stride(1) * bytes),
        target_block(to.stride(0) * bytes),
        target_slot(to.stride(1) * bytes),
        target_head(to.stride(2) * bytes) {}

  void operator()(int64_t token, int64_t block, int64_t slot, int64_t heads, int64_t row_bytes) const {
    for (int64_t head = 0; head < heads; ++head) {
      std::memcpy(target + block * target_block + slot * target_slot + head * target_head,
                  source + token * source_row + head * source_head, row_bytes);
    }
  }
};

void check_append(const char* op, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& slots) {
  check_dims(op, "k", k, 3, "(tokens, kv heads, head dim)");
  check_dims(op, "v", v, 3, "(tokens, kv heads, head dim)");
  check_dims(op, "slots", slots, 1, "(tokens,)");
  check_float(op, "k", k);
  check_same_dtype(op, "v", v, "k", k);
  check_same_dtype(op, "k_cache", k_cache, "k", k);
  check_same_dtype(op, "v_cache", v_cache, "k", k);
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Long, op, ": slots must be int64, got ",
                  name_of(slots.scalar_type()));
  check_caches(op, k_cache, v_cache);
  const int64_t tokens = k.size(0), heads = k.size(1), head_dim = k.size(2);
  check_size(op, "v's tokens", v.size(0), tokens);
  check_size(op, "v's kv heads", v.size(1), heads);
  check_size(op, "v's head dim", v.size(2), head_dim);
  check_size(op, "the cache's kv heads", k_cache.size(2), heads);
  check_size(op, "the cache's head dim", k_cache.size(3), head_dim);
  check_size(op, "the length of slots", slots.size(0), tokens);
  check_unit_stride(op, "k", k);
  check_unit_stride(op, "v", v);
  const int64_t capacity = k_cache.size(0) * k_cache.size(1);
  const int64_t* slot_of = static_cast<const int64_t*>(slots.const_data_ptr());
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t slot = slot_of[token * slots.stride(0)];
    STD_TORCH_CHECK(slot >= -1 && slot < capacity, op, ": slots must lie in -1..", capacity - 1, ", got ", slot);
  }
}

void append_rows(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots) {
  const int64_t tokens = k.size(0), heads = k.size(1), head_dim = k.size(2), block_size = k_cache.size(1);
  const int64_t* slot_of = static_cast<const int64_t*>(slots.const_data_ptr());
  const int64_t slot_stride = slots.stride(0);
  const int64_t bytes = k.element_size(), row_bytes = head_dim * bytes;
  if (tokens * heads * row_bytes == 0) return;
  const RowCopy copy_k(k, k_cache, bytes), copy_v(v, v_cache, bytes);
  const int64_t grain = 1 + (256 << 10) / (heads * row_bytes);  // 256 KiB per thread: less is not worth waking one
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = slot_of[token * slot_stride];
      if (slot < 0) continue;
      copy_k(token, slot / block_size, slot % block_size, heads, row_bytes);
      copy_v(token, slot / block_size, slot % block_size, heads, row_bytes);
    }
  });
}

// k, v (N, Hkv, D) -> caches (num_blocks, block_size, Hkv, D) at slots (N,) = block * block_size + offset; -1 skips a
// token.
void append_kv_(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots) {
  check_append("append_kv_", k, v, k_cache, v_cache, slots);
  append_rows(k, v, k_cache, v_cache, slots);
}

AttentionShape check_paged_attention(const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                     const Tensor& block_table, const Tensor& context_lens, const Tensor& cu_seqlens_q,
                                     double scale, int64_t window) {
  check_dims(op, "q", q, 3, "(queries, heads, head dim)");
  check_dims(op, "block_table", block_table, 2, "(sequences, max_blocks)");
  check_dims(op, "context_lens", context_lens, 1, "(sequences,)");
  check_dims(op, "cu_seqlens_q", cu_seqlens_q, 1, "(sequences + 1,)");
  check_float(op, "q", q);
  check_same_dtype(op, "k_cache", k_cache, "q", q);
  check_same_dtype(op, "v_cache", v_cache, "q", q);
  check_int32(op, "block_table", block_table);
  check_int32(op, "context_lens", context_lens);
  check_int32(op, "cu_seqlens_q", cu_seqlens_q);
  check_caches(op, k_cache, v_cache);
  check_unit_stride(op, "q", q);
  const int64_t head_dim = q.size(2), heads = q.size(1), kv_heads = k_cache.size(2);
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= kMaxHeadDim, op, ": head dim must lie in 1..", kMaxHeadDim, ", got ",
                  head_dim);
  check_size(op, "the cache's head dim", k_cache.size(3), head_dim);
  STD_TORCH_CHECK(kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0, op,
                  ": heads of q must be a multiple of the cache's ", kv_heads, " kv heads, got ", heads);
  check_size(op, "the rows of block_table", block_table.size(0), context_lens.size(0));
  check_size(op, "the length of cu_seqlens_q", cu_seqlens_q.size(0), context_lens.size(0) + 1);
  STD_TORCH_CHECK(window >= 0, op, ": window must be >= 0 (0 = none), got ", window);
  const int64_t bounded_window = window < kMaxWindow ? window : kMaxWindow;
  const AttentionShape shape{heads,
                             kv_heads,
                             k_cache.size(1),
                             bounded_window,
                             int(heads / kv_heads),
                             int(head_dim),
                             int((head_dim + 15) / 16 * 16),
                             float(scale)};
  check_sequences(op, Sequences(block_table, context_lens, cu_seqlens_q), shape, k_cache.size(0), q.size(0));
  return shape;
}

Tensor attend_cache(const AttentionShape& shape, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& block_table, const Tensor& context_lens, const Tensor& cu_seqlens_q) {
  const Sequences all(block_table, context_lens, cu_seqlens_q);
  Tensor out = torch::stable::new_empty(q, {q.size(0), shape.heads, shape.head_dim});
  if (q.scalar_type() == ScalarType::Float) {
    attend_all<float>(shape, all, q, k_cache, v_cache, out);
  } else {
    attend_all<BFloat16Bits>(shape, all, q, k_cache, v_cache, out);
  }
  return out;
}

// q (Nq, H, D), caches (num_blocks, block_size, Hkv, D), block_table (S, max_blocks), context_lens (S,), cu_seqlens_q
// (S + 1,)
// -> (Nq, H, D). The queries of a sequence are its last positions; position p sees the keys p - window < j <= p.
Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                       const Tensor& context_lens, const Tensor& cu_seqlens_q, double scale, int64_t window) {
  const AttentionShape shape = check_paged_attention("paged_attention", q, k_cache, v_cache, block_table, context_lens,
                                                     cu_seqlens_q, scale, window);
  return attend_cache(shape, q, k_cache, v_cache, block_table, context_lens, cu_seqlens_q);
}

// The state of S decoding texts brought forward by the token drawn for each: gpt2_kernels.reference.advance_.
void advance_(const Tensor& drawn, const Tensor& tokens, const Tensor& positions, const Tensor& slots,
              const Tensor& context_lens, const Tensor& limits, const Tensor& ends, const Tensor& block_table,
              const Tensor& record, const Tensor& count, int64_t block_size) {
  const char* op = "advance_";
  const int64_t S = drawn.numel();
  const auto longs = [&](const char* name, const Tensor& x, int64_t length) {
    check_vector(op, name, x, ScalarType::Long, length);
    return static_cast<int64_t*>(x.mutable_data_ptr());
  };
  const int64_t *draws = longs("drawn", drawn, S), *limit = longs("limits", limits, S), *end = longs("ends", ends, S);
  int64_t *token = longs("tokens", tokens, S), *position = longs("positions", positions, S),
          *slot = longs("slots", slots, S), *step = longs("count", count, 1);
  check_vector(op, "context_lens", context_lens, ScalarType::Int, S);
  int32_t* context = static_cast<int32_t*>(context_lens.mutable_data_ptr());
  check_dims(op, "block_table", block_table, 2, "(S, max_blocks)");
  check_int32(op, "block_table", block_table);
  check_size(op, "the rows of block_table", block_table.size(0), S);
  check_dims(op, "record", record, 2, "(steps, S)");
  check_size(op, "the columns of record", record.size(1), S);
  check_unit_stride(op, "record", record);
  STD_TORCH_CHECK(record.scalar_type() == ScalarType::Long, op, ": record must be int64, got ",
                  name_of(record.scalar_type()));
  STD_TORCH_CHECK(block_size >= 1, op, ": block_size must be >= 1, got ", block_size);
  STD_TORCH_CHECK(*step >= 0 && *step < record.size(0), op, ": count must lie in 0..", record.size(0) - 1, ", got ",
                  *step);
  const auto goes_on = [&](int64_t s) {
    return context[s] > 0 && draws[s] != end[s] && position[s] + 2 < limit[s];  // its length with the drawn token
  };
  const int64_t room = block_table.size(1) * block_size;
  for (int64_t s = 0; s < S; ++s) {
    STD_TORCH_CHECK(!goes_on(s) || (position[s] >= -1 && position[s] + 1 < room), op,
                    ": positions must lie in -1..", room - 2, " (before the last place of block_table), got ",
                    position[s]);
  }
  const int32_t* table = static_cast<const int32_t*>(block_table.const_data_ptr());
  int64_t* row = static_cast<int64_t*>(record.mutable_data_ptr()) + (*step)++ * record.stride(0);
  for (int64_t s = 0; s < S; ++s) {
    const bool active = context[s] > 0, on = goes_on(s);
    row[s] = active ? draws[s] : -1;
    if (active) {
      token[s] = draws[s];
      ++position[s];
    }
    context[s] = on ? int32_t(position[s] + 1) : 0;
    slot[s] = -1;
    if (on) {
      const int64_t block = table[s * block_table.stride(0) + position[s] / block_size * block_table.stride(1)];
      slot[s] = block * block_size + position[s] % block_size;
    }
  }
}

template <class T>
void gelu_all(T* x, int64_t count, bool tanh) {
  const auto gelu_range = GPT2K_CHOOSE(gelu_tanh_range<T>);
  torch::stable::parallel_for(0, count, 16 << 10, [&](int64_t begin, int64_t end) {
    if (tanh) {
      gelu_range(x + begin, end - begin);
    } else {
      for (int64_t i = begin; i < end; ++i) {
        const float value = to_float(x[i]);
        store_rounded(x + i, 0.5f * value * (1.0f + std::erf(value * 0.707106781f)));
      }
    }
  });
}

// x of any shape, contiguous, becomes gelu(x): by tanh, or by erf.
void gelu_(const Tensor& x, bool tanh) {
  check_float("gelu_", "x", x);
  STD_TORCH_CHECK(x.is_contiguous(), "gelu_: x must be contiguous");
  if (x.scalar_type() == ScalarType::Float) {
    gelu_all(static_cast<float*>(x.mutable_data_ptr()), x.numel(), tanh);
  } else {
    gelu_all(static_cast<BFloat16Bits*>(x.mutable_data_ptr()), x.numel(), tanh);
  }
}

template <class T>
Rows<const T> rows_of(const MaybeTensor& x) {
  if (!x) return {nullptr, 0};
  return {static_cast<const T*>(x->const_data_ptr()), x->is_contiguous() ? x->size(x->dim() - 1) : x->stride(0)};
}

// x (..., C), residual (..., C) or none, weight and bias (C,) -> the layer norm of each row of x + residual, this sum
// (none without a residual), both (..., C), and the row's mean and 1 / deviation (2, R) float32.
std::tuple<Tensor, MaybeTensor, Tensor> normalize(const char* op, const Tensor& x, const MaybeTensor& residual,
                                                  const Tensor& weight, const MaybeTensor& bias, double eps) {
  check_float(op, "x", x);
  check_rows(op, "x", x);
  if (residual) check_rows_like(op, "residual", *residual, "x", x);
  const int64_t C = x.size(x.dim() - 1), R = x.numel() / C;
  check_vector(op, "weight", weight, x.scalar_type(), C);
  if (bias) check_vector(op, "bias", *bias, x.scalar_type(), C);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  MaybeTensor total;
  if (residual) total = torch::stable::new_empty(x, x.sizes());
  Tensor statistics = torch::stable::new_empty(x, {2, R}, ScalarType::Float);
  float* kept = static_cast<float*>(statistics.mutable_data_ptr());
  const auto run = [&](auto element) {
    using T = decltype(element);
    normalize_rows<T>({rows_of<T>(x), rows_of<T>(residual), data_or_null<T>(weight), data_or_null<T>(bias),
                       {result_of<T>(total), C}, {static_cast<T*>(y.mutable_data_ptr()), C}, kept, R, C},
                      float(eps));
  };
  x.scalar_type() == ScalarType::Float ? run(float()) : run(BFloat16Bits());
  return {y, total, statistics};
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, double eps) {
  const auto [y, total, statistics] = normalize("layer_norm", x, std::nullopt, weight, bias, eps);
  return {y, statistics};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                  const MaybeTensor& bias, double eps) {
  const auto [y, total, statistics] = normalize("add_layer_norm", x, residual, weight, bias, eps);
  return {y, *total, statistics};
}

// dy, dtotal or none, x (..., C), weight (C,), the statistics of x's rows (2, R) -> dx, with dtotal added, (..., C),
// dweight and dbias (C,), each where it is wanted.
std::tuple<MaybeTensor, MaybeTensor, MaybeTensor> layer_norm_backward(const Tensor& dy, const MaybeTensor& dtotal,
                                                                      const Tensor& x, const Tensor& weight,
                                                                      const Tensor& statistics, bool want_dx,
                                                                      bool want_dweight, bool want_dbias) {
  const char* op = "layer_norm_backward";
  check_float(op, "x", x);
  check_rows(op, "x", x);
  check_rows_like(op, "dy", dy, "x", x);
  if (dtotal) check_rows_like(op, "dtotal", *dtotal, "x", x);
  const int64_t C = x.size(x.dim() - 1), R = x.numel() / C;
  check_vector(op, "weight", weight, x.scalar_type(), C);
  check_dims(op, "statistics", statistics, 2, "(2, R)");
  check_size(op, "the rows of statistics", statistics.size(0), 2);
  check_size(op, "the columns of statistics", statistics.size(1), R);
  STD_TORCH_CHECK(statistics.scalar_type() == ScalarType::Float && statistics.is_contiguous(), op,
                  ": statistics must be dense float32, got ", name_of(statistics.scalar_type()));
  MaybeTensor dx, dweight, dbias;
  if (want_dx) dx = torch::stable::new_empty(x, x.sizes());
  if (want_dweight) dweight = torch::stable::new_empty(x, {C});
  if (want_dbias) dbias = torch::stable::new_empty(x, {C});
  const auto run = [&](auto element) {
    using T = decltype(element);
    normalize_rows_backward<T>({rows_of<T>(dy), rows_of<T>(dtotal), rows_of<T>(x), data_or_null<T>(weight),
                                static_cast<const float*>(statistics.const_data_ptr()), {result_of<T>(dx), C},
                                result_of<T>(dweight), result_of<T>(dbias), R, C}, x);
  };
  x.scalar_type() == ScalarType::Float ? run(float()) : run(BFloat16Bits());
  return {dx, dweight, dbias};
}

template <class T>
void softmax_all(const T* logits, int64_t stride, int64_t V, const int64_t* targets, int64_t R, int64_t ignored,
                 float* losses, float* maxima, float* totals) {
  const auto softmax = GPT2K_CHOOSE(softmax_row<T>);
  torch::stable::parallel_for(0, R, 1 + (16 << 10) / V, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      losses[r] = maxima[r] = 0.0f;
      totals[r] = 1.0f;
      if (targets[r] == ignored) continue;
      softmax(logits + r * stride, V, maxima + r, totals + r);
      losses[r] = std::log(totals[r]) + (maxima[r] - to_float(logits[r * stride + targets[r]]));
    }
  });
}

template <class T>
void softmax_gradient_all(const T* logits, int64_t stride, int64_t V, const int64_t* targets, int64_t R,
                          int64_t ignored, const float* maxima, const float* totals, float factor, T* gradients,
                          int64_t out_stride) {
  const auto gradient = GPT2K_CHOOSE(softmax_gradient_row<T>);
  torch::stable::parallel_for(0, R, 1 + (16 << 10) / V, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* out = gradients + r * out_stride;
      if (targets[r] == ignored) {
        std::memset(static_cast<void*>(out), 0, sizeof(T) * V);
      } else {
        gradient(logits + r * stride, V, targets[r], maxima[r], totals[r], factor, out);
      }
    }
  });
}

const int64_t* check_cross_entropy(const char* op, const Tensor& logits, const Tensor& targets, int64_t ignored) {
  check_float(op, "logits", logits);
  check_dims(op, "logits", logits, 2, "(R, V)");
  check_unit_stride(op, "logits", logits);
  const int64_t* target = vector_of<int64_t>(op, "targets", targets, ScalarType::Long, logits.size(0));
  for (int64_t r = 0; r < logits.size(0); ++r) {
    STD_TORCH_CHECK(target[r] == ignored || (target[r] >= 0 && target[r] < logits.size(1)), op,
                    ": targets must lie in 0..", logits.size(1) - 1, " or be ", ignored, ", got ", target[r]);
  }
  return target;
}

// logits (R, V), targets (R,) int64 -> each row's loss, largest logit and sum of exp(logit - largest), (R,) float32. A
// row whose target is ignore_index is not read: 0, 0 and 1.
std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets, int64_t ignore_index) {
  const int64_t* target = check_cross_entropy("cross_entropy", logits, targets, ignore_index);
  const int64_t R = logits.size(0), V = logits.size(1), stride = logits.stride(0);
  Tensor losses = torch::stable::new_empty(logits, {R}, ScalarType::Float);
  Tensor maxima = torch::stable::new_empty(logits, {R}, ScalarType::Float);
  Tensor totals = torch::stable::new_empty(logits, {R}, ScalarType::Float);
  float* into[] = {static_cast<float*>(losses.mutable_data_ptr()), static_cast<float*>(maxima.mutable_data_ptr()),
                   static_cast<float*>(totals.mutable_data_ptr())};
  const void* data = logits.const_data_ptr();
  if (logits.scalar_type() == ScalarType::Float) {
    softmax_all(static_cast<const float*>(data), stride, V, target, R, ignore_index, into[0], into[1], into[2]);
  } else {
    softmax_all(static_cast<const BFloat16Bits*>(data), stride, V, target, R, ignore_index, into[0], into[1], into[2]);
  }
  return {losses, maxima, totals};
}

// gradients (R, V), which may be logits, become factor (softmax(logits) - [v = target]), and 0 in ignored rows.
void cross_entropy_backward_(const Tensor& logits, const Tensor& targets, const Tensor& maxima, const Tensor& totals,
                             double factor, int64_t ignore_index, const Tensor& gradients) {
  const char* op = "cross_entropy_backward_";
  const int64_t* target = check_cross_entropy(op, logits, targets, ignore_index);
  const int64_t R = logits.size(0), V = logits.size(1), stride = logits.stride(0);
  const float* largest = vector_of<float>(op, "maxima", maxima, ScalarType::Float, R);
  const float* sums = vector_of<float>(op, "totals", totals, ScalarType::Float, R);
  check_same_dtype(op, "gradients", gradients, "logits", logits);
  check_dims(op, "gradients", gradients, 2, "(R, V)");
  check_size(op, "the rows of gradients", gradients.size(0), R);
  check_size(op, "the columns of gradients", gradients.size(1), V);
  check_unit_stride(op, "gradients", gradients);
  const int64_t out_stride = gradients.stride(0);
  const void* data = logits.const_data_ptr();
  void* out = gradients.mutable_data_ptr();
  if (logits.scalar_type() == ScalarType::Float) {
    softmax_gradient_all(static_cast<const float*>(data), stride, V, target, R, ignore_index, largest, sums,
                         float(factor), static_cast<float*>(out), out_stride);
  } else {
    softmax_gradient_all(static_cast<const BFloat16Bits*>(data), stride, V, target, R, ignore_index, largest, sums,
                         float(factor), static_cast<BFloat16Bits*>(out), out_stride);
  }
}

// logits (S, V), each option (S,), history (S, V) bool -> tokens (S,) int64, their log-probabilities (S,), and the ids
// and log-probabilities (S, top_logprobs) of the likeliest.
std::tuple<Tensor, Tensor, Tensor, Tensor> sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                                                  const Tensor& top_p, const Tensor& min_p, const Tensor& seeds,
                                                  const Tensor& positions, const MaybeTensor& history,
                                                  const MaybeTensor& penalty, int64_t top_logprobs) {
  check_float("sample", "logits", logits);
  check_dims("sample", "logits", logits, 2, "(S, V)");
  check_unit_stride("sample", "logits", logits);
  const int64_t S = logits.size(0), V = logits.size(1), stride = logits.stride(0);
  STD_TORCH_CHECK(V >= 1 && top_logprobs >= 0 && top_logprobs <= V, "sample: top_logprobs must lie in 0..", V,
                  ", got ", top_logprobs);
  STD_TORCH_CHECK(history.has_value() == penalty.has_value(), "sample: history and penalty go together");
  const float* temperatures = vector_of<float>("sample", "temperature", temperature, ScalarType::Float, S);
  const int64_t* ks = vector_of<int64_t>("sample", "top_k", top_k, ScalarType::Long, S);
  const float* top_ps = vector_of<float>("sample", "top_p", top_p, ScalarType::Float, S);
  const float* min_ps = vector_of<float>("sample", "min_p", min_p, ScalarType::Float, S);
  const int64_t* seed = vector_of<int64_t>("sample", "seeds", seeds, ScalarType::Long, S);
  const int64_t* position = vector_of<int64_t>("sample", "positions", positions, ScalarType::Long, S);
  if (history) {
    STD_TORCH_CHECK(history->scalar_type() == ScalarType::Bool && history->numel() == S * V && history->is_contiguous(),
                    "sample: history must be (S, V) dense bool, got ", history->numel(), " of ",
                    name_of(history->scalar_type()));
  }
  const bool* seen = data_or_null<bool>(history);
  const float* penalties = penalty ? vector_of<float>("sample", "penalty", *penalty, ScalarType::Float, S) : nullptr;
  Tensor tokens = torch::stable::new_empty(logits, {S}, ScalarType::Long);
  Tensor logprobs = torch::stable::new_empty(logits, {S}, ScalarType::Float);
  Tensor top_ids = torch::stable::new_empty(logits, {S, top_logprobs}, ScalarType::Long);
  Tensor top_values = torch::stable::new_empty(logits, {S, top_logprobs}, ScalarType::Float);
  int64_t *token = static_cast<int64_t*>(tokens.mutable_data_ptr()),
          *ids = static_cast<int64_t*>(top_ids.mutable_data_ptr());
  float *logprob = static_cast<float*>(logprobs.mutable_data_ptr()),
        *values = static_cast<float*>(top_values.mutable_data_ptr());
  const bool is_float = logits.scalar_type() == ScalarType::Float;
  const void* data = logits.const_data_ptr();
  torch::stable::parallel_for(0, S, 1 + (16 << 10) / V, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(V);
    for (int64_t row = begin; row < end; ++row) {
      const SampleParams params{temperatures[row],
                                top_ps[row],
                                min_ps[row],
                                penalties ? penalties[row] : 1.0f,
                                ks[row],
                                seed[row],
                                position[row],
                                seen ? seen + row * V : nullptr};
      SampleResult result{0, 0.0f, ids + row * top_logprobs, values + row * top_logprobs};
      if (is_float) {
        sample_row(static_cast<const float*>(data) + row * stride, V, params, top_logprobs, scores, result);
      } else {
        sample_row(static_cast<const BFloat16Bits*>(data) + row * stride, V, params, top_logprobs, scores, result);
      }
      token[row] = result.token;
      logprob[row] = result.logprob;
    }
  });
  return {tokens, logprobs, top_ids, top_values};
}

#if GPT2K_PRODUCTS

constexpr int64_t kMaxInt8K = 65536;  // sums of 255 * 127 fit in 32 bits
constexpr int64_t kTileRowsInt8 = 4;  // fewer are faster without AMX's tiles; the sums are exact either way

void check_linear(const char* op, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                  const MaybeTensor& residual) {
  check_float(op, "x", x);
  check_dims(op, "x", x, 2, "(M, K)");
  check_dims(op, "weight", weight, 2, "(N, K)");
  check_size(op, "the columns of weight", weight.size(1), x.size(1));
  check_unit_stride(op, "x", x);
  check_unit_stride(op, "weight", weight);
  if (bias) {
    check_same_dtype(op, "bias", *bias, "x", x);
    check_dims(op, "bias", *bias, 1, "(N,)");
    check_size(op, "the length of bias", bias->size(0), weight.size(0));
    check_unit_stride(op, "bias", *bias);
  }
  if (residual) {
    check_same_dtype(op, "residual", *residual, "x", x);
    check_dims(op, "residual", *residual, 2, "(M, N)");
    check_size(op, "the rows of residual", residual->size(0), x.size(0));
    check_size(op, "the columns of residual", residual->size(1), weight.size(0));
    check_unit_stride(op, "residual", *residual);
  }
  STD_TORCH_CHECK(simd_level_in_use() >= 3, op, ": needs AVX-512 with BF16 and VNNI");
}

template <class T>
LinearEpilogue<T> epilogue(const MaybeTensor& bias, const MaybeTensor& residual, Tensor* pre, Tensor& y,
                           int64_t activation) {
  return {data_or_null<T>(bias),
          data_or_null<T>(residual),
          pre ? static_cast<T*>(pre->mutable_data_ptr()) : nullptr,
          static_cast<T*>(y.mutable_data_ptr()),
          y.size(1),
          residual ? residual->stride(0) : 0,
          int(activation),
          nullptr,
          nullptr,
          nullptr};
}

// x (M, K), weight (N, K), bias (N,), residual (M, N) -> activation(x weight^T + bias) + residual (M, N), and the input
// of the activation (M, N) where `keep`, else (0, N).
std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                  const MaybeTensor& residual, int64_t activation, bool keep) {
  check_same_dtype("linear", "weight", weight, "x", x);
  check_linear("linear", x, weight, bias, residual);
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  Tensor y = torch::stable::new_empty(x, {M, N}), pre = torch::stable::new_empty(x, {keep ? M : 0, N});
  Tensor* kept = keep ? &pre : nullptr;
  if (x.scalar_type() == ScalarType::Float) {
    run_linear<avx512_dot::Float32Dot>(static_cast<const float*>(x.const_data_ptr()), x.stride(0),
                                       static_cast<const float*>(weight.const_data_ptr()), weight.stride(0), M, K,
                                       epilogue<float>(bias, residual, kept, y, activation));
  } else {
    const auto* rows = static_cast<const BFloat16Bits*>(x.const_data_ptr());
    const auto* columns = static_cast<const BFloat16Bits*>(weight.const_data_ptr());
    const auto to = epilogue<BFloat16Bits>(bias, residual, kept, y, activation);
#if GPT2K_AMX
    if (amx_in_use()) {
      run_linear_amx(rows, x.stride(0), columns, weight.stride(0), M, K, to);
      return {y, pre};
    }
#endif
    run_linear<avx512_dot::BFloat16Dot>(rows, x.stride(0), columns, weight.stride(0), M, K, to);
  }
  return {y, pre};
}

template <class T>
void linear_int8_into(const Tensor& x, const Tensor& weight, const Tensor& scale, LinearEpilogue<T> to) {
  const int64_t M = x.size(0), K = x.size(1), stride = x.stride(0);
  Tensor rows = torch::stable::new_empty(x, {M, K}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {M}, ScalarType::Float);
  Tensor totals = torch::stable::new_empty(x, {M}, ScalarType::Int);
  int8_t* q = static_cast<int8_t*>(rows.mutable_data_ptr());
  float* x_scale = static_cast<float*>(scales.mutable_data_ptr());
  int32_t* x_sum = static_cast<int32_t*>(totals.mutable_data_ptr());
  const T* source = static_cast<const T*>(x.const_data_ptr());
  torch::stable::parallel_for(0, M, 1 + (64 << 10) / (K + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      avx512_dot::quantize_row(source + row * stride, K, q + row * K, x_scale + row, x_sum + row);
    }
  });
  to.weight_scale = static_cast<const float*>(scale.const_data_ptr());
  to.x_scale = x_scale;
  const int8_t* columns = static_cast<const int8_t*>(weight.const_data_ptr());
#if GPT2K_AMX
  if (M >= kTileRowsInt8 && amx_in_use()) {
    return run_linear_amx(q, K, columns, weight.stride(0), M, K, to);
  }
#endif
  to.x_sum = x_sum;
  run_linear<avx512_dot::Int8Dot>(q, K, columns, weight.stride(0), M, K, to);
}

// The same with weight (N, K) int8 and scale (N,) float32; rows of x are rounded to int8, each with its own scale.
Tensor linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scale, const MaybeTensor& bias,
                   const MaybeTensor& residual, int64_t activation) {
  const char* op = "linear_int8";
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, op, ": weight must be int8, got ",
                  name_of(weight.scalar_type()));
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_contiguous(), op,
                  ": scale must be float32 and contiguous, got ", name_of(scale.scalar_type()));
  check_linear(op, x, weight, bias, residual);
  check_dims(op, "scale", scale, 1, "(N,)");
  check_size(op, "the length of scale", scale.size(0), weight.size(0));
  STD_TORCH_CHECK(x.size(1) <= kMaxInt8K, op, ": K must be <= ", kMaxInt8K, ", got ", x.size(1));
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  if (x.scalar_type() == ScalarType::Float) {
    linear_int8_into<float>(x, weight, scale, epilogue<float>(bias, residual, nullptr, y, activation));
  } else {
    linear_int8_into<BFloat16Bits>(x, weight, scale, epilogue<BFloat16Bits>(bias, residual, nullptr, y, activation));
  }
  return y;
}

// x (N, K), weight (M, K) with bias (M,); in int8 where it has a scale (M,).
Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias, const MaybeTensor& scale,
               const MaybeTensor& residual, int64_t activation) {
  if (scale) return linear_int8(x, weight, *scale, bias, residual, activation);
  return std::get<0>(linear(x, weight, bias, residual, activation, false));
}

// One layer of a GPT-2 over packed tokens x (N, C), the operators above in one call and with their bits. weights:
// weight and bias of ln_1, c_attn, attn.c_proj, ln_2, c_fc and mlp.c_proj; scales: of the four matrices in int8, or
// none.
Tensor paged_layer_(const Tensor& x, const std::vector<Tensor> weights, const std::vector<Tensor> scales,
                    const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots, const Tensor& block_table,
                    const Tensor& context_lens, const Tensor& cu_seqlens_q, double scale, double eps,
                    int64_t activation) {
  // All of it is looked at before the cache is written.
  const char* op = "paged_layer_";
  check_size(op, "the number of weights", int64_t(weights.size()), 12);
  if (!scales.empty()) check_size(op, "the number of scales", int64_t(scales.size()), 4);
  check_float(op, "x", x);
  check_dims(op, "x", x, 2, "(N, C)");
  STD_TORCH_CHECK(x.is_contiguous(), op, ": x must be contiguous");
  check_caches(op, k_cache, v_cache);
  const int64_t N = x.size(0), C = x.size(1), heads = k_cache.size(2), head_dim = k_cache.size(3);
  STD_TORCH_CHECK(heads * head_dim == C, op, ": the cache must have H * D = C = ", C, ", got ", heads, " * ", head_dim);
  const auto scale_of = [&](int i) { return scales.empty() ? MaybeTensor() : MaybeTensor(scales[i]); };
  const auto check_matrix = [&](const char* name, int i, int64_t outputs, int64_t inputs) {
    const Tensor& weight = weights[i];
    const ScalarType dtype = scales.empty() ? x.scalar_type() : ScalarType::Char;
    check_dims(op, name, weight, 2, "a matrix");
    STD_TORCH_CHECK(weight.scalar_type() == dtype && weight.size(0) == outputs && weight.size(1) == inputs, op, ": ",
                    name, " must be (", outputs, ", ", inputs, ") of ", name_of(dtype), ", got (", weight.size(0), ", ",
                    weight.size(1), ") of ", name_of(weight.scalar_type()));
    check_unit_stride(op, name, weight);
  };
  check_dims(op, "c_fc.weight", weights[8], 2, "a matrix");
  const int64_t width = weights[8].size(0);
  check_matrix("c_attn.weight", 2, 3 * C, C);
  check_matrix("attn.c_proj.weight", 4, C, C);
  check_matrix("c_fc.weight", 8, width, C);
  check_matrix("mlp.c_proj.weight", 10, C, width);
  const int64_t lengths[] = {C, C, 3 * C, C, C, C, width, C};
  const char* names[] = {"ln_1.weight", "ln_1.bias", "c_attn.bias", "attn.c_proj.bias",
                         "ln_2.weight", "ln_2.bias", "c_fc.bias",   "mlp.c_proj.bias"};
  const int places[] = {0, 1, 3, 5, 6, 7, 9, 11};
  for (int i = 0; i < 8; ++i) check_vector(op, names[i], weights[places[i]], x.scalar_type(), lengths[i]);
  const int64_t outputs[] = {3 * C, C, width, C};
  for (size_t i = 0; i < scales.size(); ++i) check_vector(op, "a scale", scales[i], ScalarType::Float, outputs[i]);
  STD_TORCH_CHECK(C >= 1 && width >= 1, op, ": C and the width of the MLP must be >= 1, got ", C, " and ", width);
  STD_TORCH_CHECK(scales.empty() || (C <= kMaxInt8K && width <= kMaxInt8K), op, ": K must be <= ", kMaxInt8K, ", got ",
                  C, " and ", width);
  const Tensor rows = torch::stable::view(x, {N, heads, head_dim});  // as queries, keys and values will be
  check_append(op, rows, rows, k_cache, v_cache, slots);
  const AttentionShape shape =
      check_paged_attention(op, rows, k_cache, v_cache, block_table, context_lens, cu_seqlens_q, scale, 0);

  const Tensor normed = std::get<0>(layer_norm(x, weights[0], weights[1], eps));
  const Tensor qkv = product(normed, weights[2], weights[3], scale_of(0), std::nullopt, 0);
  const Tensor parts = torch::stable::view(qkv, {N, 3, heads, head_dim});
  const auto part = [&](int64_t i) { return torch::stable::select(parts, 1, i); };
  append_rows(part(1), part(2), k_cache, v_cache, slots);
  const Tensor seen = attend_cache(shape, part(0), k_cache, v_cache, block_table, context_lens, cu_seqlens_q);
  const Tensor between =
      product(torch::stable::view(seen, {N, C}), weights[4], weights[5], scale_of(1), MaybeTensor(x), 0);

  const Tensor again = std::get<0>(layer_norm(between, weights[6], weights[7], eps));
  const Tensor hidden = product(again, weights[8], weights[9], scale_of(2), std::nullopt, activation);
  return product(hidden, weights[10], weights[11], scale_of(3), MaybeTensor(between), 0);
}

#endif  // GPT2K_PRODUCTS

// For tests and reports: lowers the instruction set to at most `limit` and returns the one in use (0 portable, 1 AVX2,
// 2 AVX-512, 3 with BF16 and VNNI, 4 with AMX too).
int64_t simd_level(int64_t limit) {
  simd_limit.store(int(limit < 0 ? 0 : limit > 4 ? 4 : limit));
  return amx_in_use() ? 4 : simd_level_in_use();
}

}  // namespace

STABLE_TORCH_LIBRARY(gpt2_kernels_cpu, m) {
  m.def("append_kv_(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor context_lens, "
      "Tensor cu_seqlens_q, float scale, int window) -> Tensor");
  m.def(
      "advance_(Tensor drawn, Tensor(a!) tokens, Tensor(b!) positions, Tensor(c!) slots, Tensor(d!) context_lens, "
      "Tensor limits, Tensor ends, Tensor block_table, Tensor(e!) record, Tensor(f!) count, int block_size) -> ()");
  m.def("gelu_(Tensor(a!) x, bool tanh) -> ()");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor statistics, bool want_dx, "
      "bool want_dweight, bool want_dbias) -> (Tensor?, Tensor?, Tensor?)");
  m.def("cross_entropy(Tensor logits, Tensor targets, int ignore_index) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_backward_(Tensor logits, Tensor targets, Tensor maxima, Tensor totals, float factor, "
      "int ignore_index, Tensor(a!) gradients) -> ()");
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
      "Tensor positions, Tensor? history, Tensor? penalty, int top_logprobs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("simd_level(int limit) -> int");
#if GPT2K_PRODUCTS
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation, bool keep) -> (Tensor, Tensor)");
  m.def(
      "linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, int activation) -> Tensor");
  m.def(
      "paged_layer_(Tensor x, Tensor[] weights, Tensor[] scales, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
      "Tensor block_table, Tensor context_lens, Tensor cu_seqlens_q, float scale, float eps, int activation) "
      "-> Tensor");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(gpt2_kernels_cpu, CPU, m) {
  m.impl("append_kv_", TORCH_BOX(&append_kv_));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("advance_", TORCH_BOX(&advance_));
  m.impl("gelu_", TORCH_BOX(&gelu_));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward_", TORCH_BOX(&cross_entropy_backward_));
  m.impl("sample", TORCH_BOX(&sample));
#if GPT2K_PRODUCTS
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("paged_layer_", TORCH_BOX(&paged_layer_));
#endif
}

STABLE_TORCH_LIBRARY_IMPL(gpt2_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&simd_level));
}
