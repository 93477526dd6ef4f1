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
  using Mask = __mmask64;
  GPT2K_INLINE __m512i load(const int8_t* p) { return _mm512_loadu_si512(p); }
  GPT2K_INLINE __m512i load(const int8_t* p, Mask mask) { return _mm512_maskz_loadu_epi8(mask, p); }
  GPT2K_INLINE __m512i weight(__m512i w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
  GPT2K_INLINE IntLanes add(IntLanes sum, __m512i x, __m512i w) {
    return (IntLanes)_mm512_dpbusd_epi32((__m512i)sum, w, x);
  }
};

// ROWS rows of x against 16 / ROWS rows of weight: lane row * COLS + column of the result. `ahead` elements further on
// lie the weights that come next.
template <class Dot, int ROWS, bool PREFETCH>
GPT2K_INLINE typename Dot::Sum dot_tile(const typename Dot::X* const* x, const typename Dot::Weight* const* weight,
                                        int64_t K, int64_t ahead) {
  constexpr int kCols = 16 / ROWS;
  typename Dot::Sum sums[16] = {};
  int64_t k = 0;
  for (; k + Dot::kStep <= K; k += Dot::kStep) {
    __m512i rows[ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) rows[row] = Dot::load(x[row] + k);
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
      const __m512i w = Dot::weight(Dot::load(weight[col] + k));
      if (PREFETCH) __builtin_prefetch(weight[col] + k + ahead, 0, 2);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        sums[row * kCols + col] = Dot::add(sums[row * kCols + col], rows[row], w);
      }
    }
  }
  if (k < K) {
    const auto mask = typename Dot::Mask((uint64_t(1) << (K - k)) - 1);
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
      const __m512i w = Dot::weight(Dot::load(weight[col] + k, mask));
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        sums[row * kCols + col] = Dot::add(sums[row * kCols + col], Dot::load(x[row] + k, mask), w);
      }
    }
  }
  return sum_each(sums);
}

// Sums of `rows` rows with `cols` columns, COLS at a time; what lies past either end repeats the last one.
template <class Dot, int ROWS>
GPT2K_INLINE void dot_columns(const LinearBlock<typename Dot::X, typename Dot::Weight>& block, int32_t* sums) {
  constexpr int kCols = 16 / ROWS;
  for (int col = 0; col < block.cols; col += kCols) {
    const typename Dot::Weight* weight[kCols];
    for (int i = 0; i < kCols; ++i) {
      weight[i] = block.weight + (col + i < block.cols ? col + i : block.cols - 1) * block.weight_stride;
    }
    for (int row = 0; row < block.rows; row += ROWS) {
      const typename Dot::X* x[ROWS];
      for (int i = 0; i < ROWS; ++i) x[i] = block.x + (row + i < block.rows ? row + i : block.rows - 1) * block.x_stride;
      const auto tile = row == 0 ? dot_tile<Dot, ROWS, true>(x, weight, block.K, kCols * block.weight_stride)
                                 : dot_tile<Dot, ROWS, false>(x, weight, block.K, 0);
      for (int i = 0; i < ROWS; ++i) {
        std::memcpy(sums + (row + i) * kLinearCols + col, reinterpret_cast<const int32_t*>(&tile) + i * kCols,
                    sizeof(int32_t) * kCols);
      }
    }
  }
}

template <class Dot>
static void dot_block(const LinearBlock<typename Dot::X, typename Dot::Weight>& block, int32_t* sums) {
  if (block.rows == 1) return dot_columns<Dot, 1>(block, sums);
  if (block.rows == 2) return dot_columns<Dot, 2>(block, sums);
  dot_columns<Dot, 4>(block, sums);
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
        exact = exact - 128 * to.x_sum[first_row + row];
        const Lanes scale = load_some(to.weight_scale + first_col + col, cols - col < kLanes ? cols - col : kLanes);
        y = __builtin_convertvector(exact, Lanes) * (scale * to.x_scale[first_row + row]);
      }
      finish_lanes(y, to, first_row + row, first_col + col, cols - col < kLanes ? cols - col : kLanes);
    }
  }
}

// One row of x in int8: its largest magnitude becomes 127. A row with a NaN or infinity gets the scale NaN, and with it
// every y of that row.
template <class T>
static void quantize_row(const T* x, int64_t K, int8_t* q, float* scale, int32_t* sum) {
  Lanes top = {}, odd = {};
  for (int64_t k = 0; k < K; k += kLanes) {
    const Lanes v = load_some(x + k, K - k < kLanes ? int(K - k) : kLanes);
    top = larger(top, (Lanes)((BitLanes)v & 0x7fffffffu));
    odd = odd + v * 0.0f;
  }
  const float largest = horizontal_max(top) + horizontal_sum(odd);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  *scale = largest * (1.0f / 127.0f);
  IntLanes total = {};
  for (int64_t k = 0; k < K; k += kLanes) {
    const int count = K - k < kLanes ? int(K - k) : kLanes;
    const __m512i whole = _mm512_cvtps_epi32((__m512)(load_some(x + k, count) * inverse));  // to nearest, ties to even
    total = total + (IntLanes)whole;
    const __m128i bytes = _mm512_cvtsepi32_epi8(whole);
    std::memcpy(q + k, &bytes, count);
  }
  *sum = _mm512_reduce_add_epi32((__m512i)total);
}
