// One row of topk_gating on CUDA: its logits in registers, its scores and their distribution, which
// forward and backward share. Contract and math: m2ae_kernels/ops/topk_gating.py
//
// A row is a thread's, which has all of its kN experts, or a warp's, whose lane l has the experts
// l kN to l kN + kN: the lowest lane has the lowest experts. A tile is memory of a warp for one
// number per expert and lane, in which each lane has a column, kLanes apart, free of bank
// conflicts, that can be indexed by numbers that are not known to the compiler.
#pragma once

#include "device.cuh"
#include "topk_gating.h"

namespace m2ae::cuda {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLog2E = 1.44269504f;
constexpr float kLowestExponent = -87.3f;  // exp() of less is below the smallest normal number
constexpr float kFar = -20.f;              // as in _topk_gating_reference.py

__device__ __forceinline__ float infinity() {
  return __int_as_float(0x7f800000);
}
__device__ __forceinline__ float not_a_number() {
  return __int_as_float(0x7fc00000);
}

// exp(x) by one instruction of the special function unit: relative error 2^-22 + 2^-23 |x|, which
// the sum of a row hides wherever x is large; exactly 1 of 0, exactly 0 of -inf.
__device__ __forceinline__ float exp_of(float x) {
#ifdef M2AE_EMU
  return std::exp2(x * kLog2E);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * kLog2E));
  return y;
#endif
}

// The log-score of z, which is no NaN.
__device__ __forceinline__ float log_score(float z, GatingScore score) {
  if (score == kSoftmax) return z;
  const float t = expf(-fabsf(z)), rest = log1pf(t);
  if (score == kSigmoid) return fminf(z, 0.f) - rest;
  return 0.5f * (z < kFar ? z - 0.5f * t : logf(fmaxf(z, 0.f) + rest));
}

// Its derivative.
__device__ __forceinline__ float slope_of(float z, GatingScore score) {
  if (score == kSoftmax) return 1.f;
  const float t = expf(-fabsf(z));
  if (score == kSigmoid) return (z < 0 ? 1.f : t) / (1.f + t);
  const float softplus = fmaxf(z, 0.f) + log1pf(t);
  return 0.5f * (z < kFar ? 1.f - 0.5f * t : (z < 0 ? t : 1.f) / ((1.f + t) * softplus));
}

// The unsigned number that is larger for the larger float: NaN 1, then -inf, ..., -0 and 0, ...,
// inf. 0 is left for experts that are not there, or taken.
__device__ __forceinline__ uint32_t key_of(float x) {
  const auto bits = uint32_t(__float_as_int(x + 0.f));  // -0 + 0 = 0
  const uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
  return x == x ? key : 1u;
}
__device__ __forceinline__ float number_of(uint32_t key) {
  return __int_as_float(int(key >> 31 ? key & 0x7fffffffu : ~key));  // a NaN of 1
}

__device__ __forceinline__ float sum_of_lanes(float x) {
  for (int bits = kLanes / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kAll, x, bits);
  return x;
}

template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) GatingVector {
  T at[kWidth];
};

__device__ __forceinline__ float number_at(const void* from, Element element, int64_t i) {
  if (element == Element::kFloat32) return static_cast<const float*>(from)[i];
  if (element == Element::kBFloat16)
    return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
  return __half2float(static_cast<const __half*>(from)[i]);
}

// The first n of kN numbers, n > 0, moved `kWidth` at a time if `in_vectors`, where n is a multiple
// of it.
template <typename T, int kN>
__device__ __forceinline__ void load(const T* from, int n, bool in_vectors, float (&to)[kN]) {
  constexpr int kWidth = kN < 4 ? kN : 4;
  using vector_t = GatingVector<T, kWidth>;
  if (in_vectors) {
#pragma unroll
    for (int i = 0; i < kN; i += kWidth) {
      if (i >= n) continue;
      const vector_t numbers = *reinterpret_cast<const vector_t*>(from + i);
#pragma unroll
      for (int w = 0; w < kWidth; ++w) to[i + w] = convert<float>(numbers.at[w]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kN; ++i)
    if (i < n) to[i] = convert<float>(from[i]);
}

template <typename T, int kN>
__device__ __forceinline__ void store(const float (&from)[kN], int n, bool in_vectors, T* to) {
  constexpr int kWidth = kN < 4 ? kN : 4;
  using vector_t = GatingVector<T, kWidth>;
  if (in_vectors) {
#pragma unroll
    for (int i = 0; i < kN; i += kWidth) {
      if (i >= n) continue;
      vector_t numbers;
#pragma unroll
      for (int w = 0; w < kWidth; ++w) numbers.at[w] = convert<T>(from[i + w]);
      *reinterpret_cast<vector_t*>(to + i) = numbers;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kN; ++i)
    if (i < n) to[i] = convert<T>(from[i]);
}

template <bool kWarp, int kN>
struct GatingRow {
  const GatingInput& given;
  const int lane, first, n;  // this thread's experts: first to first + n, n <= 0 for some lanes
  float* const column;       // of this lane in the warp's tile

  int64_t s = 0, t = 0;
  bool present = false, has_nan = false, is_infinite = false, is_shared = false, is_plain = true;
  float z[kN];        // -inf beyond n
  float top = 0;      // log-score, or 0 where the log-scores are relative to nothing finite
  float highest = 0;  // logit
  float total = 1;    // sum of exp(a - top), 1 where it would be 0
  float weighed = 0;  // sum of exp(a - top) (a - top)
  float dot = 0;      // sum of exp(a - top) times what find_distribution() was given

  __device__ GatingRow(const GatingInput& input, float* tile)
      : given(input),
        lane(int(threadIdx.x) % kLanes),
        first(kWarp ? lane * kN : 0),
        n(input.E - first < kN ? input.E - first : kN),
        column(tile + lane) {}

  __device__ int64_t row() const { return s * given.T + t; }

  // Logits of stream `of_stream` and token `of_token`, which may be past the last: then, and where
  // the mask says so, the row is absent, and its logits are 0.
  __device__ __forceinline__ void read(int64_t of_stream, int64_t of_token) {
    s = of_stream;
    t = of_token;
    present = t < given.T && (given.mask == nullptr || given.mask[t]);
    read_logits();
    has_nan = false;
    highest = -infinity();
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      has_nan |= z[i] != z[i];
      highest = fmaxf(highest, z[i]);  // of a NaN and a number, the number
    }
    if (kWarp) {
      has_nan = __any_sync(kAll, has_nan);
      highest = number_of(__reduce_max_sync(kAll, key_of(highest)));
    }
    const bool below = highest == -infinity(), above = highest == infinity();
    is_infinite = below || (above && given.score != kSigmoid);
    is_shared = is_infinite && above;
    is_plain = given.score == kSoftmax && !has_nan && !above;
    top = is_infinite ? 0.f : log_score(highest, given.score);
  }

  // The logit of any expert of the row, from memory.
  __device__ float logit(int e) const {
    float x = number_at(given.logits, given.element, t * given.E + e);
    if (given.shift != nullptr) x += number_at(given.shift, given.shift_element, s * given.E + e);
    return x;
  }

  // A NaN counts as -inf; where there are +inf, they share the row.
  __device__ float log_score_of(float x) const {
    return log_score(x == x ? x : -infinity(), given.score);
  }
  __device__ float relative_score_of(float x) const {
    const float a = log_score_of(x);
    return is_shared ? (a == infinity() ? 0.f : -infinity()) : a;
  }

  // total, and weighed and dot as asked for; `keeps`: exp(a - top) in the column.
  __device__ __forceinline__ void find_distribution(
      bool keeps, bool weighs, const float* by /* [E] or nullptr */) {
    if (!is_plain) {
      // A loop that is not unrolled, because its body is long; so the logits go by memory.
#pragma unroll
      for (int i = 0; i < kN; ++i) column[i * kLanes] = z[i];
      add_up<false, true>(keeps, by);
    } else if (weighs || by != nullptr) {
      add_up<true, true>(keeps, by);
    } else {
      add_up<true, false>(keeps, by);
    }
    if (kWarp) {
      total = sum_of_lanes(total);
      if (weighs) weighed = sum_of_lanes(weighed);
      if (by != nullptr) dot = sum_of_lanes(dot);
    }
    if (total == 0) total = 1;
  }

 private:
  __device__ __forceinline__ void read_logits() {
#pragma unroll
    for (int i = 0; i < kN; ++i) z[i] = i < n ? 0.f : -infinity();
    if (!present || n <= 0) return;
    const int64_t at = t * given.E + first;
    if (given.element == Element::kFloat32)
      load(static_cast<const float*>(given.logits) + at, n, given.in_vectors, z);
    else if (given.element == Element::kBFloat16)
      load(static_cast<const __nv_bfloat16*>(given.logits) + at, n, given.in_vectors, z);
    else
      load(static_cast<const __half*>(given.logits) + at, n, given.in_vectors, z);
    if (given.shift == nullptr) return;
#pragma unroll
    for (int i = 0; i < kN; ++i)
      if (i < n) z[i] += number_at(given.shift, given.shift_element, s * given.E + first + i);
  }

  template <bool plain, bool all_sums>
  __device__ __forceinline__ void add_up(bool keeps, const float* by) {
    total = weighed = dot = 0;
    [[maybe_unused]] constexpr int kUnrolled = plain ? kN : 1;
#pragma unroll kUnrolled
    for (int i = 0; i < kN; ++i) {
      const float d = plain ? z[i] - top : relative_score_of(column[i * kLanes]) - top;
      const float x = exp_of(d);
      total += x;
      if (all_sums) {
        weighed += x * fmaxf(d, kLowestExponent);
        if (by != nullptr && i < n) dot += x * by[first + i];
      }
      if (keeps) column[i * kLanes] = x;
    }
  }
};

}  // namespace
}  // namespace m2ae::cuda
