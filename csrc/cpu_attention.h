// How paged attention is split over instruction sets, tiles and threads. Included once, by cpu_ops.cpp; the arithmetic,
// and why its bits do not depend on any of this, is in cpu_attention_tile.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define GPT2K_AMX 1  // this compiler knows it, and this system says whether a process may use it
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define GPT2K_INLINE static inline __attribute__((always_inline))

using torch::stable::Tensor;

namespace {

constexpr int kChunk = 32;     // keys per softmax step, counted from position 0: part of the result's definition
constexpr int kDotLanes = 16;  // partial sums of a dot product: part of the result's definition
constexpr int kTileRows = 64;  // query rows that share one pass over the keys (no influence on the result)
constexpr int kWidenRows = 4;  // from this many rows on, keys and values are copied to float32 (no influence either)
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct BFloat16Bits {
  uint16_t bits;
};

GPT2K_INLINE float to_float(float x) { return x; }

GPT2K_INLINE float to_float(BFloat16Bits x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

GPT2K_INLINE void store_rounded(float* target, float x) { *target = x; }

GPT2K_INLINE void store_rounded(BFloat16Bits* target, float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  target->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

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

template <int... I>
struct Ints {};
template <int N, int... I>
struct MakeIntsFrom : MakeIntsFrom<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIntsFrom<0, I...> {
  using Type = Ints<I...>;
};
template <int N>
using MakeInts = typename MakeIntsFrom<N>::Type;  // 0, 1 ... N - 1

namespace portable {
#define GPT2K_LANES 4
#include "cpu_lanes.h"
#include "cpu_attention_tile.h"
#include "cpu_gelu_tile.h"
#include "cpu_layernorm_tile.h"
#include "cpu_crossentropy_tile.h"
#include "cpu_sample_tile.h"
#undef GPT2K_LANES
#undef GPT2K_SHUFFLE
}  // namespace portable

// Several instruction sets in one binary, chosen at run time: different machines may share the disk with the cache.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define GPT2K_LANES 8
#include "cpu_lanes.h"
#include "cpu_attention_tile.h"
#include "cpu_gelu_tile.h"
#include "cpu_layernorm_tile.h"
#include "cpu_crossentropy_tile.h"
#include "cpu_sample_tile.h"
#undef GPT2K_LANES
#undef GPT2K_SHUFFLE
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
namespace avx512 {
#define GPT2K_LANES 16
#include "cpu_lanes.h"
#include "cpu_attention_tile.h"
#include "cpu_gelu_tile.h"
#include "cpu_layernorm_tile.h"
#include "cpu_crossentropy_tile.h"
#include "cpu_sample_tile.h"
#undef GPT2K_LANES
#undef GPT2K_SHUFFLE
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__

#if GPT2K_AMX
// Whether the CPU multiplies tiles of bfloat16 and int8, and Linux lets this process hold them, which it must be asked.
bool detect_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBFloat16 | kTile | kInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

int detect_simd_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // some runtimes of clang's do not fill it in by themselves
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return 2;
#if GPT2K_AMX
    if (detect_amx()) return 4;
#endif
    return 3;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

std::atomic<int> simd_limit{4};

int simd_level_in_use() {
  static const int detected = detect_simd_level();
  const int limit = simd_limit.load(std::memory_order_relaxed);
  return detected < limit ? detected : limit;
}

// The function of that name for the instruction set in use.
#if defined(__x86_64__)
#define GPT2K_CHOOSE(...)                            \
  (simd_level_in_use() >= 2   ? &avx512::__VA_ARGS__ \
   : simd_level_in_use() == 1 ? &avx2::__VA_ARGS__   \
                              : &portable::__VA_ARGS__)
#else
#define GPT2K_CHOOSE(...) (&portable::__VA_ARGS__)
#endif

struct Sequences {  // int32 vectors of any stride
  const int32_t *lengths, *starts, *table;
  int64_t length_stride, start_stride, table_strides[2], count, max_blocks;

  Sequences(const Tensor& block_table, const Tensor& context_lens, const Tensor& cu_seqlens_q)
      : lengths(static_cast<const int32_t*>(context_lens.const_data_ptr())),
        starts(static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr())),
        table(static_cast<const int32_t*>(block_table.const_data_ptr())),
        length_stride(context_lens.stride(0)),
        start_stride(cu_seqlens_q.stride(0)),
        table_strides{block_table.stride(0), block_table.stride(1)},
        count(context_lens.size(0)),
        max_blocks(block_table.size(1)) {}

  int64_t length(int64_t sequence) const { return lengths[sequence * length_stride]; }
  int64_t start(int64_t sequence) const { return starts[sequence * start_stride]; }
  int64_t queries(int64_t sequence) const { return start(sequence + 1) - start(sequence); }
};

// Everything that becomes an address is looked at here, before any of it is used.
void check_sequences(const char* op, const Sequences& all, const AttentionShape& shape, int64_t num_blocks,
                     int64_t rows) {
  STD_TORCH_CHECK(all.start(0) == 0, op, ": cu_seqlens_q must start with 0, got ", all.start(0));
  for (int64_t s = 0; s < all.count; ++s) {
    STD_TORCH_CHECK(all.start(s + 1) >= all.start(s), op, ": cu_seqlens_q must not decrease, got ", all.start(s + 1),
                    " after ", all.start(s));
    STD_TORCH_CHECK(all.start(s + 1) <= rows, op, ": cu_seqlens_q must lie in 0..", rows, " (the rows of q), got ",
                    all.start(s + 1));
    const int64_t length = all.length(s), room = all.max_blocks * shape.block_size;
    STD_TORCH_CHECK(length >= 0 && length <= room, op, ": context_lens must lie in 0..", room,
                    " (max_blocks * block_size), got ", length);
    if (all.queries(s) == 0) continue;
    const int64_t first_position = length - all.queries(s);
    const int64_t first_key = visible_keys(shape, first_position).begin;  // blocks that left the window may be gone
    for (int64_t i = first_key / shape.block_size; i * shape.block_size < length; ++i) {
      const int64_t block = all.table[s * all.table_strides[0] + i * all.table_strides[1]];
      STD_TORCH_CHECK(block >= 0 && block < num_blocks, op, ": block_table must lie in 0..", num_blocks - 1, ", got ",
                      block);
    }
  }
}

// Tiles of one sequence and kv head, the last and longest first, so that no thread is left with a long one at the end.
std::vector<Tile> make_tiles(const Sequences& all, const AttentionShape& shape) {
  std::vector<Tile> tiles;
  const int64_t tile_queries = shape.group < kTileRows ? kTileRows / shape.group : 1;
  for (int64_t s = 0; s < all.count; ++s) {
    const int64_t queries = all.queries(s), first_position = all.length(s) - queries;
    for (int64_t head = 0; head < shape.kv_heads; ++head) {
      for (int64_t first = (queries - 1) / tile_queries * tile_queries; queries > 0 && first >= 0;
           first -= tile_queries) {
        const int64_t count = queries - first < tile_queries ? queries - first : tile_queries;
        tiles.push_back({s, head, all.start(s) + first, first_position + first, int(count)});
      }
    }
  }
  return tiles;
}

struct Scratch {
  float* memory;
  TileState state;

  Scratch(int64_t rows, int64_t dim) {
    const int64_t padded_rows = (rows + 15) / 16 * 16;  // keeps every part aligned to a cache line
    const int64_t count = 2 * rows * dim + 2 * padded_rows + 2 * kChunk * dim;
    memory = static_cast<float*>(::operator new(sizeof(float) * count, std::align_val_t(64)));
    state.q = memory;
    state.sums = state.q + rows * dim;
    state.keys = state.sums + rows * dim;
    state.values = state.keys + kChunk * dim;
    state.running_max = state.values + kChunk * dim;
    state.running_sum = state.running_max + padded_rows;
  }
  ~Scratch() { ::operator delete(memory, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

template <class T>
void run_tiles(const AttentionShape& shape, const Pointers<T>& data, const std::vector<Tile>& tiles) {
  if (tiles.empty()) return;
  const auto attend = GPT2K_CHOOSE(attend_tile<T>);
  int64_t work = 0, most_rows = 0;  // work in multiply-adds
  for (const Tile& tile : tiles) {
    const int64_t rows = int64_t(tile.queries) * shape.group;
    const KeyRange seen = visible_keys(shape, tile.first_position + tile.queries - 1);
    work += 2 * rows * shape.padded_dim * (seen.end > seen.begin ? seen.end - seen.begin : 0);
    most_rows = rows > most_rows ? rows : most_rows;
  }
  const int64_t count = int64_t(tiles.size());
  const int64_t useful_threads = 1 + work / (128 << 10);  // waking a thread costs about as much as 128 Ki multiply-adds
  const int64_t grain = (count + useful_threads - 1) / useful_threads;
  // Tiles differ in cost (causal mask, ragged lengths), so threads take the next few from a counter instead of a fixed
  // share: neighbours, whose keys lie side by side. While one is computed, the keys of the next come into the cache;
  // after the last of a run that is a guess, since another thread may be quicker to take it.
  const int64_t run = std::min<int64_t>(8, 1 + count / (8 * int64_t(torch::stable::get_num_threads())));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, grain, [&](int64_t, int64_t) {
    Scratch scratch(most_rows, shape.padded_dim);
    for (int64_t first = next.fetch_add(run); first < count; first = next.fetch_add(run)) {
      const int64_t last = std::min(first + run, count);
      for (int64_t i = first; i < last; ++i) {
        const int64_t following = i + 1 < last ? i + 1 : next.load(std::memory_order_relaxed);
        attend(shape, data, tiles[i], following < count ? &tiles[following] : nullptr, scratch.state);
      }
    }
  });
}

template <class T>
void attend_all(const AttentionShape& shape, const Sequences& all, const Tensor& q, const Tensor& k_cache,
                const Tensor& v_cache, Tensor& out) {
  Pointers<T> data;
  data.q = static_cast<const T*>(q.const_data_ptr());
  data.k = static_cast<const T*>(k_cache.const_data_ptr());
  data.v = static_cast<const T*>(v_cache.const_data_ptr());
  data.out = static_cast<T*>(out.mutable_data_ptr());
  data.block_table = all.table;
  for (int i = 0; i < 2; ++i) {
    data.q_strides[i] = q.stride(i);
    data.table_strides[i] = all.table_strides[i];
  }
  for (int i = 0; i < 3; ++i) {
    data.k_strides[i] = k_cache.stride(i);
    data.v_strides[i] = v_cache.stride(i);
  }
  run_tiles(shape, data, make_tiles(all, shape));
  const int64_t row_size = shape.heads * shape.head_dim, used = all.start(all.count);
  std::memset(static_cast<void*>(data.out + used * row_size), 0, sizeof(T) * (q.size(0) - used) * row_size);
}

}  // namespace
