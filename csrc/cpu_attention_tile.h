// The arithmetic of paged attention on a CPU. cpu_attention.h includes this file once per instruction set, each time
// inside another namespace and with another GPT2K_LANES (floats per register: 16 AVX-512, 8 AVX2, 4 anywhere), so there
// is no include guard.
//
// The rule that shapes everything here: a query row's bits depend on its q, keys, values and position alone.
//   * Keys are walked in chunks of kChunk positions counted from position 0, whatever the block size or the tile.
//   * A dot product is 16 partial sums (lane i adds dimensions i, i + 16, i + 32 ...), folded 8, 4, 2, 1 apart.
//   * Values are added key by key, by position; the sum of a chunk's 32 weights folds 16, 8, 4, 2, 1 apart.
//   * Multiply-adds are written out and -ffp-contract=off forbids others: the compiler has no say in rounding.
// Hence one row alone (decode) and four rows at once (prefill) run the same additions, and AVX-512, AVX2 and NEON give
// the same bits. Only x86 without FMA (before 2013) rounds twice in a multiply-add, and is consistent with itself.

constexpr int kParts = kDotLanes / kLanes;  // registers that hold the 16 partial sums of one dot product

// Dot products of ROWS queries with kLanes / ROWS keys, dots[row * keys + key], still spread over the lanes: register
// `part` of the 16 partial sums. With STRIDE < kParts the parts are folded, those farthest apart first (8, then 4).
template <int ROWS, int STRIDE, class T>
GPT2K_INLINE void partial_dots(const float* q, const T* const* keys, int dim, int part, Lanes (&dots)[kLanes]) {
  constexpr int kKeys = kLanes / ROWS;
  if constexpr (STRIDE < kParts) {
    Lanes second[kLanes];
    partial_dots<ROWS, STRIDE * 2>(q, keys, dim, part, dots);
    partial_dots<ROWS, STRIDE * 2>(q, keys, dim, part + STRIDE, second);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) dots[i] = dots[i] + second[i];
  } else {
    Lanes sums[kLanes] = {};
    for (int d = part * kLanes; d < dim; d += kDotLanes) {
      Lanes query[ROWS];
#pragma GCC unroll 4
      for (int row = 0; row < ROWS; ++row) query[row] = load(q + row * dim + d);
#pragma GCC unroll 16
      for (int key = 0; key < kKeys; ++key) {
        const Lanes k = load(keys[key] + d);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
          sums[row * kKeys + key] = multiply_add(query[row], k, sums[row * kKeys + key]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) dots[i] = sums[i];
  }
}

// scores[row][key] = scale * (q[row] . keys[key]) for first <= key < last, -inf for the other keys of the chunk.
template <int ROWS, class T>
GPT2K_INLINE void score_chunk(const float* q, const T* const* keys, int first, int last, int dim, float scale,
                              float (&scores)[ROWS][kChunk]) {
  constexpr int kKeys = kLanes / ROWS;
  for (int start = first / kKeys * kKeys; start < last; start += kKeys) {
    const T* some_keys[kKeys];  // a key that must not be seen is not read either: the first visible one stands in
    for (int i = 0; i < kKeys; ++i) some_keys[i] = keys[start + i >= first && start + i < last ? start + i : first];
    Lanes dots[kLanes];
    partial_dots<ROWS, 1>(q, some_keys, dim, 0, dots);
    float flat[kLanes];
    store(flat, sum_each(dots) * scale);
    for (int row = 0; row < ROWS; ++row) std::memcpy(&scores[row][start], flat + row * kKeys, sizeof(float) * kKeys);
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int i = 0; i < first; ++i) scores[row][i] = -kInfinity;
    for (int i = last; i < kChunk; ++i) scores[row][i] = -kInfinity;
  }
}

// Turns one row's scores into weights exp(score - running max) and returns what the sums so far must be multiplied by.
GPT2K_INLINE float update_softmax(float (&scores)[kChunk], float& running_max, float& running_sum) {
  Lanes top = load(scores);
  for (int i = kLanes; i < kChunk; i += kLanes) top = larger(top, load(scores + i));
  const float chunk_max = horizontal_max(top);
  const float new_max = chunk_max > running_max ? chunk_max : running_max;
  // exp(0) would give 1 as well; skipping it saves an exponential once the maximum has settled.
  const float rescale = new_max > running_max ? exponential(broadcast(running_max - new_max))[0] : 1.0f;
  const float shift = new_max == -kInfinity ? 0.0f : new_max;  // every score so far -inf: weights 0, not NaN
  Lanes weights[kChunk / kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kChunk / kLanes; ++i) {
    weights[i] = exponential(load(scores + i * kLanes) - shift);
    store(scores + i * kLanes, weights[i]);
  }
#pragma GCC unroll 4
  for (int step = kChunk / kLanes / 2; step > 0; step /= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < step; ++i) weights[i] = weights[i] + weights[i + step];
  }
  running_sum = running_sum * rescale + horizontal_sum(weights[0]);
  running_max = new_max;
  return rescale;
}

// sums[row][0 .. REGISTERS * kLanes) = sums * rescale[row] + weights[row][key] * values[key], key after key.
template <int ROWS, int REGISTERS, class T>
GPT2K_INLINE void add_values(const float (&weights)[ROWS][kChunk], const float* rescale, const T* const* values,
                             int first, int last, int dim, int offset, float* sums) {
  Lanes total[ROWS][REGISTERS];
#pragma GCC unroll 4
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 16
    for (int i = 0; i < REGISTERS; ++i) total[row][i] = load(sums + row * dim + offset + i * kLanes) * rescale[row];
  }
  for (int key = first; key < last; ++key) {
    const T* value_row = values[key] + offset;
    Lanes value[REGISTERS];
#pragma GCC unroll 16
    for (int i = 0; i < REGISTERS; ++i) value[i] = load(value_row + i * kLanes);
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
      const Lanes weight = broadcast(weights[row][key]);
#pragma GCC unroll 16
      for (int i = 0; i < REGISTERS; ++i) total[row][i] = multiply_add(weight, value[i], total[row][i]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 16
    for (int i = 0; i < REGISTERS; ++i) store(sums + row * dim + offset + i * kLanes, total[row][i]);
  }
}

// The keys first <= key < last of one chunk for ROWS neighbouring rows: the only place where a row meets its keys.
template <int ROWS, class T>
static void attend_chunk(const T* const* keys, const T* const* values, int first, int last, int dim, float scale,
                         const float* q, float* sums, float* running_max, float* running_sum) {
  alignas(64) float weights[ROWS][kChunk];
  float rescale[ROWS];
  score_chunk<ROWS>(q, keys, first, last, dim, scale, weights);
  for (int row = 0; row < ROWS; ++row) rescale[row] = update_softmax(weights[row], running_max[row], running_sum[row]);
  // as many sums as registers hold: 16 registers of AVX-512, 8 elsewhere
  constexpr int kWide = kLanes == 16 || ROWS == 1 ? 4 * 16 : 16;
  int offset = 0;
  for (; offset + kWide <= dim; offset += kWide) {
    add_values<ROWS, kWide / kLanes>(weights, rescale, values, first, last, dim, offset, sums);
  }
  for (; offset < dim; offset += 16) {
    add_values<ROWS, 16 / kLanes>(weights, rescale, values, first, last, dim, offset, sums);
  }
}

GPT2K_INLINE void widen_row(const float* source, int head_dim, int dim, float* target) {
  for (int d = 0; d < head_dim; ++d) target[d] = source[d];
  for (int d = head_dim; d < dim; ++d) target[d] = 0.0f;
}

GPT2K_INLINE void widen_row(const BFloat16Bits* source, int head_dim, int dim, float* target) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(target + d, load(source + d));
  for (; d < head_dim; ++d) target[d] = to_float(source[d]);
  for (; d < dim; ++d) target[d] = 0.0f;
}

// All rows of a tile against one chunk. Four rows go together where all of them see the whole chunk; rows at the edge
// of the causal mask or of the window go one by one over exactly the keys they see.
template <class T>
static void attend_rows(const AttentionShape& shape, const Tile& tile, int64_t chunk_start, const T* const* keys,
                        const T* const* values, const TileState& state) {
  const int dim = shape.padded_dim;
  const int64_t chunk_end = chunk_start + kChunk;
  const int rows = tile.queries * shape.group;
  for (int row = 0; row < rows;) {
    const KeyRange seen = visible_keys(shape, tile.first_position + row / shape.group);
    if constexpr (sizeof(T) == sizeof(float)) {  // four rows or more read widened keys, see attend_tile
      if (row + 4 <= rows && seen.end >= chunk_end &&
          visible_keys(shape, tile.first_position + (row + 3) / shape.group).begin <= chunk_start) {
        attend_chunk<4>(keys, values, 0, kChunk, dim, shape.scale, state.q + row * dim, state.sums + row * dim,
                        state.running_max + row, state.running_sum + row);
        row += 4;
        continue;
      }
    }
    const int first = seen.begin > chunk_start ? int(seen.begin < chunk_end ? seen.begin - chunk_start : kChunk) : 0;
    const int last = seen.end < chunk_end ? int(seen.end > chunk_start ? seen.end - chunk_start : 0) : kChunk;
    if (first < last) {
      attend_chunk<1>(keys, values, first, last, dim, shape.scale, state.q + row * dim, state.sums + row * dim,
                      state.running_max + row, state.running_sum + row);
    }
    ++row;
  }
}

// Where the keys and values of one chunk lie: entries first <= i < last of keys and values.
template <class T>
GPT2K_INLINE void find_rows(const AttentionShape& shape, const Pointers<T>& data, const Tile& tile, int64_t chunk_start,
                            int first, int last, const T** keys, const T** values) {
  const int32_t* table = data.block_table + tile.sequence * data.table_strides[0];
  int64_t entry = (chunk_start + first) / shape.block_size, slot = (chunk_start + first) % shape.block_size;
  int64_t block = 0;
  for (int i = first; i < last; ++i, ++slot) {
    if (slot == shape.block_size) {
      slot = 0;
      ++entry;
    }
    if (slot == 0 || i == first) block = table[entry * data.table_strides[1]];
    keys[i] = data.k + block * data.k_strides[0] + slot * data.k_strides[1] + tile.kv_head * data.k_strides[2];
    values[i] = data.v + block * data.v_strides[0] + slot * data.v_strides[1] + tile.kv_head * data.v_strides[2];
  }
}

// Blocks lie anywhere in memory, so the hardware does not foresee them; asked for one chunk ahead, they come from
// memory faster (8 sequences of 1024 keys, larger than the caches: 1.3 to 2 times).
template <class T>
GPT2K_INLINE void fetch_rows(const AttentionShape& shape, const T* const* keys, const T* const* values, int first,
                             int last) {
  for (int i = first; i < last; ++i) {
    for (int d = 0; d < shape.head_dim; d += int(64 / sizeof(T))) {
      __builtin_prefetch(keys[i] + d, 0, 2);
      __builtin_prefetch(values[i] + d, 0, 2);
    }
  }
}

// The first chunk of a tile, which is computed after the one at hand.
template <class T>
static void fetch_tile(const AttentionShape& shape, const Pointers<T>& data, const Tile& tile) {
  const int64_t begin = visible_keys(shape, tile.first_position).begin, chunk = begin / kChunk * kChunk;
  const int64_t end = visible_keys(shape, tile.first_position + tile.queries - 1).end;
  const int first = int(begin - chunk), last = chunk + kChunk > end ? int(end - chunk) : kChunk;
  const T *keys[kChunk] = {}, *values[kChunk] = {};
  find_rows(shape, data, tile, chunk, first, last, keys, values);
  fetch_rows(shape, keys, values, first, last);
}

// One tile: neighbouring queries of one sequence, for the query heads that share one kv head. `following` is the tile
// that the same thread is likely to compute after it, or null.
template <class T>
static void attend_tile(const AttentionShape& shape, const Pointers<T>& data, const Tile& tile, const Tile* following,
                        const TileState& state) {
  const int dim = shape.padded_dim;
  const int rows = tile.queries * shape.group;
  for (int row = 0; row < rows; ++row) {
    const int64_t query = tile.first_row + row / shape.group, head = tile.kv_head * shape.group + row % shape.group;
    widen_row(data.q + query * data.q_strides[0] + head * data.q_strides[1], shape.head_dim, dim, state.q + row * dim);
    for (int d = 0; d < dim; ++d) state.sums[row * dim + d] = 0.0f;
    state.running_max[row] = -kInfinity;
    state.running_sum[row] = 0.0f;
  }
  // Copying a chunk to float32 pays off once several rows read it, and pads odd head dimensions with zeros.
  const bool widen = rows >= kWidenRows || shape.head_dim != dim;
  const int64_t begin = visible_keys(shape, tile.first_position).begin;
  const int64_t end = visible_keys(shape, tile.first_position + tile.queries - 1).end;
  const T *keys[kChunk] = {}, *values[kChunk] = {}, *next_keys[kChunk] = {}, *next_values[kChunk] = {};
  for (int64_t chunk = begin / kChunk * kChunk; chunk < end; chunk += kChunk) {
    const int first = chunk < begin ? int(begin - chunk) : 0, last = chunk + kChunk > end ? int(end - chunk) : kChunk;
    if (chunk <= begin) {
      find_rows(shape, data, tile, chunk, first, last, keys, values);
    } else {
      std::memcpy(keys, next_keys, sizeof(keys));
      std::memcpy(values, next_values, sizeof(values));
    }
    const int64_t next = chunk + kChunk;
    if (next < end) {
      const int next_last = next + kChunk > end ? int(end - next) : kChunk;
      find_rows(shape, data, tile, next, 0, next_last, next_keys, next_values);
      fetch_rows(shape, next_keys, next_values, 0, next_last);
    } else if (following != nullptr) {
      fetch_tile(shape, data, *following);
    }
    if (widen) {
      const float *wide_keys[kChunk] = {}, *wide_values[kChunk] = {};
      for (int i = first; i < last; ++i) {
        widen_row(keys[i], shape.head_dim, dim, state.keys + i * dim);
        widen_row(values[i], shape.head_dim, dim, state.values + i * dim);
        wide_keys[i] = state.keys + i * dim;
        wide_values[i] = state.values + i * dim;
      }
      attend_rows(shape, tile, chunk, wide_keys, wide_values, state);
    } else {
      attend_rows(shape, tile, chunk, keys, values, state);
    }
  }
  for (int row = 0; row < rows; ++row) {
    const int64_t query = tile.first_row + row / shape.group, head = tile.kv_head * shape.group + row % shape.group;
    const KeyRange seen = visible_keys(shape, tile.first_position + row / shape.group);
    T* out = data.out + (query * shape.heads + head) * shape.head_dim;
    for (int d = 0; d < shape.head_dim; ++d) {
      store_rounded(out + d, seen.begin < seen.end ? state.sums[row * dim + d] / state.running_sum[row] : 0.0f);
    }
  }
}
