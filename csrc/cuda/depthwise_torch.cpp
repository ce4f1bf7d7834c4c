// mnet_cuda::depthwise: checks, allocates, launches on torch's current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../depthwise_checks.h"
#include "check_device.h"
#include "depthwise.h"

namespace mnet::cuda {

static std::tuple<at::Tensor, at::Tensor> depthwise_op(const at::Tensor& x, const at::Tensor& weight,
                                                       const std::optional<at::Tensor>& bn, int64_t act,
                                                       int64_t stride, bool moments) {
  const c10::cuda::CUDAGuard guard(x.device());
  const int architecture = check_device("depthwise", x.device());
  const DepthwiseCall call = prepare_depthwise(x, weight, bn, act, stride, moments);
  const Tile tile = choose_tile(Kernel::kDepthwise, call.dtype, call.params.c, architecture);
  const int64_t floats = depthwise_workspace(call.params, call.dtype, tile);
  const at::Tensor workspace = at::empty({floats}, x.options().dtype(at::kFloat));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch("depthwise", depthwise(call.params, call.dtype, tile, workspace.mutable_data_ptr<float>(), stream));
  return {call.y, call.moments};
}

}  // namespace mnet::cuda

TORCH_LIBRARY_IMPL(mnet_cuda, CUDA, m) { m.impl("depthwise", &mnet::cuda::depthwise_op); }
