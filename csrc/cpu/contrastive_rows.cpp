#include "contrastive_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../floating_element.h"
#include "isa.h"

namespace m2ae::cpu {

Element contrastive_element(const char* op, const char* name, const Tensor& features) {
  STD_TORCH_CHECK(
      features.is_cpu() && features.dim() == 2, op, ": expected ", name, " [rows, D] on the CPU");
  return floating_element(op, name, features);
}

Operand contrastive_operand(Element element) {
  return element == Element::kBFloat16 && has_bfloat16_gemm() ? Operand::kBFloat16
                                                              : Operand::kFloat32;
}

PackedRows::PackedRows(
    const Tensor& features,
    const PresentRows& present,
    Operand operand,
    int64_t tile,
    Normalization normalization,
    PackedForms forms)
    : features_(static_cast<const char*>(features.const_data_ptr())),
      D_(features.size(1)),
      row_stride_(features.stride(0)),
      stride_(features.stride(1)),
      element_(contrastive_element("contrastive loss", "features", features)),
      present_(present),
      operand_(operand),
      tile_(tile),
      depth_(padded(std::max<int64_t>(D_, 1), kDepthPadding)),
      normalization_(normalization),
      forms_(forms) {
  const int64_t row_bytes = depth_ * bytes_of(operand_);
  const int64_t bytes = padded(count(), kPadding) * row_bytes;
  const int64_t tiled_bytes = tiles() * tile_ * row_bytes;
  rows_ = Buffer<char>(bytes);
  if (forms.rows_b && operand == Operand::kBFloat16) rows_b_ = Buffer<char>(bytes);
  if (forms.transposed_a) transposed_a_ = Buffer<char>(tiled_bytes);
  if (forms.transposed_b) transposed_b_ = Buffer<char>(tiled_bytes);
  if (operand == Operand::kBFloat16) factors_ = Buffer<float>(padded(count(), kPadding));
  longest_ = Buffer<double>(tiles());
}

void PackedRows::pack_row(int64_t i, double* longest) {
  const Kernels& kernel = kernels();
  const int64_t row = present_.row_of(i);
  const char* const from = features_ + row * row_stride_ * bytes_of(element_);
  char* const to = const_cast<char*>(rows(i));
  float a = 1, b = 1, factor = 1, inverse = 1;
  if (!normalization_.normalize || normalization_.given == nullptr) {
    const double norm = std::sqrt(kernel.square_norm[int(element_)](from, stride_, D_));
    if (normalization_.normalize) {
      const double most = std::numeric_limits<float>::max();
      inverse = float(std::min(1 / std::max(norm, normalization_.eps), most));
      if (norm != norm) inverse = float(norm);
      normalization_.made[row] = inverse;
    } else {
      *longest = std::max(*longest, std::isfinite(norm) ? norm : INFINITY);
    }
  } else {
    inverse = normalization_.given[row];
  }
  if (normalization_.normalize) {
    // Unit vectors, but for rounding; rows that hold NaN or infinity show in the inverse norm.
    *longest = std::max(*longest, inverse > 0 ? 1.0 : INFINITY);
    if (operand_ == Operand::kFloat32) {
      a = inverse;
    } else {
      // In two steps: neither overflows, and both are exact.
      int exponent = 0;
      factor = std::isfinite(inverse) ? std::frexp(inverse, &exponent) : inverse;
      a = std::ldexp(1.0f, exponent / 2);
      b = std::ldexp(1.0f, exponent - exponent / 2);
    }
  }
  kernel.pack_row[int(element_)][int(operand_)](from, stride_, D_, a, b, to, depth_);
  if (operand_ == Operand::kBFloat16) factors_[i] = factor;
}

void PackedRows::pack(int64_t t) {
  const Kernels& kernel = kernels();
  const int64_t begin = t * tile_, end = std::min(begin + tile_, count());
  const int64_t rows_of_tile = padded(end - begin, kPadding);
  double longest = 0;
  for (int64_t i = begin; i < end; ++i) pack_row(i, &longest);
  longest_[t] = longest;
  char* const first = const_cast<char*>(rows(begin));
  char* const padding = const_cast<char*>(rows(end));
  std::memset(padding, 0, first + rows_of_tile * depth_ * bytes_of(operand_) - padding);
  const bool is_float = operand_ == Operand::kFloat32;
  if (!is_float) std::fill(&factors_[end], &factors_[begin] + rows_of_tile, 0.0f);
  if (forms_.rows_b && !is_float)
    kernel.pair_rows(first, depth_, rows_of_tile, depth_, const_cast<char*>(rows_b(begin)));
  if (forms_.transposed_a) {
    char* const to = const_cast<char*>(transposed_a(t));
    const auto transpose = is_float ? kernel.transpose32 : kernel.transpose16;
    transpose(first, depth_, rows_of_tile, depth_, to, tile_);
  }
  if (forms_.transposed_b) {  // of bfloat16, pairs of elements are one unit
    char* const to = const_cast<char*>(transposed_b(t));
    const int64_t units = is_float ? depth_ : depth_ / 2;
    kernel.transpose32(first, units, rows_of_tile, units, to, tile_);
  }
}

double PackedRows::longest() const {
  double longest = 0;
  for (int64_t t = 0; t < tiles(); ++t) longest = std::max(longest, longest_[t]);
  return longest;
}

}  // namespace m2ae::cpu
