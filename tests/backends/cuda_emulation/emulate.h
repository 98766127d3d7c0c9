// Runs CUDA kernels on the host: enough of CUDA for csrc/cuda, so that a machine without a GPU can test all but the
// hardware.
//
// A thread is a fiber. The threads of a block run in random order between two barriers, and one warp, chosen at random,
// only when all others wait; the blocks of a grid run in random order, in a cooperative launch from one barrier of the
// grid to the next. So a result that depends on the order comes out wrong, and a thread or a block that misses a
// barrier ends the program. Shared memory belongs to its block and starts as NaN; a 16-byte access at another address
// ends the program too. It cannot show races between threads that run at the same time, the memory model, registers or
// speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared_memory")))
extern "C" char __start_shared_memory[], __stop_shared_memory[];
using std::fma;
using std::isinf;
using std::isnan;
using std::sqrt;

namespace emulation {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "%s\n", message);
  std::abort();
}

struct Index {
  unsigned x = 0;
};
inline Index thread, block, grid;

constexpr int kWarp = 32;
enum class State { kReady, kAtWarp, kAtBlock, kAtGrid, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf resume;
  State state;
  unsigned shuffles = 0;
  char slots[2][8];  // the values that the fiber shuffles; two, so that one barrier is enough for each shuffle

  static constexpr size_t kStack = 1 << 16;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> shared;
};

inline jmp_buf scheduler;
inline Block* running;
inline const std::function<void()>* body;
inline std::mt19937 random(1);

inline Fiber& fiber() { return running->fibers[thread.x]; }

// setjmp and longjmp switch in nanoseconds; swapcontext calls the kernel.
[[gnu::noinline]] inline void wait(State state) {
  fiber().state = state;
  if (_setjmp(fiber().resume) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  for (;;) {  // a fiber is used again for the next block
    (*body)();
    wait(State::kDone);
  }
}

[[gnu::noinline]] inline void step() {
  if (_setjmp(scheduler) != 0) return;
  if (fiber().stack) _longjmp(fiber().resume, 1);
  ucontext_t first;
  getcontext(&first);
  fiber().stack.reset(new char[Fiber::kStack]);
  first.uc_stack.ss_sp = fiber().stack.get();
  first.uc_stack.ss_size = Fiber::kStack;
  first.uc_link = nullptr;
  makecontext(&first, enter, 0);
  setcontext(&first);
}

inline void start(Block& block, int threads) {
  block.fibers.resize(threads);
  block.shared.assign(__stop_shared_memory - __start_shared_memory, '\xff');
  for (Fiber& fiber : block.fibers) fiber.state = State::kReady;
}

// Runs a block until its threads are all at the grid's barrier or all done; returns that state.
inline State run_block(Block& block, unsigned index) {
  running = &block;
  emulation::block.x = index;
  std::copy(block.shared.begin(), block.shared.end(), __start_shared_memory);
  std::vector<Fiber>& fibers = block.fibers;
  const auto all = [](auto first, auto last, State state) {
    return std::all_of(first, last, [&](const Fiber& fiber) { return fiber.state == state; });
  };
  const auto release = [](auto first, auto last) {
    std::for_each(first, last, [](Fiber& fiber) { fiber.state = State::kReady; });
  };
  if (fibers[0].state == State::kAtGrid) release(fibers.begin(), fibers.end());
  std::vector<unsigned> order(fibers.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  const unsigned warps = static_cast<unsigned>(fibers.size()) / kWarp;
  unsigned slow = random() % warps;
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    const auto run_warps = [&](bool slow_one) {
      bool ran = false;
      for (unsigned t : order) {
        thread.x = t;
        if ((t / kWarp == slow) != slow_one || fiber().state != State::kReady) continue;
        step();
        ran = true;
      }
      return ran;
    };
    run_warps(false) || run_warps(true);
    for (const State end : {State::kAtGrid, State::kDone}) {
      if (!all(fibers.begin(), fibers.end(), end)) continue;
      std::copy(__start_shared_memory, __stop_shared_memory, block.shared.begin());
      return end;
    }
    bool released = false;
    for (auto warp = fibers.begin(); warp != fibers.end(); warp += kWarp) {
      if (all(warp, warp + kWarp, State::kAtWarp)) release(warp, warp + kWarp), released = true;
    }
    if (all(fibers.begin(), fibers.end(), State::kAtBlock)) {
      release(fibers.begin(), fibers.end());
      slow = random() % warps;
      released = true;
    }
    released |= std::any_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::kReady; });
    if (!released) fail("a thread missed a barrier of its warp, its block or the grid");
  }
}

inline void run(unsigned blocks, int threads, bool cooperative, const std::function<void()>& kernel) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> one_at_a_time(mutex);
  static std::deque<Block> pool;
  body = &kernel;
  grid.x = blocks;
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  pool.resize(std::max<size_t>(pool.size(), cooperative ? blocks : 1));
  if (!cooperative) {
    for (unsigned b : order) {
      start(pool[0], threads);
      if (run_block(pool[0], b) != State::kDone) fail("a barrier of the grid in a launch that is not cooperative");
    }
    return;
  }
  for (unsigned b : order) start(pool[b], threads);
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    unsigned done = 0;
    for (unsigned b : order) done += run_block(pool[b], b) == State::kDone;
    if (done == blocks) return;
    if (done != 0) fail("a block missed a barrier of the grid");
  }
}

}  // namespace emulation

inline emulation::Index &threadIdx = emulation::thread, &blockIdx = emulation::block, &gridDim = emulation::grid;
inline void __syncthreads() { emulation::wait(emulation::State::kAtBlock); }
inline void __syncwarp() { emulation::wait(emulation::State::kAtWarp); }

inline double __shfl_xor_sync(unsigned, double value, int distance) {
  const unsigned slot = emulation::fiber().shuffles++ % 2;
  std::memcpy(emulation::fiber().slots[slot], &value, sizeof(value));
  emulation::wait(emulation::State::kAtWarp);
  std::memcpy(&value, emulation::running->fibers[emulation::thread.x ^ distance].slots[slot], sizeof(value));
  return value;
}
