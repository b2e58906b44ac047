// moe_sort on the CPU: a stable counting sort. Contract: m2ae_kernels/ops/moe_sort.py
//
// Slots are cut into runs; a first pass counts the experts of each run, a second writes each slot
// to its place, which the counts of the runs before it give. Where an expert has more slots than
// the capacity, all are sorted first, and then each expert chooses among its own. Integers only, so
// the number of runs, which is that of threads, shows nowhere.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../moe_arguments.h"
#include "pooled_tensor.h"
#include "workspace.h"

namespace m2ae::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "moe_sort";
constexpr int64_t kRun = 1 << 14;  // slots of a thread, at least: pays for waking it

class Sorter {
 public:
  Sorter(const int32_t* ids, int64_t n, int64_t E)
      : ids_(ids),
        n_(n),
        E_(E),
        runs_(std::clamp<int64_t>(n / kRun, 1, torch::stable::get_num_threads())),
        place_(runs_ * E) {}

  // Counts, and what the experts keep of them: rows of expert e begin at offsets[e].
  void count(int64_t capacity, int64_t align, int32_t* offsets /* [E + 1] */, int32_t* kept) {
    std::vector<int32_t> bad(runs_, -1);  // the first id that is none, of each run
    each_run([&](int64_t run, int64_t begin, int64_t end) {
      int32_t* const count = &place_[run * E_];
      std::fill_n(count, E_, 0);
      for (int64_t s = begin; s < end; ++s) {
        const int32_t e = ids_[s];
        if (e >= 0 && e < E_) {
          ++count[e];
        } else if (e != -1 && bad[run] == -1) {
          bad[run] = e;
        }
      }
    });
    for (const int32_t id : bad)
      STD_TORCH_CHECK(id == -1, kOp, ": expected ids in [-1, E = ", E_, "), got ", id);
    int64_t row = 0;
    start_.assign(E_ + 1, 0);
    for (int64_t e = 0; e < E_; ++e) {
      int64_t all = 0;
      for (int64_t run = 0; run < runs_; ++run) all += place_[run * E_ + e];
      const int64_t keeps = std::min(all, capacity);
      overflows_ = overflows_ || keeps < all;
      start_[e + 1] = start_[e] + all;
      offsets[e] = int32_t(row);
      kept[e] = int32_t(keeps);
      row += (keeps + align - 1) / align * align;
    }
    offsets[E_] = int32_t(row);
  }

  bool overflows() const { return overflows_; }
  int64_t start(int64_t e) const { return start_[e]; }  // of expert e if nothing were dropped
  int64_t all(int64_t e) const { return start_[e + 1] - start_[e]; }

  // write(place of slot s, s) for all, where expert e begins at first[e]; s is skipped if -1.
  template <typename First, typename Write, typename Skip>
  void sort(const First& first, const Write& write, const Skip& skip) {
    for (int64_t e = 0; e < E_; ++e) {
      int32_t next = int32_t(first(e));
      for (int64_t run = 0; run < runs_; ++run) {
        const int32_t count = place_[run * E_ + e];
        place_[run * E_ + e] = next;
        next += count;
      }
    }
    each_run([&](int64_t run, int64_t begin, int64_t end) {
      int32_t* const next = &place_[run * E_];
      for (int64_t s = begin; s < end; ++s) {
        if (ids_[s] < 0) {
          skip(s);
        } else {
          write(next[ids_[s]]++, s);
        }
      }
    });
  }

 private:
  template <typename Work>
  void each_run(const Work& work) {
    const int64_t length = (n_ + runs_ - 1) / runs_;
    torch::stable::parallel_for(0, runs_, 1, [&](int64_t first, int64_t last) {
      for (int64_t run = first; run < last; ++run)
        work(run, std::min(run * length, n_), std::min((run + 1) * length, n_));
    });
  }

  const int32_t* ids_;  // [n]
  int64_t n_, E_, runs_;
  Buffer<int32_t> place_;       // [runs, E], counts, then the next place of each run
  std::vector<int64_t> start_;  // [E + 1]
  bool overflows_ = false;
};

// Which of an expert's slots, in ascending order, stay: keeps[i] of slots[i].
class Chooser {
 public:
  Chooser(DropPolicy policy, int64_t k, const float* weights)
      : policy_(policy), k_(k), w_(weights) {}

  void operator()(const int32_t* slots, int64_t n, int64_t capacity, std::vector<bool>* keeps) {
    keeps->assign(n, capacity >= n);
    if (capacity >= n) return;
    if (policy_ == DropPolicy::kPosition) {
      std::fill_n(keeps->begin(), capacity, true);
      return;
    }
    if (policy_ == DropPolicy::kSlot) return by_slot(slots, n, capacity, keeps);
    order_.resize(n);
    for (int64_t i = 0; i < n; ++i) order_[i] = int32_t(i);
    // Largest first, NaN last, equals as they stand: a strict order, whatever the algorithm.
    const auto comes_first = [&](int32_t a, int32_t b) {
      const float x = w_[slots[a]], y = w_[slots[b]];
      if (std::isnan(x) || std::isnan(y))
        return std::isnan(x) == std::isnan(y) ? a < b : !std::isnan(x);
      return x != y ? x > y : a < b;
    };
    std::nth_element(order_.begin(), order_.begin() + capacity, order_.end(), comes_first);
    for (int64_t i = 0; i < capacity; ++i) (*keeps)[order_[i]] = true;
  }

 private:
  void by_slot(const int32_t* slots, int64_t n, int64_t capacity, std::vector<bool>* keeps) {
    std::vector<int64_t> left(k_, 0);  // of each j, how many stay
    for (int64_t i = 0; i < n; ++i) ++left[slots[i] % k_];
    for (int64_t& of_slot : left) {
      of_slot = std::min(of_slot, capacity);
      capacity -= of_slot;
    }
    for (int64_t i = 0; i < n; ++i) (*keeps)[i] = left[slots[i] % k_]-- > 0;
  }

  DropPolicy policy_;
  int64_t k_;
  const float* w_;  // [R, k]
  std::vector<int32_t> order_;
};

// Sorts all slots, then lets each expert drop what it has no room for.
void sort_and_drop(
    Sorter& sorter,
    int64_t n,
    int64_t E,
    DropPolicy policy,
    int64_t k,
    const float* weights,
    const int32_t* offsets,
    const int32_t* kept,
    int32_t* sorted,
    int32_t* inverse) {
  const Buffer<int32_t> all(n);
  sorter.sort(
      [&](int64_t e) { return sorter.start(e); },
      [&](int32_t place, int64_t s) { all[place] = int32_t(s); },
      [&](int64_t s) { inverse[s] = -1; });
  const int64_t grain = std::max<int64_t>(kRun * E / std::max<int64_t>(n, 1), 1);
  torch::stable::parallel_for(0, E, grain, [&](int64_t begin, int64_t end) {
    Chooser choose(policy, k, weights);
    std::vector<bool> keeps;
    for (int64_t e = begin; e < end; ++e) {
      const int32_t* const slots = all.data() + sorter.start(e);
      choose(slots, sorter.all(e), kept[e], &keeps);
      int32_t row = offsets[e];
      for (int64_t i = 0; i < sorter.all(e); ++i) {
        inverse[slots[i]] = keeps[i] ? row : -1;
        if (keeps[i]) sorted[row++] = slots[i];
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_sort_cpu(
    const Tensor& topk_ids /* [R, k] */,
    int64_t num_experts,
    std::optional<int64_t> capacity,
    int64_t drop_policy,
    const std::optional<Tensor>& topk_weights /* [R, k] */,
    int64_t align) {
  const MoeSortOptions options(topk_ids, num_experts, capacity, drop_policy, topk_weights, align);
  const int64_t n = options.slots, k = options.k, E = options.E, N = options.N;
  const Tensor ids = torch::stable::contiguous(topk_ids);
  Tensor sorted_ids = pooled_tensor(topk_ids, {N}, ScalarType::Int);
  Tensor inverse_ids = pooled_tensor(topk_ids, {options.R, k}, ScalarType::Int);
  Tensor expert_offsets = torch::stable::new_empty(topk_ids, {E + 1});
  Tensor tokens_per_expert = torch::stable::new_empty(topk_ids, {E});
  auto* const sorted = static_cast<int32_t*>(sorted_ids.mutable_data_ptr());
  auto* const inverse = static_cast<int32_t*>(inverse_ids.mutable_data_ptr());
  int32_t* const offsets = expert_offsets.mutable_data_ptr<int32_t>();
  int32_t* const kept = tokens_per_expert.mutable_data_ptr<int32_t>();

  Sorter sorter(static_cast<const int32_t*>(ids.const_data_ptr()), n, E);
  sorter.count(capacity.value_or(n), align, offsets, kept);
  for (int64_t e = 0; e < E; ++e)
    std::fill(sorted + offsets[e] + kept[e], sorted + offsets[e + 1], -1);
  std::fill(sorted + offsets[E], sorted + N, -1);
  if (sorter.overflows()) {
    Tensor weights = options.by_weight ? torch::stable::contiguous(*topk_weights) : ids;
    const float* const w =
        options.by_weight ? static_cast<const float*>(weights.const_data_ptr()) : nullptr;
    sort_and_drop(sorter, n, E, options.policy, k, w, offsets, kept, sorted, inverse);
  } else {
    sorter.sort(
        [&](int64_t e) { return offsets[e]; },
        [&](int32_t place, int64_t s) {
          sorted[place] = int32_t(s);
          inverse[s] = place;
        },
        [&](int64_t s) { inverse[s] = -1; });
  }
  return {sorted_ids, inverse_ids, expert_offsets, tokens_per_expert};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("moe_sort", TORCH_BOX(&m2ae::cpu::moe_sort_cpu));
}
