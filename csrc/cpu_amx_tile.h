// Sums of products on AMX, included once, inside the namespace whose functions are compiled for it, after cpu_lanes.h.
//
// A tile is 16 rows of 64 bytes. Weights are loaded as they lie, 16 rows of the matrix at a time; it is x, the small
// operand, that is packed: the instruction wants the other factor in units of 32 bits, (unit along K, row of x). So a
// tile of sums is (16 columns of y, 16 rows of y) and is turned around when it is stored. A sum adds the products of
// one row and one column in an order that K alone decides, whatever the number of rows: in bfloat16, of each 64 bytes,
// those of even k and those of odd k, and what the two come to is added to what was there before; in int8 it is exact.

constexpr int kTileSide = 16;   // rows of a tile, and its columns of 32 bits
constexpr int kTileBytes = 64;  // of a row of a tile

// x as tiles: of rows 16 group .. 16 group + 15, the tiles along K, each (16 units, width rows) of 32 bits, 0 past the
// end of K. Fewer than 16 rows in all make the tiles narrower, else missing rows are 0.
struct Packed {
  int64_t rows, row_bytes, tiles, groups;
  int width;
  char* data;

  Packed(int64_t rows, int64_t row_bytes)
      : rows(rows),
        row_bytes(row_bytes),
        tiles((row_bytes + kTileBytes - 1) / kTileBytes),
        groups((rows + kTileSide - 1) / kTileSide),
        width(int(rows < kTileSide ? rows : kTileSide)),
        data(static_cast<char*>(::operator new(size_t(groups * tiles * tile_bytes() + 1), std::align_val_t(64)))) {}
  ~Packed() { ::operator delete(data, std::align_val_t(64)); }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  int64_t tile_bytes() const { return int64_t(kTileSide) * 4 * width; }
  char* group(int64_t i) const { return data + i * tiles * tile_bytes(); }
};

// Lane i of row j and lane j of row i change places.
template <int STEP, int... I>
GPT2K_INLINE void swap_squares(Lanes& a, Lanes& b, Ints<I...>) {
  const Lanes upper = GPT2K_SHUFFLE(a, b, ((I & STEP) ? kLanes + I - STEP : I)...);
  b = GPT2K_SHUFFLE(a, b, ((I & STEP) ? kLanes + I : I + STEP)...);
  a = upper;
}

template <int STEP = kLanes / 2>
GPT2K_INLINE void transpose(Lanes (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & STEP) == 0) swap_squares<STEP>(rows[i], rows[i + STEP], MakeInts<kLanes>{});
  }
  if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}

GPT2K_INLINE __mmask64 first_bytes(int64_t count) {  // of a row of a tile, all of them where there are more
  return count < kTileBytes ? (__mmask64(1) << count) - 1 : ~__mmask64(0);
}

static void pack_group(const Packed& to, int64_t group, const char* x, int64_t x_stride) {
  const int64_t first = group * kTileSide;
  const int rows = int(to.rows - first < kTileSide ? to.rows - first : kTileSide);
  char* target = to.group(group);
  for (int64_t k = 0; k < to.row_bytes; k += kTileBytes, target += to.tile_bytes()) {
    const __mmask64 mask = first_bytes(to.row_bytes - k);
    Lanes tile[kTileSide] = {};
    for (int row = 0; row < rows; ++row) {
      tile[row] = (Lanes)_mm512_maskz_loadu_epi8(mask, x + (first + row) * x_stride + k);
    }
    transpose(tile);
    for (int unit = 0; unit < kTileSide; ++unit) {
      store_some(reinterpret_cast<float*>(target) + unit * to.width, tile[unit], to.width);
    }
  }
}

// Tiles 4 and 5 are weights, 6 and 7 packed x, 0-3 sums; the last two kinds are as wide as there are rows of x.
static void configure(int width) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int tile = 0; tile < 8; ++tile) {
    shape.rows[tile] = kTileSide;
    shape.row_bytes[tile] = uint16_t(tile == 4 || tile == 5 ? kTileBytes : 4 * width);
  }
  __asm__ volatile("" : : "r"(&shape) : "memory");  // GCC's own intrinsic does not say that all of it is read
  _tile_loadconfig(&shape);
}

static void release() { _tile_release(); }

// The 16 rows of weights at `from`, from byte k on; where fewer are left, of rows or of bytes, a copy filled up with 0.
GPT2K_INLINE const char* weights_at(const char* from, int64_t stride, int rows, int64_t k, int64_t bytes,
                                    char* copy) {
  for (int row = 0; row < kTileSide; ++row) {
    const bool there = row < rows;
    const __mmask64 mask = there ? first_bytes(bytes - k) : 0;
    _mm512_storeu_si512(copy + row * kTileBytes, _mm512_maskz_loadu_epi8(mask, there ? from + row * stride + k : from));
  }
  return copy;
}

template <class X>
constexpr bool kIsInt8 = sizeof(X) == 1;

#define GPT2K_TILE_MULTIPLY(sums, weights, x) \
  if constexpr (kIsInt8<X>) {                 \
    _tile_dpbssd(sums, weights, x);           \
  } else {                                    \
    _tile_dpbf16ps(sums, weights, x);         \
  }

// 32 columns of y against GROUPS (1 or 2) groups of rows; FETCH brings the next 32 rows of weights into the cache.
template <class X, int GROUPS, bool FETCH>
GPT2K_INLINE void multiply_tiles(const Packed& x, int64_t group, const char* weight, int64_t stride, int cols) {
  const char *x0 = x.group(group), *x1 = x.group(group + (GROUPS == 2 ? 1 : 0));
  const int64_t x_stride = 4 * x.width;
  alignas(64) char copies[2][kTileSide * kTileBytes];
  const int64_t whole = cols == 2 * kTileSide ? x.row_bytes / kTileBytes : 0;  // tiles that are read where they lie
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (GROUPS == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t tile = 0; tile < x.tiles; ++tile) {
    const int64_t k = tile * kTileBytes;
    if (FETCH) {
#pragma GCC unroll 32
      for (int row = 0; row < 2 * kTileSide; ++row) {
        __builtin_prefetch(weight + (2 * kTileSide + row) * stride + k, 0, 2);
      }
    }
    const char *w0 = weight + k, *w1 = weight + kTileSide * stride + k;
    int64_t w_stride = stride;
    if (tile >= whole) {
      __asm__ volatile("" : : : "memory");  // the copies before have been loaded
      w0 = weights_at(weight, stride, cols, k, x.row_bytes, copies[0]);
      w1 = weights_at(weight + kTileSide * stride, stride, cols - kTileSide, k, x.row_bytes, copies[1]);
      w_stride = kTileBytes;
      __asm__ volatile("" : : : "memory");  // these are there
    }
    _tile_loadd(6, x0 + tile * x.tile_bytes(), x_stride);
    _tile_loadd(4, w0, w_stride);
    GPT2K_TILE_MULTIPLY(0, 4, 6);
    _tile_loadd(5, w1, w_stride);
    GPT2K_TILE_MULTIPLY(1, 5, 6);
    if constexpr (GROUPS == 2) {
      _tile_loadd(7, x1 + tile * x.tile_bytes(), x_stride);
      GPT2K_TILE_MULTIPLY(2, 4, 7);
      GPT2K_TILE_MULTIPLY(3, 5, 7);
    }
  }
}

// A tile of sums (16 columns of y, 16 rows) in memory to rows of `kLinearCols` sums.
GPT2K_INLINE void turn(const int32_t* tile, int32_t* sums) {
  Lanes rows[kTileSide];
#pragma GCC unroll 16
  for (int i = 0; i < kTileSide; ++i) rows[i] = load(reinterpret_cast<const float*>(tile) + i * kTileSide);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kTileSide; ++i) store(reinterpret_cast<float*>(sums) + i * kLinearCols, rows[i]);
}

// Rows row .. row + rows - 1 of x, row a multiple of 16, against `cols` rows of weights: sums (64, kLinearCols).
template <class X>
static void multiply_block(const Packed& x, int64_t row, int rows, const char* weight, int64_t stride, int cols,
                           int32_t* sums) {
  alignas(64) int32_t tiles[4][kTileSide * kTileSide];
  const int groups = (rows + kTileSide - 1) / kTileSide;
  for (int col = 0; col < cols; col += 2 * kTileSide) {
    const char* from = weight + col * stride;
    const int left = cols - col < 2 * kTileSide ? cols - col : 2 * kTileSide;
    for (int group = 0; group < groups; group += 2) {
      const int64_t at = row / kTileSide + group;
      const bool two = group + 1 < groups;
      if (two && group == 0) {
        multiply_tiles<X, 2, true>(x, at, from, stride, left);
      } else if (two) {
        multiply_tiles<X, 2, false>(x, at, from, stride, left);
      } else if (group == 0) {
        multiply_tiles<X, 1, true>(x, at, from, stride, left);
      } else {
        multiply_tiles<X, 1, false>(x, at, from, stride, left);
      }
      int32_t* target = sums + group * kTileSide * kLinearCols + col;
      _tile_stored(0, tiles[0], kTileBytes);
      _tile_stored(1, tiles[1], kTileBytes);
      turn(tiles[0], target);
      turn(tiles[1], target + kTileSide);
      if (two) {
        _tile_stored(2, tiles[2], kTileBytes);
        _tile_stored(3, tiles[3], kTileBytes);
        turn(tiles[2], target + kTileSide * kLinearCols);
        turn(tiles[3], target + kTileSide * kLinearCols + kTileSide);
      }
    }
  }
}

#undef GPT2K_TILE_MULTIPLY
