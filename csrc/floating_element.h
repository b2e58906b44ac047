// The dtypes that most ops compute in, as the elements that kernels are told.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "element.h"

namespace m2ae {

inline Element floating_element(
    const char* op, const char* name, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Element::kFloat32;
  if (type == ScalarType::BFloat16) return Element::kBFloat16;
  STD_TORCH_CHECK(
      type == ScalarType::Half,
      op,
      ": expected ",
      name,
      " in float32, bfloat16 or float16, got ",
      toString(type));
  return Element::kFloat16;
}

}  // namespace m2ae
