// Sums of powers over rows and over columns: one for each worker that adds to them, and together.
#pragma once

#include <cmath>
#include <cstdint>

#include "info_nce_loss_tile.h"
#include "workspace.h"

namespace m2ae::cpu {

// sum * 2^reference
struct LogSum {
  double reference, sum;

  double log2() const { return sum == 0 ? -INFINITY : reference + std::log2(sum); }
};

inline LogSum operator+(const LogSum& a, const LogSum& b) {
  if (a.sum == 0) return b;
  if (b.sum == 0) return a;
  if (a.reference == b.reference) return {a.reference, a.sum + b.sum};
  const double reference = a.reference > b.reference ? a.reference : b.reference;
  const double sum =
      a.sum * std::exp2(a.reference - reference) + b.sum * std::exp2(b.reference - reference);
  return {reference, sum};
}

// Those of one direction: of rows, one part for each column group; of columns, for each row group.
class DirectionSums {
 public:
  DirectionSums(int64_t parts, int64_t size, bool robust, bool by_id, int32_t reference);

  NceSums at(int64_t part, int64_t i) const;  // from row or column i on

  LogSum negative(int64_t i) const { return sum_of(negative_, negative_reference_, i); }
  // Of positives by id; nothing if there are no ids.
  LogSum positive(int64_t i) const { return sum_of(positive_, positive_reference_, i); }
  double logits(int64_t i) const { return total_of(logits_, i); }
  double count(int64_t i) const { return total_of(count_, i); }

 private:
  LogSum sum_of(const Buffer<double>& sums, const Buffer<float>& references, int64_t i) const;
  double total_of(const Buffer<double>& numbers, int64_t i) const;

  int64_t parts_, size_;
  int32_t reference_;
  Buffer<double> negative_, positive_, logits_, count_;
  Buffer<float> negative_reference_, positive_reference_;
};

}  // namespace m2ae::cpu
