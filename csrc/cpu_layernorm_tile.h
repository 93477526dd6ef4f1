// Layer normalisation on a CPU, included once per instruction set after cpu_lanes.h: a row's bits depend on the row
// alone.

// y = (total - mean) rstd weight + bias of C values, where total is x, or x + residual, rounded and kept.
template <class T>
static void normalize_row(const T* x, const T* residual, const T* weight, const T* bias, int64_t C, float eps, T* total,
                          T* y, float* mean, float* rstd) {
  if (residual != nullptr) {
    visit_row(C, [=](int64_t c, int count, int) {
      store_some(total + c, load_some(x + c, count) + load_some(residual + c, count), count);
    });
    x = total;
  }
  const float centre = sum_row(x, C, [](Lanes sum, Lanes v, int) { return sum + v; }) / float(C);
  const float variance = sum_row(x, C, [centre](Lanes sum, Lanes v, int count) {
    const Lanes apart = keep_first(v - centre, count);
    return multiply_add(apart, apart, sum);
  }) / float(C);
  const float scale = 1.0f / std::sqrt(variance + eps);
  *mean = centre;
  *rstd = scale;
  visit_row(C, [=](int64_t c, int count, int) {
    const Lanes shift = bias == nullptr ? Lanes{} : load_some(bias + c, count);
    const Lanes xhat = (load_some(x + c, count) - centre) * scale;
    store_some(y + c, multiply_add(xhat, load_some(weight + c, count), shift), count);
  });
}

// dx = (wdy - mean(wdy) - xhat mean(wdy xhat)) rstd + dtotal with wdy = weight dy, and a row's shares of the gradients
// of weight and bias, dy xhat and dy, added to dweight and dbias. Each result may be null, and so may dtotal.
template <class T>
static void normalize_row_backward(const T* dy, const T* dtotal, const T* x, const T* weight, int64_t C, float mean,
                                   float rstd, T* dx, float* dweight, float* dbias) {
  float along = 0.0f, across = 0.0f;
  if (dx != nullptr) {
    Lanes alongs[kSums] = {}, acrosses[kSums] = {};
    visit_row(C, [&](int64_t c, int count, int i) {
      const Lanes wdy = load_some(weight + c, count) * load_some(dy + c, count);  // 0 in lanes that do not count
      alongs[i] = multiply_add(wdy, (load_some(x + c, count) - mean) * rstd, alongs[i]);
      acrosses[i] = acrosses[i] + wdy;
    });
    along = total_of(alongs) / float(C);
    across = total_of(acrosses) / float(C);
  }
  visit_row(C, [=](int64_t c, int count, int) {
    const Lanes grad = load_some(dy + c, count), xhat = (load_some(x + c, count) - mean) * rstd;
    if (dx != nullptr) {
      const Lanes apart = load_some(weight + c, count) * grad - multiply_add(xhat, broadcast(along), broadcast(across));
      const Lanes others = dtotal == nullptr ? Lanes{} : load_some(dtotal + c, count);
      store_some(dx + c, multiply_add(apart, broadcast(rstd), others), count);
    }
    if (dweight != nullptr) store_some(dweight + c, multiply_add(grad, xhat, load_some(dweight + c, count)), count);
    if (dbias != nullptr) store_some(dbias + c, load_some(dbias + c, count) + grad, count);
  });
}

// The sum, from first to last, of `rows` rows of C values that lie `stride` apart.
template <class T>
static void add_rows(const float* from, int64_t rows, int64_t stride, int64_t C, T* sums) {
  visit_row(C, [=](int64_t c, int count, int) {
    Lanes sum = {};
    for (int64_t row = 0; row < rows; ++row) sum = sum + load_some(from + row * stride + c, count);
    store_some(sums + c, sum, count);
  });
}
