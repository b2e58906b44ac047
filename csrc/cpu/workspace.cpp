// The pool behind workspace.h: free blocks, the least recently used given back first.
#include "workspace.h"

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace m2ae::cpu {
namespace {

constexpr size_t kSmallest = size_t(4) << 10;
constexpr size_t kHugePage = size_t(2) << 20;

struct Block {
  void* memory;
  size_t bytes;
};

class Pool {
 public:
  void* take(size_t bytes) {
    const size_t size = size_class(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    // One that wastes a quarter at most.
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      if (block->bytes < size || block->bytes > size + size / 4) continue;
      if (best == free_.end() || block->bytes < best->bytes) best = block;
    }
    Block block{};
    if (best != free_.end()) {
      block = *best;
      free_.erase(best);
      held_ -= block.bytes;
    } else {
      block = fresh(size);
    }
    taken_.emplace(block.memory, block.bytes);
    return block.memory;
  }

  void give(void* memory) {
    std::list<Block> surplus;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto taken = taken_.find(memory);
      free_.push_front({memory, taken->second});
      held_ += taken->second;
      taken_.erase(taken);
      while (held_ > kPoolBytes) {
        held_ -= free_.back().bytes;
        surplus.splice(surplus.end(), free_, std::prev(free_.end()));
      }
    }
    for (const Block& block : surplus) std::free(block.memory);
  }

 private:
  // Rounded up to an eighth or less, so that sizes that differ little share blocks.
  static size_t size_class(size_t bytes) {
    size_t power = kSmallest;
    while (power < bytes) power *= 2;
    size_t step = std::max(power / 16, kSmallest);
    if (bytes >= kHugePage) step = std::max(step, kHugePage);
    return (bytes + step - 1) / step * step;
  }

  static Block fresh(size_t size) {
    const bool is_huge = size >= kHugePage;
    void* const memory = std::aligned_alloc(is_huge ? kHugePage : 64, size);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (is_huge) madvise(memory, size, MADV_HUGEPAGE);  // only advice: may fail
#endif
    return {memory, size};
  }

  std::mutex mutex_;
  std::list<Block> free_;  // the most recently used first
  std::unordered_map<void*, size_t> taken_;
  size_t held_ = 0;
};

// Never destroyed: tensors that hold blocks may outlive every static object.
Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

}  // namespace

void* take_block(size_t bytes) {
  return pool().take(bytes);
}

void give_block(void* block) {
  if (block != nullptr) pool().give(block);
}

}  // namespace m2ae::cpu
