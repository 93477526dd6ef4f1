// y = activation(x weight^T + bias) + residual on registers of dot products, included once, inside the namespace whose
// functions are compiled for AVX-512 with BF16 and VNNI, after cpu_lanes.h and cpu_gelu_tile.h.
//
// A value of y is 16 partial sums (lane i adds elements of K as they lie in a register, from 0 up), folded 8, 4, 2, 1
// apart: the same additions whatever the number of rows, the tile and the thread. Weights stay as PyTorch keeps them,
// (N, K), both operands dense along K, so nothing is packed and nothing is held twice.

// One register of each operand, loaded and multiplied; kStep elements of K at a time.
struct Float32Dot {
  using X = float;
  using Weight = float;
  using Sum = Lanes;
  static constexpr int kStep = 16;
  static constexpr int kSide = 4;  // rows of weight that one row of x meets side by side
  using Mask = __mmask16;
  GPT2K_INLINE __m512i load(const float* p) { return _mm512_loadu_si512(p); }
  GPT2K_INLINE __m512i load(const float* p, Mask mask) { return _mm512_maskz_loadu_epi32(mask, p); }
  GPT2K_INLINE __m512i weight(__m512i w) { return w; }
  GPT2K_INLINE Lanes add(Lanes sum, __m512i x, __m512i w) {
    return (Lanes)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
  }
};

struct BFloat16Dot {
  using X = BFloat16Bits;
  using Weight = BFloat16Bits;
  using Sum = Lanes;
  static constexpr int kStep = 32;
  static constexpr int kSide = 1;
  using Mask = __mmask32;
  GPT2K_INLINE __m512i load(const BFloat16Bits* p) { return _mm512_loadu_si512(p); }
  GPT2K_INLINE __m512i load(const BFloat16Bits* p, Mask mask) { return _mm512_maskz_loadu_epi16(mask, p); }
  GPT2K_INLINE __m512i weight(__m512i w) { return w; }
  GPT2K_INLINE Lanes add(Lanes sum, __m512i x, __m512i w) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};

struct Int8Dot {  // VNNI multiplies unsigned by signed: weights are read as w + 128, which adds 128 sum(x) to a row
  using X = int8_t;
  using Weight = int8_t;
  using Sum = IntLanes;
  static constexpr int kStep = 64;
  static constexpr int kSide = 1;
  using Mask = __mmask64;
  GPT2K_INLINE __m512i load(const int8_t* p) { return _mm512_loadu_si512(p); }
  GPT2K_INLINE __m512i load(const int8_t* p, Mask mask) { return _mm512_maskz_loadu_epi8(mask, p); }
  GPT2K_INLINE __m512i weight(__m512i w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
  GPT2K_INLINE IntLanes add(IntLanes sum, __m512i x, __m512i w) {
    return (IntLanes)_mm512_dpbusd_epi32((__m512i)sum, w, x);
  }
};

// The sums of ROWS rows of x with 16 / ROWS rows of weight, lane by lane, over the elements from `begin` to `end`.
// FETCHED rows of weight that come later, from `next` on, are brought into the cache meanwhile.
template <class Dot, int ROWS, int FETCHED>
GPT2K_INLINE void dot_tile(typename Dot::Sum (&sums)[16], const typename Dot::X* const* x,
                           const typename Dot::Weight* const* weight, int64_t begin, int64_t end,
                           const typename Dot::Weight* next, int64_t stride) {
  constexpr int kCols = 16 / ROWS;
  int64_t k = begin;
  for (; k + Dot::kStep <= end; k += Dot::kStep) {
    __m512i rows[ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) rows[row] = Dot::load(x[row] + k);
#pragma GCC unroll 16
    for (int row = 0; row < FETCHED; ++row) __builtin_prefetch(next + row * stride + k, 0, 2);
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
      const __m512i w = Dot::weight(Dot::load(weight[col] + k));
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        sums[row * kCols + col] = Dot::add(sums[row * kCols + col], rows[row], w);
      }
    }
  }
  if (k < end) {
    const auto mask = typename Dot::Mask((uint64_t(1) << (end - k)) - 1);
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
      const __m512i w = Dot::weight(Dot::load(weight[col] + k, mask));
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        sums[row * kCols + col] = Dot::add(sums[row * kCols + col], Dot::load(x[row] + k, mask), w);
      }
    }
  }
}

// Sums of `rows` rows with `cols` columns, ROWS rows with twice 16 / ROWS columns at a time, so that what is loaded of
// x serves two tiles; what lies past either end repeats the last one. The weights of the next columns are fetched
// while these are multiplied, FETCHED of them in each of the first passes over the rows, so that the first pass alone
// does not wait for memory. With PIECES K is cut so that these columns stay in the innermost cache for all rows; the
// lanes of unfinished sums are kept between two pieces, which changes no bit.
template <class Dot, int ROWS, int FETCHED, bool PIECES = false>
GPT2K_INLINE void dot_columns(const LinearBlock<typename Dot::X, typename Dot::Weight>& block, int32_t* sums) {
  constexpr int kCols = 16 / ROWS, kTiles = 2;
  typename Dot::Sum kept[PIECES ? kLinearRows / ROWS : 1][kTiles][16];
  const int64_t stride = block.weight_stride;
  // 4 rows of x and 8 of weights are three quarters of that cache
  const int64_t piece = inner_cache_bytes() / 16 / int64_t(sizeof(typename Dot::X)) / Dot::kStep * Dot::kStep;
  for (int first = 0; first < block.cols; first += kTiles * kCols) {
    int64_t begin = 0, end;
    do {
      end = PIECES && block.K - begin > piece ? begin + piece : block.K;
      for (int row = 0, fetched = 0; row < block.rows; row += ROWS, fetched += FETCHED) {
        const typename Dot::X* x[ROWS];
        for (int i = 0; i < ROWS; ++i) {
          x[i] = block.x + (row + i < block.rows ? row + i : block.rows - 1) * block.x_stride;
        }
        for (int tile = 0; tile < kTiles && first + tile * kCols < block.cols; ++tile) {
          const int col = first + tile * kCols;
          const typename Dot::Weight* weight[kCols];
          for (int i = 0; i < kCols; ++i) {
            weight[i] = block.weight + (col + i < block.cols ? col + i : block.cols - 1) * stride;
          }
          const typename Dot::Weight* next = block.weight + (col + kTiles * kCols + fetched) * stride;
          typename Dot::Sum lanes[16] = {};
          if (PIECES && begin > 0) std::memcpy(lanes, kept[row / ROWS][tile], sizeof(lanes));
          if (fetched < kCols) {
            dot_tile<Dot, ROWS, FETCHED>(lanes, x, weight, begin, end, next, stride);
          } else {
            dot_tile<Dot, ROWS, 0>(lanes, x, weight, begin, end, next, stride);
          }
          if (PIECES && end < block.K) {
            std::memcpy(kept[row / ROWS][tile], lanes, sizeof(lanes));
            continue;
          }
          const auto folded = sum_each(lanes);  // lane row * kCols + column
          for (int i = 0; i < ROWS; ++i) {
            std::memcpy(sums + (row + i) * kLinearCols + col, reinterpret_cast<const int32_t*>(&folded) + i * kCols,
                        sizeof(int32_t) * kCols);
          }
        }
      }
      begin = end;
    } while (begin < block.K);
  }
}

// One row of x: memory is read from one end to the other, in as many streams as measured best, with a word ahead to
// processors that do not foresee it (a fifth of the bandwidth on an Intel). Sixteen rows side by side cost int8 a fifth
// on an AMD.
constexpr int kAhead = 2048;  // bytes

template <class Dot>
GPT2K_INLINE void dot_row(const LinearBlock<typename Dot::X, typename Dot::Weight>& block, int32_t* sums) {
  constexpr int kSide = Dot::kSide;
  const auto mask = typename Dot::Mask((uint64_t(1) << block.K % Dot::kStep) - 1);
  for (int col = 0; col < block.cols; col += 16) {
    typename Dot::Sum tile[16] = {};
#pragma GCC unroll 16
    for (int first = 0; first < 16; first += kSide) {
      const typename Dot::Weight* weight[kSide];
      for (int i = 0; i < kSide; ++i) {
        const int at = col + first + i;
        weight[i] = block.weight + (at < block.cols ? at : block.cols - 1) * block.weight_stride;
      }
      int64_t k = 0;
      for (; k + Dot::kStep <= block.K; k += Dot::kStep) {
        const __m512i x = Dot::load(block.x + k);
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) {
          __builtin_prefetch(reinterpret_cast<const char*>(weight[i] + k) + kAhead, 0, 3);
          tile[first + i] = Dot::add(tile[first + i], x, Dot::weight(Dot::load(weight[i] + k)));
        }
      }
      if (k == block.K) continue;
      const __m512i x = Dot::load(block.x + k, mask);
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        tile[first + i] = Dot::add(tile[first + i], x, Dot::weight(Dot::load(weight[i] + k, mask)));
      }
    }
    const auto folded = sum_each(tile);
    std::memcpy(sums + col, &folded, sizeof(folded));
  }
}

template <class Dot>
static void dot_block(const LinearBlock<typename Dot::X, typename Dot::Weight>& block, int32_t* sums) {
  if (block.rows == 1) return dot_row<Dot>(block, sums);
  if (block.rows == 2) return dot_columns<Dot, 2, 8>(block, sums);
  if (block.rows <= 4) return dot_columns<Dot, 4, 4>(block, sums);
  if (block.rows <= 12) return dot_columns<Dot, 4, 2>(block, sums);
  dot_columns<Dot, 4, 1, true>(block, sums);
}

// One row of a block, its sums in float32: bias, activation, residual, one rounding.
template <class T>
GPT2K_INLINE void finish_lanes(Lanes y, const LinearEpilogue<T>& to, int64_t row, int64_t col, int count) {
  if (to.bias != nullptr) y = y + load_some(to.bias + col, count);
  if (to.pre != nullptr) store_some(to.pre + row * to.N + col, y, count);
  if (to.activation == 2) {
    y = gelu_tanh(y);
  } else if (to.activation == 1) {
    float lanes[kLanes];
    store(lanes, y);
    for (float& value : lanes) value = 0.5f * value * (1.0f + std::erf(value * 0.707106781f));
    y = load(lanes);
  }
  if (to.residual != nullptr) y = y + load_some(to.residual + row * to.residual_stride + col, count);
  store_some(to.y + row * to.N + col, y, count);
}

template <class T>
static void finish_block(const int32_t* sums, const LinearEpilogue<T>& to, int64_t first_row, int rows,
                         int64_t first_col, int cols) {
  for (int row = 0; row < rows; ++row) {
    for (int col = 0; col < cols; col += kLanes) {
      const int32_t* here = sums + row * kLinearCols + col;
      Lanes y;
      if (to.weight_scale == nullptr) {
        y = load(reinterpret_cast<const float*>(here));
      } else {
        IntLanes exact;
        std::memcpy(&exact, here, sizeof(exact));
        if (to.x_sum != nullptr) exact = exact - 128 * to.x_sum[first_row + row];
        const Lanes scale = load_some(to.weight_scale + first_col + col, cols - col < kLanes ? cols - col : kLanes);
        y = __builtin_convertvector(exact, Lanes) * (scale * to.x_scale[first_row + row]);
      }
      finish_lanes(y, to, first_row + row, first_col + col, cols - col < kLanes ? cols - col : kLanes);
    }
  }
}

// One row of x in int8: its largest magnitude becomes 127. A row of nothing larger than 4e-37, whose 127 / largest is
// no float32, becomes 0; one with a NaN or an infinity gets the scale NaN, and with it every y of that row.
template <class T>
static void quantize_row(const T* x, int64_t K, int8_t* q, float* scale, int32_t* sum) {
  const int64_t whole = K / kLanes * kLanes;
  const int rest = int(K - whole);
  Lanes top = {}, odd = {};
  const auto look = [&](Lanes v) __attribute__((always_inline)) {
    top = larger(top, (Lanes)((BitLanes)v & 0x7fffffffu));
    odd = odd + v * 0.0f;
  };
  for (int64_t k = 0; k < whole; k += kLanes) look(load(x + k));
  if (rest > 0) look(load_some(x + whole, rest));
  const float largest = horizontal_max(top) + horizontal_sum(odd);
  const float inverse = largest > 4e-37f ? 127.0f / largest : 0.0f;
  *scale = largest * (1.0f / 127.0f);
  __m512i total = _mm512_setzero_si512();
  const auto round = [&](Lanes v) __attribute__((always_inline)) {  // to nearest, ties to even
    const __m512i integers = _mm512_cvtps_epi32((__m512)(v * inverse));
    total = _mm512_add_epi32(total, integers);
    return _mm512_cvtsepi32_epi8(integers);
  };
  for (int64_t k = 0; k < whole; k += kLanes) _mm_storeu_si128((__m128i*)(q + k), round(load(x + k)));
  if (rest > 0) {
    const __m128i bytes = round(load_some(x + whole, rest));
    std::memcpy(q + whole, &bytes, rest);
  }
  *sum = _mm512_reduce_add_epi32(total);
}
