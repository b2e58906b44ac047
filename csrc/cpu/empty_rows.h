// Outputs of an op in reused memory.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace m2ae::cpu {

// Uninitialized [rows, width] of a dtype of 2 or 4 bytes. A large one is of the pool of workspace.h
// and goes back there when its last owner lets go of it, so that the next step touches no fresh
// pages.
torch::stable::Tensor empty_rows(
    const torch::stable::Tensor& like,
    int64_t rows,
    int64_t width,
    torch::headeronly::ScalarType dtype);

}  // namespace m2ae::cpu
