#include "info_nce_loss_inputs.h"

#include <algorithm>
#include <cmath>

#include "isa.h"

namespace m2ae::cpu {

Operand nce_operand(const char* op, const Tensor& query, const Tensor& key) {
  const Element element = contrastive_element(op, "query", query);
  STD_TORCH_CHECK(
      contrastive_element(op, "key", key) == element && key.size(1) == query.size(1),
      op,
      ": expected query [N, D] and key [M, D] of one dtype");
  return contrastive_operand(element);
}

TileGrid nce_grid(int64_t n, int64_t m, int64_t D) {
  return tile_grid(n, m, D, 3);
}

double softplus(double x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

double number_of(const char* op, const char* name, const Tensor& number) {
  STD_TORCH_CHECK(
      number.is_cpu() && number.numel() == 1, op, ": expected one number on the CPU as ", name);
  switch (number.scalar_type()) {
    case ScalarType::Double:
      return *number.const_data_ptr<double>();
    case ScalarType::Float:
      return *number.const_data_ptr<float>();
    case ScalarType::BFloat16:
      return float(*number.const_data_ptr<torch::headeronly::BFloat16>());
    case ScalarType::Half:
      return float(*number.const_data_ptr<torch::headeronly::Half>());
    default:
      STD_TORCH_CHECK(
          false, op, ": expected a floating ", name, ", got ", toString(number.scalar_type()));
  }
}

NceRange nce_range(double logit_scale, const PackedRows& x, const PackedRows& y) {
  constexpr double kLog2E = 1.44269504088896340736;
  NceRange range{};
  range.scale.scale = logit_scale * kLog2E;
  // No product of rows is larger, but for its rounding; nor is it infinite.
  const double product = x.longest() * y.longest();
  const double bound = std::fabs(range.scale.scale) * product * 1.0001 + 0.001;
  // Powers then lie in [2^-126, 2^100], and sums of 2^20 of them are far from infinity.
  range.robust = !(product < 1e37 && 2 * std::ceil(bound) <= 226);
  range.scale.reference = range.robust ? 0 : int32_t(std::ceil(bound)) - 100;
  return range;
}

double product_of_rows(const PackedRows& x, int64_t i, const PackedRows& y, int64_t j) {
  const double product = kernels().dot_rows[int(x.operand())](x.rows(i), y.rows(j), x.depth());
  return double(x.factor(i)) * double(y.factor(j)) * product;
}

}  // namespace m2ae::cpu
