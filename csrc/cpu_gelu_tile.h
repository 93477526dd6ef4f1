// GELU on a CPU, included once per instruction set after cpu_lanes.h.
//
// A value's bits depend on the value alone: the last few of a range go through the same register as all others, where
// PyTorch's own loops take a scalar routine that rounds differently.

// 0.5 x (1 + tanh u) = x sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3); the exponential is of -|2u|, so that it
// cannot overflow.
GPT2K_INLINE Lanes gelu_tanh(Lanes x) {
  const Lanes twice_u = multiply_add(x * x * x, broadcast(0.07135481627f), x * 1.595769122f);
  const Lanes negated = -twice_u;
  const Lanes e = exponential(twice_u < Lanes{} ? twice_u : negated);
  const Lanes one = broadcast(1.0f);
  return x * (twice_u < Lanes{} ? e : one) / (one + e);
}

template <class T>
void gelu_tanh_range(T* x, int64_t count) {
  float lanes[kLanes];
  for (int64_t i = 0; i < count; i += kLanes) {
    const int here = count - i < kLanes ? int(count - i) : kLanes;
    if (here == kLanes) {
      store(lanes, gelu_tanh(load(x + i)));
    } else {
      T rest[kLanes] = {};
      std::memcpy(rest, x + i, sizeof(T) * here);
      store(lanes, gelu_tanh(load(rest)));
    }
    for (int lane = 0; lane < here; ++lane) store_rounded(x + i + lane, lanes[lane]);
  }
}
