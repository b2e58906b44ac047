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
  Floats of_rows(const float* from, int64_t row) const {
    if (this->rows == kLanes) return load(from + row);
    float numbers[kLanes] = {};
    for (int l = 0; l < this->rows; ++l) numbers[l] = from[row + l];
    return load(numbers);
  }

  // to [k, kLanes] <- what is [R, k], of these rows; 0 where there is no row.
  template <typename number_t>
  void read_chosen(const number_t* from, int64_t row, number_t* to) const {
    const int64_t k = given.k, end = given.S * given.T * k, first = row * k;
    const int64_t padded = (k + kLanes - 1) / kLanes * kLanes;
    if (this->rows < kLanes || first + (kLanes - 1) * k + padded > end) {
      for (int64_t j = 0; j < k; ++j)
        for (int l = 0; l < kLanes; ++l)
          to[j * kLanes + l] = l < this->rows ? from[first + l * k + j] : number_t(0);
      return;
    }
    const auto* const bits = reinterpret_cast<const float*>(from + first);
    for (int64_t j = 0; j < k; j += kLanes) {
      Floats x[kLanes];
      for (int l = 0; l < kLanes; ++l) x[l] = load(bits + l * k + j);
      transpose(x);
      const int n = int(k - j < kLanes ? k - j : kLanes);
      for (int i = 0; i < n; ++i) store(x[i], to + (j + i) * kLanes);
    }
  }

  // scratch.chosen <- the logits of the chosen.
  void pick_chosen() const {
    for (int64_t j = 0; j < given.k; ++j) {
      int32_t* const of_rows = scratch.ids + j * kLanes;
      Ints ids = load(of_rows);
      ids = (ids >= 0) & (ids < int32_t(E)) ? ids : Ints{};  // -1 where masked
      store(ids, of_rows);
      if (E > kCompared) {
        scratch.chosen[j] = pick(scratch.z, of_rows);
        continue;
      }
      Floats picked{};
      for (int32_t e = 0; e < E; ++e) picked = ids == e ? load(scratch.z + e * kLanes) : picked;
      scratch.chosen[j] = picked;
    }
  }

  // scratch.chosen <- the gradients by the log-scores of the chosen; their sum if p spreads it.
  Floats find_chosen(int64_t row) {
    const int64_t k = given.k;
    read_chosen(given.ids, row, scratch.ids);
    read_chosen(given.grad_weights, row, reinterpret_cast<float*>(scratch.dw));
    pick_chosen();
    this->weigh(scratch.chosen);
    Floats sum{};
    for (int64_t j = 0; j < k; ++j) {
      const Floats dw = scratch.dw[j] * given.routed_scaling_factor;
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
      common += of_rows(given.grad_logsumexp, row);
    if (has_entropy) {
      dH = of_rows(given.grad_entropy, row);
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
    if (E <= kCompared) {
      for (int32_t e = 0; e < E; ++e) {
        Floats sum = load(g + e * kLanes);
        for (int64_t j = 0; j < given.k; ++j)
          sum += load(scratch.ids + j * kLanes) == e ? scratch.chosen[j] : Floats{};
        store(sum, g + e * kLanes);
      }
      return;
    }
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
      if (rows == kLanes && writes_in_place(t, E, end)) copy = to + t * E;
    write_rows(memory.sums, E, rows, copy, to + t * E);
  }
  if (grad_shift == nullptr) return;
  for (int64_t i = 0; i < S * E; ++i)
    for (int l = 0; l < kLanes; ++l) grad_shift[i] += double(shift_sums[i * kLanes + l]);
}

}  // namespace
}  // namespace m2ae::cpu
