// What the backward of expert_mlp holds: a worker's memory, and the sums that become gradients.
#pragma once

#include <algorithm>
#include <vector>

#include "expert_mlp.h"

namespace m2ae::cpu {

struct BackwardNeeds {
  bool x, w1, w2, weights, b1, b2, shift;
  bool rows() const { return x || shift; }
};

// One worker's memory. Rows beyond those of a block are zero, up to a multiple of kLanes.
struct BackwardScratch {
  static constexpr int64_t kBlock = 128;  // rows that go through an expert together
  // Hidden channels of one step, a multiple of 4 and of kLanes.
  static constexpr int64_t kPanel = 128;

  Buffer<float> u, g, turned_g;       // [kBlock, D], [kBlock, Do], [Do, kBlock]
  Buffer<float> by_u;                 // [kBlock, D]
  Buffer<float> h, up;                // [kPanel]
  Buffer<float> a, by_a;              // [kBlock, kPanel]
  Buffer<float> by_h, by_up, turned;  // [kBlock, kPanel], transposed
  Buffer<float> factors;              // [kPanel]
  Buffer<float> by_b1, by_b2;         // over a block, so that no sum has more terms
  Buffer<float> weights, row, z;      // a panel of weights, rows of any width
  float by_weight[kBlock], weight[kBlock];

  explicit BackwardScratch(const ExpertMlp& mlp)
      : u(kBlock * mlp.D),
        g(kBlock * in_lanes(mlp.Do)),
        turned_g(kBlock * in_lanes(mlp.Do)),
        by_u(kBlock * mlp.D),
        h(kPanel),
        up(mlp.gated ? kPanel : 0),
        a(kBlock * kPanel),
        by_a(kBlock * kPanel),
        by_h(kBlock * kPanel),
        by_up(mlp.gated ? kBlock * kPanel : 0),
        turned(kBlock * kPanel),
        factors(kPanel),
        by_b1(2 * kPanel),
        by_b2(mlp.Do),
        weights(mlp.element == Element::kFloat32 ? 0 : kPanel * std::max(mlp.D, mlp.Do)),
        row(std::max({mlp.D, mlp.Do, kPanel})),
        z(mlp.Do) {}
};

// float32 sums of a gradient that is to be in the dtype of its input.
struct GradientSums {
  Tensor gradient;
  Buffer<float> buffer;
  float* data = nullptr;

  GradientSums(const Tensor& like, std::vector<int64_t> sizes, bool is_needed, Element element)
      : gradient(torch::stable::new_empty(like, is_needed ? sizes : std::vector<int64_t>{0})) {
    if (!is_needed) return;
    if (element == Element::kFloat32) {
      data = gradient.mutable_data_ptr<float>();
    } else {
      buffer = Buffer<float>(gradient.numel());
      data = buffer.data();
    }
  }
  void store(int64_t i, int64_t n, Element element) {
    if (buffer.size() == 0 || n == 0) return;
    char* const to = static_cast<char*>(gradient.mutable_data_ptr()) + i * bytes_of(element);
    kernels().cast[int(Element::kFloat32)][int(element)](data + i, to, n);
  }
};

}  // namespace m2ae::cpu
