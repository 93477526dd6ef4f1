// What sampling asks of a whole row of logits, included once per instruction set after cpu_lanes.h.

// Copies V logits to float32 and returns their maximum, and whether there is a NaN.
template <class T>
static float widen_logits(const T* logits, int64_t V, float* scores, bool* has_nan) {
  Lanes top = broadcast(-kInfinity);
  IntLanes odd = {};
  int64_t i = 0;
  for (; i + kLanes <= V; i += kLanes) {
    const Lanes x = load(logits + i);
    store(scores + i, x);
    top = larger(x, top);  // a NaN is never larger
    odd = odd | (x != x);
  }
  float largest = horizontal_max(top);
  bool nan = false;
  for (int lane = 0; lane < kLanes; ++lane) nan = nan || odd[lane] != 0;
  for (; i < V; ++i) {
    scores[i] = to_float(logits[i]);
    largest = scores[i] > largest ? scores[i] : largest;
    nan = nan || scores[i] != scores[i];
  }
  *has_nan = nan;
  return largest;
}

// weights[i] = exp((scores[i] - largest) / temperature), no score above `largest`; returns their sum. In place is fine,
// and no weights are stored where there is no place for them.
static float exponential_row(const float* scores, int64_t V, float largest, float temperature, float* weights) {
  Lanes sum = {};
  for (int64_t i = 0; i < V; i += kLanes) {
    const int here = V - i < kLanes ? int(V - i) : kLanes;
    const Lanes e = keep_first(exponential((load_some(scores + i, here) - largest) / temperature), here);
    if (weights != nullptr) store_some(weights + i, e, here);
    sum = sum + e;
  }
  return horizontal_sum(sum);
}
