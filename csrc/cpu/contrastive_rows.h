// The present rows of one side of a contrastive loss as operands of products: gathered, converted,
// normalized, padded with zeros to multiples of 16 rows, and in the orders that products need.
//
// Product of tiles i and j, from which the logits of x_i and y_j come, and the two of its gradient:
//   S [rows, columns] = x.rows y.transposed_b     dX = G y.rows_b     dY^T = x.transposed_a G
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../element.h"
#include "contrastive_pairs.h"
#include "gemm.h"
#include "workspace.h"

namespace m2ae::cpu {

constexpr int64_t kPadding = 16;       // rows: of every tile, a multiple
constexpr int64_t kDepthPadding = 32;  // elements of a row: a multiple

inline int64_t padded(int64_t size, int64_t to) {
  return (size + to - 1) / to * to;
}

// How the rows become unit vectors. Inverse norms are 1 / max(norm, eps).
struct Normalization {
  bool normalize = false;
  double eps = 0;
  const float* given = nullptr;  // [all rows], inverse norms made before; or
  float* made = nullptr;         // [all rows], where to write them; absent rows are not written
};

struct PackedForms {
  bool rows_b = false, transposed_a = false, transposed_b = false;  // beside rows
};

// Element of features [N, D] if it is one of those that the losses take.
Element contrastive_element(const char* op, const char* name, const Tensor& features);
// What the products of such features are made of.
Operand contrastive_operand(Element element);

// A packed row times its factor is the row, of unit length if normalized. Rows of float32 are
// packed as they enter, with no factors. Rows of bfloat16 are packed exactly, multiplied by a power
// of two at most; the factor is what remains of the inverse norm.
class PackedRows {
 public:
  // `tile` rows, a multiple of kPadding, go together in the transposed forms.
  PackedRows(
      const Tensor& features /* [N, D] */,
      const PresentRows& present,
      Operand operand,
      int64_t tile,
      Normalization normalization,
      PackedForms forms);

  void pack(int64_t t);  // tile t; tiles are independent

  int64_t count() const { return present_.count; }
  int64_t depth() const { return depth_; }  // of a packed row; zeros beyond D
  int64_t width() const { return D_; }
  int64_t tile() const { return tile_; }
  int64_t tiles() const { return (count() + tile_ - 1) / tile_; }
  Operand operand() const { return operand_; }
  const PresentRows& present() const { return present_; }
  const Normalization& normalization() const { return normalization_; }

  // Row i, and the forms from row i or of tile t on.
  const char* rows(int64_t i) const { return at(rows_, i * depth_); }
  const char* rows_b(int64_t i) const {
    return operand_ == Operand::kFloat32 ? rows(i) : at(rows_b_, i * depth_);
  }
  const char* transposed_a(int64_t t) const { return at(transposed_a_, t * depth_ * tile_); }
  const char* transposed_b(int64_t t) const { return at(transposed_b_, t * depth_ * tile_); }
  // nullptr if all are 1, as for float32; 0 in the padding.
  const float* factors(int64_t i) const {
    return operand_ == Operand::kFloat32 ? nullptr : factors_.data() + i;
  }
  float factor(int64_t i) const { return operand_ == Operand::kFloat32 ? 1 : factors_[i]; }

  // No row is longer than this; infinite if one is not finite. Once all tiles are packed.
  double longest() const;

 private:
  char* at(const Buffer<char>& form, int64_t element) const {
    return form.data() + element * bytes_of(operand_);
  }
  void pack_row(int64_t i, double* longest);

  const char* features_;
  int64_t D_, row_stride_, stride_;
  Element element_;
  const PresentRows& present_;
  Operand operand_;
  int64_t tile_, depth_;
  Normalization normalization_;
  PackedForms forms_;
  Buffer<char> rows_, rows_b_, transposed_a_, transposed_b_;
  Buffer<float> factors_;
  Buffer<double> longest_;  // [tiles]
};

}  // namespace m2ae::cpu
