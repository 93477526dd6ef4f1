// How linear is split over blocks and threads. Included once, by cpu_ops.cpp; the arithmetic is in cpu_linear_tile.h
// and, for CPUs with AMX, in cpu_amx_tile.h.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cpu_tiles.h"

#if GPT2K_PRODUCTS

namespace {

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

// The same on AMX, with X the type of both factors. The rows of x, packed once, are taken as many at a time as stay in
// a thread's second cache, and for these the weights are read once.
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
  const int64_t together = 1 + (768 << 10) / (kLinearRows * packed.row_bytes + 1);
  torch::stable::parallel_for(0, blocks_m * blocks_n, grain, [&](int64_t begin, int64_t end) {
    alignas(64) int32_t sums[kLinearRows * kLinearCols];
    amx::configure(packed.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / (together * blocks_n) * together;  // of the blocks of rows that are taken at a time
      const int64_t count = std::min(together, blocks_m - first), rest = i - first * blocks_n;
      const int64_t row = (first + rest % count) * kLinearRows, col = rest / count * kLinearCols;
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

#endif  // GPT2K_PRODUCTS
