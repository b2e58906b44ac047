// Rows of topk_gating on CUDA, forward: the weights and ids of each, and the sums over those of a
// block. Contract and math: m2ae_kernels/ops/topk_gating.py
#pragma once

#include "topk_gating_select.cuh"

namespace m2ae::cuda {
namespace {

// Threads of a block. The sums of many experts are in shared memory, of which there is 48 KiB.
template <bool kWarp, int kN>
constexpr int kThreadsOf = kWarp && kN <= 8 ? 256 : 128;
// What a warp has in shared memory: numbers of its tile and its sums, then of its chosen, and bytes
// of these.
template <bool kWarp, int kN>
struct WarpMemory {
  static constexpr int kWarps = kThreadsOf<kWarp, kN> / kLanes;
  static constexpr int kTile = kN * kLanes;
  static constexpr int kSums = kWarp ? kTile : 2 * kLanes;  // of a thread's row also the factors
  static constexpr int kCounts = kWarp ? kTile : kLanes;    // of the block
  float *tile, *sums, *chosen;
  uint8_t* chosen_ids;

  static constexpr size_t bytes(int k) {
    const size_t of_chosen = kWarp ? 0 : size_t(k) * kLanes * (sizeof(float) + 1);
    return kWarps * ((kTile + kSums) * sizeof(float) + of_chosen) + kCounts * sizeof(int32_t);
  }
  __device__ WarpMemory(float* shared, int warp, int k)
      : tile(shared + warp * kTile),
        sums(shared + kWarps * kTile + warp * kSums),
        chosen(shared + kWarps * (kTile + kSums) + warp * k * kLanes) {
    float* const behind = shared + kWarps * (kTile + kSums + (kWarp ? 0 : k * kLanes));
    chosen_ids = reinterpret_cast<uint8_t*>(behind + kCounts) + warp * k * kLanes;
  }
  // [kCounts], of the block, in the order of the sums.
  __device__ static int32_t* counts(float* shared, int k) {
    return reinterpret_cast<int32_t*>(shared + kWarps * (kTile + kSums + (kWarp ? 0 : k * kLanes)));
  }
};

// A row's numbers as they are shown: 0 where it is absent, NaN where it has one.
template <typename Row>
__device__ __forceinline__ float shown(const Row& row, float x) {
  if (row.has_nan && !row.given.zero_nan) x = not_a_number();
  return row.present ? x : 0.f;
}

// Scores of experts alone, and weights relative to those of the chosen, need no sum over all.
__device__ __forceinline__ bool needs_distribution(const GatingForward& given) {
  return given.score == kSoftmax || given.probs_sum != nullptr || given.entropy != nullptr;
}

// How the weights follow from the scores: exp(raw - base) * factor.
struct Weighing {
  bool by_score;  // raw is the log-score itself, not relative to others
  float base, factor;

  template <typename Row>
  __device__ explicit Weighing(const Row& row)
      : by_score(row.given.score != kSoftmax && !row.given.norm_topk_prob),
        base(by_score || row.given.norm_topk_prob ? 0.f : row.top),
        factor(by_score || row.given.norm_topk_prob ? 1.f : 1.f / row.total) {}

  template <typename Row>
  __device__ float raw(const Row& row, float z) const {
    return by_score ? row.log_score_of(z) : row.relative_score_of(z);
  }
};

template <typename Row>
__device__ void write_statistics(const GatingForward& given, const Row& row) {
  const int64_t r = row.row();
  const float log_total = logf(row.total);
  const float lse = (row.is_infinite ? row.highest : row.top) + log_total;
  given.logsumexp[r] = given.score == kSoftmax ? shown(row, lse) : 0.f;
  if (given.entropy != nullptr) given.entropy[r] = shown(row, log_total - row.weighed / row.total);
}

// The keys of a row, of its best groups alone if there are groups. The tile is lost.
template <bool kWarp, int kN>
__device__ __forceinline__ void find_keys(
    const GatingForward& given, GatingRow<kWarp, kN>& row, float* tile, uint32_t (&key)[kN]) {
  const bool has_groups = given.n_group > 1;
  const bool by_score = given.bias != nullptr || (has_groups && given.group_best > 1);
  if (by_score || has_groups) {
#pragma unroll
    for (int i = 0; i < kN; ++i) row.column[i * kLanes] = row.z[i];
    if (by_score) {
#pragma unroll 1
      for (int i = 0; i < row.n; ++i)
        row.column[i * kLanes] =
            selection_score(row, given.bias, row.column[i * kLanes], row.first + i);
    }
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const uint32_t x = key_of(given.bias != nullptr ? row.column[i * kLanes] : row.z[i]);
    key[i] = i < row.n ? x : 0;
  }
  if (!has_groups) return;
  if (kWarp) __syncwarp();
  leave_best_groups<kWarp, kN>(given, tile, row.lane, key);
}

template <typename T>
struct alignas(4 * sizeof(T)) FourChosen {
  T at[4];
};

// A thread's k weights and ids to memory, 16 bytes at a time if k allows.
template <typename Row>
__device__ __forceinline__ void write_chosen(
    const GatingForward& given,
    const Row& row,
    const float* chosen,
    const uint8_t* chosen_ids,
    float factor) {
  const int k = given.k;
  float* const weights = given.weights + row.row() * k;
  int32_t* const ids = given.ids + row.row() * k;
  const auto weight = [&](int j) { return shown(row, chosen[j * kLanes] * factor); };
  const auto id = [&](int j) { return row.present ? int32_t(chosen_ids[j * kLanes]) : -1; };
  if (k % 4 == 0) {
#pragma unroll 1
    for (int j = 0; j < k; j += 4) {
      *reinterpret_cast<FourChosen<float>*>(weights + j) = {
          {weight(j), weight(j + 1), weight(j + 2), weight(j + 3)}};
      *reinterpret_cast<FourChosen<int32_t>*>(ids + j) = {{id(j), id(j + 1), id(j + 2), id(j + 3)}};
    }
    return;
  }
#pragma unroll 1
  for (int j = 0; j < k; ++j) {
    weights[j] = weight(j);
    ids[j] = id(j);
  }
}

// Rows of a thread each. Lane e adds up expert e of the warp's rows.
template <int kN>
class ThreadRows {
 public:
  using Row = GatingRow<false, kN>;
  using Memory = WarpMemory<false, kN>;
  static constexpr int kRows = kThreadsOf<false, kN>;  // of a block

  __device__ ThreadRows(const GatingForward& forward, float* shared)
      : given(forward),
        lane(int(threadIdx.x) % kLanes),
        memory(shared, int(threadIdx.x) / kLanes, forward.k) {}

  __device__ void operator()(int64_t s, int64_t first) {
    Row row(given, memory.tile);
    row.read(s, first + threadIdx.x);
    if (needs_distribution(given))
      row.find_distribution(given.probs_sum != nullptr, given.entropy != nullptr, nullptr);
    if (given.probs_sum != nullptr) add_distribution(row);
    uint32_t key[kN];
    find_keys(given, row, memory.tile, key);
    const unsigned taken = choose(row, key);
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      const unsigned rows = __ballot_sync(kAll, taken >> e & 1);
      if (lane == e) count_ += __popc(rows);
    }
    if (row.t < given.T) write_statistics(given, row);
  }

  __device__ void finish(int32_t* counts) {
    memory.sums[lane] = sum_;
    if (lane < kN) atomicAdd(&counts[lane], count_);
  }
  __device__ static int place(int e) { return e; }

 private:
  __device__ __forceinline__ void add_distribution(const Row& row) {
    float* const factors = memory.sums + kLanes;
    factors[lane] = shown(row, 1.f / row.total);
    __syncwarp();
    float sum = 0;
    if (lane < given.E) {
#pragma unroll 8
      for (int i = 0; i < kLanes; ++i) {
        const int of_row = (lane + i) % kLanes;  // or all lanes would read one bank
        sum += memory.tile[lane * kLanes + of_row] * factors[of_row];
      }
    }
    sum_ += sum;
    __syncwarp();
  }

  // The row's weights and ids; returns a bit for each expert that is chosen.
  __device__ __forceinline__ unsigned choose(const Row& row, uint32_t (&key)[kN]) {
    Weighing weighing(row);
    float* const chosen = memory.chosen + lane;
    uint8_t* const chosen_ids = memory.chosen_ids + lane;
    unsigned taken = 0;
    float largest = -infinity();
    for (int j = 0; j < given.k; ++j) {
      int id;
      const uint32_t best = take_best(key, &id);
      taken |= 1u << id;
      float z = number_of(best);
      if (given.bias != nullptr && row.present) z = row.logit(id);
      const float raw = weighing.raw(row, z);
      largest = fmaxf(largest, raw);
      chosen[j * kLanes] = raw;
      chosen_ids[j * kLanes] = uint8_t(id);
    }
    if (given.norm_topk_prob) weighing.base = largest == -infinity() ? 0.f : largest;
    float sum = 0;
    for (int j = 0; j < given.k; ++j) {
      const float x = exp_of(chosen[j * kLanes] - weighing.base);
      sum += x;
      chosen[j * kLanes] = x;
    }
    if (given.norm_topk_prob) weighing.factor = 1.f / (sum == 0 ? 1.f : sum);
    if (row.t < given.T)
      write_chosen(given, row, chosen, chosen_ids, weighing.factor * given.routed_scaling_factor);
    return row.present ? taken : 0;
  }

  const GatingForward& given;
  const int lane;
  const Memory memory;
  float sum_ = 0;
  int32_t count_ = 0;
};

// Rows of a warp each. Of the k chosen, lane j has the j-th, then the 32 + j-th, and so on.
template <int kN>
class WarpRows {
 public:
  using Row = GatingRow<true, kN>;
  using Memory = WarpMemory<true, kN>;
  static constexpr int kRows = kThreadsOf<true, kN> / kLanes;  // of a block
  static constexpr bool kSumsInRegisters = kN <= 8;

  __device__ WarpRows(const GatingForward& forward, float* shared)
      : given(forward),
        lane(int(threadIdx.x) % kLanes),
        memory(shared, int(threadIdx.x) / kLanes, forward.k),
        counts_(Memory::counts(shared, forward.k)) {
#pragma unroll
    for (int i = 0; i < kN; ++i) memory.sums[i * kLanes + lane] = 0;
  }

  __device__ void operator()(int64_t s, int64_t first) {
    Row row(given, memory.tile);
    row.read(s, first + int(threadIdx.x) / kLanes);
    if (row.t >= given.T) return;  // whole warps
    if (needs_distribution(given))
      row.find_distribution(given.probs_sum != nullptr, given.entropy != nullptr, nullptr);
    if (given.probs_sum != nullptr) add_distribution(row);
    uint32_t key[kN];
    find_keys(given, row, memory.tile, key);
    choose(row, key);
    if (lane == 0) write_statistics(given, row);
    __syncwarp();
  }

  __device__ void finish(int32_t*) {
    if constexpr (kSumsInRegisters) {
#pragma unroll
      for (int i = 0; i < kN; ++i) memory.sums[i * kLanes + lane] = sums_[i];
    }
  }
  __device__ static int place(int e) { return e % kN * kLanes + e / kN; }

 private:
  __device__ __forceinline__ void add_distribution(const Row& row) {
    const float factor = shown(row, 1.f / row.total);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float x = row.column[i * kLanes] * factor;
      if constexpr (kSumsInRegisters)
        sums_[i] += x;
      else
        memory.sums[i * kLanes + lane] += x;
    }
  }

  __device__ __forceinline__ void choose(const Row& row, const uint32_t (&key)[kN]) {
    const int k = given.k;
    float* const weights = given.weights + row.row() * k;
    int32_t* const ids = given.ids + row.row() * k;
    Weighing weighing(row);
    LaneBest<kN> mine(key, row.column);
    float raw = -infinity(), largest = -infinity();
#pragma unroll 1
    for (int first = 0; first < k; first += kLanes) {
      uint32_t my_key = 0;
      int my_id = 0;
      const int end = k - first < kLanes ? k - first : kLanes;
#pragma unroll 1
      for (int j = 0; j < end; ++j) {
        int id;
        const uint32_t best = mine.take(lane, &id);
        my_key = lane == j ? best : my_key;
        my_id = lane == j ? id : my_id;
      }
      if (lane >= end) continue;
      float z = number_of(my_key);
      if (given.bias != nullptr && row.present) z = row.logit(my_id);
      raw = weighing.raw(row, z);
      largest = fmaxf(largest, raw);
      ids[first + lane] = row.present ? my_id : -1;
      if (k > kLanes) weights[first + lane] = raw;  // until the sum is known
      if (row.present) atomicAdd(&counts_[place(my_id)], 1);
    }
    if (given.norm_topk_prob) {
      largest = number_of(__reduce_max_sync(kAll, key_of(largest)));
      weighing.base = largest == -infinity() ? 0.f : largest;
      float sum = 0;
#pragma unroll 1
      for (int j = lane; j < k; j += kLanes)
        sum += exp_of((k > kLanes ? weights[j] : raw) - weighing.base);
      sum = sum_of_lanes(sum);
      weighing.factor = 1.f / (sum == 0 ? 1.f : sum);
    }
    const float factor = weighing.factor * given.routed_scaling_factor;
#pragma unroll 1
    for (int j = lane; j < k; j += kLanes)
      weights[j] = shown(row, exp_of((k > kLanes ? weights[j] : raw) - weighing.base) * factor);
  }

  const GatingForward& given;
  const int lane;
  const Memory memory;
  int32_t* const counts_;
  float sums_[kSumsInRegisters ? kN : 1] = {};
};

}  // namespace
}  // namespace m2ae::cuda
