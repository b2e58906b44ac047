// convert<to_t>(x) between float, double, BFloat16 and Half, rounding to nearest even, without
// branches and without library types in the arithmetic, so that loops over it vectorize. Included
// by kernels only, after <cstdint>, <cstring>, <type_traits> and torch's BFloat16 and Half.
#pragma once

namespace m2ae::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(BFloat16 x) {
  return float_of(uint32_t(x.x) << 16);
}

// Exponent and mantissa move to their places in a float; multiplying by 2^112 corrects the bias,
// for subnormals too. Infinity and NaN have all exponent bits set in both formats.
inline float widen(Half x) {
  const uint32_t bits = x.x, magnitude = (bits & 0x7fffu) << 13;
  const float scaled = float_of(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t finite = bits_of(scaled);
  const uint32_t result = magnitude >= (0x7c00u << 13) ? special : finite;
  return float_of(result | (bits & 0x8000u) << 16);
}

inline BFloat16 narrow_to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = 0x7fc0u;
  return BFloat16(uint16_t(x != x ? nan : rounded), BFloat16::from_bits());
}

// Adding a power of two whose last place, as a float, is the last place of the result makes the
// addition itself round: 2^13 times that of x, and no less than where halves become subnormal.
inline Half narrow_to_half(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const float capped = float_of(magnitude < 0x47800000u ? magnitude : 0x47800000u);  // 65536
  const uint32_t exponent = bits_of(capped) & 0x7f800000u;
  const uint32_t lowest = 0x38800000u;  // 2^-14, the smallest normal half
  const uint32_t unit = (exponent > lowest ? exponent : lowest) + (13u << 23);
  const uint32_t sum = bits_of(capped + float_of(unit));
  // The sum's low bits are the mantissa with its leading one, which counts as one more exponent.
  const uint32_t half_exponent = ((unit >> 23) - 13u - 112u - 1u) << 10;
  const uint32_t finite = half_exponent + (sum - unit);
  const uint32_t infinite_or_nan = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t result = magnitude >= 0x47800000u ? infinite_or_nan : finite;
  return Half(uint16_t(result | sign), Half::from_bits());
}

template <typename to_t, typename from_t>
inline to_t convert(from_t x) {
  if constexpr (std::is_same_v<to_t, from_t>) {
    return x;
  } else if constexpr (std::is_same_v<from_t, BFloat16> || std::is_same_v<from_t, Half>) {
    return convert<to_t>(widen(x));
  } else if constexpr (std::is_same_v<to_t, BFloat16>) {
    return narrow_to_bfloat16(float(x));  // from double through float, as tensor.to() does
  } else if constexpr (std::is_same_v<to_t, Half>) {
    return narrow_to_half(float(x));
  } else {
    return to_t(x);
  }
}

}  // namespace
}  // namespace m2ae::cpu
