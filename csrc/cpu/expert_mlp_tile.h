// What the kernels of expert_mlp are given: activations and dropout of tiles of float32.
#pragma once

#include <cstdint>

namespace m2ae::cpu {

constexpr int kActivations = 9;  // in the order of ACTIVATIONS in ops/_activations.py
constexpr int kFirstGated = 6;
constexpr int kIdentity = 0;

// Philox4x32-10 as in ops/_philox.py: counter (slot, column / 4, stream).
struct Dropout {
  uint32_t key[2] = {0, 0};
  uint32_t stream = 0;     // 2 * offset + which of the two dropouts
  uint32_t threshold = 0;  // words below it are dropped; 0: there is no dropout
  float scale = 1;         // of what is kept
};

// out <- act(x), or act(x) * up if it is gated.
using ActivateKernel = void(const float* x, const float* up, int64_t n, float* out);
// Gradients by x and, if it is gated, by up, for `grad` by the above.
using ActivateBackwardKernel =
    void(const float* grad, const float* x, const float* up, int64_t n, float* by_x, float* by_up);

// One row of hidden channels in the backward. `by_a`: the gradient by act(h) times `factors`, those
// of the dropout, yet without the router weight. Writes a = weight factors act(h), and the
// gradients by h and, if it is gated, by up. Returns <by_a, factors act(h)>.
using HiddenBackwardKernel = float(
    const float* by_a,
    const float* h,
    const float* up,
    const float* factors,
    float weight,
    int64_t n,
    float* a,
    float* by_h,
    float* by_up);

}  // namespace m2ae::cpu
