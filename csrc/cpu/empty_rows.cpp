#include "empty_rows.h"

#include <torch/csrc/stable/ops.h>

#include "workspace.h"

namespace m2ae::cpu {
namespace {

constexpr int64_t kPooledBytes = int64_t(1) << 18;  // malloc keeps smaller blocks by itself

}  // namespace

torch::stable::Tensor empty_rows(
    const torch::stable::Tensor& like,
    int64_t rows,
    int64_t width,
    torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  const bool is_half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  const int64_t bytes = rows * width * (is_half ? 2 : 4);
  if (bytes < kPooledBytes) return torch::stable::new_empty(like, {rows, width}, dtype);
  return torch::stable::from_blob(
      take_block(size_t(bytes)), {rows, width}, {width, 1}, like.device(), dtype, &give_block);
}

}  // namespace m2ae::cpu
