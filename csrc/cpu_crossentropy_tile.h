// Cross-entropy of one row of logits, included once per instruction set after cpu_lanes.h: a row's bits depend on the
// row alone.

// The largest of V logits, and the sum of exp(logit - largest). A NaN makes the sum NaN, and so does an infinite
// maximum.
template <class T>
static void softmax_row(const T* logits, int64_t V, float* maximum, float* total) {
  constexpr int kTops = 4;
  const int64_t whole = V / (kTops * kLanes) * (kTops * kLanes);
  Lanes tops[kTops];
  for (Lanes& top : tops) top = broadcast(-kInfinity);
  for (int64_t v = 0; v < whole; v += kTops * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kTops; ++i) tops[i] = larger(load(logits + v + i * kLanes), tops[i]);  // a NaN is never larger
  }
  float largest = horizontal_max(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
  for (int64_t v = whole; v < V; ++v) largest = to_float(logits[v]) > largest ? to_float(logits[v]) : largest;
  *maximum = largest;
  *total = sum_row(logits, V, [largest](Lanes sum, Lanes x, int count) {
    return sum + keep_first(exponential(x - largest), count);
  });
}

// gradient[v] = factor (exp(logit - maximum) / total - [v = target]); gradient may be logits.
template <class T>
static void softmax_gradient_row(const T* logits, int64_t V, int64_t target, float maximum, float total, float factor,
                                 T* gradient) {
  const float share = factor / total;
  const float chosen = exponential(broadcast(to_float(logits[target]) - maximum))[0] * share - factor;
  int64_t v = 0;
  for (; v + kLanes <= V; v += kLanes) store(gradient + v, exponential(load(logits + v) - maximum) * share);
  if (v < V) {
    const int count = int(V - v);
    store_some(gradient + v, exponential(load_some(logits + v, count) - maximum) * share, count);
  }
  store_rounded(gradient + target, chosen);
}
