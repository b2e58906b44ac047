// ema_update_'s work, as plain data for the CPU and the CUDA kernel: which memory is averaged into
// which. Built by ema_update_plan(), which also refuses what no kernel could do safely; the
// contract, with the friendly messages, is in m2ae_kernels/ops/ema_update.py
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "ema_update_layout.h"

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

// The bytes from the first to the last element of the target, the source or the shadow (t = 0, 1,
// 2).
struct EmaExtent {
  const char* begin;
  const char* end;
  int pair;
  bool is_target;
};

inline EmaExtent extent_of(const EmaPlan& plan, int index, int t) {
  const EmaPair& pair = plan.pairs[index];
  const void* const pointers[] = {pair.target, pair.source, pair.shadow};
  const Element elements[] = {pair.target_element, pair.source_element, pair.shadow_element};
  const char* begin = static_cast<const char*>(pointers[t]);
  int64_t last = pair.numel - 1;
  if (pair.layout != kEmaFlat) {
    const EmaLayout& layout = plan.layouts[pair.layout];
    last = 0;
    for (int64_t d = 0; d < layout.dims; ++d) last += layout.strides[t][d] * (layout.sizes[d] - 1);
  }
  return {begin, begin + (last + 1) * bytes_of(elements[t]), index, t == 0};
}

// True if the two pairs do the same to the same memory.
inline bool are_tied(const EmaPlan& plan, const EmaPair& a, const EmaPair& b) {
  return a.target == b.target && a.source == b.source && a.shadow == b.shadow &&
         a.numel == b.numel && a.target_element == b.target_element &&
         a.source_element == b.source_element && a.shadow_element == b.shadow_element &&
         (a.layout == kEmaFlat
              ? b.layout == kEmaFlat
              : b.layout != kEmaFlat && plan.layouts[a.layout] == plan.layouts[b.layout]);
}

// True if the pair's source is its target, walked in one order: every element is its own source.
inline bool is_own_source(const EmaPlan& plan, const EmaPair& pair) {
  if (pair.target != pair.source || pair.target_element != pair.source_element) return false;
  if (pair.layout == kEmaFlat) return true;
  const EmaLayout& layout = plan.layouts[pair.layout];
  return std::equal(layout.strides[0], layout.strides[0] + layout.dims, layout.strides[1]);
}

// Tied tensors are updated once; any other overlap of what is written is an error, because pairs
// are processed in no particular order.
inline void drop_ties(EmaPlan& plan) {
  std::vector<EmaExtent> written;
  written.reserve(2 * plan.pairs.size());
  for (int i = 0; i < int(plan.pairs.size()); ++i) {
    written.push_back(extent_of(plan, i, 0));
    if (plan.pairs[i].shadow != nullptr) written.push_back(extent_of(plan, i, 2));
  }
  const auto by_begin = [](const EmaExtent& a, const EmaExtent& b) { return a.begin < b.begin; };
  if (!std::is_sorted(written.begin(), written.end(), by_begin))
    std::stable_sort(written.begin(), written.end(), by_begin);

  std::vector<bool> is_repeated(plan.pairs.size(), false);
  const EmaExtent* last = nullptr;
  for (const EmaExtent& next : written) {
    if (last == nullptr || next.begin >= last->end) {
      last = &next;
      continue;
    }
    STD_TORCH_CHECK(
        last->is_target == next.is_target && last->pair != next.pair &&
            are_tied(plan, plan.pairs[last->pair], plan.pairs[next.pair]),
        "ema_update_: expected targets and shadows that do not overlap in memory (tied targets"
        " with one source are fine), got an overlap of pairs ",
        last->pair,
        " and ",
        next.pair);
    is_repeated[next.pair] = true;
  }

  for (int i = 0; i < int(plan.pairs.size()); ++i) {
    const EmaExtent source = extent_of(plan, i, 1);
    // Back from the last extent that begins before the source ends; but for ties, they are apart.
    auto next = std::lower_bound(
        written.begin(), written.end(), source.end, [](const EmaExtent& w, const char* end) {
          return w.begin < end;
        });
    while (next != written.begin() && (--next)->end > source.begin)
      STD_TORCH_CHECK(
          next->is_target && is_own_source(plan, plan.pairs[i]) &&
              are_tied(plan, plan.pairs[i], plan.pairs[next->pair]),
          "ema_update_: expected sources that do not overlap in memory with targets or shadows,"
          " got an overlap of source ",
          i,
          " and pair ",
          next->pair);
  }

  size_t kept = 0;
  for (size_t i = 0; i < plan.pairs.size(); ++i)
    if (!is_repeated[i]) plan.pairs[kept++] = plan.pairs[i];
  plan.pairs.resize(kept);
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
  plan.pairs.reserve(targets.size());
  if (targets.empty()) return plan;
  const auto device = targets[0].device();
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &target = targets[i], &source = sources[i];
    const Tensor* shadow = shadows ? &(*shadows)[i] : nullptr;
    const auto sizes = target.sizes();
    STD_TORCH_CHECK(
        sizes.equals(source.sizes()) && (shadow == nullptr || sizes.equals(shadow->sizes())),
        "ema_update_: expected one shape per pair, got several for pair ",
        i);
    STD_TORCH_CHECK(
        target.device() == device && source.device() == device &&
            (shadow == nullptr || shadow->device() == device),
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

    pair.layout = kEmaFlat;
    const bool is_contiguous = target.is_contiguous() && source.is_contiguous() &&
                               (shadow == nullptr || shadow->is_contiguous());
    if (!is_contiguous) {
      const EmaLayout layout = collapse({&target, &source, shadow}, per_number);
      STD_TORCH_CHECK(
          !overlaps_itself(layout, 0) && (shadow == nullptr || !overlaps_itself(layout, 2)),
          "ema_update_: expected targets and shadows whose elements do not overlap, got an expanded"
          " or overlapping view in pair ",
          i);
      if (!is_flat(layout, shadow != nullptr)) {
        pair.layout = int32_t(plan.layouts.size());
        plan.layouts.push_back(layout);
      }
    }
    plan.pairs.push_back(pair);
  }
  drop_ties(plan);
  return plan;
}

}  // namespace m2ae
