// ema_update_ on the CPU: threads and memory walks. The loops are in ema_update_kernel.h, the
// checks in ../ema_update_plan.h; contract and math: m2ae_kernels/ops/ema_update.py
//
// One task owns kChunk consecutive elements of one target, and its shadow. With a shadow it goes
// through them in blocks that stay in the first-level cache, so the shadow is no second read of
// memory.
#include "../ema_update_plan.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "isa.h"

namespace m2ae::cpu {
namespace {

constexpr int64_t kChunk = 1 << 15;  // 128 KB of float32: enough to pay for waking a thread
constexpr int64_t kBlock = 1 << 11;

struct Chunk {
  int32_t pair;
  int64_t begin, end;
};

double scalar_value(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.numel() == 1 && tensor.is_cpu(),
      "ema_update_: expected ",
      name,
      " to be one number on the CPU, as the targets are, got ",
      tensor.numel(),
      " elsewhere");
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return *tensor.const_data_ptr<double>();
    case ScalarType::Float:
      return *tensor.const_data_ptr<float>();
    case ScalarType::Bool:
      return *static_cast<const bool*>(tensor.const_data_ptr());
    default:
      STD_TORCH_CHECK(
          false,
          "ema_update_: expected ",
          name,
          " in float64 or float32, got ",
          toString(tensor.scalar_type()));
  }
}

// Blocks of one pair are averaged where they lie, or, if the pair is no run of memory, in buffers.
class Updater {
 public:
  Updater(const EmaPair& pair, const EmaLayout* layout, double decay)
      : pair_(pair), layout_(layout), decay_(decay) {}

  void operator()(int64_t begin, int64_t end) {
    const bool at_once = layout_ == nullptr && pair_.shadow == nullptr;
    const int64_t step = at_once ? end - begin : kBlock;
    for (int64_t i = begin; i < end; i += step) block(i, std::min(step, end - i));
  }

 private:
  void block(int64_t begin, int64_t n) {
    if (layout_ == nullptr) {
      const int64_t t = bytes_of(pair_.target_element), s = bytes_of(pair_.source_element);
      void* shadow = pair_.shadow == nullptr ? nullptr
                                             : static_cast<char*>(pair_.shadow) +
                                                   begin * bytes_of(pair_.shadow_element);
      update(
          static_cast<char*>(pair_.target) + begin * t,
          static_cast<const char*>(pair_.source) + begin * s,
          shadow,
          n);
      return;
    }
    alignas(64) char target[kBlock * 8], source[kBlock * 8], shadow[kBlock * 8];
    walk(0, pair_.target_element, begin, n, [&](int64_t i, char* at, int64_t bytes) {
      std::memcpy(target + i * bytes, at, bytes);
    });
    walk(1, pair_.source_element, begin, n, [&](int64_t i, char* at, int64_t bytes) {
      std::memcpy(source + i * bytes, at, bytes);
    });
    update(target, source, pair_.shadow == nullptr ? nullptr : shadow, n);
    walk(0, pair_.target_element, begin, n, [&](int64_t i, char* at, int64_t bytes) {
      std::memcpy(at, target + i * bytes, bytes);
    });
    if (pair_.shadow == nullptr) return;
    walk(2, pair_.shadow_element, begin, n, [&](int64_t i, char* at, int64_t bytes) {
      std::memcpy(at, shadow + i * bytes, bytes);
    });
  }

  // visit(i, address of element begin + i, its bytes) for tensor t of the layout.
  template <typename Visit>
  void walk(int t, Element element, int64_t begin, int64_t n, const Visit& visit) const {
    const void* const pointers[] = {pair_.target, pair_.source, pair_.shadow};
    auto* const base = static_cast<char*>(const_cast<void*>(pointers[t]));
    const int64_t bytes = bytes_of(element);
    int64_t at[kEmaMaxDims] = {};
    int64_t rest = begin, offset = 0;
    for (int64_t d = layout_->dims - 1; d >= 0; --d) {
      at[d] = rest % layout_->sizes[d];
      rest /= layout_->sizes[d];
      offset += at[d] * layout_->strides[t][d];
    }
    for (int64_t i = 0; i < n; ++i) {
      visit(i, base + offset * bytes, bytes);
      for (int64_t d = layout_->dims - 1; d >= 0; --d) {
        offset += layout_->strides[t][d];
        if (++at[d] < layout_->sizes[d]) break;
        offset -= at[d] * layout_->strides[t][d];
        at[d] = 0;
      }
    }
  }

  void update(void* target, const void* source, void* shadow, int64_t n) const {
    const int t = int(pair_.target_element), s = int(pair_.source_element);
    if (!is_floating(pair_.target_element)) {
      std::memmove(target, source, n * bytes_of(pair_.target_element));
      if (shadow != nullptr) std::memcpy(shadow, target, n * bytes_of(pair_.target_element));
      return;
    }
    if (decay_ == 0) kernels().cast[s][t](source, target, n);
    if (decay_ != 0 && decay_ != 1) kernels().ema_update[t][s](target, source, n, 1 - decay_);
    if (shadow != nullptr) kernels().cast[t][int(pair_.shadow_element)](target, shadow, n);
  }

  const EmaPair& pair_;
  const EmaLayout* layout_;
  double decay_;
};

void ema_update_cpu(
    std::vector<Tensor> targets,
    std::vector<Tensor> sources,
    double decay,
    const std::optional<Tensor>& decay_tensor,
    std::optional<std::vector<Tensor>> shadows,
    const std::optional<Tensor>& found_inf) {
  if (decay_tensor) decay = scalar_value(*decay_tensor, "decay");
  STD_TORCH_CHECK(decay >= 0 && decay <= 1, "ema_update_: expected decay in [0, 1], got ", decay);
  const bool skip = found_inf && scalar_value(*found_inf, "found_inf") != 0;
  const EmaPlan plan = ema_update_plan(targets, sources, shadows);
  if (skip) return;

  std::vector<Chunk> chunks;
  for (int32_t p = 0; p < int32_t(plan.pairs.size()); ++p) {
    const int64_t numel = plan.pairs[p].numel;
    for (int64_t i = 0; i < numel; i += kChunk)
      chunks.push_back({p, i, std::min(i + kChunk, numel)});
  }
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const EmaPair& pair = plan.pairs[chunks[c].pair];
      const EmaLayout* layout = pair.layout == kEmaFlat ? nullptr : &plan.layouts[pair.layout];
      Updater(pair, layout, decay)(chunks[c].begin, chunks[c].end);
    }
  };
  torch::stable::parallel_for(0, int64_t(chunks.size()), 1, run);
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("ema_update_", TORCH_BOX(&m2ae::cpu::ema_update_cpu));
}
