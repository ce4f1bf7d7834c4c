// The pool as an allocator of torch's.
#include <c10/core/CPUAllocator.h>

#include "../maps.h"
#include "map_pool.h"

namespace mnet::cpu {

namespace {

// torch's memory profiler is told as torch's own CPU allocator tells it, through the same books, so that its totals are of
// both.  Told are the bytes asked for, as there: a storage's size.  What rounds them up to the range is seldom touched.
// While no profiler is on this is a look at a thread-local.
void give_back(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);  // first: another thread may be handed this address at once
  pool_free(data);
}

struct MapAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes < kSmallestInPool ? nullptr : pool_allocate(bytes);
    if (data == nullptr) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* dest, const void* src, std::size_t count) const override { default_copy_data(dest, src, count); }
};

}  // namespace

c10::Allocator* map_allocator() {
  static MapAllocator* const instance = new MapAllocator;  // outlives every map
  return instance;
}

}  // namespace mnet::cpu
