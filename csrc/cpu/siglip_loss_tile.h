// What the loops of siglip_loss read and fill beside a tile's logits; plain data.
#pragma once

#include "contrastive_tile.h"

namespace m2ae::cpu {

struct SiglipTile {
  float scale, bias;  // l = product * factors * scale + bias
  double* loss;       // [rows], sums that the tile is added to

  // With gradients, of the sum over rows of weight times loss:
  const float* weight;  // [rows]
  double* by_scale;     // sums that the tile is added to
  double* by_bias;
  // [rows], by the logit of the target where that is in the tile; or nullptr. Its entry of the
  // tile's gradient is 0 then, which is rounded to 16 bits.
  float* by_target;
};

// gradient_a, gradient_b: as write_gradient_tile() has them; gradient_a may be nullptr.
using SiglipKernel =
    void(const LogitTile& tile, const SiglipTile& given, void* gradient_a, void* gradient_b);

}  // namespace m2ae::cpu
