// Runs a CUDA kernel on the host: enough of CUDA for the kernels of csrc/cuda, so that a machine without a GPU can test
// them.
//
// A block is a set of fibers, one for each thread. Blocks run in random order, and so do the threads of a block between
// two barriers, so a result that depends on the order comes out wrong. A thread that misses a barrier ends the program.
// What this cannot show: memory races between blocks, the hardware's rounding of half precision, speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <random>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __shared__ static  // one block at a time
#define __launch_bounds__(threads)
using std::fma;

namespace emulation {

struct Index {
  unsigned x = 0;
};
inline Index thread, block, grid;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  int64_t barriers = 0;
  bool done = false;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline const std::function<void()>* body;

inline void enter() {
  (*body)();
  fibers[thread.x].done = true;
}

inline void barrier() {
  Fiber& fiber = fibers[thread.x];
  ++fiber.barriers;
  swapcontext(&fiber.context, &scheduler);
}

inline void start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, enter, 0);
  fiber.barriers = 0;
  fiber.done = false;
}

inline void run(int64_t blocks, int threads, const std::function<void()>& kernel) {
  static std::mutex mutex;
  static std::mt19937 random(1);
  const std::lock_guard<std::mutex> one_at_a_time(mutex);
  body = &kernel;
  fibers.resize(threads);
  grid.x = static_cast<unsigned>(blocks);
  std::vector<unsigned> block_order(blocks), thread_order(threads);
  for (int64_t i = 0; i < blocks; ++i) block_order[i] = static_cast<unsigned>(i);
  for (int i = 0; i < threads; ++i) thread_order[i] = static_cast<unsigned>(i);
  std::shuffle(block_order.begin(), block_order.end(), random);
  for (unsigned b : block_order) {
    block.x = b;
    for (Fiber& fiber : fibers) start(fiber);
    while (!fibers[0].done) {  // up to the next barrier, or to the end
      std::shuffle(thread_order.begin(), thread_order.end(), random);
      for (unsigned t : thread_order) {
        thread.x = t;
        swapcontext(&scheduler, &fibers[t].context);
      }
      for (const Fiber& fiber : fibers) {
        if (fiber.barriers != fibers[0].barriers || fiber.done != fibers[0].done) {
          std::fputs("a thread of a block missed a barrier\n", stderr);
          std::abort();
        }
      }
    }
  }
}

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define gridDim emulation::grid
#define __syncthreads emulation::barrier
