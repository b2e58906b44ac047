// What the backward of expert_mlp does with a block of an expert's rows, and a worker's memory.
#pragma once

#include <algorithm>
#include <vector>

#include "expert_mlp.h"

namespace m2ae::cpu {

struct BackwardNeeds {
  bool x, w1, w2, weights, b1, b2, shift;
  bool rows() const { return x || shift; }
};

// One worker's memory. Rows beyond those of a block are zero, up to a multiple of kLanes. What is
// `left` or `right` is an operand of products, as ExpertMlp makes them; not made of float32 where
// that is an operand as it is.
struct BackwardScratch {
  // Rows that go through an expert together: more of bfloat16, whose weights are packed for each.
  static constexpr int64_t kMaxBlock = 512;
  static int64_t block_of(const ExpertMlp& mlp) {
    return mlp.operand == Operand::kFloat32 ? 256 : kMaxBlock;
  }
  // Hidden channels of one step, a multiple of 4 and of kLanes.
  static constexpr int64_t kPanel = 128;

  Buffer<float> u, left_u, right_u, inputs;      // [block, D]; the last one transposed
  Buffer<float> g, left_g, turned_g;             // [block, Do]; the last one transposed
  Buffer<float> by_u;                            // [block, D]
  Buffer<float> h, up, columns;                  // [block, kPanel]; the last one transposed
  Buffer<float> a, by_a, right_a;                // [block, kPanel]
  Buffer<float> by_h, by_up, left_by_h, turned;  // [block, kPanel]; the last one transposed
  Buffer<float> factors;                         // [kPanel]
  Buffer<float> by_b1, by_b2;                    // over a block, so that no sum has more terms
  Buffer<float> weights, row, z;                 // a panel of weights, rows of any width
  Buffer<float> w1, w2;                          // a task's sums, taken when one needs them
  Buffer<float> tile_w1, tile_w2;                // or those of a panel
  float by_weight[kMaxBlock], weight[kMaxBlock];

  BackwardScratch(const ExpertMlp& mlp, bool recomputes);

 private:
  BackwardScratch(const ExpertMlp& mlp, bool recomputes, int64_t block);
};

// Where the gradients of a task's weights are summed, and rounded to if that is somewhere else.
struct WeightSums {
  float *w1, *w2;        // [channels, D], [Do, channels of ld_w2], from the first of the task on
  int64_t up_w1, ld_w2;  // elements from a gate's row of w1 to that of its up channel
  bool is_tile;          // of one panel at a time, for a task of one block
  float *b1, *b2;        // [H or 2 H], [Do], of the expert
  char *to_w1, *to_w2;   // [H or 2 H, D], [Do, H] of the expert, written by the last block
};

// The hidden channels [first, last) of expert e, and which one of the splits that is.
struct HiddenRange {
  int64_t e, q, first, last;
};

class BackwardBlocks {
 public:
  BackwardBlocks(
      const ExpertMlp& mlp,
      const BackwardNeeds& needs,
      const Floats& grad /* [R, Do] */,
      const Floats& h /* [N, H or 2 H], or nothing: computed again */,
      const Floats& y /* [N, Do], or nothing */)
      : mlp_(mlp), needs_(needs), grad_(grad), h_(h), y_(y) {}

  bool recomputes() const { return !h_; }
  void round(const float* from, int64_t n, char* to, int64_t i) const;
  // Takes m sorted rows through a range. Adds to the sums, or sets those of w1 and w2 if it is the
  // first of a task, and rounds them if it is the last; leaves the gradient by u in scratch.by_u
  // [m, D], that by the router weights in scratch.by_weight.
  void run(
      BackwardScratch& scratch,
      const HiddenRange& range,
      const int32_t* rows,
      int64_t m,
      bool is_first,
      bool is_last,
      const WeightSums& sums) const;

 private:
  struct Panel {
    const HiddenRange& range;
    const int32_t* rows;
    int64_t m, n, h0, width, ld;  // n, ld: m, width in lanes
    bool adds_rows, adds_weights, is_last;
    const WeightSums& sums;
  };

  void output(BackwardScratch& scratch, const HiddenRange& range, int32_t row, int64_t i) const;
  void panel(BackwardScratch& scratch, const Panel& panel) const;
  void layer(BackwardScratch& scratch, const Panel& panel, int64_t c, float* h) const;
  void hidden(BackwardScratch& scratch, const Panel& panel, int64_t i) const;
  void first_layer(
      BackwardScratch& scratch,
      const Panel& panel,
      int64_t half,
      const float* by_h,
      bool adds_rows) const;

  const ExpertMlp& mlp_;
  const BackwardNeeds needs_;
  const Floats &grad_, &h_, &y_;
};

}  // namespace m2ae::cpu
