// What cuda/mma.cuh says in PTX, on the CPU: products are exact, sums are float32 in the order of the depth.  (A tensor
// core adds in another order and truncates: results differ by roundings.)
#pragma once

#include "cuda_host.h"

namespace mnet::host {

inline void finish_copy(const AsyncCopy& copy) {
  if (copy.from != nullptr) std::memcpy(copy.to, copy.from, 16);
  if (copy.from == nullptr) std::memset(copy.to, 0, 16);
}

// A target is undefined from the copy's issue until it is waited for: NaN here, the data move as late as they may.  Where
// warps run ahead, every other copy is done at once instead: whoever still uses the target writes over the data.
inline void copy_async(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    throw std::runtime_error("an asynchronous copy is not aligned to 16 bytes");
  }
  const AsyncCopy copy{to, from};
  if (schedule == Schedule::kRandomWarps && block.random() % 2 == 0) return finish_copy(copy);
  std::memset(to, 0xff, 16);
  block.running->copies.push_back(copy);
}
inline void commit_copies() { block.running->groups.push_back(block.running->copies.size()); }
inline void wait_for_copies(size_t pending_groups) {
  Fiber& self = *block.running;
  if (self.groups.size() <= pending_groups) return;
  const size_t finished = self.groups.size() - pending_groups, count = self.groups[finished - 1];
  for (size_t i = 0; i < count; ++i) finish_copy(self.copies[i]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + count);
  self.groups.erase(self.groups.begin(), self.groups.begin() + finished);
  for (size_t& end : self.groups) end -= count;
}

struct MmaLane {
  const uint32_t* a;
  const uint32_t* b;
  float* c;
};

// Value `i` of a 32-bit word: of its two, or the one tf32, of which the hardware reads 19 bits.
template <typename T>
float word_value(uint32_t word, int i) {
  if constexpr (sizeof(T) == 4) {
    word &= ~0x1fffu;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  } else {
    const auto half = static_cast<uint16_t>(word >> 16 * i);
    T value;
    std::memcpy(static_cast<void*>(&value), &half, 2);
    return static_cast<float>(value);
  }
}

template <typename T>
void complete_mma(Exchange* const* lanes) {
  constexpr int kPerWord = 4 / sizeof(T), kDepth = 8 * kPerWord;
  float a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* from = static_cast<const MmaLane*>(lanes[lane]->in);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kPerWord; ++i) {
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][(t + r / 2 * 4) * kPerWord + i] = word_value<T>(from->a[r], i);
      for (int r = 0; r < 2; ++r) b[g][(t + r * 4) * kPerWord + i] = word_value<T>(from->b[r], i);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* c = static_cast<const MmaLane*>(lanes[lane]->in)->c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0.f;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[column][k];
      c[i] += sum;
    }
  }
}

template <bool kTransposed>
void complete_ldmatrix(Exchange* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* to = static_cast<uint32_t*>(lanes[lane]->out);
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int h = 0; h < 2; ++h) {
        const int row = kTransposed ? lane % 4 * 2 + h : lane / 4, column = kTransposed ? lane / 4 : lane % 4 * 2 + h;
        pair[h] = static_cast<const uint16_t*>(lanes[8 * i + row]->in)[column];
      }
      std::memcpy(&to[i], pair, 4);
    }
  }
}

}  // namespace mnet::host

namespace mnet::cuda {

inline void cp_async16(void* to, const void* from, bool exists) { host::copy_async(to, exists ? from : nullptr); }
inline void cp_async_commit() { host::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  host::wait_for_copies(kPending);
}

template <bool kTransposed>
void ldmatrix_x4(uint32_t (&r)[4], const void* row, MNET_HERE) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) throw std::runtime_error("a row of ldmatrix is not aligned");
  uint16_t own[8];  // read by the lane itself, when it says so
  std::memcpy(own, row, 16);
  host::collective(&host::complete_ldmatrix<kTransposed>, own, r, {file, line});
}

// Ties away from zero.
inline uint32_t to_tf32(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu; }

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MNET_HERE) {
  const host::MmaLane lane{a, b, c};
  host::collective(&host::complete_mma<T>, &lane, nullptr, {file, line});
}

}  // namespace mnet::cuda
