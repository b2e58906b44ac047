// The machine behind cuda_emu.h: the threads of a block as fibers on one OS thread.
//
// A fiber runs until it waits (for a barrier, or for the lanes of a warp operation) or ends; the
// scheduler then resumes the next one. Blocks run one after the other. If a whole round of fibers
// makes no progress, the block is deadlocked, which is reported with what its threads wait for.
// M2AE_EMU_ORDER = forward | reverse | shuffle is the order of a round; shuffle also lets whole
// warps fall behind, so that a missing barrier shows.
#pragma once

#include <cuda_runtime_api.h>  // dim3, uint3, cudaError_t: declarations only
#include <vector_functions.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emu {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;

// The values that lanes of a warp exchange, and whose they are: a lane that has read them may end
// before others do.
struct Round {
  uint64_t values[kLanes] = {};
  unsigned lanes = 0;
};

// The lanes of a warp that named one mask. Two rounds alternate: a fast lane may come to the next
// meeting before a slow one has read the last.
struct Meeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  uint64_t generation = 0;
  Round rounds[2];
};

struct Warp {
  std::vector<std::unique_ptr<Meeting>> meetings;
  unsigned alive = 0;  // bit per lane
  int held_rounds = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  uint3 index{};
  int lane = 0;
  Warp* warp = nullptr;
  bool done = false;
  const char* waits_in = nullptr;
  std::exception_ptr error;
};

struct Votes {
  int any = 0, all = 1, count = 0;
};

struct Block {
  uint3 index{};
  dim3 size, grid;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> dynamic_shared;
  int alive = 0;
  int at_barrier = 0;
  uint64_t barrier_generation = 0;
  Votes votes, last_votes;
  bool progress = false;
  Fiber* current = nullptr;
  void* scheduler_stack = nullptr;
  const std::function<void()>* kernel = nullptr;
};

inline Block* block = nullptr;  // the one that runs

inline std::string& last_error() {
  static std::string error;
  return error;
}

// Saves the callee-saved registers on the running stack and continues on another.
extern "C" void m2ae_emu_switch(void** save, void* to);
#if defined(__x86_64__)
__asm__(R"(
.text
.weak m2ae_emu_switch
.type m2ae_emu_switch,@function
m2ae_emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi); movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size m2ae_emu_switch,.-m2ae_emu_switch
)");
constexpr int kSavedRegisters = 6;
#else
#error "fibers.h: write m2ae_emu_switch for this processor"
#endif

inline void wait(const char* operation) {
  block->current->waits_in = operation;
  m2ae_emu_switch(&block->current->stack_pointer, block->scheduler_stack);
  block->current->waits_in = nullptr;
}

inline void open_barrier_if_full() {
  if (block->at_barrier == 0 || block->at_barrier != block->alive) return;
  block->last_votes = std::exchange(block->votes, Votes{});
  block->at_barrier = 0;
  ++block->barrier_generation;
  block->progress = true;
}

inline const Votes& barrier(bool vote) {
  const uint64_t generation = block->barrier_generation;
  ++block->at_barrier;
  block->votes.any |= vote;
  block->votes.all &= vote;
  block->votes.count += vote;
  block->progress = true;
  open_barrier_if_full();
  while (block->barrier_generation == generation) wait("__syncthreads");
  return block->last_votes;
}

inline void close_if_complete(Meeting& meeting, unsigned alive) {
  if (meeting.arrived == 0 || (meeting.arrived & alive) != (meeting.mask & alive)) return;
  meeting.rounds[meeting.generation % 2].lanes = meeting.arrived;
  meeting.arrived = 0;
  ++meeting.generation;
  block->progress = true;
}

// Wait for the lanes of the mask; then lane l's value is result.values[l].
template <typename T>
const Round& meet(unsigned mask, T value, const char* operation) {
  static_assert(sizeof(T) <= 8, "a warp operation exchanges at most 8 bytes");
  Fiber& fiber = *block->current;
  if (!(mask >> fiber.lane & 1))
    throw std::runtime_error(std::string(operation) + ": the calling lane is not in its mask");
  Meeting* meeting = nullptr;
  for (const auto& known : fiber.warp->meetings)
    if (known->mask == mask) meeting = known.get();
  if (meeting == nullptr) {
    fiber.warp->meetings.push_back(std::make_unique<Meeting>());
    meeting = fiber.warp->meetings.back().get();
    meeting->mask = mask;
  }
  const uint64_t generation = meeting->generation;
  Round& round = meeting->rounds[generation % 2];
  round.values[fiber.lane] = 0;
  std::memcpy(&round.values[fiber.lane], &value, sizeof value);
  meeting->arrived |= 1u << fiber.lane;
  block->progress = true;
  close_if_complete(*meeting, fiber.warp->alive);
  while (meeting->generation == generation) wait(operation);
  return round;
}

inline void fiber_main() {
  Fiber& fiber = *block->current;
  try {
    (*block->kernel)();
  } catch (...) {
    fiber.error = std::current_exception();
  }
  fiber.done = true;
  --block->alive;
  fiber.warp->alive &= ~(1u << fiber.lane);
  block->progress = true;
  open_barrier_if_full();  // those who wait need not wait for this one any more
  for (const auto& meeting : fiber.warp->meetings) close_if_complete(*meeting, fiber.warp->alive);
  m2ae_emu_switch(&fiber.stack_pointer, block->scheduler_stack);
  std::abort();
}

class Random {  // xorshift64: the same order in every run
 public:
  uint64_t below(uint64_t n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ % n;
  }

 private:
  uint64_t state_ = 0x9e3779b97f4a7c15ull;
};

inline void make_fibers(char* stacks) {
  const int n = int(block->fibers.size());
  for (int i = 0; i < n; ++i) {
    Fiber& fiber = block->fibers[i];
    const dim3& size = block->size;
    fiber.index = make_uint3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
    fiber.lane = i % kLanes;
    fiber.warp = &block->warps[i / kLanes];
    fiber.warp->alive |= 1u << fiber.lane;
    auto* top = reinterpret_cast<void**>(stacks + (i + 1) * kStackBytes);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int r = 0; r < kSavedRegisters; ++r) *--top = nullptr;
    fiber.stack_pointer = top;
  }
}

[[noreturn]] inline void report_deadlock() {
  std::string text = "deadlock in block " + std::to_string(block->index.x) + ":";
  int shown = 0;
  for (const Fiber& fiber : block->fibers)
    if (!fiber.done && shown++ < 4)
      text += " thread " + std::to_string(fiber.index.x) + " waits in " +
              (fiber.waits_in == nullptr ? "nothing" : fiber.waits_in) + ";";
  throw std::runtime_error(text + " " + std::to_string(block->alive) + " threads never met");
}

inline void run_block(char* stacks, char order, Random& random) {
  const int n = int(block->size.x * block->size.y * block->size.z);
  block->fibers.assign(n, Fiber{});
  block->warps.clear();
  block->warps.resize((n + kLanes - 1) / kLanes);
  block->alive = n;
  block->at_barrier = 0;
  make_fibers(stacks);
  std::vector<int> turns(n);
  for (int i = 0; i < n; ++i) turns[i] = order == 'r' ? n - 1 - i : i;

  while (block->alive > 0) {
    bool any_held = false;
    if (order == 's') {
      for (int i = n - 1; i > 0; --i) std::swap(turns[i], turns[random.below(i + 1)]);
      for (Warp& warp : block->warps) {
        if (warp.held_rounds > 0)
          --warp.held_rounds;
        else if (random.below(4) == 0)
          warp.held_rounds = int(random.below(200));
        any_held |= warp.held_rounds > 0;
      }
    }
    block->progress = any_held;
    for (const int i : turns) {
      Fiber& fiber = block->fibers[i];
      if (fiber.done || fiber.warp->held_rounds > 0) continue;
      block->current = &fiber;
      m2ae_emu_switch(&block->scheduler_stack, fiber.stack_pointer);
      if (fiber.error) std::rethrow_exception(fiber.error);
    }
    if (!block->progress && block->alive > 0) report_deadlock();
  }
}

inline void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  const char* order = std::getenv("M2AE_EMU_ORDER");
  const size_t threads = size_t(size.x) * size.y * size.z;
  Random random;
  Block running;
  try {
    if (threads == 0 || threads > 1024 || grid.x == 0 || shared_bytes > kMaxSharedBytes)
      throw std::runtime_error("launch of a grid, block or shared memory that no GPU takes");
    static std::vector<char> stacks;
    if (stacks.size() < threads * kStackBytes) stacks.resize(threads * kStackBytes);
    running.size = size;
    running.grid = grid;
    running.kernel = &kernel;
    block = &running;
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          running.index = make_uint3(x, y, z);
          // Fresh shared memory is not zero on a GPU either.
          running.dynamic_shared.assign(shared_bytes + 16, char(0xCD));
          run_block(stacks.data(), order == nullptr ? 'f' : order[0], random);
        }
  } catch (const std::exception& error) {
    last_error() = error.what();
  }
  block = nullptr;
}

}  // namespace emu
