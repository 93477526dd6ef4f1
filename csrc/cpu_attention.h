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
#include <new>
#include <vector>

#include "cpu_tiles.h"

using torch::stable::Tensor;

namespace {

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
