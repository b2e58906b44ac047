// moe_sort's launcher, on raw pointers: implemented in moe_sort.cu, called by moe_sort.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace m2ae::cuda {

constexpr int64_t kMoeSortMaxExperts = 2048;  // counters of a block fit 48 KiB
constexpr int64_t kMoeSortChunk = 2048;       // slots of a block
constexpr int64_t kMoeSortNoCapacity = int64_t(1) << 31;

// The blocks that `slots` slots take; at least one, which writes the outputs of no slots at all.
inline int64_t moe_sort_blocks(int64_t slots) {
  return slots == 0 ? 1 : (slots + kMoeSortChunk - 1) / kMoeSortChunk;
}

// In which order slots compete for an expert's capacity.
struct MoeSortOrder {
  const int64_t* given;  // [R k], or null
  int64_t rows;          // R, to take slots in order of j, then row; or 0
};

struct MoeSortArguments {
  const int32_t* ids;  // [R, k]
  int64_t slots;       // R k
  int64_t k;
  int64_t E;
  int64_t N;
  int64_t capacity;
  int64_t align;
  int32_t* counts;   // scratch, [E, blocks]
  int32_t* totals;   // scratch, [E]
  int32_t* sorted;   // [N]
  int32_t* inverse;  // [R, k]
  int32_t* offsets;  // [E + 1]
  int32_t* kept;     // [E]
};

// The ids of slots that have room, and -1 for the others, in the order in which they compete.
cudaError_t moe_sort_drop_launch(
    const MoeSortArguments& arguments, MoeSortOrder order, int32_t* kept_ids, cudaStream_t stream);

// The sort itself, by slot; what is beyond the capacity is dropped.
cudaError_t moe_sort_launch(const MoeSortArguments& arguments, cudaStream_t stream);

}  // namespace m2ae::cuda
