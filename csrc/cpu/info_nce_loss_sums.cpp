#include "info_nce_loss_sums.h"

#include <algorithm>

namespace m2ae::cpu {
namespace {

template <typename T>
Buffer<T> filled(int64_t size, T value) {
  Buffer<T> buffer(size);
  std::fill_n(buffer.data(), size, value);
  return buffer;
}

template <typename T>
T* from(const Buffer<T>& buffer, int64_t i) {
  return buffer.size() == 0 ? nullptr : buffer.data() + i;
}

}  // namespace

DirectionSums::DirectionSums(
    int64_t parts, int64_t size, bool robust, bool by_id, int32_t reference)
    : parts_(parts), size_(size), reference_(reference) {
  const int64_t all = parts * size;
  negative_ = filled(all, 0.0);
  if (robust) negative_reference_ = filled(all, -INFINITY);
  if (!by_id) return;
  positive_ = filled(all, 0.0);
  logits_ = filled(all, 0.0);
  count_ = filled(all, 0.0);
  if (robust) positive_reference_ = filled(all, -INFINITY);
}

NceSums DirectionSums::at(int64_t part, int64_t i) const {
  i += part * size_;
  return {
      from(negative_, i),
      from(positive_, i),
      from(logits_, i),
      from(count_, i),
      from(negative_reference_, i),
      from(positive_reference_, i)};
}

LogSum DirectionSums::sum_of(
    const Buffer<double>& sums, const Buffer<float>& references, int64_t i) const {
  LogSum total{double(reference_), 0};
  for (int64_t p = 0; p < parts_ && sums.size() != 0; ++p) {
    const int64_t at = p * size_ + i;
    const double reference = references.size() == 0 ? reference_ : double(references[at]);
    total = total + LogSum{reference, sums[at]};
  }
  return total;
}

double DirectionSums::total_of(const Buffer<double>& numbers, int64_t i) const {
  double total = 0;
  for (int64_t p = 0; p < parts_ && numbers.size() != 0; ++p) total += numbers[p * size_ + i];
  return total;
}

}  // namespace m2ae::cpu
