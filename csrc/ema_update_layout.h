// How the elements of a target, its source and its shadow lie in memory, for ema_update_plan().
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "ema_update_pair.h"

namespace m2ae {

using torch::stable::Tensor;

// Dimensions of one or several tensors of one shape, outermost first, without those of size 1 and
// with neighbours merged wherever every tensor walks them as one.
inline EmaLayout collapse(const std::array<const Tensor*, 3>& tensors, int64_t per_number) {
  EmaLayout layout{};
  const auto sizes = tensors[0]->sizes();
  std::vector<int> order;
  for (int d = 0; d < int(sizes.size()); ++d)
    if (sizes[d] != 1) order.push_back(d);
  // Walk the memory of the target in order, whatever the order of its dimensions.
  const auto target_strides = tensors[0]->strides();
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return target_strides[a] > target_strides[b];
  });

  for (const int d : order) {
    int64_t strides[3] = {};
    for (int t = 0; t < 3; ++t)
      if (tensors[t] != nullptr) strides[t] = tensors[t]->strides()[d] * per_number;
    const int64_t last = layout.dims - 1;
    const bool merges = last >= 0 && layout.strides[0][last] == strides[0] * sizes[d] &&
                        layout.strides[1][last] == strides[1] * sizes[d] &&
                        layout.strides[2][last] == strides[2] * sizes[d];
    if (!merges) {
      STD_TORCH_CHECK(
          layout.dims < kEmaMaxDims,
          "ema_update_: expected at most ",
          kEmaMaxDims,
          " dimensions that do not merge, got more");
      layout.sizes[layout.dims++] = sizes[d];
    } else {
      layout.sizes[last] *= sizes[d];
    }
    for (int t = 0; t < 3; ++t) layout.strides[t][layout.dims - 1] = strides[t];
  }
  if (per_number == 2) {
    STD_TORCH_CHECK(
        layout.dims < kEmaMaxDims,
        "ema_update_: expected at most ",
        kEmaMaxDims - 1,
        " complex dimensions that do not merge, got more");
    layout.sizes[layout.dims] = 2;
    for (int t = 0; t < 3; ++t) layout.strides[t][layout.dims] = 1;
    ++layout.dims;
  }
  return layout;
}

// True if the memory of all of them is one run, in one order: then nobody needs the layout.
inline bool is_flat(const EmaLayout& layout, bool has_shadow) {
  int64_t expected = 1;
  for (int64_t d = layout.dims - 1; d >= 0; --d) {
    for (int t = 0; t < (has_shadow ? 3 : 2); ++t)
      if (layout.strides[t][d] != expected) return false;
    expected *= layout.sizes[d];
  }
  return true;
}

// Elements of tensor t of the layout must lie at different addresses to be written.
inline bool overlaps_itself(const EmaLayout& layout, int t) {
  std::vector<int64_t> order(layout.dims);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return layout.strides[t][a] < layout.strides[t][b];
  });
  int64_t reach = 0;  // of the dimensions seen so far
  for (const int64_t d : order) {
    if (layout.strides[t][d] <= reach) return true;
    reach += layout.strides[t][d] * (layout.sizes[d] - 1);
  }
  return false;
}

}  // namespace m2ae
