// Powers of two that vectorize: round the exponent by adding a large number, take the fraction's
// power by a polynomial, and put the integer into the exponent bits. Relative error below 1.5e-7,
// whatever the size of the exponent; results below 2^-126 are 0. Included by kernels only.
#pragma once

#include "convert.h"
#include "multiply_add.h"

namespace m2ae::cpu {
namespace {

// Added to x, it leaves the nearest integer in the last bits: its own last place is 1.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23

// 2^f for f in [-0.5, 0.5]: minimax of the relative error, 2e-9 before rounding.
inline float exp2_of_fraction(float f) {
  float p = 0x1.41fbbcp-13f;
  p = multiply_add(p, f, 0x1.5f3e54p-10f);
  p = multiply_add(p, f, 0x1.3b2d4cp-7f);
  p = multiply_add(p, f, 0x1.c6aee8p-5f);
  p = multiply_add(p, f, 0x1.ebfbdcp-3f);
  p = multiply_add(p, f, 0x1.62e43p-1f);
  return multiply_add(p, f, 1.0f);
}

// A factor in two parts, because a product of 100 with one rounded float is off by 6e-6.
struct Factor {
  float high, low;

  explicit Factor(double value) : high(float(value)), low(float(value - double(float(value)))) {
    // An infinite factor has no second part.
    if (!(low - low == 0)) low = 0;
  }
};

// x * factor - n, for n near the product: of the fraction no digits are lost to the integer.
inline float product_minus(float x, Factor factor, float n) {
#if defined(M2AE_HAS_FMA)
  return multiply_add(x, factor.low, std::fma(x, factor.high, -n));
#else
  const float x_1 = float_of(bits_of(x) & 0xfffff000u), x_2 = x - x_1;
  const float y_1 = float_of(bits_of(factor.high) & 0xfffff000u), y_2 = factor.high - y_1;
  const float product = x * factor.high;
  const float error = ((x_1 * y_1 - product) + x_1 * y_2 + x_2 * y_1) + x_2 * y_2;
  return (product - n) + (error + x * factor.low);
#endif
}

// The same where x may be infinite, and the product larger than that of the fraction.
inline float product_minus_far(float x, Factor factor, float n) {
  const float near = product_minus(x, factor, n), far = multiply_add(x, factor.high, -n);
  return far - far == 0 ? near : far;
}

// 2^(x * factor - reference) for results in [2^-126, 2^127]. bias = 127 - reference.
inline float exp2_of_product(float x, Factor factor, uint32_t bias) {
  const float rounded = multiply_add(x, factor.high, kRounder);
  const float p = exp2_of_fraction(product_minus(x, factor, rounded - kRounder));
  return p * float_of((bits_of(rounded) + bias) << 23);
}

// 2^x, but 2^127 at most.
inline float exp2_of(float x) {
  x = x < -127.0f ? -127.0f : x;  // NaN stays
  x = x > 127.0f ? 127.0f : x;
  const float rounded = x + kRounder;
  return exp2_of_fraction(x - (rounded - kRounder)) * float_of((bits_of(rounded) + 127u) << 23);
}

}  // namespace
}  // namespace m2ae::cpu
