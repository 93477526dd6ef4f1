// One register of floats: loads, stores, a multiply-add and an exponential, the same bits in every lane and on every
// instruction set, and sums over its lanes. Included once per instruction set, each time inside another namespace and
// with another GPT2K_LANES (floats per register: 16 AVX-512, 8 AVX2, 4 anywhere), so there is no include guard.

constexpr int kLanes = GPT2K_LANES;

typedef float Lanes __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntLanes __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitLanes __attribute__((vector_size(kLanes * 4)));
typedef float LanesInMemory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HalfLanes __attribute__((vector_size(kLanes * 2)));
typedef uint16_t HalfLanesInMemory __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

GPT2K_INLINE Lanes load(const float* source) { return *reinterpret_cast<const LanesInMemory*>(source); }

GPT2K_INLINE Lanes load(const BFloat16Bits* source) {  // bfloat16 is the upper half of a float32
  const HalfLanes half = *reinterpret_cast<const HalfLanesInMemory*>(source);
  return (Lanes)(__builtin_convertvector(half, BitLanes) << 16);
}

GPT2K_INLINE void store(float* target, Lanes x) { *reinterpret_cast<LanesInMemory*>(target) = x; }

GPT2K_INLINE HalfLanes round_lanes(Lanes x) {  // the bits of store_rounded
  const BitLanes bits = (BitLanes)x;
  const BitLanes rounded = x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : BitLanes{} + 0x7fc0u;
  return __builtin_convertvector(rounded, HalfLanes);
}

GPT2K_INLINE void store(BFloat16Bits* target, Lanes x) {
  *reinterpret_cast<HalfLanesInMemory*>(target) = round_lanes(x);
}

// The first `count` values of a register; the other lanes are 0 when loaded and left alone when stored.
#if GPT2K_LANES == 16
GPT2K_INLINE __mmask16 first_lanes(int count) { return __mmask16((1u << count) - 1); }

GPT2K_INLINE Lanes load_some(const float* source, int count) {
  return (Lanes)_mm512_maskz_loadu_ps(first_lanes(count), source);
}

GPT2K_INLINE Lanes load_some(const BFloat16Bits* source, int count) {
  const __m256i half = _mm256_maskz_loadu_epi16(first_lanes(count), source);
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

GPT2K_INLINE void store_some(float* target, Lanes x, int count) {
  _mm512_mask_storeu_ps(target, first_lanes(count), (__m512)x);
}

GPT2K_INLINE void store_some(BFloat16Bits* target, Lanes x, int count) {
  _mm256_mask_storeu_epi16(target, first_lanes(count), (__m256i)round_lanes(x));
}
#else
template <class T>
GPT2K_INLINE Lanes load_some(const T* source, int count) {
  if (count == kLanes) return load(source);
  T rest[kLanes] = {};
  std::memcpy(rest, source, sizeof(T) * count);
  return load(rest);
}

template <class T>
GPT2K_INLINE void store_some(T* target, Lanes x, int count) {
  if (count == kLanes) return store(target, x);
  T rest[kLanes];
  store(rest, x);
  std::memcpy(target, rest, sizeof(T) * count);
}
#endif

GPT2K_INLINE Lanes broadcast(float x) { return x - Lanes{}; }  // x - 0, since x + 0 turns -0 into 0

GPT2K_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if GPT2K_LANES == 16
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif GPT2K_LANES == 8
  return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// exp(x) for x <= 0 to about one unit in the last place: 2^n * exp(r) with |r| <= ln(2) / 2. Below -87.3, where float32
// turns subnormal, it is 0; NaN stays NaN because the power of two is applied by a multiplication.
GPT2K_INLINE Lanes exponential(Lanes x) {
  const Lanes lowest = broadcast(-87.3f);
  const Lanes clamped = x < lowest ? lowest : x;
  const Lanes magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the lowest bits
  const Lanes shifted = multiply_add(clamped, broadcast(1.44269504088896341f), magic);
  const Lanes n = shifted - magic;
  Lanes r = multiply_add(n, broadcast(-0.693359375f), clamped);  // ln(2) in two parts, the first exact in few bits
  r = multiply_add(n, broadcast(2.12194440e-4f), r);
  Lanes p = broadcast(1.9875691500e-4f);  // the polynomial of Cephes' expf
  p = multiply_add(p, r, broadcast(1.3981999507e-3f));
  p = multiply_add(p, r, broadcast(8.3334519073e-3f));
  p = multiply_add(p, r, broadcast(4.1665795894e-2f));
  p = multiply_add(p, r, broadcast(1.6666665459e-1f));
  p = multiply_add(p, r, broadcast(5.0000001201e-1f));
  p = multiply_add(p, r * r, r) + 1.0f;
  const Lanes power = (Lanes)(((BitLanes)shifted << 23) + 0x3f800000u);
  return x < lowest ? Lanes{} : p * power;
}

// A shuffle in each compiler's spelling: the numbers pick lanes of a, and from kLanes on lanes of b.
#if defined(__clang__)
#define GPT2K_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GPT2K_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntLanes{__VA_ARGS__})
#endif

// Lanes i with bit STEP clear get a[i] + a[i + STEP], the others b[i] + b[i - STEP]: one level of two sums at once.
template <int STEP, class V, int... I>
GPT2K_INLINE V pair_sum(V a, V b, Ints<I...>) {
  const V own = GPT2K_SHUFFLE(a, b, ((I & STEP) ? kLanes + I : I)...);
  const V other = GPT2K_SHUFFLE(a, b, ((I & STEP) ? kLanes + I - STEP : I + STEP)...);
  return own + other;
}

// Lane i of the result is the sum over the lanes of sums[i].
template <int STEP = kLanes / 2, class V>
GPT2K_INLINE V sum_each(V (&sums)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < STEP; ++i) sums[i] = pair_sum<STEP>(sums[i], sums[i + STEP], MakeInts<kLanes>{});
  if constexpr (STEP > 1) return sum_each<STEP / 2>(sums);
  return sums[0];
}

template <int STEP, int... I>
GPT2K_INLINE Lanes swap_lanes(Lanes a, Ints<I...>) {
  return GPT2K_SHUFFLE(a, a, (I ^ STEP)...);
}

template <int STEP = kLanes / 2>
GPT2K_INLINE float horizontal_sum(Lanes a) {
  a = a + swap_lanes<STEP>(a, MakeInts<kLanes>{});
  if constexpr (STEP > 1) return horizontal_sum<STEP / 2>(a);
  return a[0];
}

GPT2K_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

template <int STEP = kLanes / 2>
GPT2K_INLINE float horizontal_max(Lanes a) {
  a = larger(a, swap_lanes<STEP>(a, MakeInts<kLanes>{}));
  if constexpr (STEP > 1) return horizontal_max<STEP / 2>(a);
  return a[0];
}

template <int... I>
GPT2K_INLINE Lanes keep_first(Lanes v, int count, Ints<I...>) {
  return (Lanes)((IntLanes)v & (IntLanes{I...} < count));
}

GPT2K_INLINE Lanes keep_first(Lanes v, int count) {  // the lanes from `count` on become 0
  return keep_first(v, count, MakeInts<kLanes>{});
}

constexpr int kSums = 4;  // registers that add up a row in turns: one alone would wait for each addition

// Calls visit(c, count, i) for each register of a row of C values: its first column, how many of its lanes count, and a
// number below kSums, another for each of those that follow each other.
template <class Visit>
GPT2K_INLINE void visit_row(int64_t C, Visit visit) {
  int64_t c = 0;
  for (; c + kSums * kLanes <= C; c += kSums * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) visit(c + i * kLanes, kLanes, i);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSums; ++i, c += kLanes) {
    if (c < C) visit(c, C - c < kLanes ? int(C - c) : kLanes, i);
  }
}

GPT2K_INLINE float total_of(const Lanes (&sums)[kSums]) {
  return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The sum over a row of term(register, how many of its lanes count), which is 0 in lanes that do not.
template <class T, class Term>
GPT2K_INLINE float sum_row(const T* x, int64_t C, Term term) {
  Lanes sums[kSums] = {};
  visit_row(C, [&](int64_t c, int count, int i) { sums[i] = term(sums[i], load_some(x + c, count), count); });
  return total_of(sums);
}
