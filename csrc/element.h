// What an element is, told to code that sees no torch: kernels get void pointers and this.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define M2AE_HOST_DEVICE __host__ __device__
#else
#define M2AE_HOST_DEVICE
#endif

namespace m2ae {

// The floating types first, in the order of their tables; then bytes to copy, by width.
enum class Element : uint8_t {
  kFloat32 = 0,
  kFloat64 = 1,
  kBFloat16 = 2,
  kFloat16 = 3,
  kBytes1 = 4,
  kBytes2 = 5,
  kBytes4 = 6,
  kBytes8 = 7,
};

constexpr int kFloatingElements = 4;

M2AE_HOST_DEVICE inline bool is_floating(Element element) {
  return static_cast<int>(element) < kFloatingElements;
}

inline int64_t bytes_of(Element element) {
  constexpr int64_t kBytes[] = {4, 8, 2, 2, 1, 2, 4, 8};
  return kBytes[static_cast<int>(element)];
}

}  // namespace m2ae
