// How layer norm and its gradients are split over threads. Included once, by cpu_ops.cpp; the arithmetic is in
// cpu_layernorm_tile.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "cpu_tiles.h"

namespace {

constexpr int64_t kNormGrain = 16 << 10;  // values that are worth a thread

template <class T>
struct Rows {  // with a dense last axis; null where there is no such tensor
  T* first;
  int64_t stride;

  T* operator[](int64_t row) const { return first == nullptr ? nullptr : first + row * stride; }
};

template <class T>
struct NormRows {  // (R, C) each
  Rows<const T> x, residual;
  const T *weight, *bias;  // (C,); bias or null
  Rows<T> total, y;
  float* statistics;  // (2, R)
  int64_t R, C;
};

template <class T>
void normalize_rows(const NormRows<T>& a, float eps) {
  const auto normalize = GPT2K_CHOOSE(normalize_row<T>);
  torch::stable::parallel_for(0, a.R, 1 + kNormGrain / a.C, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      normalize(a.x[r], a.residual[r], a.weight, a.bias, a.C, eps, a.total[r], a.y[r], a.statistics + r,
                a.statistics + a.R + r);
    }
  });
}

template <class T>
struct NormGradients {  // (R, C) each; results, and dtotal, are null where they are not wanted
  Rows<const T> dy, dtotal, x;
  const T* weight;          // (C,)
  const float* statistics;  // (2, R)
  Rows<T> dx;
  T *dweight, *dbias;  // (C,)
  int64_t R, C;
};

// The gradients of weight and bias are added up by parts, ranges of rows that R alone decides, and these from first to
// last: the same bits on any number of threads.
constexpr int64_t kPartRows = 16;  // in a part at least, or the sums of parts would be as large as the rows
constexpr int64_t kMostParts = 128;
constexpr int64_t kSumColumns = 256;  // of all parts that a thread adds at a time

template <class T>
void normalize_rows_backward(const NormGradients<T>& a, const Tensor& like) {
  const auto backward = GPT2K_CHOOSE(normalize_row_backward<T>);
  const auto add = GPT2K_CHOOSE(add_rows<T>);
  const int64_t rows = std::max(kPartRows, (a.R + kMostParts - 1) / kMostParts), parts = (a.R + rows - 1) / rows;
  const int64_t apart = (a.C + 15) / 16 * 16;  // every sum starts on a cache line: it is loaded and stored for each row
  const int64_t shift_at = a.dweight == nullptr ? 0 : apart, width = shift_at + (a.dbias == nullptr ? 0 : apart);
  const Tensor scratch = torch::stable::new_empty(like, {parts, width}, torch::headeronly::ScalarType::Float);
  float* sums = static_cast<float*>(scratch.mutable_data_ptr());
  torch::stable::parallel_for(0, parts, 1 + kNormGrain / (rows * a.C), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* mine = sums + part * width;
      std::fill(mine, mine + width, 0.0f);
      for (int64_t r = part * rows; r < std::min(a.R, (part + 1) * rows); ++r) {
        backward(a.dy[r], a.dtotal[r], a.x[r], a.weight, a.C, a.statistics[r], a.statistics[a.R + r], a.dx[r],
                 a.dweight == nullptr ? nullptr : mine, a.dbias == nullptr ? nullptr : mine + shift_at);
      }
    }
  });
  // In one go, and by one thread where they are few: to wake the others costs more.
  T* const results[] = {a.dweight == nullptr ? a.dbias : a.dweight, a.dbias};
  const int64_t blocks = (a.C + kSumColumns - 1) / kSumColumns, work = kSumColumns * (1 + parts);
  torch::stable::parallel_for(0, width / apart * blocks, 1 + 16 * kNormGrain / work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t which = i / blocks, c = i % blocks * kSumColumns;
      add(sums + which * apart + c, parts, width, std::min(kSumColumns, a.C - c), results[which] + c);
    }
  });
}

}  // namespace
