// a * b + c, fused where the instruction set can. Included by kernels only, after <cmath>.
#pragma once

// g++ does not define __FMA__ after a target pragma: isa_<name>.cpp says M2AE_HAS_FMA instead.
#if defined(__FMA__) || defined(__aarch64__)
#define M2AE_HAS_FMA
#endif

namespace m2ae::cpu {
namespace {

template <typename acc_t>
inline acc_t multiply_add(acc_t a, acc_t b, acc_t c) {
#if defined(M2AE_HAS_FMA)
  return std::fma(a, b, c);
#else
  return a * b + c;  // torch's own kernels do not fuse either on such a machine
#endif
}

}  // namespace
}  // namespace m2ae::cpu
