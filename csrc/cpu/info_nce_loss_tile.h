// What the loops of info_nce_loss fill and read beside a tile's logits; plain data.
//
// Logits are to the base 2 here: t_ij = l_ij log2(e). Where no logit can be large, all powers are
// 2^(t - reference), with one integer for all: one power serves the sums of rows and of columns and
// the gradient. Otherwise (`robust`) each row and each column has a reference of its own, the
// largest so far.
#pragma once

#include "contrastive_tile.h"

namespace m2ae::cpu {

struct NceScale {
  double scale;  // t = product * factors * scale
  int32_t reference;
};

// Sums of one direction, that a tile is added to. Positives here are those by id; a target is left
// out, of the sums of negatives, too.
struct NceSums {
  double* negative;  // sum of 2^(t - reference); nullptr if the direction is not wanted
  double* positive;  // the same over positives, and
  double* logits;    // sum of t
  double* count;
  float* negative_reference;  // if robust; -inf before the first
  float* positive_reference;
};

// For each row of a direction, what its logits get of its upstream gradient w:
//   negatives  w 2^(t - lse)      positives  w ((r - 1 / k) - r sigma)
// with r = 2^(t - pos), or 1 for a single positive, as sigma, the share of the negatives, is all
// that is left then. w = 0 for rows that are not in the loss.
struct NceShares {
  const float* negative;  // w 2^(reference - lse), or w if robust
  const float* lse;       // if robust
  // Of positives by id:
  const float* weight;         // w
  const float* positive;       // 2^(reference - pos), or 1 if robust; 0 for a single one
  const float* pos;            // if robust
  const float* single;         // 1 for a single positive, else 0
  const float* inverse_count;  // 1 / k
  const float* sigma;
};

using NceSumsKernel =
    void(const LogitTile& tile, const NceScale& scale, const NceSums& rows, const NceSums& columns);
// Writes the gradient by the logits, as write_gradient_tile() has it, and returns the sum of its
// product with x_i . y_j, which is the derivative by the scale; before any rounding to 16 bits.
using NceGradientKernel = double(
    const LogitTile& tile,
    const NceScale& scale,
    const NceShares& rows,
    const NceShares& columns,
    void* gradient_a,
    void* gradient_b);
// Adds to each rank the negatives above the threshold, which is a product, without the factor of
// its own row or column, times `sign`.
using NceRanksKernel = void(
    const LogitTile& tile,
    float sign,
    const float* row_threshold,
    const float* column_threshold,
    int32_t* row_rank,
    int32_t* column_rank /* or nullptr */);

}  // namespace m2ae::cpu
