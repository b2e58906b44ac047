// siglip_loss on the CPU: arguments, and what is returned. The walk over the matrix is in
// siglip_loss.h, its loops in siglip_loss_kernel.h; contract and math:
// m2ae_kernels/ops/siglip_loss.py
//
// Forward makes the gradients, too, as the weights of the rows are known there, up to one factor;
// backward recomputes where they are not, for gradients of losses per row.
#include "siglip_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <tuple>
#include <vector>

namespace m2ae::cpu {
namespace {

constexpr const char* kOp = "siglip_loss";

// Element i of floating numbers, [rows] or one.
double value_at(const char* name, const Tensor& tensor, int64_t i) {
  const int64_t at = tensor.dim() == 0 ? 0 : i * tensor.stride(0);
  const void* const data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return static_cast<const float*>(data)[at];
    case ScalarType::Double:
      return static_cast<const double*>(data)[at];
    case ScalarType::BFloat16:
      return float(static_cast<const torch::headeronly::BFloat16*>(data)[at]);
    case ScalarType::Half:
      return float(static_cast<const torch::headeronly::Half*>(data)[at]);
    default:
      STD_TORCH_CHECK(
          false, kOp, ": expected ", name, " floating, got ", toString(tensor.scalar_type()));
  }
}

float number_of(const char* name, const Tensor& number) {
  STD_TORCH_CHECK(number.is_cpu() && number.dim() == 0, kOp, ": expected ", name, " [] on the CPU");
  return float(value_at(name, number, 0));
}

Tensor number_like(const Tensor& like, ScalarType dtype, double value) {
  Tensor number = torch::stable::new_empty(like, {}, dtype);
  switch (dtype) {
    case ScalarType::Double:
      *number.mutable_data_ptr<double>() = value;
      break;
    case ScalarType::BFloat16:
      *static_cast<torch::headeronly::BFloat16*>(number.mutable_data_ptr()) = float(value);
      break;
    case ScalarType::Half:
      *static_cast<torch::headeronly::Half*>(number.mutable_data_ptr()) = float(value);
      break;
    default:
      *number.mutable_data_ptr<float>() = float(value);
  }
  return number;
}

void check_rows(const char* name, const Tensor& rows, int64_t count) {
  STD_TORCH_CHECK(
      rows.is_cpu() && rows.dim() == 1 && rows.size(0) == count,
      kOp,
      ": expected ",
      name,
      " [",
      count,
      "] on the CPU");
}

SiglipLoss::Needs needs_of(const std::vector<bool>& asked) {
  STD_TORCH_CHECK(asked.size() == 4, kOp, ": expected 4 flags, got ", asked.size());
  return {asked[0], asked[1], asked[2], asked[3]};
}

void check_features(const Tensor& images, const Tensor& texts) {
  contrastive_element(kOp, "image_features", images);
  contrastive_element(kOp, "text_features", texts);
  STD_TORCH_CHECK(
      texts.size(1) == images.size(1) && texts.scalar_type() == images.scalar_type(),
      kOp,
      ": expected text_features of the width and dtype of image_features");
}

// The gradient of features, zeros where rows are absent; or empty.
struct FeatureGradient {
  Tensor tensor;
  GradientOutput output{nullptr, Element::kFloat32};

  FeatureGradient(const Tensor& features, bool is_needed, bool is_written, ScalarType dtype)
      : tensor(
            !is_needed   ? torch::stable::new_empty(features, {0}, dtype)
            : is_written ? torch::stable::new_empty(features, features.sizes(), dtype)
                         : torch::stable::new_zeros(features, features.sizes(), dtype)) {
    if (!is_needed) return;
    output.gradient = tensor.mutable_data_ptr();
    if (dtype != ScalarType::Float) output.element = contrastive_element(kOp, "features", features);
  }
};

Tensor number_gradient(const Tensor& like, bool is_needed, ScalarType dtype, double value) {
  return is_needed ? number_like(like, dtype, value) : torch::stable::new_empty(like, {0}, dtype);
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward siglip_loss_cpu(
    const Tensor& images /* [N, D] */,
    const Tensor& texts /* [M, D] */,
    const Tensor& logit_scale /* [] */,
    const Tensor& logit_bias /* [] */,
    const std::optional<Tensor>& target,      // [N]
    const std::optional<Tensor>& query_mask,  // [N]
    const std::optional<Tensor>& key_mask,    // [M]
    const std::optional<Tensor>& query_ids,   // [N]
    const std::optional<Tensor>& key_ids,     // [M]
    const std::optional<Tensor>& weight,      // [N]
    int64_t target_offset,
    int64_t ignore_index,
    int64_t same_id,
    bool normalize,
    double eps,
    bool per_row,
    const std::vector<bool>& gradients,
    bool /* allow_tf32 */,
    int64_t /* workspace: nothing here grows with N x M */) {
  check_features(images, texts);
  const int64_t N = images.size(0), M = texts.size(0);
  const auto needs = needs_of(gradients);
  STD_TORCH_CHECK(!per_row || !needs.any(), kOp, ": expected no gradients of losses per row");
  if (weight) check_rows("weight", *weight, N);
  constexpr ScalarType kFloat = ScalarType::Float;
  Tensor rnorm_q = torch::stable::new_zeros(images, {normalize ? N : 0}, kFloat);
  Tensor rnorm_k = torch::stable::new_zeros(images, {normalize ? M : 0}, kFloat);
  const PairArguments arguments{
      target,
      query_mask,
      key_mask,
      query_ids,
      key_ids,
      target_offset,
      ignore_index,
      same_id,
      false};
  SiglipLoss loss(
      images,
      texts,
      number_of("logit_scale", logit_scale),
      number_of("logit_bias", logit_bias),
      arguments,
      {normalize, eps, nullptr, rnorm_q.mutable_data_ptr<float>()},
      {normalize, eps, nullptr, rnorm_k.mutable_data_ptr<float>()},
      needs);
  const PresentRows& queries = loss.queries();
  for (int64_t i = 0; i < queries.count; ++i)
    loss.weight(i) = weight ? float(value_at("weight", *weight, queries.row_of(i))) : 1.0f;
  const bool is_written = !query_mask && !key_mask && N > 0 && M > 0;
  FeatureGradient image(images, needs.image, is_written, kFloat);
  FeatureGradient text(texts, needs.text, is_written, kFloat);
  loss.run(image.output, text.output);

  Tensor losses = torch::stable::new_zeros(images, {per_row ? N : 1}, kFloat);
  float* const to = losses.mutable_data_ptr<float>();
  double sum = 0;
  for (int64_t i = 0; i < queries.count; ++i) {
    const double of_row = double(loss.weight(i)) * loss.loss(i);
    if (per_row) to[queries.row_of(i)] = float(of_row);
    sum += of_row;
  }
  return {
      per_row ? losses : number_like(images, kFloat, sum),
      image.tensor,
      text.tensor,
      number_gradient(images, needs.scale, kFloat, loss.by_scale()),
      number_gradient(images, needs.bias, kFloat, loss.by_bias()),
      rnorm_q,
      rnorm_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_loss_backward_cpu(
    const Tensor& grad /* [N] or [] */,
    const Tensor& images /* [N, D] */,
    const Tensor& texts /* [M, D] */,
    const Tensor& logit_scale /* [] */,
    const Tensor& logit_bias /* [] */,
    const std::optional<Tensor>& target,
    const std::optional<Tensor>& query_mask,
    const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& query_ids,
    const std::optional<Tensor>& key_ids,
    const std::optional<Tensor>& weight,
    const Tensor& rnorm_q /* [N] or [0] */,
    const Tensor& rnorm_k /* [M] or [0] */,
    int64_t target_offset,
    int64_t ignore_index,
    int64_t same_id,
    bool normalize,
    double eps,
    bool /* allow_tf32 */,
    int64_t /* workspace */,
    const std::vector<bool>& output_mask) {
  check_features(images, texts);
  const int64_t N = images.size(0), M = texts.size(0);
  const auto needs = needs_of(output_mask);
  if (weight) check_rows("weight", *weight, N);
  if (grad.dim() != 0) check_rows("grad", grad, N);
  const Tensor norms_q = torch::stable::contiguous(rnorm_q);
  const Tensor norms_k = torch::stable::contiguous(rnorm_k);
  check_rows("rnorm_q", norms_q, normalize ? N : 0);
  check_rows("rnorm_k", norms_k, normalize ? M : 0);
  const PairArguments arguments{
      target,
      query_mask,
      key_mask,
      query_ids,
      key_ids,
      target_offset,
      ignore_index,
      same_id,
      false};
  SiglipLoss loss(
      images,
      texts,
      number_of("logit_scale", logit_scale),
      number_of("logit_bias", logit_bias),
      arguments,
      {normalize, eps, norms_q.const_data_ptr<float>(), nullptr},
      {normalize, eps, norms_k.const_data_ptr<float>(), nullptr},
      needs);
  const PresentRows& queries = loss.queries();
  for (int64_t i = 0; i < queries.count; ++i) {
    const int64_t row = queries.row_of(i);
    const float of_loss = float(value_at("grad", grad, row));
    loss.weight(i) = weight ? of_loss * float(value_at("weight", *weight, row)) : of_loss;
  }
  const bool is_written = !query_mask && !key_mask && N > 0 && M > 0;
  FeatureGradient image(images, needs.image, is_written, images.scalar_type());
  FeatureGradient text(texts, needs.text, is_written, images.scalar_type());
  loss.run(image.output, text.output);
  return {
      image.tensor,
      text.tensor,
      number_gradient(logit_scale, needs.scale, logit_scale.scalar_type(), loss.by_scale()),
      number_gradient(logit_bias, needs.bias, logit_bias.scalar_type(), loss.by_bias())};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("siglip_loss", TORCH_BOX(&m2ae::cpu::siglip_loss_cpu));
  m.impl("siglip_loss_backward", TORCH_BOX(&m2ae::cpu::siglip_loss_backward_cpu));
}
