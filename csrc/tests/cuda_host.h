// Runs CUDA kernels on the CPU, for tests: included by cuda/device.h under MNET_CUDA_ON_HOST instead of the device's
// own words, so that the kernel's source is compiled unchanged by the host compiler (under AddressSanitizer, too).
//
// Every thread of a block is a fiber.  A thread runs until it waits at a barrier or in a warp exchange; which one runs next
// is the launch's `schedule`, and a correct kernel computes the same under all of them.  Blocks run one after the other,
// their shared memory freshly allocated and filled with NaN.  Reported as exceptions: a barrier that some threads never
// reach, threads at two different barriers, exchanges that never complete.
//
// Not modelled: memory ordering between blocks, bank conflicts, register limits.  What cuda/mma.cuh says in PTX is
// emulated by mma_host.h on the warp-wide operations (`collective`) and asynchronous copies of this file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define MNET_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define MNET_HOST_ASAN 1
#endif
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

#include "launch_host.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace mnet::host {

enum class State { kReady, kBarrier, kExchange, kDone };
constexpr Schedule kSchedules[] = {Schedule::kForward, Schedule::kReverse, Schedule::kRandomThreads,
                                   Schedule::kRandomWarps};
constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

struct Place {
  const char* file;
  int line;
  bool operator==(const Place& o) const { return file == o.file && line == o.line; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

// A lane's part of a warp exchange.  `complete` does the whole exchange once all lanes of the mask are there; it gets
// the parts of the warp's 32 lanes, nullptr for those outside the mask.
struct Exchange {
  unsigned mask;
  void (*complete)(Exchange* const* lanes);
  int source;  // of a shuffle: the lane whose `in` it takes
  size_t size;
  const void* in;
  void* out;
};

// 16 bytes on their way to shared memory; from nowhere: zeros.
struct AsyncCopy {
  void* to;
  const void* from;
};

// Where a suspended thread or the scheduler goes on.  On x86-64 a switch saves the registers a call must keep and the
// stack pointer; swapcontext, used elsewhere, asks the kernel for the signal mask every time.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};
__attribute__((naked, noinline)) inline void switch_context(Context*, const Context*) {
  __asm__(
      "endbr64\n\tpush %rbp\n\tpush %rbx\n\tpush %r12\n\tpush %r13\n\tpush %r14\n\tpush %r15\n\t"
      "mov %rsp, (%rdi)\n\tmov (%rsi), %rsp\n\t"
      "pop %r15\n\tpop %r14\n\tpop %r13\n\tpop %r12\n\tpop %rbx\n\tpop %rbp\n\tret");
}
inline void prepare_context(Context& context, char* stack, size_t size, void (*entry)()) {
  // As if `entry` had been called: the stack is 16-byte aligned but for a return address, here null.
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) / 16 * 16) - 2;
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  std::fill(top - 6, top, nullptr);
  context.stack_pointer = top - 6;
}
#else
struct Context {
  ucontext_t state;
};
inline void switch_context(Context* from, const Context* to) { swapcontext(&from->state, &to->state); }
inline void prepare_context(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = size;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  uint3 index;
  State state;
  Place place;
  Exchange exchange;
  std::vector<AsyncCopy> copies;  // not waited for yet
  std::vector<size_t> groups;     // how many of `copies` each committed group ends at
  void* fake_stack;               // AddressSanitizer's
};

struct Shared {
  const void* key;
  std::unique_ptr<void, decltype(&std::free)> memory;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Shared> shared;
  size_t dynamic_bytes = 0;
  std::function<void()> kernel;
  std::mt19937_64 random;
  Fiber* running = nullptr;
  std::exception_ptr error;  // thrown in a thread
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};

inline Block block;
inline const char dynamic_key = 0;

inline void* shared_memory(const void* key, size_t size) {
  for (const Shared& s : block.shared) {
    if (s.key == key) return s.memory.get();
  }
  void* memory = std::aligned_alloc(128, (size + 127) / 128 * 128);
  std::memset(memory, 0xff, size);  // a NaN in every dtype
  block.shared.push_back({key, {memory, &std::free}});
  return memory;
}

// Gives the processor back to the scheduler; returns when the thread is resumed.
inline void leave(bool for_good) {
  Fiber& self = *block.running;
#if defined(MNET_HOST_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_size);
#else
  (void)for_good;
#endif
  switch_context(&self.context, &block.scheduler);
#if defined(MNET_HOST_ASAN)
  __sanitizer_finish_switch_fiber(self.fake_stack, &block.scheduler_stack, &block.scheduler_stack_size);
#endif
}

inline void fiber_main() {
#if defined(MNET_HOST_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
#endif
  try {
    block.kernel();
  } catch (...) {
    block.error = std::current_exception();
  }
  block.running->state = State::kDone;
  leave(true);
}

inline void resume(Fiber& fiber) {
  block.running = &fiber;
  threadIdx = fiber.index;
#if defined(MNET_HOST_ASAN)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
  switch_context(&block.scheduler, &fiber.context);
#if defined(MNET_HOST_ASAN)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void fail(const std::string& what) {
  throw std::runtime_error("block " + std::to_string(blockIdx.x) + ": " + what);
}

inline void shuffle(Exchange* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane] == nullptr) continue;
    const Exchange& to = *lanes[lane];
    if (lanes[to.source] != nullptr) std::memcpy(to.out, lanes[to.source]->in, to.size);
    if (lanes[to.source] == nullptr) std::memset(to.out, 0xff, to.size);
  }
}

// Completes the exchange `fiber` waits in, once all lanes of its mask are there.
inline void try_exchange(const Fiber& fiber) {
  const size_t index = &fiber - block.fibers.data(), warp = index / kWarp * kWarp;
  const unsigned mask = fiber.exchange.mask;
  if (!(mask >> index % kWarp & 1)) fail("lane not in its own mask at " + fiber.place.text());
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (warp + lane >= block.fibers.size()) fail("mask names lanes beyond the block at " + fiber.place.text());
    const Fiber& other = block.fibers[warp + lane];
    if (other.state != State::kExchange) return;
    if (!(other.place == fiber.place) || other.exchange.mask != mask || other.exchange.complete != fiber.exchange.complete) {
      fail("exchanges at " + fiber.place.text() + " and " + other.place.text() + " meet");
    }
  }
  Exchange* lanes[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) lanes[lane] = &block.fibers[warp + lane].exchange;
  }
  fiber.exchange.complete(lanes);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) block.fibers[warp + lane].state = State::kReady;
  }
}

// One turn of a thread, if it can run.
inline bool step(Fiber& fiber) {
  if (fiber.state != State::kReady) return false;
  resume(fiber);
  if (block.error != nullptr) std::rethrow_exception(block.error);
  if (fiber.state == State::kExchange) try_exchange(fiber);
  return true;
}

// One round: every thread gets a turn (kRandomWarps: a warp runs as far as it can before the next one starts).
inline bool run_round() {
  std::vector<size_t> order(block.fibers.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  if (schedule == Schedule::kRandomThreads) std::shuffle(order.begin(), order.end(), block.random);
  bool progress = false;
  if (schedule != Schedule::kRandomWarps) {
    for (const size_t i : order) progress |= step(block.fibers[i]);
    return progress;
  }
  std::vector<size_t> warps((order.size() + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), size_t{0});
  std::shuffle(warps.begin(), warps.end(), block.random);
  for (const size_t warp : warps) {
    for (bool again = true; again; progress |= again) {
      again = false;
      for (size_t i = warp * kWarp; i < std::min(order.size(), (warp + 1) * kWarp); ++i) again |= step(block.fibers[i]);
    }
  }
  return progress;
}

// Opens the barrier once every thread waits there; false when the block is done.
inline bool open_barrier(bool progress) {
  const Fiber *waiting = nullptr, *exchanging = nullptr;
  size_t done = 0, at_barrier = 0;
  for (const Fiber& fiber : block.fibers) {
    done += fiber.state == State::kDone;
    if (fiber.state == State::kExchange) exchanging = &fiber;
    if (fiber.state != State::kBarrier) continue;
    ++at_barrier;
    if (waiting != nullptr && !(waiting->place == fiber.place)) {
      fail("threads wait at two barriers, " + waiting->place.text() + " and " + fiber.place.text());
    }
    waiting = &fiber;
  }
  if (done == block.fibers.size()) return false;
  if (waiting != nullptr && at_barrier + done == block.fibers.size()) {
    if (done > 0) fail(std::to_string(done) + " threads ended before the barrier at " + waiting->place.text());
    for (Fiber& fiber : block.fibers) fiber.state = State::kReady;
  } else if (!progress) {
    fail("deadlock in a warp exchange at " + exchanging->place.text());
  }
  return true;
}

template <typename F>
void launch(dim3 grid, dim3 threads, size_t dynamic_bytes, cudaStream_t stream, F&& kernel) {
  if (stream != current_stream) throw std::runtime_error("a kernel is not launched on the current stream of its device");
  if (good_launches == 0) last_error = launch_error;
  if (good_launches >= 0 && good_launches-- == 0) return;
  if (grid.y * grid.z * threads.y * threads.z != 1) throw std::runtime_error("only one-dimensional launches are run here");
  gridDim = grid;
  blockDim = threads;
  block.dynamic_bytes = dynamic_bytes;
  block.shared.clear();  // what a launch that threw has left
  block.error = nullptr;
  block.kernel = kernel;
  block.fibers.resize(threads.x);
  std::vector<unsigned> blocks(grid.x);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (schedule != Schedule::kForward) std::shuffle(blocks.begin(), blocks.end(), block.random);
  for (const unsigned b : blocks) {
    blockIdx = {b, 0, 0};
    for (unsigned t = 0; t < threads.x; ++t) {
      Fiber& fiber = block.fibers[t];
      if (fiber.stack == nullptr) fiber.stack.reset(new char[kStackBytes]);
      fiber.index = {t, 0, 0};
      fiber.state = State::kReady;
      fiber.copies.clear();
      fiber.groups.clear();
#if defined(MNET_HOST_ASAN)
      __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);  // frames of a thread that has ended
#endif
      prepare_context(fiber.context, fiber.stack.get(), kStackBytes, fiber_main);
    }
    while (open_barrier(run_round())) {
    }
    block.shared.clear();
  }
}

inline void wait(State state, Place place) {
  block.running->state = state;
  block.running->place = place;
  leave(false);
}

template <typename T>
T exchange(unsigned mask, T value, int source, Place place) {
  T result{};
  block.running->exchange = {mask, &shuffle, source, sizeof(T), &value, &result};
  wait(State::kExchange, place);
  return result;
}

inline int lane() { return static_cast<int>(threadIdx.x % kWarp); }

// An operation of the whole warp.
inline void collective(void (*complete)(Exchange* const*), const void* in, void* out, Place place) {
  block.running->exchange = {~0u, complete, 0, 0, in, out};
  wait(State::kExchange, place);
}

}  // namespace mnet::host

#define MNET_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(MNET_HERE) { mnet::host::wait(mnet::host::State::kBarrier, {file, line}); }
inline void __syncwarp(unsigned mask = ~0u, MNET_HERE) {
  mnet::host::exchange(mask, 0, mnet::host::lane(), {file, line});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, MNET_HERE) {
  return mnet::host::exchange(mask, value, source & 31, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, MNET_HERE) {
  return mnet::host::exchange(mask, value, mnet::host::lane() ^ flip, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by, MNET_HERE) {
  const int lane = mnet::host::lane();
  return mnet::host::exchange(mask, value, lane + by < 32 ? lane + by : lane, {file, line});
}

#define MNET_DEVICE inline
#define MNET_SHARED(type, name, dims)   \
  static const char name##_key = 0;     \
  using name##_type = type dims;        \
  name##_type& name = *static_cast<name##_type*>(mnet::host::shared_memory(&name##_key, sizeof(name##_type)))
#define MNET_DYNAMIC_SHARED(type, name) \
  type* const name =                     \
      static_cast<type*>(mnet::host::shared_memory(&mnet::host::dynamic_key, mnet::host::block.dynamic_bytes))
#define MNET_LAUNCH_DYNAMIC(kernel, grid, block_size, bytes, stream, ...) \
  mnet::host::launch((grid), (block_size), (bytes), (stream), [&] { (kernel)(__VA_ARGS__); })
#define MNET_LAUNCH(kernel, grid, block_size, stream, ...) \
  MNET_LAUNCH_DYNAMIC(kernel, grid, block_size, 0, stream, __VA_ARGS__)

namespace mnet::cuda {
inline cudaError_t launch_status() { return host::take_error(); }

template <typename Kernel>
cudaError_t allow_shared(Kernel*, int bytes) {
  return bytes <= 99 * 1024 ? cudaSuccess : cudaErrorInvalidValue;  // what every card from 8.0 on has
}
}  // namespace mnet::cuda
