// What the kernels of topk_gating rely on, on the CPU and on CUDA alike; the public function says
// it better.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace m2ae {

constexpr int64_t kGatingMaxExperts = 1024;  // 32 for each lane of a warp
constexpr int64_t kGatingScores = 3;         // score functions

inline void check_gating_choice(int64_t E, int64_t top_k, int64_t score_function) {
  STD_TORCH_CHECK(
      E <= kGatingMaxExperts && 1 <= top_k && top_k <= E && 0 <= score_function &&
          score_function < kGatingScores,
      "topk_gating: expected E <= ",
      kGatingMaxExperts,
      ", 1 <= top_k <= E and a score function, got E = ",
      E,
      ", top_k = ",
      top_k);
}

inline void check_gating_groups(
    int64_t E, int64_t top_k, int64_t n_group, int64_t topk_group, int64_t group_best) {
  STD_TORCH_CHECK(
      n_group >= 1 && E % n_group == 0 && 1 <= topk_group && topk_group <= n_group &&
          1 <= group_best && group_best <= E / n_group && top_k <= topk_group * (E / n_group),
      "topk_gating: expected groups with top_k experts, got n_group = ",
      n_group,
      ", topk_group = ",
      topk_group);
}

}  // namespace m2ae
