// Allocates the maps (activations and their gradients, channels_last) that stages return.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>

namespace mnet {

namespace cpu {

// malloc below map_pool.h's kSmallestInPool and where the pool has no room, else the pool.
c10::Allocator* map_allocator();

}  // namespace cpu

// An uninitialised map of the shape [N, C, H, W] given, with like's dtype and device.
inline at::Tensor empty_map(at::IntArrayRef shape, const at::Tensor& like) {
  if (!like.is_cpu()) return at::empty(shape, like.options().memory_format(at::MemoryFormat::ChannelsLast));
  return at::detail::empty_generic(shape, cpu::map_allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   like.scalar_type(), at::MemoryFormat::ChannelsLast);
}

}  // namespace mnet
