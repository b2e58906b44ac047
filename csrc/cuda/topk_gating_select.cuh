// Which experts a row of topk_gating goes to on CUDA: the best by key, one after the other, within
// the best groups. Contract: m2ae_kernels/ops/topk_gating.py
#pragma once

#include "topk_gating_row.cuh"

namespace m2ae::cuda {
namespace {

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  return a > b ? a : b;
}
__device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}

// The best of a thread's keys, which loses its key. As many instructions as pushing all keys into a
// sorted list, but no list to hold, whatever k is.
template <int kN>
__device__ __forceinline__ uint32_t take_best(uint32_t (&key)[kN], int* id) {
  uint32_t best = 0;
  int at = 0;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    at = key[i] > best ? i : at;
    best = larger(key[i], best);
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) key[i] = i == at ? 0 : key[i];
  *id = at;
  return best;
}

// The best of a lane's keys, sorted, lower experts before their equals. A lane of 32 seldom gives
// more than three of the k, so that few lanes of few rows look through their keys again; for them
// the keys are in the lane's column.
template <int kN>
class LaneBest {
 public:
  __device__ __forceinline__ LaneBest(const uint32_t (&keys)[kN], float* column) : column_(column) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      column[i * kLanes] = __int_as_float(int(keys[i]));
      push(keys[i], i);
    }
  }

  // The best of all lanes, which is gone then, and which expert it is.
  __device__ __forceinline__ uint32_t take(int lane, int* id) {
    const uint32_t best = __reduce_max_sync(kAll, key_[0]);
    const int winner = __ffs(int(__ballot_sync(kAll, key_[0] == best))) - 1;
    *id = winner * kN + __shfl_sync(kAll, id_[0], winner);
    if (lane == winner) drop_first();
    return best;
  }

 private:
  static constexpr int kDepth = kN < 3 ? kN : 3;

  __device__ __forceinline__ void push(uint32_t x, int i) {
#pragma unroll
    for (int d = kDepth - 1; d > 0; --d) {
      id_[d] = x > key_[d - 1] ? id_[d - 1] : x > key_[d] ? i : id_[d];
      key_[d] = larger(key_[d], smaller(key_[d - 1], x));
    }
    id_[0] = x > key_[0] ? i : id_[0];
    key_[0] = larger(key_[0], x);
  }

  __device__ __forceinline__ void drop_first() {
    const uint32_t gone = key_[0];
    const int gone_id = id_[0];
#pragma unroll
    for (int d = 0; d + 1 < kDepth; ++d) {
      key_[d] = key_[d + 1];
      id_[d] = id_[d + 1];
    }
    key_[kDepth - 1] = 0;
    if (key_[0] != 0) return;
    // Those that come after the one that is gone.
#pragma unroll 1
    for (int i = 0; i < kN; ++i) {
      const auto x = uint32_t(__float_as_int(column_[i * kLanes]));
      push(x < gone || (x == gone && i > gone_id) ? x : 0, i);
    }
  }

  uint32_t key_[kDepth] = {};
  int id_[kDepth] = {};  // of the lane's experts
  const float* column_;
};

// What an expert is chosen by where the logit alone does not tell: its score and bias.
template <bool kWarp, int kN>
__device__ float selection_score(
    const GatingRow<kWarp, kN>& row, const float* bias, float z, int expert) {
  float x = z;
  if (z == z && z != -infinity()) {
    x = row.given.score == kSoftmax ? exp_of(row.relative_score_of(z) - row.top) / row.total
                                    : exp_of(row.log_score_of(z));
  }
  return bias == nullptr ? x : x + bias[expert];
}

// Where expert e of the row is in a warp's tile; a thread's row is its column.
template <bool kWarp, int kN>
__device__ __forceinline__ float* tile_at(float* tile, int lane, int e) {
  return kWarp ? tile + e % kN * kLanes + e / kN : tile + e * kLanes + lane;
}

// The key of the sum of the best of group g, in descending order. Experts of -inf and NaN add
// nothing, but to a group that has no other.
template <bool kWarp, int kN>
__device__ uint32_t group_key(const GatingForward& given, float* tile, int lane, int g) {
  const int size = given.E / given.n_group;
  const auto key = [&](int i) { return key_of(*tile_at<kWarp, kN>(tile, lane, g * size + i)); };
  uint32_t best = 0, second = 0;
#pragma unroll 4
  for (int i = 0; i < size; ++i) {
    const uint32_t x = key(i);
    second = larger(second, smaller(best, x));
    best = larger(best, x);
  }
  float sum = number_of(best);
  if (!(sum > -infinity())) return best;
  if (given.group_best > 1 && number_of(second) > -infinity()) sum += number_of(second);
  // Of more than two, each is the best of those that come after the one before it.
  if (given.group_best <= 2) return key_of(sum);
  uint32_t last = 0xffffffffu;
  int last_id = -1;
#pragma unroll 1
  for (int j = 0; j < given.group_best; ++j) {
    uint32_t next = 0;
    int id = 0;
#pragma unroll 1
    for (int i = 0; i < size; ++i) {
      const uint32_t x = key(i);
      if (x <= next || !(x < last || (x == last && i > last_id))) continue;
      next = x;
      id = i;
    }
    if (j >= 2 && number_of(next) > -infinity()) sum += number_of(next);
    last = next;
    last_id = id;
  }
  return key_of(sum);
}

// Experts of all but the best groups lose their keys. The tile has what groups are compared by, and
// is lost. A lane of a warp owns groups lane, lane + 32, ...; a thread owns all of its row's.
template <bool kWarp, int kN>
__device__ void leave_best_groups(
    const GatingForward& given, float* tile, int lane, uint32_t (&key)[kN]) {
  const int G = given.n_group, size = given.E / G;
  constexpr int kStep = kWarp ? kLanes : 1;
  const int begin = kWarp ? lane : 0;
  // The key of a group replaces its first number, which nobody else reads.
#pragma unroll 1
  for (int g = begin; g < G; g += kStep) {
    const uint32_t of_group = group_key<kWarp, kN>(given, tile, lane, g);
    *tile_at<kWarp, kN>(tile, lane, g * size) = __int_as_float(int(of_group));
  }
  if (kWarp) __syncwarp();
  uint32_t kept = 0;  // a bit for each group of the thread
#pragma unroll 1
  for (int g = begin; g < G; g += kStep) {
    const auto mine = uint32_t(__float_as_int(*tile_at<kWarp, kN>(tile, lane, g * size)));
    int better = 0;
#pragma unroll 1
    for (int other = 0; other < G; ++other) {
      const auto x = uint32_t(__float_as_int(*tile_at<kWarp, kN>(tile, lane, other * size)));
      better += x > mine || (x == mine && other < g);
    }
    if (better < given.topk_group) kept |= 1u << (g / kStep);
  }
  int g = kWarp ? lane * kN / size : 0, in_group = kWarp ? lane * kN % size : 0;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const uint32_t owners = kWarp ? __shfl_sync(kAll, kept, g % kLanes) : kept;
    if (!(owners >> (g / kStep % kLanes) & 1)) key[i] = 0;
    if (++in_group == size) {
      in_group = 0;
      ++g;
    }
  }
  if (kWarp) __syncwarp();
}

}  // namespace
}  // namespace m2ae::cuda
