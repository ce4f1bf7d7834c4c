// mnet_cuda::pointwise: checks, allocates, launches on torch's current stream.
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../pointwise_checks.h"
#include "check_device.h"
#include "pointwise.h"

namespace mnet::cuda {

static std::tuple<at::Tensor, at::Tensor> pointwise_op(const at::Tensor& x, const at::Tensor& weight,
                                                       const std::optional<at::Tensor>& bn, int64_t act,
                                                       const std::optional<at::Tensor>& gate, bool moments) {
  const c10::cuda::CUDAGuard guard(x.device());
  const int architecture = check_device("pointwise", x.device());
  const PointwiseCall call = prepare_pointwise(x, weight, bn, act, gate, moments);
  const Tile tile = choose_tile(Kernel::kPointwise, call.dtype, call.params.e, architecture);
  const bool tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);  // as torch's convolution asks
  const at::Tensor workspace = at::empty({pointwise_workspace(call.params, call.dtype, tile)}, x.options().dtype(at::kByte));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch("pointwise", pointwise(call.params, call.dtype, tile, tf32, workspace.mutable_data_ptr(), stream));
  return {call.y, call.moments};
}

}  // namespace mnet::cuda

TORCH_LIBRARY_IMPL(mnet_cuda, CUDA, m) { m.impl("pointwise", &mnet::cuda::pointwise_op); }
