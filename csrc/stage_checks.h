// Checks of tensors that stages share: maps (activations in channels_last memory) and float32 tables.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "common/params.h"
#include "depthwise_checks.h"

namespace mnet {

inline void check_activation(const char* op, const char* name, int64_t act) {
  TORCH_CHECK(act >= 0 && act < kNumActivations, op, ": ", name, " is ", act, ", expected an index from 0 to ",
              kNumActivations - 1, " into mnet_kernels.schema.ACTIVATIONS");
}

// A map of its own shape: [N, C, H, W], none of C, H, W zero, channels_last.
inline void check_map(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 4, op, ": ", name, " has shape ", t.sizes(), ", expected [N, C, H, W]");
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max() / 4;
  for (int64_t dim = 1; dim < 4; ++dim) {
    TORCH_CHECK(t.size(dim) > 0 && t.size(dim) <= kMaxSize, op, ": ", name, " has shape ", t.sizes(),
                ", expected C, H and W from 1 to ", kMaxSize);
  }
  TORCH_CHECK(t.is_contiguous(at::MemoryFormat::ChannelsLast), op, ": ", name, " has shape ", t.sizes(), " and strides ",
              t.strides(), ", expected channels_last memory; call ", name,
              ".contiguous(memory_format=torch.channels_last)");
}

// A map that goes with another one: its dtype and device, and the shape given.
inline void check_map_like(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef shape,
                           const char* other_name, const at::Tensor& other) {
  TORCH_CHECK(t.sizes() == shape, op, ": ", name, " has shape ", t.sizes(), ", expected ", shape, " to go with ",
              other_name, " of shape ", other.sizes());
  TORCH_CHECK(t.scalar_type() == other.scalar_type(), op, ": ", name, " has dtype ", t.scalar_type(), ", expected ",
              other_name, "'s ", other.scalar_type(), "; cast it (", name, ".to(", other_name, ".dtype))");
  TORCH_CHECK(t.device() == other.device(), op, ": ", name, " is on ", t.device(), ", expected ", other_name, "'s ",
              other.device());
  check_map(op, name, t);
}

// A contiguous float32 table of the shape given; returns its data.
inline const float* check_table(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef shape,
                                const at::Tensor& like) {
  TORCH_CHECK(t.sizes() == shape, op, ": ", name, " has shape ", t.sizes(), ", expected ", shape);
  TORCH_CHECK(t.scalar_type() == at::kFloat, op, ": ", name, " has dtype ", t.scalar_type(),
              ", expected float32; float64 runs on the reference backend");
  TORCH_CHECK(t.is_contiguous(), op, ": ", name, " has strides ", t.strides(), ", expected contiguous rows; call ", name,
              ".contiguous()");
  TORCH_CHECK(t.device() == like.device(), op, ": ", name, " is on ", t.device(), ", expected ", like.device());
  return t.const_data_ptr<float>();
}

inline const float* check_table(const char* op, const char* name, const std::optional<at::Tensor>& t,
                                at::IntArrayRef shape, const at::Tensor& like) {
  return t.has_value() ? check_table(op, name, *t, shape, like) : nullptr;
}

}  // namespace mnet
