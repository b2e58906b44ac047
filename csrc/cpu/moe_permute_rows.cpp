#include "moe_permute_rows.h"

#include <cstring>

#include "../floating_element.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace m2ae::cpu {
namespace {

Tensor with_runs(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.dim() == 2, op, ": expected ", name, " [rows, D] on the CPU");
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

void check_ids(const char* op, const char* name, const Tensor& ids, int64_t dim) {
  STD_TORCH_CHECK(
      ids.is_cpu() && ids.dim() == dim && ids.scalar_type() == ScalarType::Int,
      op,
      ": expected ",
      name,
      " of int32 with ",
      dim,
      " dimensions on the CPU");
}

}  // namespace

Rows::Rows(const char* op, const char* name, const Tensor& tensor)
    : tensor_(with_runs(op, name, tensor)),
      element_(float32_element(op, name, tensor)),
      data_(static_cast<const char*>(tensor_.const_data_ptr())),
      stride_bytes_(tensor_.stride(0) * bytes_of(element_)) {}

SortedSlots::SortedSlots(
    const char* op, const Tensor* sorted_ids, const Tensor& inverse_ids, int64_t N)
    : op_(op), inverse_tensor_(torch::stable::contiguous(inverse_ids)), sorted_rows_(N) {
  check_ids(op, "inverse_ids", inverse_ids, 2);
  rows_ = inverse_ids.size(0);
  slots_ = inverse_ids.size(1);
  STD_TORCH_CHECK(slots_ > 0, op, ": expected inverse_ids [R, k] with k >= 1");
  inverse_ = inverse_tensor_.const_data_ptr<int32_t>();
  if (sorted_ids == nullptr) return;
  check_ids(op, "sorted_ids", *sorted_ids, 1);
  STD_TORCH_CHECK(
      sorted_ids->size(0) == N,
      op,
      ": expected as many sorted_ids as sorted rows, ",
      N,
      ", got ",
      sorted_ids->size(0));
  sorted_tensor_.push_back(torch::stable::contiguous(*sorted_ids));
  sorted_ = sorted_tensor_[0].const_data_ptr<int32_t>();
}

void SortedSlots::check() const {
  STD_TORCH_CHECK(
      !is_out_of_range_.load(),
      op_,
      ": expected inverse_ids of the routing in [-1, N = ",
      sorted_rows_,
      "), got one outside; is the routing that of these rows?");
}

SlotWeights::SlotWeights(const char* op, const Tensor* weights, const SortedSlots& slots)
    : slots_(slots.slots()) {
  if (weights == nullptr) return;
  STD_TORCH_CHECK(
      weights->is_cpu() && weights->dim() == 2 && weights->size(0) == slots.rows() &&
          weights->size(1) == slots_ && weights->scalar_type() == ScalarType::Float,
      op,
      ": expected topk_weights [R, k] of float32 on the CPU");
  tensor_.push_back(torch::stable::contiguous(*weights));
  static const float none = 0;
  data_ = slots.rows() == 0 ? &none : tensor_[0].const_data_ptr<float>();
}

void copy_row(void* to, const void* from, int64_t bytes, bool streams) {
#if defined(__SSE2__)
  auto* t = static_cast<char*>(to);
  const auto* f = static_cast<const char*>(from);
  // Rows of an odd width do not begin where a line of the cache does; those lines are not whole.
  if (streams && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(t) % 64 == 0) {
    for (int64_t i = 0; i < bytes; i += 64) {
      __m128i line[4];
      for (int q = 0; q < 4; ++q)
        line[q] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(f + i) + q);
      for (int q = 0; q < 4; ++q) _mm_stream_si128(reinterpret_cast<__m128i*>(t + i) + q, line[q]);
    }
    return;
  }
#endif
  std::memcpy(to, from, size_t(bytes));
}

void zero_row(void* to, int64_t bytes, bool streams) {
#if defined(__SSE2__)
  auto* t = static_cast<char*>(to);
  if (streams && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(t) % 64 == 0) {
    for (int64_t i = 0; i < bytes; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(t + i), _mm_setzero_si128());
    return;
  }
#endif
  std::memset(to, 0, size_t(bytes));
}

void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

void zero_empty_rows(char* rows, int64_t row_bytes, const SortedSlots& slots, bool streams) {
  // Most look-ups find nothing to do: shared by what they read.
  share(slots.sorted_rows(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (slots.is_empty(i)) zero_row(rows + i * row_bytes, row_bytes, streams);
    if (streams) finish_streams();
  });
}

}  // namespace m2ae::cpu
