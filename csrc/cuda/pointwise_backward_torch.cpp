// mnet_cuda::pointwise_backward: checks, allocates, launches on torch's current stream.
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../pointwise_checks.h"
#include "check_device.h"
#include "pointwise_backward.h"

namespace mnet::cuda {

static std::tuple<at::Tensor, at::Tensor, at::Tensor> pointwise_backward_op(
    const std::optional<at::Tensor>& grad, const at::Tensor& y, const at::Tensor& y_bn, const at::Tensor& coef,
    int64_t y_act, const std::optional<at::Tensor>& offset, const at::Tensor& x, const at::Tensor& weight,
    const std::optional<at::Tensor>& bn, int64_t act, const std::optional<at::Tensor>& gate,
    const std::optional<at::Tensor>& residual, bool needs_dx, bool needs_sums, bool needs_dw) {
  const char* op = "pointwise_backward";
  const c10::cuda::CUDAGuard guard(x.device());
  const int architecture = check_device(op, x.device());
  const PointwiseBackwardCall call = prepare_pointwise_backward(grad, y, y_bn, coef, y_act, offset, x, weight, bn, act,
                                                                gate, residual, needs_dx, needs_sums, needs_dw);
  const PointwiseBackwardTiles tiles{
      choose_tile(Kernel::kPointwiseInputGradient, call.dtype, call.params.c, architecture),
      choose_tile(Kernel::kPointwiseWeightGradient, call.dtype, call.params.c, architecture),
      choose_tile(Kernel::kPointwiseBothGradients, call.dtype, call.params.c, architecture)};
  const bool tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);  // as torch's convolution asks
  const int64_t bytes = pointwise_backward_workspace(call.params, call.dtype, tiles);
  const at::Tensor workspace = at::empty({bytes}, x.options().dtype(at::kByte));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch(op, pointwise_backward(call.params, call.dtype, tiles, tf32, workspace.mutable_data_ptr(), stream));
  return {call.gx, call.sums, call.dw};
}

}  // namespace mnet::cuda

TORCH_LIBRARY_IMPL(mnet_cuda, CUDA, m) { m.impl("pointwise_backward", &mnet::cuda::pointwise_backward_op); }
