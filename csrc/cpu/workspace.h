// Memory for temporaries that grow with N x D or N x M and do not leave an op. Pages that were
// never touched cost more than the work on them (1 to 3 us per 4 KiB on a virtual machine), and
// malloc gives large blocks back at once; so blocks are kept here, up to kPoolBytes, and reused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace m2ae::cpu {

constexpr size_t kPoolBytes = size_t(256) << 20;  // unused memory that is kept

// At least `bytes` of uninitialized memory, aligned to 64. Both from any thread.
void* take_block(size_t bytes);
void give_block(void* block);  // nullptr is nothing

// An array from the pool; uninitialized, of plain data.
template <typename T>
class Buffer {
 public:
  static_assert(std::is_trivially_copyable_v<T>);

  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(size == 0 ? nullptr : static_cast<T*>(take_block(size_t(size) * sizeof(T)))),
        size_(size) {}
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { give_block(data_); }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }
  // The memory is the caller's from here on, to be passed to give_block().
  T* release() {
    size_ = 0;
    return std::exchange(data_, nullptr);
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace m2ae::cpu
