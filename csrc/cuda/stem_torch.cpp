// mnet_cuda::stem and stem_backward: check, allocate, launch on torch's current stream.
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../stem_checks.h"
#include "check_device.h"
#include "stem.h"

namespace mnet::cuda {

static std::tuple<at::Tensor, at::Tensor> stem_op(const at::Tensor& x, const at::Tensor& weight, int64_t stride,
                                                  bool moments) {
  const c10::cuda::CUDAGuard guard(x.device());
  const int architecture = check_device("stem", x.device());
  const StemCall call = prepare_stem(x, weight, stride, moments);
  const bool tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);  // as torch's convolution asks
  const Tile tile = choose_tile(Kernel::kStem, call.dtype, call.params.e, architecture);
  const at::Tensor workspace = at::empty({stem_workspace(call.params, tile)}, x.options().dtype(at::kFloat));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch("stem", stem(call.params, call.dtype, tile, tf32, workspace.mutable_data_ptr<float>(), stream));
  return {call.y, call.moments};
}

static std::tuple<at::Tensor, at::Tensor> stem_backward_op(const at::Tensor& grad, const at::Tensor& y,
                                                           const at::Tensor& y_bn, const at::Tensor& coef, int64_t y_act,
                                                           const at::Tensor& x, int64_t stride, bool needs_dy,
                                                           bool needs_dw) {
  const c10::cuda::CUDAGuard guard(x.device());
  const int architecture = check_device("stem_backward", x.device());
  const StemBackwardCall call = prepare_stem_backward(grad, y, y_bn, coef, y_act, x, stride, needs_dy, needs_dw);
  const bool tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
  const Tile tile = choose_tile(Kernel::kStemBackward, call.dtype, call.params.e, architecture);
  const at::Tensor workspace = at::empty({stem_backward_workspace(call.params, tile)}, x.options().dtype(at::kFloat));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch("stem_backward",
               stem_backward(call.params, call.dtype, tile, tf32, workspace.mutable_data_ptr<float>(), stream));
  return {call.dy, call.dw};
}

}  // namespace mnet::cuda

TORCH_LIBRARY_IMPL(mnet_cuda, CUDA, m) {
  m.impl("stem", &mnet::cuda::stem_op);
  m.impl("stem_backward", &mnet::cuda::stem_backward_op);
}
