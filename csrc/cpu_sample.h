// A token for each row of logits, included once, by cpu_ops.cpp: gpt2_kernels.reference.sample, a row at a time.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "cpu_tiles.h"

namespace {

struct SampleParams {  // of one row
  float temperature, top_p, min_p, penalty;
  int64_t top_k, seed, position;
  const bool* history;  // (V,), or null
};

struct SampleResult {
  int64_t token;
  float logprob;
  int64_t* top_ids;  // (top_count,)
  float* top_values;
};

// The first word of Philox-4x32-10 (Salmon et al., 2011) with key `seed` at counter (position, 0, 0, 0), as a multiple
// of 2^-24 in [0, 1).
float uniform(int64_t seed, int64_t position) {
  uint32_t c0 = uint32_t(position), c1 = 0, c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(uint64_t(seed) >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return float(c0 >> 8) * 0x1p-24f;
}

// The k-th largest of V scores, which are not NaN.
float kth_largest(const float* scores, int64_t V, int64_t k) {
  std::vector<float> best(scores, scores + k);  // a heap with its smallest in front
  std::make_heap(best.begin(), best.end(), std::greater<>());
  for (int64_t i = k; i < V; ++i) {
    if (scores[i] <= best.front()) continue;
    std::pop_heap(best.begin(), best.end(), std::greater<>());
    best.back() = scores[i];
    std::push_heap(best.begin(), best.end(), std::greater<>());
  }
  return best.front();
}

// One draw among V scores, all of them finite or -infinity, the largest finite: top-k, temperature, top-p, min-p.
int64_t draw(const float* scores, int64_t V, float largest, const SampleParams& params) {
  std::vector<int64_t> ids;
  std::vector<float> kept, weights;
  const float least = params.top_k > 0 && params.top_k < V ? kth_largest(scores, V, params.top_k) : -kInfinity;
  for (int64_t i = 0; i < V; ++i) {
    if (scores[i] < least || scores[i] == -kInfinity) continue;  // ties at the threshold stay
    ids.push_back(i);
    kept.push_back(scores[i]);
  }
  weights.resize(kept.size());
  GPT2K_CHOOSE(exponential_row)(kept.data(), int64_t(kept.size()), largest, params.temperature, weights.data());
  float smallest = -kInfinity;
  if (params.top_p < 1) {  // the fewest tokens whose probabilities reach it, and ties
    std::vector<size_t> order(kept.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return kept[a] > kept[b]; });
    double total = 0, before = 0;
    for (const size_t i : order) total += double(weights[i]);
    for (const size_t i : order) {
      if (i != order[0] && !(before < double(params.top_p) * total)) break;
      smallest = kept[i];
      before += double(weights[i]);
    }
  }
  const float least_weight = params.min_p < 1 ? params.min_p : 1.0f;
  double total = 0;
  std::vector<double> cumulative(kept.size());
  size_t last = 0;
  for (size_t i = 0; i < kept.size(); ++i) {
    if (weights[i] > 0 && weights[i] >= least_weight && kept[i] >= smallest) {
      total += double(weights[i]);
      last = i;
    }
    cumulative[i] = total;
  }
  const double point = double(uniform(params.seed, params.position)) * total;
  const size_t chosen = size_t(std::upper_bound(cumulative.begin(), cumulative.end(), point) - cumulative.begin());
  return ids[std::min(chosen, last)];  // a draw that rounds up to the total would fall behind the last one
}

// The `count` largest, ties by id; a NaN counts as +infinity, which is where the reference puts it.
void find_top(const float* scores, int64_t V, int64_t count, float log_total, SampleResult& to) {
  std::vector<int64_t> ids(V);
  for (int64_t i = 0; i < V; ++i) ids[i] = i;
  const auto value = [&](int64_t i) { return scores[i] != scores[i] ? kInfinity : scores[i]; };
  const auto before = [&](int64_t a, int64_t b) {
    const float x = value(a), y = value(b);
    return x > y || (x == y && a < b);
  };
  std::partial_sort(ids.begin(), ids.begin() + count, ids.end(), before);
  for (int64_t i = 0; i < count; ++i) {
    to.top_ids[i] = ids[i];
    to.top_values[i] = scores[ids[i]] - log_total;
  }
}

template <class T>
void sample_row(const T* logits, int64_t V, const SampleParams& params, int64_t top_count, std::vector<float>& scores,
                SampleResult& to) {
  bool has_nan = false;
  float largest = GPT2K_CHOOSE(widen_logits<T>)(logits, V, scores.data(), &has_nan);
  float log_total = has_nan ? NAN : largest;
  if (!has_nan && std::fabs(largest) < kInfinity) {
    log_total += std::log(GPT2K_CHOOSE(exponential_row)(scores.data(), V, largest, 1.0f, nullptr));
  }
  if (top_count > 0) find_top(scores.data(), V, top_count, log_total, to);
  std::vector<float> adjusted;
  const float* choice = scores.data();
  if (params.history != nullptr) {  // Keskar et al., 2019 (CTRL)
    adjusted = scores;
    for (int64_t i = 0; i < V; ++i) {
      if (params.history[i]) adjusted[i] = scores[i] > 0 ? scores[i] / params.penalty : scores[i] * params.penalty;
    }
    choice = adjusted.data();
    largest = -kInfinity;
    has_nan = false;
    for (int64_t i = 0; i < V; ++i) {
      largest = choice[i] > largest ? choice[i] : largest;
      has_nan = has_nan || choice[i] != choice[i];
    }
  }
  const bool usual = std::fabs(log_total) < kInfinity && std::fabs(largest) < kInfinity && !has_nan;
  if (params.temperature > 0 && usual) {
    to.token = draw(choice, V, largest, params);
  } else if (has_nan) {
    to.token = std::find_if(choice, choice + V, [](float x) { return x != x; }) - choice;
  } else {
    to.token = std::find(choice, choice + V, largest) - choice;
  }
  to.logprob = scores[to.token] - log_total;
}

}  // namespace
