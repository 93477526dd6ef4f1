// The arithmetic of every operator on every instruction set: each _tile.h file, over the registers of cpu_lanes.h, once
// in the namespace of each set; before them what they are given. Included by the headers that split the work.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "cpu_simd.h"

namespace {

constexpr int kChunk = 32;     // keys per softmax step, counted from position 0: part of the result's definition
constexpr int kDotLanes = 16;  // partial sums of a dot product: part of the result's definition
constexpr int kTileRows = 64;  // query rows that share one pass over the keys (no influence on the result)
constexpr int kWidenRows = 4;  // from this many rows on, keys and values are copied to float32 (no influence either)

struct AttentionShape {
  int64_t heads, kv_heads, block_size, window;
  int group, head_dim, padded_dim;  // query heads per kv head; D; D rounded up to 16
  float scale;
};

template <class T>
struct Pointers {  // strides in elements
  const T *q, *k, *v;
  T* out;                      // (Nq, H, D) contiguous
  const int32_t* block_table;  // (S, max_blocks)
  int64_t q_strides[2], k_strides[3], v_strides[3], table_strides[2];
};

struct Tile {
  int64_t sequence, kv_head;
  int64_t first_row, first_position;  // the first query: its row in q, its position in the sequence
  int queries;
};

struct TileState {                   // a worker's scratch; rows = queries x group, dim = padded_dim
  float *q, *sums;                   // (rows, dim)
  float *running_max, *running_sum;  // (rows,)
  float *keys, *values;              // (kChunk, dim)
};

struct KeyRange {
  int64_t begin, end;
};

GPT2K_INLINE KeyRange visible_keys(const AttentionShape& shape, int64_t position) {
  const int64_t begin = shape.window > 0 ? position - shape.window + 1 : 0;
  return {begin > 0 ? begin : 0, position + 1};
}

#if GPT2K_PRODUCTS

constexpr int kLinearRows = 64;  // rows and columns of y that a thread computes at a time (no influence on the result)
constexpr int kLinearCols = 64;

template <class X, class Weight>
struct LinearBlock {
  const X* x;
  const Weight* weight;
  int64_t x_stride, weight_stride, K;
  int rows, cols;
};

template <class T>
struct LinearEpilogue {
  const T *bias, *residual;  // (N,), (M, N), or null
  T *pre, *y;                // (M, N) contiguous; pre, the input of the activation, or null
  int64_t N, residual_stride;
  int activation;             // 0 none, 1 GELU by erf, 2 GELU by tanh
  const float* weight_scale;  // (N,) in int8, else null
  const float* x_scale;       // (M,)
  const int32_t* x_sum;       // (M,) sums of the rows of x in int8, where 128 of them are in every sum; else null
};

#endif  // GPT2K_PRODUCTS

#define GPT2K_LANES 4
namespace portable {
#include "cpu_lanes.h"
#include "cpu_attention_tile.h"
#include "cpu_gelu_tile.h"
#include "cpu_layernorm_tile.h"
#include "cpu_crossentropy_tile.h"
#include "cpu_sample_tile.h"
}  // namespace portable
#undef GPT2K_LANES

#if defined(__x86_64__)

#define GPT2K_LANES 8
GPT2K_TARGET("avx2,fma")
namespace avx2 {
#include "cpu_lanes.h"
#include "cpu_attention_tile.h"
#include "cpu_gelu_tile.h"
#include "cpu_layernorm_tile.h"
#include "cpu_crossentropy_tile.h"
#include "cpu_sample_tile.h"
}  // namespace avx2
GPT2K_TARGET_END
#undef GPT2K_LANES

#define GPT2K_LANES 16
GPT2K_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#include "cpu_lanes.h"
#include "cpu_attention_tile.h"
#include "cpu_gelu_tile.h"
#include "cpu_layernorm_tile.h"
#include "cpu_crossentropy_tile.h"
#include "cpu_sample_tile.h"
}  // namespace avx512
GPT2K_TARGET_END

#if GPT2K_PRODUCTS
GPT2K_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")
namespace avx512_dot {
#include "cpu_lanes.h"
#include "cpu_gelu_tile.h"
#include "cpu_linear_tile.h"
}  // namespace avx512_dot
GPT2K_TARGET_END
#endif

#if GPT2K_AMX
GPT2K_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16,amx-int8")
namespace amx {
#include "cpu_lanes.h"
#include "cpu_amx_tile.h"
}  // namespace amx
GPT2K_TARGET_END
#endif
#undef GPT2K_LANES

#endif  // __x86_64__

// The function of that name for the instruction set in use.
#if defined(__x86_64__)
#define GPT2K_CHOOSE(...)                            \
  (simd_level_in_use() >= 2   ? &avx512::__VA_ARGS__ \
   : simd_level_in_use() == 1 ? &avx2::__VA_ARGS__   \
                              : &portable::__VA_ARGS__)
#else
#define GPT2K_CHOOSE(...) (&portable::__VA_ARGS__)
#endif

}  // namespace
