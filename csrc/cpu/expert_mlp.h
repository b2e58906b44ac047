// expert_mlp on the CPU: the arguments of a call, checked, and what its two directions share.
// Contract and math: m2ae_kernels/ops/expert_mlp.py
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "../element.h"
#include "expert_mlp_tile.h"
#include "isa.h"
#include "workspace.h"

namespace m2ae::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class WeightAt : int64_t { kOutput = 0, kInput = 1, kNowhere = 2 };

constexpr int64_t kLanes = 16;  // rows of a block and depths of transposed tiles: multiples

inline int64_t in_lanes(int64_t size) {
  return (size + kLanes - 1) / kLanes * kLanes;
}

// The same for rows that are transposed as pairs of bfloat16.
inline int64_t in_pairs(int64_t size) {
  return (size + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
}

// A dense tensor of one of the floating types, read as float32.
struct Floats {
  Tensor tensor;  // contiguous
  Element element = Element::kFloat32;
  const char* data = nullptr;

  Floats() = default;
  Floats(const char* name, const Tensor& given, std::vector<int64_t> sizes);

  const char* at(int64_t i) const { return data + i * bytes_of(element); }
  // Elements i to i + n, in `scratch` unless they are float32 where they lie.
  const float* read(int64_t i, int64_t n, float* scratch) const {
    if (element == Element::kFloat32) return reinterpret_cast<const float*>(at(i));
    load(i, n, scratch);
    return scratch;
  }
  void load(int64_t i, int64_t n, float* to) const {
    kernels().cast[int(element)][int(Element::kFloat32)](at(i), to, n);
  }
  // `rows` of n each, ld apart, as a matrix: where it lies, or packed in `scratch` [rows, n].
  struct Matrix {
    const float* data;
    int64_t ld;
  };
  Matrix matrix(int64_t i, int64_t rows, int64_t n, int64_t ld, float* scratch) const {
    if (element == Element::kFloat32) return {reinterpret_cast<const float*>(at(i)), ld};
    for (int64_t r = 0; r < rows; ++r) load(i + r * ld, n, scratch + r * n);
    return {scratch, n};
  }
  explicit operator bool() const { return data != nullptr; }
};

// Everything but gradients and outputs.
struct ExpertArguments {
  const Tensor &x, &w1, &w2, &topk_weights;
  const std::optional<Tensor>&b1, &b2, &shift, &seed;
  const Tensor &sorted_ids, &inverse_ids, &expert_offsets;
  int64_t activation, output_activation;
  double dropout_p, output_dropout_p;
  int64_t weight_at;
};

class ExpertMlp {
 public:
  explicit ExpertMlp(const ExpertArguments& given);

  int64_t T, D, E, H, Do, S, R, k, N;
  bool gated;
  int64_t activation, output_activation;
  WeightAt weight_at;
  Element element;
  // What products are made of: bfloat16 if the inputs are, this machine multiplies it, and D, H and
  // Do are even, since such products take their depth in pairs. Sums are float32 either way.
  Operand operand;
  Floats x, w1, w2, b1, b2, shift;
  Dropout hidden, output;

  int64_t wide() const { return gated ? 2 * H : H; }
  int32_t slot(int64_t row) const { return sorted_ids_[row]; }
  int32_t place(int64_t slot) const { return inverse_ids_[slot]; }
  float weight(int64_t row) const { return weights_[sorted_ids_[row]]; }
  float factor(int64_t row) const { return weight_at == WeightAt::kOutput ? weight(row) : 1; }

  // Sorted rows with a slot of expert e in group g of `groups` equal parts of the R rows of the
  // routing: rows[first(g, e)] to rows[first(g, e) + 1], in their order.
  struct Segments {
    int64_t groups, experts;
    Buffer<int32_t> rows;
    std::vector<int64_t> begin;  // [groups * E + 1]
    int64_t index(int64_t g, int64_t e) const { return g * experts + e; }
  };
  Segments segments(int64_t groups) const;
  int64_t first_of_group(int64_t g, int64_t groups) const { return R * g / groups; }

  // to [n, ld] <- x[t] + shift[s] of `rows` sorted rows, times the router weight if `weighted`.
  void gather(const int32_t* rows, int64_t n, bool weighted, float* to, int64_t ld) const;

  // An operand of gemm().
  struct Packed {
    const void* data;
    int64_t ld;
  };
  // Elements i on of weights, `rows` of n each, ld apart, as A or B of a product: where they lie,
  // or in `scratch`, of packed_weights(rows * n) floats.
  Packed left(
      const Floats& weights, int64_t i, int64_t rows, int64_t n, int64_t ld, float* scratch) const;
  Packed right(
      const Floats& weights, int64_t i, int64_t rows, int64_t n, int64_t ld, float* scratch) const;
  int64_t packed_weights(int64_t n) const { return element == Element::kFloat32 ? 0 : n; }
  // float32 `from` [rows, ld], ld as of in_pairs(), as A, with the same ld; bfloat16 in `to`.
  const void* left(const float* from, int64_t rows, int64_t ld, void* to) const;
  // `from` [rows, n], ld apart, as B, with n as its ld; where it lies if that is what it is.
  Packed right(const float* from, int64_t rows, int64_t n, int64_t ld, void* to) const;
  // What left() made of [rows, ld], transposed: as A [ld, rows], or as B.
  void turn_left(const void* from, int64_t rows, int64_t ld, void* to) const;
  void turn_right(const void* from, int64_t rows, int64_t ld, void* to) const;
  int64_t packed(int64_t n) const { return operand == Operand::kFloat32 ? 0 : n / 2; }  // floats

 private:
  Tensor topk_weights_, sorted_, inverse_, offsets_;  // keep the memory
  const float* weights_;
  const int32_t *sorted_ids_, *inverse_ids_, *expert_offsets_;
};

// run(worker, task) for each task in [0, tasks), on all threads; make() is a worker's scratch.
template <typename Make, typename Run>
void share_out(
    int64_t tasks, const Make& make, const Run& run, Operand operand = Operand::kFloat32) {
  std::atomic<int64_t> next = 0;
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      if (next >= tasks) return;
      auto scratch = make();
      for (int64_t task; (task = next++) < tasks;) run(scratch, task);
      gemm_release(operand);
    }
  };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (threads > 1)
    torch::stable::parallel_for(0, threads, 1, work);
  else
    work(0, 1);
}

}  // namespace m2ae::cpu
