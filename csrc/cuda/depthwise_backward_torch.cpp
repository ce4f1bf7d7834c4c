// mnet_cuda::depthwise_backward: checks, allocates, launches on torch's current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../depthwise_backward_checks.h"
#include "check_device.h"
#include "depthwise_backward.h"

namespace mnet::cuda {

static std::tuple<at::Tensor, at::Tensor, at::Tensor> depthwise_backward_op(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& y_bn, const at::Tensor& coef, int64_t y_act,
    const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& offset, const at::Tensor& x,
    const at::Tensor& weight, const std::optional<at::Tensor>& bn, int64_t act, int64_t stride,
    const std::optional<at::Tensor>& residual, bool needs_dx, bool needs_dw) {
  constexpr auto kOp = "depthwise_backward";
  const c10::cuda::CUDAGuard guard(x.device());
  const int architecture = check_device(kOp, x.device());
  const DepthwiseBackwardCall call = prepare_depthwise_backward(grad, y, y_bn, coef, y_act, gate, offset, x, weight, bn, act,
                                                                stride, residual, needs_dx, needs_dw);
  const Tile tile = choose_tile(Kernel::kDepthwiseBackward, call.dtype, call.params.c, architecture);
  const int64_t floats = depthwise_backward_workspace(call.params, call.dtype, tile);
  const at::Tensor workspace = at::empty({floats}, x.options().dtype(at::kFloat));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch(kOp, depthwise_backward(call.params, call.dtype, tile, workspace.mutable_data_ptr<float>(), stream));
  return {call.gx, call.sums, call.dw};
}

}  // namespace mnet::cuda

TORCH_LIBRARY_IMPL(mnet_cuda, CUDA, m) { m.impl("depthwise_backward", &mnet::cuda::depthwise_backward_op); }
