#include "pooled_tensor.h"

#include <torch/csrc/stable/ops.h>

#include "workspace.h"

namespace m2ae::cpu {
namespace {

constexpr int64_t kPooledBytes = int64_t(1) << 17;  // malloc keeps smaller blocks by itself

}  // namespace

torch::stable::Tensor pooled_tensor(
    const torch::stable::Tensor& like,
    const std::vector<int64_t>& sizes,
    torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  const bool is_half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  int64_t bytes = is_half ? 2 : 4;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 0; bytes *= sizes[d])
    if (d + 1 < sizes.size()) strides[d] = strides[d + 1] * sizes[d + 1];
  if (bytes < kPooledBytes) return torch::stable::new_empty(like, sizes, dtype);
  return torch::stable::from_blob(
      take_block(size_t(bytes)), sizes, strides, like.device(), dtype, &give_block);
}

}  // namespace m2ae::cpu
