// What each row and column of info_nce_loss gets of the upstream gradient, as the loops want it.
#pragma once

#include "info_nce_loss_inputs.h"

namespace m2ae::cpu {

// What the forward found for one direction, and the upstream gradient of its losses.
class Upstream {
 public:
  // `wanted` false: the loss has no such direction, and no row is in it.
  Upstream(
      const char* op,
      const Tensor& gradient,
      const Tensor& neg,
      const Tensor& pos,
      const Tensor& num,
      const PresentRows& rows,
      bool wanted);

  // Of present row i.
  bool in_loss(int64_t i) const { return wanted_ && num_[row(i)] > 0; }
  double weight(int64_t i) const { return in_loss(i) ? gradient_[row(i)] : 0; }
  // If in the loss:
  double count(int64_t i) const { return num_[row(i)]; }
  double pos(int64_t i) const;    // to the base 2
  double lse(int64_t i) const;    // over all entries, to the base 2
  double sigma(int64_t i) const;  // share of the negatives
  // The derivative by a positive's logit, which is this to the base 2, but for the weight.
  double of_positive(int64_t i, double logit) const;

  const PresentRows& rows() const { return rows_; }

 private:
  int64_t row(int64_t i) const { return rows_.row_of(i); }

  const PresentRows& rows_;
  bool wanted_;
  RowValues<float> gradient_, neg_, pos_, num_;
};

// A power of two to divide upstream gradients by, so that they are of order 1; 0 if all are.
double unit_of(const Upstream& queries, const Upstream& keys);

// The arrays of NceShares for all rows of one direction.
class DirectionShares {
 public:
  DirectionShares(const Upstream& of, bool robust, bool by_id);

  // False if row i has shares that need a reference of its own.
  bool fill(int64_t i, double unit, const NceRange& range);
  NceShares at(int64_t i) const;  // from row i on

 private:
  const Upstream& of_;
  bool by_id_;
  Buffer<float> negative_, lse_, weight_, positive_, pos_, single_, inverse_count_, sigma_;
};

}  // namespace m2ae::cpu
