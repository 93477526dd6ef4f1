// Layer normalisation on a CPU, included once per instruction set after cpu_lanes.h: a row's bits depend on the row alone.

// (x - mean) rstd weight + bias of C values; a lane adds every kLanes-th of them, from 0 up.
template <class T>
static void normalize_row(const T* x, const T* weight, const T* bias, int64_t C, float eps, T* y, float* mean,
                          float* rstd) {
  const auto count = [C](int64_t c) { return C - c < kLanes ? int(C - c) : kLanes; };
  Lanes sum = {};
  for (int64_t c = 0; c < C; c += kLanes) sum = sum + load_some(x + c, count(c));
  *mean = horizontal_sum(sum) / float(C);
  Lanes squares = {};
  for (int64_t c = 0; c < C; c += kLanes) {
    Lanes apart = load_some(x + c, count(c)) - *mean;
    for (int lane = count(c); lane < kLanes; ++lane) apart[lane] = 0.0f;
    squares = multiply_add(apart, apart, squares);
  }
  *rstd = 1.0f / std::sqrt(horizontal_sum(squares) / float(C) + eps);
  for (int64_t c = 0; c < C; c += kLanes) {
    const int here = count(c);
    const Lanes shift = bias == nullptr ? Lanes{} : load_some(bias + c, here);
    const Lanes normal = (load_some(x + c, here) - *mean) * *rstd;
    store_some(y + c, multiply_add(normal, load_some(weight + c, here), shift), here);
  }
}
