// The loops of topk_gating, backward. Contract and math: m2ae_kernels/ops/topk_gating.py
//
// Lanes are rows, as in topk_gating_kernel.h. The distribution is made again, from the logits. A
// task owns tokens in all their streams, so that the gradient of a logit is one sum in one place.
#pragma once

#include "topk_gating_scores.h"

namespace m2ae::cpu {
namespace {

template <typename element_t, int score>
class GatingBackwardBlock : GatingBlock<element_t, score> {
 public:
  using Block = GatingBlock<element_t, score>;
  using Block::E, Block::scratch, Block::total;

  GatingBackwardBlock(const GatingBackward& backward, const GatingScratch& memory)
      : Block(backward, memory),
        given(backward),
        is_in_softmax_(score == kSoftmax && !backward.norm_topk_prob),
        of_all_(
            backward.grad_probs_sum != nullptr || backward.grad_entropy != nullptr ||
            (score == kSoftmax && backward.grad_logsumexp != nullptr) ||
            (is_in_softmax_ && backward.grad_weights != nullptr)) {}

  // Of the rows of stream s: adds to the gradients of logits and of the shift, [E, kLanes] each.
  void operator()(int64_t s, int64_t t, float* of_logits, bool is_first, float* of_shift) {
    this->read(s, t);
    this->find_scores();
    if (of_all_) this->find_distribution(true, given.grad_entropy != nullptr, given.grad_probs_sum);
    const int64_t row = s * given.T + t;
    const Ints is_nan = given.zero_nan ? Ints{} : this->has_nan;
    const Ints is_plain = this->present & ~this->is_infinite & ~is_nan;
    const bool is_finished =
        score == kSoftmax && is_first && of_shift == nullptr && !any(~is_plain);
    float* const g = is_finished ? of_logits : reinterpret_cast<float*>(scratch.keys);
    const Floats of_chosen = given.grad_weights == nullptr ? Floats{} : find_chosen(row);
    if (of_all_)
      given.grad_entropy == nullptr ? write_dense<false>(row, of_chosen, g)
                                    : write_dense<true>(row, of_chosen, g);
    else
      for (int64_t i = 0; i < E * kLanes; ++i) g[i] = 0;
    if (given.grad_weights != nullptr) add_chosen(g);
    if (!is_finished) finish(g, is_plain, is_nan, of_logits, is_first, of_shift);
  }

 private:
  // One number of each row, 0 where there is no row.
  Floats of_rows(const float* from, int64_t row, int64_t stride) const {
    if (stride == 1 && this->rows == kLanes) return load(from + row);
    float numbers[kLanes] = {};
    for (int l = 0; l < this->rows; ++l) numbers[l] = from[(row + l) * stride];
    return load(numbers);
  }

  // scratch.chosen <- the gradients by the log-scores of the chosen; their sum if p spreads it.
  Floats find_chosen(int64_t row) {
    const int64_t k = given.k;
    for (int64_t j = 0; j < k; ++j) {
      int32_t ids[kLanes] = {};
      for (int l = 0; l < this->rows; ++l) {
        const int32_t id = given.ids[(row + l) * k + j];
        ids[l] = uint32_t(id) < uint32_t(E) ? id : 0;  // -1 where masked
      }
      store(load(ids), scratch.ids + j * kLanes);
      scratch.chosen[j] = pick(scratch.z, ids);
    }
    this->weigh(scratch.chosen);
    Floats sum{};
    for (int64_t j = 0; j < k; ++j) {
      const Floats dw = of_rows(given.grad_weights + j, row, k) * given.routed_scaling_factor;
      const Floats product = scratch.chosen[j] * dw;
      sum += product;
      scratch.dw[j] = dw;
      if (!given.norm_topk_prob) scratch.chosen[j] = product;
    }
    if (!given.norm_topk_prob) return is_in_softmax_ ? sum : Floats{};
    for (int64_t j = 0; j < k; ++j) scratch.chosen[j] *= scratch.dw[j] - sum;
    return Floats{};
  }

  // g <- p (dP - dot + dlse - dH (log p + H)), with log p + H = a - top + sum of p (top - a)
  template <bool has_entropy>
  void write_dense(int64_t row, Floats of_chosen, float* g) {
    const Floats inverse = 1.0f / total;
    const float* const dP = given.grad_probs_sum;
    Floats common = -of_chosen - (dP == nullptr ? Floats{} : this->dot * inverse), dH{};
    if (score == kSoftmax && given.grad_logsumexp != nullptr)
      common += of_rows(given.grad_logsumexp, row, 1);
    if (has_entropy) {
      dH = of_rows(given.grad_entropy, row, 1);
      common += dH * this->weighed * inverse;
    }
    for (int64_t e = 0; e < E; ++e) {
      Floats x = common;
      if (dP != nullptr) x += dP[e];
      if (has_entropy)
        x -= dH * larger(load(this->a + e * kLanes) - this->top, floats(kLowestExponent));
      store(load(scratch.t + e * kLanes) * inverse * x, g + e * kLanes);
    }
  }

  void add_chosen(float* g) const {
    for (int64_t j = 0; j < given.k; ++j) {
      float more[kLanes];
      store(scratch.chosen[j], more);
      const int32_t* const ids = scratch.ids + j * kLanes;
      for (int l = 0; l < this->rows; ++l) g[int64_t(ids[l]) * kLanes + l] += more[l];
    }
  }

  // From gradients by the log-scores to those by the logits, and into the sums.
  void finish(
      const float* g, Ints is_plain, Ints is_nan, float* of_logits, bool is_first, float* of_shift)
      const {
    const bool all_plain = !any(~is_plain);
    const Floats nan = floats(__builtin_nanf(""));
    for (int64_t e = 0; e < E; ++e) {
      Floats x = load(g + e * kLanes);
      if (score != kSoftmax) {
        const Floats z = load(scratch.z + e * kLanes);
        x *= slope_of<score>(z == z ? z : Floats{});
      }
      if (!all_plain) x = is_plain ? x : is_nan & this->present ? nan : Floats{};
      if (of_shift != nullptr) store(load(of_shift + e * kLanes) + x, of_shift + e * kLanes);
      if (!is_first) x += load(of_logits + e * kLanes);
      store(x, of_logits + e * kLanes);
    }
  }

  const GatingBackward& given;
  const bool is_in_softmax_;  // the gradient of the weights goes through p
  const bool of_all_;         // experts that were not chosen have a gradient
};

template <typename element_t, int score>
void topk_gating_backward_kernel(
    const GatingBackward& given,
    int64_t begin,
    int64_t end,
    float* scratch,
    float* shift_sums,
    double* grad_shift) {
  const int64_t E = given.E, S = given.S, part = E * kLanes;
  const GatingScratch memory(scratch, E);
  GatingBackwardBlock<element_t, score> block(given, memory);
  if (grad_shift != nullptr)
    for (int64_t i = 0; i < S * part; ++i) shift_sums[i] = 0;
  auto* const to = static_cast<element_t*>(given.grad_logits);
  for (int64_t t = begin; t < end; t += kLanes) {
    for (int64_t s = 0; s < S; ++s)
      block(s, t, memory.sums, s == 0, grad_shift == nullptr ? nullptr : shift_sums + s * part);
    if (to == nullptr) continue;
    if (S == 0)
      for (int64_t i = 0; i < part; ++i) memory.sums[i] = 0;
    const int rows = int(given.T - t < kLanes ? given.T - t : kLanes);
    float* copy = memory.rows;
    if constexpr (std::is_same_v<element_t, float>)
      if (E % kLanes == 0 && rows == kLanes) copy = to + t * E;
    write_rows(memory.sums, E, rows, copy, to + t * E);
  }
  if (grad_shift == nullptr) return;
  for (int64_t i = 0; i < S * E; ++i)
    for (int l = 0; l < kLanes; ++l) grad_shift[i] += double(shift_sums[i * kLanes + l]);
}

}  // namespace
}  // namespace m2ae::cpu
