// Outputs of an op in reused memory.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace m2ae::cpu {

// Uninitialized and contiguous, of a dtype of 2 or 4 bytes. A large one is of the pool of
// workspace.h and goes back there when its last owner lets go of it, so that the next step touches
// no fresh pages.
torch::stable::Tensor pooled_tensor(
    const torch::stable::Tensor& like,
    const std::vector<int64_t>& sizes,
    torch::headeronly::ScalarType dtype);

}  // namespace m2ae::cpu
