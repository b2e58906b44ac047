// What forward and backward of info_nce_loss both make of its inputs.
#pragma once

#include "contrastive_tiles.h"
#include "info_nce_loss_tile.h"

namespace m2ae::cpu {

// The same for both directions, so that a product is the same number in both.
TileGrid nce_grid(int64_t n, int64_t m, int64_t D);

// Whether a logit can be so large that rows and columns need references of their own, and what all
// share if not.
struct NceRange {
  bool robust;
  NceScale scale;
};

// Once both sides are packed.
NceRange nce_range(double logit_scale, const PackedRows& x, const PackedRows& y);

// What products of these features are made of, once they fit each other.
Operand nce_operand(const char* op, const Tensor& query, const Tensor& key);

double number_of(const char* op, const char* name, const Tensor& number /* [] */);

// log(1 + e^x)
double softplus(double x);

// x_i . y_j, in double.
double product_of_rows(const PackedRows& x, int64_t i, const PackedRows& y, int64_t j);

}  // namespace m2ae::cpu
