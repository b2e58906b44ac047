// Vectors of one number per token, as wide as the instruction set has them, with the functions that
// topk_gating is made of. isa_<name>.cpp says how wide. Included by kernels only, after <utility>.
#pragma once

#include "exp2.h"

#if !defined(M2AE_VECTOR_BYTES)
#define M2AE_VECTOR_BYTES 16
#endif

// The compiler would call the longer of these functions, and keep no vector in a register over it.
#define M2AE_VECTOR_INLINE inline __attribute__((always_inline))

namespace m2ae::cpu {
namespace {

constexpr int kLanes = M2AE_VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(M2AE_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(M2AE_VECTOR_BYTES)));

constexpr float kInfinity = __builtin_inff();
constexpr float kLowestExponent = -87.3f;  // exp() of less is below the smallest normal number

M2AE_VECTOR_INLINE Floats floats(float x) {
  return x - Floats{};
}
M2AE_VECTOR_INLINE Ints ints(int32_t x) {
  return x - Ints{};
}
M2AE_VECTOR_INLINE Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
M2AE_VECTOR_INLINE Ints load(const int32_t* from) {
  Ints x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <typename Vector, typename T>
M2AE_VECTOR_INLINE void store(Vector x, T* to) {
  std::memcpy(to, &x, sizeof x);
}
M2AE_VECTOR_INLINE bool any(Ints mask) {
  uint64_t words[sizeof(Ints) / 8], all = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) all |= word;
  return all != 0;
}

template <int h, int... lane>
M2AE_VECTOR_INLINE void exchange(Floats& a, Floats& b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  const Floats low = __builtin_shufflevector(a, b, ((lane & h) ? kLanes + lane - h : lane)...);
  b = __builtin_shufflevector(a, b, ((lane & h) ? kLanes + lane : lane + h)...);
#else
  const Floats low = __builtin_shuffle(a, b, Ints{((lane & h) ? kLanes + lane - h : lane)...});
  b = __builtin_shuffle(a, b, Ints{((lane & h) ? kLanes + lane : lane + h)...});
#endif
  a = low;
}

// Swaps the blocks of h x h beside the diagonal, then those within the blocks.
template <int h = kLanes / 2>
M2AE_VECTOR_INLINE void transpose(Floats (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    if ((i & h) == 0) exchange<h>(rows[i], rows[i + h], std::make_integer_sequence<int, kLanes>());
  if constexpr (h > 1) transpose<h / 2>(rows);
}

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // times n: the first is exact

// exp(x) of x <= 88; 0 where that is below the smallest normal number.
M2AE_VECTOR_INLINE Floats exp_of(Floats x) {
  const Floats clamped = x > kLowestExponent ? x : floats(kLowestExponent);
  const Floats rounded = clamped * kLog2E + kRounder;
  const Floats n = rounded - kRounder;
  const Floats f = ((clamped - n * kLn2High) - n * kLn2Low) * kLog2E;
  Floats p = f * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;  // as exp2_of_fraction
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e43p-1f;
  p = p * f + 1.0f;
  p = p * (Floats)(((Ints)rounded + 127) << 23);
  return x < kLowestExponent ? Floats{} : p;
}

// log(x) of normal x > 0; +inf of +inf. Relative error below 2e-7, also near 1.
M2AE_VECTOR_INLINE Floats log_of(Floats x) {
  const Ints bits = (Ints)x;
  const Ints exponent = (bits - 0x3f3504f3) >> 23;  // of x / sqrt(1/2)
  const Floats m = (Floats)(bits - (exponent << 23));
  const Floats n = __builtin_convertvector(exponent, Floats);
  const Floats s = (m - 1.0f) / (m + 1.0f), s2 = s * s;  // log m = 2 atanh s, |s| < 0.172
  const Floats rest = s * s2 * (s2 * (s2 * (s2 * (2.0f / 9) + 2.0f / 7) + 2.0f / 5) + 2.0f / 3);
  const Floats result = n * kLn2High + (2.0f * s + (rest + n * kLn2Low));
  return x == kInfinity ? x : result;
}

// log(1 + t) of t in [0, 1]: what 1 + t rounds away comes back by the slope.
M2AE_VECTOR_INLINE Floats log1p_of(Floats t) {
  const Floats u = 1.0f + t;
  return log_of(u) + (t - (u - 1.0f)) / u;
}

// The integer that is larger for the larger number: NaN, -inf, ..., -0 and 0, ..., inf. All are
// above kNoKey.
constexpr int32_t kNoKey = INT32_MIN;
M2AE_VECTOR_INLINE Ints key_of(Floats x) {
  const Ints bits = (Ints)(x + 0.0f);  // -0 + 0 = 0
  const Ints key = bits ^ ((bits >> 31) & INT32_MAX);
  return x == x ? key : ints(kNoKey + 1);
}
M2AE_VECTOR_INLINE Floats number_of(Ints key) {
  return (Floats)(key ^ ((key >> 31) & INT32_MAX));  // of kNoKey + 1 it is a NaN
}

}  // namespace
}  // namespace m2ae::cpu
