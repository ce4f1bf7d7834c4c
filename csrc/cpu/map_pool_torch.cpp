// The pool as an allocator of torch's.
#include <c10/core/CPUAllocator.h>

#include "../maps.h"
#include "map_pool.h"

namespace mnet::cpu {

namespace {

struct MapAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes < kSmallestInPool ? nullptr : pool_allocate(bytes);
    if (data == nullptr) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    return {data, data, &pool_free, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* dest, const void* src, std::size_t count) const override { default_copy_data(dest, src, count); }
};

}  // namespace

c10::Allocator* map_allocator() {
  static MapAllocator* const instance = new MapAllocator;  // outlives every map
  return instance;
}

}  // namespace mnet::cpu
