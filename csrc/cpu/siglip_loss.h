// One call of siglip_loss on the CPU: its rows, packed, and the walk over their matrix.
//
// Each worker walks the tiles of contrastive_tiles.h that are its own. Of a tile it makes the
// products, from them losses and the gradient by the products, in place, and from that, while it is
// still in the cache, the gradients by the rows: three products in all.
#pragma once

#include <algorithm>

#include "contrastive_gradients.h"
#include "contrastive_pairs.h"
#include "contrastive_rows.h"
#include "contrastive_tiles.h"
#include "isa.h"

namespace m2ae::cpu {

class SiglipLoss {
 public:
  struct Needs {
    bool image, text, scale, bias;
    bool any() const { return image || text || scale || bias; }
    bool features() const { return image || text; }
  };

  SiglipLoss(
      const Tensor& images,
      const Tensor& texts,
      float scale,
      float bias,
      const PairArguments& arguments,
      Normalization of_images,
      Normalization of_texts,
      Needs needs)
      : scale_(scale),
        bias_(bias),
        needs_(needs),
        pairs_(contrastive_pairs("siglip_loss", images.size(0), texts.size(0), arguments)),
        operand_(contrastive_operand(contrastive_element("siglip_loss", "image_features", images))),
        grid_(grid_of(pairs_, images.size(1), needs)),
        x_(images, pairs_.queries, operand_, tile_of(grid_.row_tile), of_images, x_forms(needs)),
        y_(texts, pairs_.keys, operand_, tile_of(grid_.column_tile), of_texts, y_forms(needs)),
        weight_(pairs_.queries.count),
        loss_(pairs_.queries.count) {
    pack_both(x_, y_, is_parallel());
  }

  const PresentRows& queries() const { return pairs_.queries; }
  // Of present row i, in the gradient of the sum; to be set before run() if a gradient is needed.
  float& weight(int64_t i) { return weight_[i]; }
  double loss(int64_t i) const { return loss_[i]; }  // without weight
  double by_scale() const { return by_scale_; }
  double by_bias() const { return by_bias_; }

  // Fills losses and, if needed, gradients; those of features are written to `image` and `text`.
  void run(GradientOutput image, GradientOutput text) {
    const int64_t n = pairs_.queries.count, workers = grid_.workers();
    std::fill_n(loss_.data(), n, 0.0);
    if (n == 0 || pairs_.keys.count == 0) return;
    GradientSums sums(grid_, x_.depth(), needs_.image, needs_.text);
    const bool has_targets_apart = operand_ != Operand::kFloat32;
    const Buffer<float> by_target(has_targets_apart ? n : 0);
    const Buffer<double> losses(grid_.column_groups * n), by_number(2 * workers);
    std::fill_n(losses.data(), losses.size(), 0.0);
    const auto& table = needs_.any() ? kernels().siglip_gradient : kernels().siglip_loss;
    SiglipKernel& kernel = *table[int(operand_)][pairs_.same_id];
    run_parallel(workers, is_parallel(), [&](int64_t worker) {
      const TileWalk walk(grid_, x_, y_, needs_.features() ? &sums : nullptr, worker);
      SiglipTile given{};
      given.scale = scale_;
      given.bias = bias_;
      double by_scale = 0, by_bias = 0;  // not where another worker's are next to them
      given.by_scale = &by_scale;
      given.by_bias = &by_bias;
      for (int64_t i = walk.row_begin(); i < walk.row_end(); ++i) {
        for (int64_t j = walk.column_begin(); j < walk.column_end(); ++j) {
          const Tile tile = walk.tile(i, j, true);
          given.loss = &losses[walk.column_group() * n + tile.row];
          given.weight = &weight_[tile.row];
          given.by_target = has_targets_apart ? &by_target[tile.row] : nullptr;
          kernel(walk.logits(tile, pairs_), given, tile.gradient_a, tile.gradient_b);
          if (needs_.features()) walk.add_gradient(tile);
        }
      }
      by_number[2 * worker] = by_scale;
      by_number[2 * worker + 1] = by_bias;
    });
    for (int64_t group = 0; group < grid_.column_groups; ++group)
      for (int64_t i = 0; i < n; ++i) loss_[i] += losses[group * n + i];
    for (int64_t worker = 0; worker < workers; ++worker) {
      by_scale_ += by_number[2 * worker];
      by_bias_ += by_number[2 * worker + 1];
    }
    const float* const coefficient = has_targets_apart ? by_target.data() : nullptr;
    const GradientFinish finish{sums, x_, y_, pairs_, coefficient, scale_, is_parallel()};
    if (needs_.image) finish_queries(finish, image);
    if (needs_.text) finish_keys(finish, text);
  }

 private:
  static TileGrid grid_of(const ContrastivePairs& pairs, int64_t D, Needs needs) {
    return tile_grid(
        pairs.queries.count,
        pairs.keys.count,
        padded(std::max<int64_t>(D, 1), kDepthPadding),
        1 + needs.image + needs.text);
  }
  static int64_t tile_of(int64_t size) { return std::max(size, kPadding); }  // none is no tile
  static PackedForms x_forms(Needs needs) {
    PackedForms forms;
    forms.transposed_a = needs.text;
    return forms;
  }
  static PackedForms y_forms(Needs needs) {
    PackedForms forms;
    forms.rows_b = needs.image;
    forms.transposed_b = true;
    return forms;
  }

  bool is_parallel() const { return grid_.workers() > 1; }

  float scale_, bias_;
  Needs needs_;
  ContrastivePairs pairs_;
  Operand operand_;
  TileGrid grid_;
  PackedRows x_, y_;
  Buffer<float> weight_;
  Buffer<double> loss_;
  double by_scale_ = 0, by_bias_ = 0;
};

}  // namespace m2ae::cpu
