// The CPU operators of gpt2_kernels: paged attention over a block cache, the write of new keys and values into it, and
// GELU. Checks and registration; cpu_attention.h splits the work, cpu_attention_tile.h and cpu_gelu_tile.h hold the
// arithmetic over the registers of cpu_lanes.h.
//
// Written against LibTorch's stable ABI (torch/csrc/stable, target 2.11), so one binary serves torch 2.11 to 2.13;
// compiled at first use by gpt2_kernels/_native.py, which says why.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_attention.h"

using torch::headeronly::ScalarType;

namespace {

constexpr int kMaxHeadDim = 256;
constexpr int64_t kMaxWindow = int64_t(1) << 40;  // more than any position, and far from overflow

const char* name_of(ScalarType dtype) {
  if (dtype == ScalarType::Float) return "float32";
  if (dtype == ScalarType::BFloat16) return "bfloat16";
  if (dtype == ScalarType::Half) return "float16";
  if (dtype == ScalarType::Double) return "float64";
  if (dtype == ScalarType::Int) return "int32";
  if (dtype == ScalarType::Long) return "int64";
  return "another dtype";
}

void check_float(const char* op, const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name,
                  " must be float32 or bfloat16, got ", name_of(dtype));
}

void check_same_dtype(const char* op, const char* name, const Tensor& x, const char* like_name, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ", like_name, ", ",
                  name_of(like.scalar_type()), ", got ", name_of(x.scalar_type()));
}

void check_dims(const char* op, const char* name, const Tensor& x, int64_t dims, const char* axes) {
  STD_TORCH_CHECK(x.dim() == dims, op, ": ", name, " must be ", axes, ", got ", x.dim(), " axes");
}

void check_int32(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32, got ", name_of(x.scalar_type()));
}

void check_size(const char* op, const char* what, int64_t got, int64_t expected) {
  STD_TORCH_CHECK(got == expected, op, ": ", what, " must be ", expected, ", got ", got);
}

void check_unit_stride(const char* op, const char* name, const Tensor& x) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(x.size(last) <= 1 || x.stride(last) == 1, op, ": the last stride of ", name, " must be 1, got ",
                  x.stride(last));
}

void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache) {
  check_dims(op, "k_cache", k_cache, 4, "(num_blocks, block_size, kv heads, head dim)");
  check_dims(op, "v_cache", v_cache, 4, "(num_blocks, block_size, kv heads, head dim)");
  for (int64_t axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(v_cache.size(axis) == k_cache.size(axis), op, ": v_cache must have k_cache's shape, got ",
                    v_cache.size(axis), " instead of ", k_cache.size(axis), " in axis ", axis);
  }
  STD_TORCH_CHECK(k_cache.size(1) >= 1, op, ": block_size must be >= 1, got ", k_cache.size(1));
  check_unit_stride(op, "k_cache", k_cache);
  check_unit_stride(op, "v_cache", v_cache);
}

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

// k, v (N, Hkv, D) -> caches (num_blocks, block_size, Hkv, D) at slots (N,) = block * block_size + offset; -1 skips a
// token.
void append_kv_(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots) {
  const char* op = "append_kv_";
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
  const int64_t tokens = k.size(0), heads = k.size(1), head_dim = k.size(2), block_size = k_cache.size(1);
  check_size(op, "v's tokens", v.size(0), tokens);
  check_size(op, "v's kv heads", v.size(1), heads);
  check_size(op, "v's head dim", v.size(2), head_dim);
  check_size(op, "the cache's kv heads", k_cache.size(2), heads);
  check_size(op, "the cache's head dim", k_cache.size(3), head_dim);
  check_size(op, "the length of slots", slots.size(0), tokens);
  check_unit_stride(op, "k", k);
  check_unit_stride(op, "v", v);
  const int64_t capacity = k_cache.size(0) * block_size, slot_stride = slots.stride(0);
  const int64_t* slot_of = static_cast<const int64_t*>(slots.const_data_ptr());
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t slot = slot_of[token * slot_stride];
    STD_TORCH_CHECK(slot >= -1 && slot < capacity, op, ": slots must lie in -1..", capacity - 1, ", got ", slot);
  }
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

// q (Nq, H, D), caches (num_blocks, block_size, Hkv, D), block_table (S, max_blocks), context_lens (S,), cu_seqlens_q
// (S + 1,)
// -> (Nq, H, D). The queries of a sequence are its last positions; position p sees the keys p - window < j <= p.
Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                       const Tensor& context_lens, const Tensor& cu_seqlens_q, double scale, int64_t window) {
  const char* op = "paged_attention";
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
  const Sequences all(block_table, context_lens, cu_seqlens_q);
  check_sequences(op, all, shape, k_cache.size(0), q.size(0));
  Tensor out = torch::stable::new_empty(q, {q.size(0), heads, head_dim});
  if (q.scalar_type() == ScalarType::Float) {
    attend_all<float>(shape, all, q, k_cache, v_cache, out);
  } else {
    attend_all<BFloat16Bits>(shape, all, q, k_cache, v_cache, out);
  }
  return out;
}

template <class T>
void gelu_all(T* x, int64_t count, bool tanh) {
  const auto gelu_range = choose_gelu_function<T>();
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

// For tests and reports: lowers the instruction set to at most `limit` and returns the one in use (0 portable, 1 AVX2,
// 2 AVX-512).
int64_t simd_level(int64_t limit) {
  simd_limit.store(int(limit < 0 ? 0 : limit > 2 ? 2 : limit));
  return simd_level_in_use();
}

}  // namespace

STABLE_TORCH_LIBRARY(gpt2_kernels_cpu, m) {
  m.def("append_kv_(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor context_lens, "
      "Tensor cu_seqlens_q, float scale, int window) -> Tensor");
  m.def("gelu_(Tensor(a!) x, bool tanh) -> ()");
  m.def("simd_level(int limit) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(gpt2_kernels_cpu, CPU, m) {
  m.impl("append_kv_", TORCH_BOX(&append_kv_));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("gelu_", TORCH_BOX(&gelu_));
}

STABLE_TORCH_LIBRARY_IMPL(gpt2_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&simd_level));
}
