// ema_update_ on CUDA: the table of tensors in device memory, and the launch. The kernel is in
// ema_update.cu, the checks in ../ema_update_plan.h; contract: m2ae_kernels/ops/ema_update.py
//
// The table is built once per set of tensors and found again by comparing addresses, dtypes and
// sizes, so a call costs no copy and can be captured in a graph. Building one takes a copy from
// pageable memory, which a capture forbids: call the op once before capturing.
#include "ema_update.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>
#include <utility>

#include "../ema_update_plan.h"
#include "host.h"

namespace m2ae::cuda {
namespace {

constexpr size_t kMaxTables = 64;       // sets of tensors; a training run has a handful
constexpr int kBlocksPerProcessor = 4;  // of 256 threads with 64 registers

struct CachedTable {
  EmaPlan plan;
  int device;
  void* memory;
  EmaTable table;
  bool captured;  // a graph holds its address
};

bool same(const EmaPlan& a, const EmaPlan& b) {
  return a.pairs.size() == b.pairs.size() && a.layouts == b.layouts &&
         std::memcmp(a.pairs.data(), b.pairs.data(), a.pairs.size() * sizeof(EmaPair)) == 0;
}

std::vector<EmaChunk> chunks_of(const EmaPlan& plan) {
  std::vector<EmaChunk> chunks;
  for (int32_t p = 0; p < int32_t(plan.pairs.size()); ++p)
    for (int64_t i = 0; i * kEmaChunk < plan.pairs[p].numel; ++i) chunks.push_back({p, int32_t(i)});
  return chunks;
}

template <typename T>
size_t bytes(const std::vector<T>& items) {
  return items.size() * sizeof(T);
}

// Waits for its own copy only, not for the device's other work.
CachedTable upload(EmaPlan plan, int device) {
  const std::vector<EmaChunk> chunks = chunks_of(plan);
  std::vector<char> image(bytes(plan.pairs) + bytes(plan.layouts) + bytes(chunks));
  char* const layouts_at = image.data() + bytes(plan.pairs);
  char* const chunks_at = layouts_at + bytes(plan.layouts);
  std::memcpy(image.data(), plan.pairs.data(), bytes(plan.pairs));
  if (!plan.layouts.empty()) std::memcpy(layouts_at, plan.layouts.data(), bytes(plan.layouts));
  std::memcpy(chunks_at, chunks.data(), bytes(chunks));

  // Not torch's allocator: a block it hands out on one stream may be reused there while another
  // stream still reads the table.
  void* memory = nullptr;
  M2AE_CUDA_CHECK(cudaMalloc(&memory, image.size()));
  cudaStream_t stream = nullptr;
  M2AE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  M2AE_CUDA_CHECK(
      cudaMemcpyAsync(memory, image.data(), image.size(), cudaMemcpyHostToDevice, stream));
  M2AE_CUDA_CHECK(cudaStreamSynchronize(stream));
  M2AE_CUDA_CHECK(cudaStreamDestroy(stream));
  char* const base = static_cast<char*>(memory);
  EmaTable table{};
  table.pairs = reinterpret_cast<const EmaPair*>(base);
  table.layouts = reinterpret_cast<const EmaLayout*>(base + (layouts_at - image.data()));
  table.chunks = reinterpret_cast<const EmaChunk*>(base + (chunks_at - image.data()));
  table.num_chunks = int64_t(chunks.size());
  return {std::move(plan), device, memory, table, false};
}

// The table for this plan, complete on the device.
EmaTable table_for(EmaPlan plan, int device, cudaStream_t stream) {
  static std::mutex mutex;
  static auto* tables = new std::list<CachedTable>;  // never destroyed: CUDA may be gone by then
  const std::lock_guard<std::mutex> lock(mutex);

  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  M2AE_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  const bool capturing = status != cudaStreamCaptureStatusNone;

  auto found = std::find_if(tables->begin(), tables->end(), [&](const CachedTable& cached) {
    return cached.device == device && same(cached.plan, plan);
  });
  if (found == tables->end()) {
    STD_TORCH_CHECK(
        !capturing,
        "ema_update_: expected tensors that were updated once before the graph capture, got a new"
        " set; call ema_update_ on them outside of the capture first");
    if (tables->size() >= kMaxTables) {
      auto oldest = std::find_if(tables->rbegin(), tables->rend(), [](const CachedTable& cached) {
        return !cached.captured;
      });
      if (oldest != tables->rend()) {
        M2AE_CUDA_CHECK(cudaFree(oldest->memory));  // waits for the device, so no launch reads it
        tables->erase(std::next(oldest).base());
      }
    }
    tables->push_front(upload(std::move(plan), device));
  } else {
    tables->splice(tables->begin(), *tables, found);
  }
  tables->front().captured |= capturing;
  return tables->front().table;
}

EmaNumber number_of(const Tensor& tensor, const Tensor& target, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      tensor.numel() == 1 &&
          (type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Bool),
      "ema_update_: expected ",
      name,
      " to be one float64 or float32 number, got ",
      tensor.numel(),
      " of ",
      toString(type));
  int64_t per_number = 1;
  const Element element = element_of(type, &per_number);
  const void* data = tensor.const_data_ptr();
  if (tensor.device() == target.device()) return {0, data, element};
  STD_TORCH_CHECK(
      tensor.is_cpu() && type != ScalarType::Bool,
      "ema_update_: expected ",
      name,
      " on the targets' device");
  if (type == ScalarType::Double) return {*static_cast<const double*>(data), nullptr, element};
  return {*static_cast<const float*>(data), nullptr, element};
}

void ema_update_cuda(
    std::vector<Tensor> targets,
    std::vector<Tensor> sources,
    double decay,
    const std::optional<Tensor>& decay_tensor,
    std::optional<std::vector<Tensor>> shadows,
    const std::optional<Tensor>& found_inf) {
  if (targets.empty() && sources.empty()) return;
  EmaPlan plan = ema_update_plan(targets, sources, shadows);
  const Tensor& first = targets[0];
  EmaNumber decay_number{decay, nullptr, Element::kFloat64};
  if (decay_tensor) decay_number = number_of(*decay_tensor, first, "decay");
  STD_TORCH_CHECK(
      decay_number.device != nullptr || (decay_number.value >= 0 && decay_number.value <= 1),
      "ema_update_: expected decay in [0, 1], got ",
      decay_number.value);
  EmaNumber skip{0, nullptr, Element::kFloat32};
  if (found_inf) {
    STD_TORCH_CHECK(
        found_inf->device() == first.device(),
        "ema_update_: expected found_inf on the targets' device");
    skip = number_of(*found_inf, first, "found_inf");
  }
  if (plan.pairs.empty()) return;

  [[maybe_unused]] const auto guard = device_guard(first);
  const cudaStream_t stream = current_stream(first);
  const int device = first.get_device_index();
  const EmaTable table = table_for(std::move(plan), device, stream);
  int processors = 0;
  M2AE_CUDA_CHECK(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, std::max(device, 0)));
  const int blocks =
      int(std::min<int64_t>(table.num_chunks, int64_t(processors) * kBlocksPerProcessor));
  M2AE_CUDA_CHECK(ema_update_launch(table, decay_number, skip, blocks, stream));
}

}  // namespace
}  // namespace m2ae::cuda

M2AE_CUDA_LIBRARY(m) {
  m.impl("ema_update_", TORCH_BOX(&m2ae::cuda::ema_update_cuda));
}
