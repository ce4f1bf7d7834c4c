// From tensors to DepthwiseParams: the checks and allocations both launchers share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <limits>
#include <optional>

#include "common/params.h"
#include "maps.h"

namespace mnet {

inline Dtype storage_dtype(const char* op, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK(false, op, ": x has dtype ", x.scalar_type(), ", expected float32, bfloat16 or float16; ",
                  "float64 runs on the reference backend");
  }
}

// The weight of a depthwise convolution of c channels in x's dtype.
inline void check_depthwise_weight(const char* op, const at::Tensor& weight, int64_t c, const at::Tensor& x) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == c && weight.size(1) == 1 && weight.size(2) == weight.size(3) &&
                  (weight.size(2) == 3 || weight.size(2) == 5),
              op, ": weight has shape ", weight.sizes(), ", expected [", c, ", 1, k, k] with k 3 or 5");
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), op, ": weight has dtype ", weight.scalar_type(),
              ", expected x's ", x.scalar_type(), "; cast it (weight.to(x.dtype))");
  TORCH_CHECK(weight.device() == x.device(), op, ": weight is on ", weight.device(), ", expected x's ", x.device());
}

// What DepthwiseParams and DepthwiseBackwardParams share; x [n, *, h, w] has the size of the convolution's input.
template <typename Params>
void set_depthwise_geometry(Params& p, const at::Tensor& x, const at::Tensor& weight, int64_t act, int64_t stride) {
  p.weight = weight.const_data_ptr();
  p.weight_stride_c = weight.stride(0);
  p.weight_stride_h = weight.stride(2);
  p.weight_stride_w = weight.stride(3);
  p.n = x.size(0);
  p.c = static_cast<int32_t>(weight.size(0));
  p.h = static_cast<int32_t>(x.size(2));
  p.w = static_cast<int32_t>(x.size(3));
  p.out_h = static_cast<int32_t>((x.size(2) - 1) / stride + 1);
  p.out_w = static_cast<int32_t>((x.size(3) - 1) / stride + 1);
  p.kernel = static_cast<int32_t>(weight.size(2));
  p.stride = static_cast<int32_t>(stride);
  p.act = static_cast<Activation>(act);
}

struct DepthwiseCall {
  at::Tensor y;
  at::Tensor moments;
  DepthwiseParams params;
  Dtype dtype;
};

// Checks the arguments of `depthwise` and allocates its outputs as mnet_kernels.schema's fake does.
inline DepthwiseCall prepare_depthwise(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bn,
                                       int64_t act, int64_t stride, bool moments) {
  TORCH_CHECK(x.dim() == 4, "depthwise: x has shape ", x.sizes(), ", expected [N, C, H, W]");
  const Dtype dtype = storage_dtype("depthwise", x);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  TORCH_CHECK(c > 0 && h > 0 && w > 0, "depthwise: x has shape ", x.sizes(), ", expected C, H and W of at least 1");
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max() / 4;
  TORCH_CHECK(c <= kMaxSize && h <= kMaxSize && w <= kMaxSize, "depthwise: x has shape ", x.sizes(),
              ", expected C, H and W of at most ", kMaxSize);
  TORCH_CHECK(x.is_contiguous(at::MemoryFormat::ChannelsLast), "depthwise: x has shape ", x.sizes(), " and strides ",
              x.strides(), ", expected channels_last memory; call x.contiguous(memory_format=torch.channels_last)");

  check_depthwise_weight("depthwise", weight, c, x);

  TORCH_CHECK(stride == 1 || stride == 2, "depthwise: stride is ", stride, ", expected 1 or 2");
  TORCH_CHECK(act >= 0 && act < kNumActivations, "depthwise: act is ", act, ", expected an index from 0 to ",
              kNumActivations - 1, " into mnet_kernels.schema.ACTIVATIONS");
  if (bn.has_value()) {
    TORCH_CHECK(bn->dim() == 2 && bn->size(0) == 5 && bn->size(1) == c, "depthwise: bn has shape ", bn->sizes(),
                ", expected [5, ", c, "], the output of finalize");
    TORCH_CHECK(bn->scalar_type() == at::kFloat, "depthwise: bn has dtype ", bn->scalar_type(), ", expected float32");
    TORCH_CHECK(bn->is_contiguous(), "depthwise: bn has strides ", bn->strides(), ", expected contiguous rows");
    TORCH_CHECK(bn->device() == x.device(), "depthwise: bn is on ", bn->device(), ", expected x's ", x.device());
  } else {
    TORCH_CHECK(act == 0, "depthwise: act is ", act, " without bn, expected 0 (identity): the activation belongs to ",
                "the batch norm of x; pass bn");
  }

  DepthwiseCall call{};
  const int64_t out_h = (h - 1) / stride + 1, out_w = (w - 1) / stride + 1;
  call.y = empty_map({n, c, out_h, out_w}, x);
  const auto statistics = x.options().dtype(at::kFloat);
  call.moments = moments ? at::empty({2, c}, statistics) : at::empty({0}, statistics);
  call.dtype = dtype;

  DepthwiseParams& p = call.params;
  p.x = x.const_data_ptr();
  p.bn = bn.has_value() ? bn->const_data_ptr<float>() : nullptr;
  p.y = call.y.mutable_data_ptr();
  p.moments = moments ? call.moments.mutable_data_ptr<float>() : nullptr;
  set_depthwise_geometry(p, x, weight, act, stride);
  return call;
}

}  // namespace mnet
