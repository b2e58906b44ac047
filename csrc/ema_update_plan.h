// ema_update_'s work, as plain data for the CPU and the CUDA kernel: which memory is averaged into
// which. Built by ema_update_plan(), which also refuses what no kernel could do safely; the
// contract, with the friendly messages, is in m2ae_kernels/ops/ema_update.py
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "ema_update_pair.h"

namespace m2ae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct EmaPlan {
  std::vector<EmaPair> pairs;      // one per distinct target that has elements
  std::vector<EmaLayout> layouts;  // of the pairs that cannot be walked as flat memory
};

// Complex numbers are pairs of floats, and averaged as such; integers and bool are copied.
inline Element element_of(ScalarType type, int64_t* per_number) {
  *per_number = 1;
  switch (type) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::ComplexFloat:
      *per_number = 2;
      return Element::kFloat32;
    case ScalarType::ComplexDouble:
      *per_number = 2;
      return Element::kFloat64;
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
      return Element::kBytes1;
    case ScalarType::Short:
    case ScalarType::UInt16:
      return Element::kBytes2;
    case ScalarType::Int:
    case ScalarType::UInt32:
      return Element::kBytes4;
    case ScalarType::Long:
    case ScalarType::UInt64:
      return Element::kBytes8;
    default:
      STD_TORCH_CHECK(
          false, "ema_update_: expected a dtype to average or copy, got ", toString(type));
  }
}

// Dimensions of one or several tensors of one shape, outermost first, without those of size 1 and
// with neighbours merged wherever every tensor walks them as one.
inline EmaLayout collapse(const std::array<const Tensor*, 3>& tensors, int64_t per_number) {
  EmaLayout layout{};
  if (std::all_of(tensors.begin(), tensors.end(), [](const Tensor* tensor) {
        return tensor == nullptr || tensor->is_contiguous();
      })) {
    layout.dims = 1;
    layout.sizes[0] = tensors[0]->numel() * per_number;
    for (int t = 0; t < 3; ++t) layout.strides[t][0] = 1;
    return layout;
  }
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

// True if target and source are walked in one order.
inline bool same_walk(const EmaLayout& layout) {
  return std::equal(layout.strides[0], layout.strides[0] + layout.dims, layout.strides[1]);
}

// The bytes from the first to the last element.
struct EmaExtent {
  const char* begin;
  const char* end;
  int pair;
  bool is_target;
};

inline EmaExtent extent_of(const EmaPair& pair, const EmaLayout& layout, int t, int index) {
  const void* pointers[] = {pair.target, pair.source, pair.shadow};
  const Element elements[] = {pair.target_element, pair.source_element, pair.shadow_element};
  const char* begin = static_cast<const char*>(pointers[t]);
  int64_t last = 0;
  for (int d = 0; d < layout.dims; ++d) last += layout.strides[t][d] * (layout.sizes[d] - 1);
  return {begin, begin + (last + 1) * bytes_of(elements[t]), index, t == 0};
}

// Tied tensors are updated once; any other overlap of what is written is an error, because pairs
// are processed in no particular order.
inline void drop_ties(std::vector<EmaPair>& pairs, const std::vector<EmaLayout>& all_layouts) {
  std::vector<EmaExtent> written, read;
  for (int i = 0; i < int(pairs.size()); ++i) {
    written.push_back(extent_of(pairs[i], all_layouts[i], 0, i));
    read.push_back(extent_of(pairs[i], all_layouts[i], 1, i));
    if (pairs[i].shadow != nullptr) written.push_back(extent_of(pairs[i], all_layouts[i], 2, i));
  }
  std::stable_sort(written.begin(), written.end(), [](const EmaExtent& a, const EmaExtent& b) {
    return a.begin < b.begin;
  });

  std::vector<bool> tied(pairs.size(), false);
  const EmaExtent* last = nullptr;
  for (const EmaExtent& next : written) {
    if (last != nullptr && next.begin < last->end) {
      const EmaPair &a = pairs[last->pair], &b = pairs[next.pair];
      const EmaLayout &la = all_layouts[last->pair], &lb = all_layouts[next.pair];
      const bool same = last->is_target == next.is_target && last->pair != next.pair &&
                        a.target == b.target && a.source == b.source && a.shadow == b.shadow &&
                        a.numel == b.numel && a.target_element == b.target_element &&
                        a.source_element == b.source_element && la == lb;
      STD_TORCH_CHECK(
          same,
          "ema_update_: expected targets and shadows that do not overlap in memory (tied targets"
          " with one source are fine), got an overlap of pairs ",
          last->pair,
          " and ",
          next.pair);
      tied[next.pair] = true;
      continue;
    }
    last = &next;
  }
  for (const EmaExtent& source : read) {
    // The last extent that begins before the source ends; extents kept here do not overlap.
    auto next = std::lower_bound(
        written.begin(), written.end(), source, [](const EmaExtent& w, const EmaExtent& s) {
          return w.begin < s.end;
        });
    while (next != written.begin()) {
      --next;
      if (next->end <= source.begin) break;
      const bool is_own = next->is_target && next->begin == source.begin &&
                          pairs[next->pair].source == pairs[source.pair].source &&
                          pairs[next->pair].target == pairs[source.pair].target &&
                          pairs[source.pair].target_element == pairs[source.pair].source_element &&
                          same_walk(all_layouts[source.pair]);
      STD_TORCH_CHECK(
          is_own,
          "ema_update_: expected sources that do not overlap in memory with targets or shadows,"
          " got an overlap of source ",
          source.pair,
          " and pair ",
          next->pair);
    }
  }

  size_t kept = 0;
  for (size_t i = 0; i < pairs.size(); ++i)
    if (!tied[i]) pairs[kept++] = pairs[i];
  pairs.resize(kept);
}

inline EmaPlan ema_update_plan(
    const std::vector<Tensor>& targets,
    const std::vector<Tensor>& sources,
    const std::optional<std::vector<Tensor>>& shadows) {
  STD_TORCH_CHECK(
      targets.size() == sources.size() && (!shadows || shadows->size() == targets.size()),
      "ema_update_: expected lists of one length, got ",
      targets.size(),
      " targets and ",
      sources.size(),
      " sources");
  EmaPlan plan;
  std::vector<EmaLayout> all_layouts;  // one per pair, for the overlaps
  plan.pairs.reserve(targets.size());
  all_layouts.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &target = targets[i], &source = sources[i];
    const Tensor* shadow = shadows ? &(*shadows)[i] : nullptr;
    const auto sizes = target.sizes();
    STD_TORCH_CHECK(
        sizes == source.sizes() && (shadow == nullptr || sizes == shadow->sizes()),
        "ema_update_: expected one shape per pair, got several for pair ",
        i);
    STD_TORCH_CHECK(
        target.device() == source.device() &&
            (shadow == nullptr || target.device() == shadow->device()) &&
            target.device() == targets[0].device(),
        "ema_update_: expected all tensors on one device, got pair ",
        i,
        " elsewhere");

    int64_t per_number = 1, source_per_number = 1, shadow_per_number = 1;
    EmaPair pair{};
    pair.target = target.mutable_data_ptr();
    pair.source = source.const_data_ptr();
    pair.target_element = element_of(target.scalar_type(), &per_number);
    pair.source_element = element_of(source.scalar_type(), &source_per_number);
    const bool averages = is_floating(pair.target_element);
    STD_TORCH_CHECK(
        averages ? is_floating(pair.source_element) && per_number == source_per_number
                 : target.scalar_type() == source.scalar_type(),
        "ema_update_: expected a floating pair, or an integer pair of one dtype, got ",
        toString(target.scalar_type()),
        " from ",
        toString(source.scalar_type()),
        " in pair ",
        i);
    if (shadow != nullptr) {
      pair.shadow = shadow->mutable_data_ptr();
      pair.shadow_element = element_of(shadow->scalar_type(), &shadow_per_number);
      STD_TORCH_CHECK(
          averages ? (pair.shadow_element == Element::kBFloat16 ||
                      pair.shadow_element == Element::kFloat16) &&
                         per_number == 1
                   : shadow->scalar_type() == target.scalar_type(),
          "ema_update_: expected a bfloat16 or float16 shadow of a real target, got ",
          toString(shadow->scalar_type()),
          " in pair ",
          i);
    }
    pair.numel = target.numel() * per_number;
    if (pair.numel == 0) continue;

    EmaLayout layout = collapse({&target, &source, shadow}, per_number);
    pair.layout = is_flat(layout, shadow != nullptr) ? kEmaFlat : 0;
    STD_TORCH_CHECK(
        pair.layout == kEmaFlat ||
            (!overlaps_itself(layout, 0) && (shadow == nullptr || !overlaps_itself(layout, 2))),
        "ema_update_: expected targets and shadows whose elements do not overlap, got an expanded"
        " or overlapping view in pair ",
        i);
    plan.pairs.push_back(pair);
    all_layouts.push_back(layout);
  }
  for (size_t i = 0; i < plan.pairs.size(); ++i) {
    if (plan.pairs[i].layout == kEmaFlat) continue;
    plan.pairs[i].layout = int32_t(plan.layouts.size());
    plan.layouts.push_back(all_layouts[i]);
  }
  drop_ties(plan.pairs, all_layouts);
  return plan;
}

}  // namespace m2ae
