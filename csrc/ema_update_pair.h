// One target of ema_update_ and what goes into it: plain data, the same for the CPU and the GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "element.h"

namespace m2ae {

struct EmaPair {
  void* target;
  const void* source;
  void* shadow;            // null: none
  int64_t numel;           // elements, >= 1; a complex number is two
  int32_t layout;          // which EmaLayout, or kEmaFlat
  Element target_element;  // floating, or bytes to copy
  Element source_element;  // bytes exactly where target_element is
  Element shadow_element;  // kBFloat16, kFloat16, or target_element where that is bytes
  uint8_t unused;          // pairs are compared byte by byte, so they have no padding
};

static_assert(std::has_unique_object_representations_v<EmaPair>);

constexpr int32_t kEmaFlat = -1;  // all of the pair's memory is one run of elements
constexpr int kEmaMaxDims = 8;

// How to find element i of tensors that are no run: dimensions outermost first.
struct EmaLayout {
  int64_t dims;
  int64_t sizes[kEmaMaxDims];
  int64_t strides[3][kEmaMaxDims];  // of target, source and shadow, in elements
};

inline bool operator==(const EmaLayout& a, const EmaLayout& b) {
  return std::memcmp(&a, &b, sizeof(EmaLayout)) == 0;
}

}  // namespace m2ae
