// Layer normalisation on a CPU, included once per instruction set after cpu_lanes.h: a row's bits depend on the row alone.

// (x - mean) rstd weight + bias of C values.
template <class T>
static void normalize_row(const T* x, const T* weight, const T* bias, int64_t C, float eps, T* y, float* mean,
                          float* rstd) {
  const float centre = sum_row(x, C, [](Lanes sum, Lanes v, int) { return sum + v; }) / float(C);
  const float variance = sum_row(x, C, [centre](Lanes sum, Lanes v, int count) {
    const Lanes apart = keep_first(v - centre, count);
    return multiply_add(apart, apart, sum);
  }) / float(C);
  const float scale = 1.0f / std::sqrt(variance + eps);
  *mean = centre;
  *rstd = scale;
  const auto normal = [=](Lanes v, Lanes w, Lanes shift) { return multiply_add((v - centre) * scale, w, shift); };
  int64_t c = 0;
  if (bias != nullptr) {
    for (; c + kLanes <= C; c += kLanes) store(y + c, normal(load(x + c), load(weight + c), load(bias + c)));
  }
  for (; c < C; c += kLanes) {
    const int count = C - c < kLanes ? int(C - c) : kLanes;
    const Lanes shift = bias == nullptr ? Lanes{} : load_some(bias + c, count);
    store_some(y + c, normal(load_some(x + c, count), load_some(weight + c, count), shift), count);
  }
}
