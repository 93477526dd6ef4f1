// How linear is split over blocks and threads. Included once, by cpu_ops.cpp; the arithmetic is in cpu_linear_tile.h
// and, for CPUs with AMX, in cpu_amx_tile.h.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_attention.h"

#if defined(__x86_64__)

namespace {

constexpr int kLinearRows = 64;  // rows and columns of y that a thread computes at a time (no influence on the result)
constexpr int kLinearCols = 64;

int64_t inner_cache_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (found >= (16 << 10)) return found;
#endif
  return 32 << 10;
}

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

#if defined(__clang__)
#pragma clang attribute push(                                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")
#endif
namespace avx512_dot {
#define GPT2K_LANES 16
#include "cpu_lanes.h"
#include "cpu_gelu_tile.h"
#include "cpu_linear_tile.h"
#undef GPT2K_LANES
#undef GPT2K_SHUFFLE
}  // namespace avx512_dot
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if GPT2K_AMX
#if defined(__clang__)
#pragma clang attribute push(                                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16,amx-int8")
#endif
namespace amx {
#define GPT2K_LANES 16
#include "cpu_lanes.h"
#include "cpu_amx_tile.h"
#undef GPT2K_LANES
#undef GPT2K_SHUFFLE
}  // namespace amx
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // GPT2K_AMX

template <class Dot, class T>
void run_linear(const typename Dot::X* x, int64_t x_stride, const typename Dot::Weight* weight, int64_t weight_stride,
                int64_t M, int64_t K, const LinearEpilogue<T>& to) {
  const int64_t blocks_n = (to.N + kLinearCols - 1) / kLinearCols, blocks_m = (M + kLinearRows - 1) / kLinearRows;
  const int64_t block_work = (M < kLinearRows ? M : kLinearRows) * K * kLinearCols;
  const int64_t grain = 1 + (256 << 10) / (block_work + 1);  // multiply-adds that are worth waking a thread
  torch::stable::parallel_for(0, blocks_m * blocks_n, grain, [&](int64_t begin, int64_t end) {
    alignas(64) int32_t sums[kLinearRows * kLinearCols];
    for (int64_t i = begin; i < end; ++i) {  // a thread keeps its rows of x in its cache and walks along the weights
      const int64_t row = i / blocks_n * kLinearRows, col = i % blocks_n * kLinearCols;
      const int rows = int(M - row < kLinearRows ? M - row : kLinearRows);
      const int cols = int(to.N - col < kLinearCols ? to.N - col : kLinearCols);
      avx512_dot::dot_block<Dot>(
          {x + row * x_stride, weight + col * weight_stride, x_stride, weight_stride, K, rows, cols}, sums);
      avx512_dot::finish_block(sums, to, row, rows, col, cols);
    }
  });
}

#if GPT2K_AMX

// The same on AMX, with X the type of both factors. Columns of blocks, not rows: the weights of a block stay in a
// thread's cache while it walks along the rows of x, which are packed once.
template <class X, class T>
void run_linear_amx(const X* x, int64_t x_stride, const X* weight, int64_t weight_stride, int64_t M, int64_t K,
                    const LinearEpilogue<T>& to) {
  const int64_t blocks_n = (to.N + kLinearCols - 1) / kLinearCols, blocks_m = (M + kLinearRows - 1) / kLinearRows;
  const amx::Packed packed(M, K * int64_t(sizeof(X)));
  torch::stable::parallel_for(0, packed.groups, 1 + (64 << 10) / (K + 1), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      amx::pack_group(packed, group, reinterpret_cast<const char*>(x), x_stride * int64_t(sizeof(X)));
    }
  });
  const int64_t block_work = std::max<int64_t>(amx::kTileSide, std::min<int64_t>(M, kLinearRows)) * K * kLinearCols;
  const int64_t grain = 1 + (1 << 20) / (block_work + 1);  // as above, of tiles that are never narrower
  torch::stable::parallel_for(0, blocks_m * blocks_n, grain, [&](int64_t begin, int64_t end) {
    alignas(64) int32_t sums[kLinearRows * kLinearCols];
    amx::configure(packed.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % blocks_m * kLinearRows, col = i / blocks_m * kLinearCols;
      const int rows = int(M - row < kLinearRows ? M - row : kLinearRows);
      const int cols = int(to.N - col < kLinearCols ? to.N - col : kLinearCols);
      amx::multiply_block<X>(packed, row, rows, reinterpret_cast<const char*>(weight + col * weight_stride),
                             weight_stride * int64_t(sizeof(X)), cols, sums);
      avx512_dot::finish_block(sums, to, row, rows, col, cols);
    }
    amx::release();
  });
}

#endif  // GPT2K_AMX

}  // namespace

#endif  // __x86_64__
