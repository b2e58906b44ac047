// The loops of topk_gating, forward. Contract and math: m2ae_kernels/ops/topk_gating.py
//
// A lane is a row: kLanes rows go through every step together, their experts one after the other.
// The rows are transposed in registers on the way in; logits, log-scores and exponentials stay in
// the first-level cache up to E = 128 or so. The k best are a sorted list in registers, into which
// each expert is pushed; an expert that is only as good goes behind those before it.
#pragma once

#include "topk_gating_scores.h"

namespace m2ae::cpu {
namespace {

// Pushes (x, e) into lists that are sorted by descending key: behind its equals, before the rest,
// all of which moves on by one.
template <int n>
inline void push(Ints (&key)[n], Ints (&id)[n], Ints x, Ints e) {
  Ints better[n];
  for (int j = 0; j < n; ++j) better[j] = x > key[j];
  for (int j = n - 1; j > 0; --j) {
    key[j] = better[j - 1] ? key[j - 1] : better[j] ? x : key[j];
    id[j] = better[j - 1] ? id[j - 1] : better[j] ? e : id[j];
  }
  key[0] = better[0] ? x : key[0];
  id[0] = better[0] ? e : id[0];
}

// The same for lists of any length, [n, kLanes].
inline void push(int32_t* key, int32_t* id /* or nullptr */, int64_t n, Ints x, Ints e) {
  Ints moved{};
  for (int64_t j = 0; j < n; ++j) {
    const Ints old_key = load(key + j * kLanes);
    moved |= x > old_key;
    store(moved ? x : old_key, key + j * kLanes);
    x = moved ? old_key : x;
    if (id == nullptr) continue;
    const Ints old_id = load(id + j * kLanes);
    store(moved ? e : old_id, id + j * kLanes);
    e = moved ? old_id : e;
  }
}

// The n best of `count` keys, [count, kLanes]; the k first of them into ids [k, kLanes].
template <int n, bool of_numbers>
inline void best(const void* from, int64_t count, int64_t k, int32_t* ids, Floats* chosen) {
  Ints key[n], id[n];
  for (int j = 0; j < n; ++j) {
    key[j] = ints(kNoKey);
    id[j] = Ints{};
  }
  for (int64_t e = 0; e < count; ++e) {
    Ints x;
    if constexpr (of_numbers)
      x = key_of(load(static_cast<const float*>(from) + e * kLanes));
    else
      x = load(static_cast<const int32_t*>(from) + e * kLanes);
    push(key, id, x, ints(int32_t(e)));
  }
  for (int64_t j = 0; j < k; ++j) {
    store(id[j], ids + j * kLanes);
    if constexpr (of_numbers) chosen[j] = number_of(key[j]);
  }
}

template <bool of_numbers>
inline void best(const void* from, int64_t count, int64_t k, int32_t* ids, Floats* chosen) {
  if (k == 1) return best<1, of_numbers>(from, count, k, ids, chosen);
  if (k == 2) return best<2, of_numbers>(from, count, k, ids, chosen);
  if (k <= 4) return best<4, of_numbers>(from, count, k, ids, chosen);
  if (k <= 6) return best<6, of_numbers>(from, count, k, ids, chosen);
  if (k <= 8) return best<8, of_numbers>(from, count, k, ids, chosen);
  best<kMostChosen, of_numbers>(from, count, k, ids, chosen);
}

// The k best experts of every lane, one lane after the other.
inline void best_by_row(
    const int32_t* keys, int64_t E, int64_t k, int32_t* row_keys, int32_t* ids) {
  for (int l = 0; l < kLanes; ++l) {
    for (int64_t e = 0; e < E; ++e) row_keys[e] = keys[e * kLanes + l];
    int32_t* const row_ids = row_keys + E;
    select_experts(row_keys, E, k, row_ids);
    for (int64_t j = 0; j < k; ++j) ids[j * kLanes + l] = row_ids[j];
  }
}

template <typename element_t, int score>
class GatingForwardBlock : GatingBlock<element_t, score> {
 public:
  using Block = GatingBlock<element_t, score>;
  using Block::a, Block::E, Block::has_nan, Block::scratch, Block::top, Block::total;

  // For tokens up to `end`.
  GatingForwardBlock(const GatingForward& forward, const GatingScratch& memory, int64_t end)
      : Block(forward, memory), given(forward), end_(end) {}

  void operator()(int64_t s, int64_t t, int32_t* counts) {
    this->read(s, t);
    this->find_scores();
    const bool has_groups = given.n_group > 1;
    const bool sums_groups = has_groups && given.group_best > 1;
    const bool by_score = given.bias != nullptr || sums_groups;
    const bool keeps = given.has_probs_sum || (by_score && score == kSoftmax);
    if (keeps || score == kSoftmax || given.entropy != nullptr)
      this->find_distribution(keeps, given.entropy != nullptr);
    if (!by_score && !has_groups && given.k <= kMostChosen) {
      best<true>(scratch.z, E, given.k, scratch.ids, scratch.chosen);
    } else {
      select(by_score);
      for (int64_t j = 0; j < given.k; ++j)
        scratch.chosen[j] = pick(scratch.z, scratch.ids + j * kLanes);
    }
    this->weigh(scratch.chosen);
    write(s, t, counts);
    if (given.has_probs_sum) add_distribution();
  }

 private:
  // A row with a NaN shows it, one that is absent is 0.
  Floats shown(Floats x) const {
    if (!given.zero_nan) x = has_nan ? floats(__builtin_nanf("")) : x;
    return this->present ? x : Floats{};
  }

  // The keys of the experts, by group if there are groups, then the best of them.
  void select(bool by_score) {
    const float* of_group = scratch.z;  // what the groups are compared by
    if (by_score) {
      write_selection_scores();
      of_group = scratch.a;
    }
    const float* const of_expert = given.bias != nullptr ? scratch.a : scratch.z;
    for (int64_t e = 0; e < E; ++e)
      store(key_of(load(of_expert + e * kLanes)), scratch.keys + e * kLanes);
    if (given.n_group > 1) leave_best_groups(of_group);
    if (given.k <= kMostChosen)
      best<false>(scratch.keys, E, given.k, scratch.ids, nullptr);
    else
      best_by_row(scratch.keys, E, given.k, reinterpret_cast<int32_t*>(scratch.rows), scratch.ids);
  }

  // Into the place of the log-scores, which nothing needs any more but by the chosen logits.
  void write_selection_scores() {
    const Floats inverse = score == kSoftmax ? 1.0f / total : Floats{};
    for (int64_t e = 0; e < E; ++e) {
      const Floats z = load(scratch.z + e * kLanes);
      Floats x;
      if constexpr (score == kSoftmax) {
        x = load(scratch.t + e * kLanes) * inverse;
      } else {
        const Floats of_a = log_score_of<score>(z);
        x = of_a == kInfinity ? of_a : exp_of(of_a);
      }
      x = z == -kInfinity ? z : x;
      x = z == z ? x : z;
      if (given.bias != nullptr) x += given.bias[e];
      store(x, scratch.a + e * kLanes);
    }
  }

  // Experts of the other groups get no key.
  void leave_best_groups(const float* scores) {
    const int64_t G = given.n_group, size = E / G, n = given.group_best, kept = given.topk_group;
    // Sorted lists: of the best of a group, then of groups, at most E either way.
    auto* const list = reinterpret_cast<int32_t*>(scratch.rows);
    auto* const group_ids = reinterpret_cast<int32_t*>(scratch.dw);
    int32_t* const group_keys = scratch.ids;
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t j = 0; j < n; ++j) store(ints(kNoKey), list + j * kLanes);
      for (int64_t e = g * size; e < (g + 1) * size; ++e)
        push(list, nullptr, n, key_of(load(scores + e * kLanes)), Ints{});
      const Floats first = number_of(load(list));
      Floats sum = first;
      for (int64_t j = 1; j < n; ++j) {
        const Floats x = number_of(load(list + j * kLanes));
        sum += x > -kInfinity ? x : Floats{};
      }
      store(key_of(first > -kInfinity ? sum : first), group_keys + g * kLanes);
    }
    for (int64_t j = 0; j < kept; ++j) {
      store(ints(kNoKey), list + j * kLanes);
      store(Ints{}, group_ids + j * kLanes);
    }
    for (int64_t g = 0; g < G; ++g)
      push(list, group_ids, kept, load(group_keys + g * kLanes), ints(int32_t(g)));
    for (int64_t g = 0; g < G; ++g) {
      Ints is_kept{};
      for (int64_t j = 0; j < kept; ++j) is_kept |= load(group_ids + j * kLanes) == int32_t(g);
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        const Ints key = load(scratch.keys + e * kLanes);
        store(is_kept ? key : ints(kNoKey), scratch.keys + e * kLanes);
      }
    }
  }

  // What is one number per row, to [R]
  void write_numbers(Floats numbers, float* to) const {
    if (this->rows == kLanes) return store(numbers, to);
    float copy[kLanes];
    store(numbers, copy);
    for (int l = 0; l < this->rows; ++l) to[l] = copy[l];
  }

  // What is [k, kLanes], to [R, k]
  template <typename number_t>
  void write_chosen(const number_t* from, int64_t t, number_t* to) const {
    constexpr int64_t kFewest = 3;  // to pay for transposing kLanes of them
    const int64_t k = given.k;
    if (k >= kFewest) {
      const auto* const bits = reinterpret_cast<const float*>(from);
      auto* const numbers = reinterpret_cast<float*>(to);
      const bool in_place = this->rows == kLanes && writes_in_place(t, k, end_);
      return write_rows(bits, k, this->rows, in_place ? numbers : scratch.rows, numbers);
    }
    for (int64_t j = 0; j < k; ++j)
      for (int l = 0; l < this->rows; ++l) to[l * k + j] = from[j * kLanes + l];
  }

  void write(int64_t s, int64_t t, int32_t* counts) {
    const int64_t k = given.k, row = s * given.T + t;
    Floats of_row{};
    if (score == kSoftmax)
      of_row = shown((this->is_infinite ? this->highest : top) + log_of(total));
    write_numbers(of_row, given.logsumexp + row);
    if (given.entropy != nullptr)
      write_numbers(shown(log_of(total) - this->weighed / total), given.entropy + row);
    auto* const weights = reinterpret_cast<float*>(scratch.chosen);
    for (int64_t j = 0; j < k; ++j) {
      store(shown(scratch.chosen[j] * given.routed_scaling_factor), weights + j * kLanes);
      if (this->all_present) continue;
      const Ints ids = load(scratch.ids + j * kLanes);
      store(this->present ? ids : ints(-1), scratch.ids + j * kLanes);
    }
    write_chosen(weights, t, given.weights + row * k);
    write_chosen(scratch.ids, t, given.ids + row * k);
    count(counts);
  }

  // Few experts by comparing, which increments of one counter after the other take longer than.
  void count(int32_t* counts) const {
    const int64_t k = given.k;
    if (E <= kCompared) {
      for (int32_t e = 0; e < E; ++e) {
        Ints sum = load(scratch.counts + e * kLanes);
        for (int64_t j = 0; j < k; ++j) sum -= load(scratch.ids + j * kLanes) == e;
        store(sum, scratch.counts + e * kLanes);
      }
      return;
    }
    for (int64_t i = 0; i < k * kLanes; ++i)
      if (scratch.ids[i] >= 0) ++counts[scratch.ids[i]];
  }

  void add_distribution() {
    const Floats inverse = shown(1.0f / total);
    for (int64_t e = 0; e < E; ++e) {
      const Floats sum = load(scratch.sums + e * kLanes);
      store(sum + load(scratch.t + e * kLanes) * inverse, scratch.sums + e * kLanes);
    }
  }

  const GatingForward& given;
  const int64_t end_;
};

// sums [E] += the sums over lanes of [E, kLanes]
template <typename number_t, typename sum_t>
inline void add_lanes(const number_t* lanes, int64_t E, sum_t* sums) {
  for (int64_t e = 0; e < E; ++e) {
    sum_t sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += sum_t(lanes[e * kLanes + l]);
    sums[e] += sum;
  }
}

template <typename element_t, int score>
void topk_gating_kernel(
    const GatingForward& given,
    int64_t s,
    int64_t begin,
    int64_t end,
    float* scratch,
    double* probs_sum,
    int32_t* counts) {
  const GatingScratch memory(scratch, given.E);
  for (int64_t i = 0; i < given.E * kLanes; ++i) {
    memory.sums[i] = 0;
    memory.counts[i] = 0;
  }
  GatingForwardBlock<element_t, score> block(given, memory, end);
  for (int64_t t = begin; t < end; t += kLanes) block(s, t, counts);
  if (given.has_probs_sum) add_lanes(memory.sums, given.E, probs_sum);
  add_lanes(memory.counts, given.E, counts);
}

}  // namespace
}  // namespace m2ae::cpu
