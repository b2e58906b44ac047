// How the host functions of moe_permute and moe_unpermute check their inputs and hold them as raw
// memory. On a device nobody can look at what ids hold: those out of range are skipped.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../floating_element.h"
#include "host.h"
#include "moe_rows.h"

namespace m2ae::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Keeps contiguous versions of the inputs, on one device, for as long as they are read.
class MoeInputs {
 public:
  MoeInputs(const char* op, const Tensor& first) : op_(op), device_(first.device()) {}

  const int32_t* ids(const char* name, const Tensor& tensor, int64_t dim) {
    STD_TORCH_CHECK(
        tensor.dim() == dim && tensor.scalar_type() == ScalarType::Int,
        op_,
        ": expected ",
        name,
        " of int32 and ",
        dim,
        " dimensions");
    return static_cast<const int32_t*>(hold(name, tensor));
  }

  const float* floats(const char* name, const Tensor& tensor, int64_t numel) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Float && tensor.numel() == numel,
        op_,
        ": expected ",
        name,
        " of ",
        numel,
        " float32");
    return static_cast<const float*>(hold(name, tensor));
  }

  const void* matrix(
      const char* name, const Tensor& tensor, int64_t rows, int64_t columns, ScalarType type) {
    STD_TORCH_CHECK(
        tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
            tensor.scalar_type() == type,
        op_,
        ": expected ",
        name,
        " of ",
        rows,
        " x ",
        columns,
        " in the dtype of the other matrices");
    return hold(name, tensor);
  }

 private:
  const void* hold(const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.device() == device_, op_, ": expected ", name, " on the others' device");
    held_.push_back(torch::stable::contiguous(tensor));
    return held_.back().const_data_ptr();
  }

  const char* op_;
  torch::stable::Device device_;
  std::vector<Tensor> held_;
};

}  // namespace m2ae::cuda
