// ema_update_'s launcher, on raw pointers: implemented in ema_update.cu, called by ema_update.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../ema_update_pair.h"

namespace m2ae::cuda {

// Elements per chunk: a multiple of every vector width, small enough that 132 multiprocessors share
// a ViT-B evenly, large enough to hide the fetch of its description.
constexpr int64_t kEmaChunk = 8192;

struct EmaChunk {
  int32_t pair;
  int32_t index;  // elements [index * kEmaChunk, (index + 1) * kEmaChunk) of the pair
};

// Everything a launch reads besides the tensors lies in device memory, so a captured graph can
// replay it.
struct EmaTable {
  const EmaPair* pairs;
  const EmaLayout* layouts;
  const EmaChunk* chunks;
  int64_t num_chunks;  // >= 1
};

// A number that is known on the host, or read by the kernel.
struct EmaNumber {
  double value;
  const void* device;  // null: `value` holds
  Element element;     // kFloat64, kFloat32 or kBytes1 (bool)
};

cudaError_t ema_update_launch(
    const EmaTable& table, EmaNumber decay, EmaNumber found_inf, int blocks, cudaStream_t stream);

}  // namespace m2ae::cuda
