// The numbers and instruction sets of the CPU operators: bfloat16, which sets there are, which one is in use. Included
// once, by cpu_tiles.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>

// The highest level of instructions that is compiled, as simd_level numbers them. _native.py lowers it for a compiler or
// an assembler that knows fewer: below 4 there is no AMX, below 3 there are no products, as on other processors.
#ifndef GPT2K_LEVEL
#define GPT2K_LEVEL 4
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define GPT2K_PRODUCTS (GPT2K_LEVEL >= 3)
#if GPT2K_LEVEL >= 4 && defined(__linux__)
#define GPT2K_AMX 1  // this system says whether a process may use it
#include <cpuid.h>
#include <sys/syscall.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <unistd.h>

#define GPT2K_INLINE static inline __attribute__((always_inline))

// Functions between the two are compiled for the instruction sets named, whatever the rest of the file is compiled for:
// several sets in one binary, chosen at run time, since different machines may share the disk with the cache.
#define GPT2K_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define GPT2K_TARGET(sets) GPT2K_PRAGMA(clang attribute push(__attribute__((target(sets))), apply_to = function))
#define GPT2K_TARGET_END GPT2K_PRAGMA(clang attribute pop)
#else
#define GPT2K_TARGET(sets) GPT2K_PRAGMA(GCC push_options) GPT2K_PRAGMA(GCC target(sets))
#define GPT2K_TARGET_END GPT2K_PRAGMA(GCC pop_options)
#endif

namespace {

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

#if GPT2K_AMX
// Whether the CPU multiplies tiles of bfloat16 and int8, and Linux lets this process hold them, which it must be asked:
// by products alone, since from then on each thread's signal stack has to have room for the tiles.
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
#if GPT2K_PRODUCTS  // a compiler that has none may not know these names
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return 3;
#endif
    return 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

std::atomic<int> simd_limit{4};

int simd_level_in_use() {  // for all but products
  static const int detected = detect_simd_level();
  const int limit = simd_limit.load(std::memory_order_relaxed);
  return detected < limit ? detected : limit;
}

bool amx_in_use() {
#if GPT2K_AMX
  if (simd_limit.load(std::memory_order_relaxed) < 4 || simd_level_in_use() < 3) return false;
  static const bool detected = detect_amx();
  return detected;
#else
  return false;
#endif
}

#if GPT2K_PRODUCTS

// Of the innermost cache for data.
int64_t inner_cache_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (found >= (16 << 10)) return found;
#endif
  return 32 << 10;
}

#endif  // GPT2K_PRODUCTS

}  // namespace
