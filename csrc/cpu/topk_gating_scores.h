// The experts of kLanes rows at once: their logits, log-scores and distribution, which forward and
// backward of topk_gating share. Included by kernels only.
#pragma once

#include "topk_gating_rows.h"
#include "topk_gating_vector.h"

namespace m2ae::cpu {
namespace {

// exp(-|z|)
M2AE_VECTOR_INLINE Floats decay_of(Floats z) {
  return exp_of((Floats)((Ints)z | INT32_MIN));
}
M2AE_VECTOR_INLINE Floats larger(Floats a, Floats b) {
  return a > b ? a : b;
}
constexpr float kFar = -20.0f;  // as in _topk_gating_reference.py

// The log-score of z, which is no NaN.
template <int score>
M2AE_VECTOR_INLINE Floats log_score_of(Floats z) {
  if constexpr (score == kSoftmax) return z;
  const Floats t = decay_of(z), rest = log1p_of(t);
  if constexpr (score == kSigmoid) return (z < 0.0f ? z : Floats{}) - rest;
  const Floats near = log_of(larger(z, Floats{}) + rest);
  return 0.5f * (z < kFar ? z - 0.5f * t : near);
}

// Its derivative.
template <int score>
M2AE_VECTOR_INLINE Floats slope_of(Floats z) {
  if constexpr (score == kSoftmax) return floats(1);
  const Floats t = decay_of(z), one = floats(1);
  if constexpr (score == kSigmoid) return (z < 0.0f ? one : t) / (1.0f + t);
  const Floats softplus = larger(z, Floats{}) + log1p_of(t);
  const Floats near = (z < 0.0f ? t : one) / ((1.0f + t) * softplus);
  return 0.5f * (z < kFar ? 1.0f - 0.5f * t : near);
}

// Memory of a task. Each part is [E padded to 16 and 16 more, kGatingRows] numbers; all but rows
// hold kLanes numbers per expert, group or choice.
struct GatingScratch {
  float *z, *a, *t;     // logits, log-scores, exp(a - top)
  float* sums;          // over the rows of the task
  int32_t *keys, *ids;  // of experts; of the chosen
  Floats *chosen, *dw;  // logits of the chosen, then weights; gradients of the weights
  float* rows;          // [kLanes * E + kLanes], on the way from and to memory
  int32_t* counts;      // of the rows of the task

  GatingScratch(float* scratch, int64_t E) {
    const int64_t part = ((E + 15) / 16 * 16 + 16) * kGatingRows;
    z = scratch;
    a = z + part;
    t = a + part;
    sums = t + part;
    keys = reinterpret_cast<int32_t*>(sums + part);
    ids = keys + part;
    chosen = reinterpret_cast<Floats*>(ids + part);
    rows = sums + 4 * part;
    dw = reinterpret_cast<Floats*>(sums + 5 * part);
    counts = keys + 5 * part;
  }
};

// Experts that are found by comparing, which is faster than going to memory row by row.
constexpr int64_t kCompared = 16;

// Whether write_rows() may write kLanes rows of n from t on in place: not past what the task, which
// ends with row `end`, is yet to write.
inline bool writes_in_place(int64_t t, int64_t n, int64_t end) {
  return n % kLanes == 0 || t + kLanes + (kLanes + n - 1) / n <= end;
}

// to [rows, n] <- the first rows of [n, kLanes]. `copy` [kLanes * n + kLanes] is between, or `to`.
template <typename element_t>
inline void write_rows(const float* from, int64_t n, int rows, float* copy, element_t* to) {
  // What lies past the end of a row is overwritten: by the next row, or by the next part of it.
  for (int64_t e = (n - 1) / kLanes * kLanes; e >= 0; e -= kLanes) {
    Floats x[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = load(from + (e + i) * kLanes);
    transpose(x);
    for (int l = 0; l < kLanes; ++l) store(x[l], copy + l * n + e);
  }
  if constexpr (std::is_same_v<element_t, float>)
    if (copy == to) return;
  const int64_t size = rows * n;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) to[i] = convert<element_t>(copy[i]);
}

// One number of each row out of [E, kLanes], by the ids of the rows.
inline Floats pick(const float* from, const int32_t* ids /* [kLanes] */) {
  float picked[kLanes];
  for (int l = 0; l < kLanes; ++l) picked[l] = from[int64_t(ids[l]) * kLanes + l];
  return load(picked);
}

// Rows t to t + kLanes of a stream; those past T are absent.
template <typename element_t, int score>
struct GatingBlock {
  const GatingInput& given;
  const GatingScratch& scratch;
  int64_t E, padded;  // padding: experts of -inf, to a multiple of 4
  int rows = 0;       // that are below T
  Ints present{}, has_nan{}, is_infinite{};
  bool all_present = true;
  Floats highest{};  // logit
  Floats top{};      // log-score, or 0 where the log-scores are relative to nothing finite
  Floats total{};    // sum of exp(a - top), 1 where it would be 0
  Floats weighed{};  // sum of exp(a - top) (a - top)
  Floats dot{};      // sum of exp(a - top) times what find_distribution() was given
  // [padded, kLanes]; where the largest is +inf, 0 for all that are and -inf for the others
  const float* a = nullptr;

  GatingBlock(const GatingInput& input, const GatingScratch& memory)
      : given(input), scratch(memory), E(input.E), padded((input.E + 3) / 4 * 4) {}

  // The rows as they are in memory, if kLanes numbers can be read from each expert on; else a copy.
  const float* rows_from(int64_t t) {
    const auto* const from = static_cast<const element_t*>(given.logits) + t * E;
    if constexpr (std::is_same_v<element_t, float>)
      if (t + kLanes + (kLanes + E - 1) / E <= given.T) return from;
    const int64_t n = rows * E;
    float* const to = scratch.rows;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = convert<float>(from[i]);
    for (int64_t i = n; i < kLanes * E + kLanes; ++i) to[i] = 0;
    return to;
  }

  void find_present(int64_t t) {
    rows = int(given.T - t < kLanes ? given.T - t : kLanes);
    all_present = rows == kLanes;
    present = ints(-1);
    if (all_present && given.mask == nullptr) return;
    int32_t is_present[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      is_present[l] = l < rows && (given.mask == nullptr || given.mask[t + l]) ? -1 : 0;
      all_present &= is_present[l] != 0;
    }
    present = load(is_present);
  }

  void read(int64_t s, int64_t t) {
    find_present(t);
    const float* const from = rows_from(t);
    const float* const shift = given.shift == nullptr ? nullptr : given.shift + s * E;
    highest = floats(-kInfinity);
    has_nan = Ints{};
    for (int64_t e = 0; e < E; e += kLanes) {
      Floats z[kLanes];
      for (int l = 0; l < kLanes; ++l) z[l] = load(from + l * E + e);
      transpose(z);
      const int n = int(E - e < kLanes ? E - e : kLanes);
      for (int i = 0; i < n; ++i) {
        if (shift != nullptr) z[i] += shift[e + i];
        if (!all_present) z[i] = present ? z[i] : Floats{};
        has_nan |= z[i] != z[i];
        highest = larger(z[i], highest);
        store(z[i], scratch.z + (e + i) * kLanes);
      }
    }
    for (int64_t e = E; e < padded; ++e) store(floats(-kInfinity), scratch.z + e * kLanes);
  }

  // A NaN as -inf.
  Floats clean(Floats z) const { return z == z ? z : floats(-kInfinity); }

  // The same for numbers that are not of the scratch: a of z.
  Floats relative_score(Floats z) const {
    const Floats of_z = log_score_of<score>(clean(z));
    const Floats shared = of_z == kInfinity ? Floats{} : floats(-kInfinity);
    return (highest == kInfinity) & is_infinite ? shared : of_z;
  }

  void find_scores() {
    const Ints below = highest == -kInfinity, above = highest == kInfinity;
    is_infinite = score == kSigmoid ? below : below | above;
    const Ints shared = is_infinite & above;
    a = scratch.z;
    if (score != kSoftmax || any(has_nan | shared)) {
      for (int64_t e = 0; e < padded; ++e)
        store(relative_score(load(scratch.z + e * kLanes)), scratch.a + e * kLanes);
      a = scratch.a;
    }
    top = is_infinite ? Floats{} : log_score_of<score>(highest);
  }

  // exp(a - top), into t if `keeps`; the sum over experts of it, of it times a - top if `weighs`,
  // of it times by [E] if there is such.
  template <bool keeps, bool weighs, bool has_by>
  void find_distribution(const float* by) {
    Floats sum[4] = {}, sum_weighed[4] = {}, sum_by[4] = {};
    for (int64_t e = 0; e < padded; e += 4) {
      for (int i = 0; i < 4; ++i) {
        const Floats d = load(a + (e + i) * kLanes) - top;
        const Floats t = exp_of(d);
        sum[i] += t;
        if (weighs) sum_weighed[i] += t * larger(d, floats(kLowestExponent));
        if (has_by) sum_by[i] += t * by[e + i < E ? e + i : 0];  // the others' t is 0
        if (keeps) store(t, scratch.t + (e + i) * kLanes);
      }
    }
    total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    total = total == 0.0f ? floats(1) : total;
    if (weighs) weighed = (sum_weighed[0] + sum_weighed[1]) + (sum_weighed[2] + sum_weighed[3]);
    if (has_by) dot = (sum_by[0] + sum_by[1]) + (sum_by[2] + sum_by[3]);
  }
  void find_distribution(bool keeps, bool weighs, const float* by = nullptr) {
    if (by != nullptr)
      weighs ? find_distribution<true, true, true>(by) : find_distribution<true, false, true>(by);
    else if (keeps)
      weighs ? find_distribution<true, true, false>(by) : find_distribution<true, false, false>(by);
    else
      weighs ? find_distribution<false, true, false>(by)
             : find_distribution<false, false, false>(by);
  }

  // The k weights without factor, from the logits of the chosen, in place.
  void weigh(Floats* chosen) const {
    const int64_t k = given.k;
    if (score != kSoftmax && !given.norm_topk_prob) {
      for (int64_t j = 0; j < k; ++j) {
        const Floats of_a = log_score_of<score>(clean(chosen[j]));
        chosen[j] = of_a == kInfinity ? of_a : exp_of(of_a);
      }
      return;
    }
    Floats base = top, sum = total;
    const bool is_plain = score == kSoftmax && a == scratch.z;
    if (!is_plain)
      for (int64_t j = 0; j < k; ++j) chosen[j] = relative_score(chosen[j]);
    if (given.norm_topk_prob) {
      base = chosen[0];
      for (int64_t j = 1; j < k; ++j) base = larger(chosen[j], base);
      base = base == -kInfinity ? Floats{} : base;
      sum = Floats{};
    }
    for (int64_t j = 0; j < k; ++j) {
      chosen[j] = exp_of(chosen[j] - base);
      if (given.norm_topk_prob) sum += chosen[j];
    }
    const Floats inverse = 1.0f / (sum == 0.0f ? floats(1) : sum);
    for (int64_t j = 0; j < k; ++j) chosen[j] *= inverse;
  }
};

}  // namespace
}  // namespace m2ae::cpu
