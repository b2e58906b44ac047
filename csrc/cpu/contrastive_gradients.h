// From the sums over tiles to the gradients of the features: positives, factors, normalization.
//
// h_i is the gradient of row i as it entered, without the scale: the sum over j of G_ij y_j, plus,
// in float32, coefficient_i y_t of the query's positive. The gradient of the row is scale h_i, or,
// through the division by the norm, scale (h_i - x_i (x_i . h_i)) / norm. What the tiles add up is
// the gradient of the packed row, h_i times the row's factor.
#pragma once

#include <cstdint>

#include "contrastive_pairs.h"
#include "contrastive_tiles.h"

namespace m2ae::cpu {

struct GradientOutput {
  void* gradient;  // [all rows, D], contiguous; zeros where rows are absent
  Element element;
};

struct GradientFinish {
  const GradientSums& sums;
  const PackedRows &x, &y;
  const ContrastivePairs& pairs;
  const float* coefficient;  // [n], of each query's target; nullptr if all are in the sums already
  double scale;
  bool parallel;
};

void finish_queries(const GradientFinish& finish, GradientOutput output);
void finish_keys(const GradientFinish& finish, GradientOutput output);

}  // namespace m2ae::cpu
