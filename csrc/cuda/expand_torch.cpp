// mnet_cuda's stages of algebraic mode (the forward ones): check, allocate, launch on torch's current stream.
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../expand_checks.h"
#include "check_device.h"
#include "expand_depthwise.h"
#include "expand_finalize.h"
#include "expand_gram.h"

namespace mnet::cuda {

static void check_width(const char* op, const at::Tensor& x, int64_t most) {
  TORCH_CHECK(x.dim() != 4 || x.size(1) <= most, op, ": x has ", x.size(1), " channels, expected at most ", most,
              " on the cuda backend; mode 'chain' takes any number");
}

static at::Tensor gram_op(const at::Tensor& x) {
  const c10::cuda::CUDAGuard guard(x.device());
  const int architecture = check_device("gram", x.device());
  check_width("gram", x, kMaxGramChannels);
  const GramCall call = prepare_gram(x);
  const Tile tile = choose_tile(Kernel::kGram, call.dtype, call.params.c, architecture);
  const at::Tensor workspace = at::empty({gram_workspace(call.params, call.dtype, tile)}, x.options().dtype(at::kByte));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch("gram", gram(call.params, call.dtype, tile, workspace.mutable_data_ptr(), stream));
  return call.gram;
}

static std::tuple<at::Tensor, at::Tensor> expand_finalize_op(const at::Tensor& gram, const at::Tensor& weight,
                                                             const std::optional<at::Tensor>& gamma,
                                                             const std::optional<at::Tensor>& beta, double eps,
                                                             int64_t count) {
  const c10::cuda::CUDAGuard guard(gram.device());
  check_device("expand_finalize", gram.device());
  const ExpandFinalizeCall call = prepare_expand_finalize(gram, weight, gamma, beta, eps, count);
  check_launch("expand_finalize", expand_finalize(call.params, call.dtype, c10::cuda::getCurrentCUDAStream().stream()));
  return {call.bn, call.mean};
}

static std::tuple<at::Tensor, at::Tensor> expand_depthwise_op(const at::Tensor& x, const at::Tensor& shift,
                                                              const at::Tensor& expand_weight, const at::Tensor& bn,
                                                              int64_t act, const at::Tensor& weight, int64_t stride,
                                                              bool moments) {
  constexpr auto kOp = "expand_depthwise";
  const c10::cuda::CUDAGuard guard(x.device());
  const int architecture = check_device(kOp, x.device());
  check_width(kOp, x, kMaxExpandSource);
  const ExpandDepthwiseCall call = prepare_expand_depthwise(x, shift, expand_weight, bn, act, weight, stride, moments);
  const Tile tile = choose_tile(Kernel::kExpandDepthwise, call.dtype, call.params.depthwise.c, architecture);
  const bool tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);  // as torch's convolution asks
  const int64_t bytes = expand_depthwise_workspace(call.params, call.dtype, tile);
  const at::Tensor workspace = at::empty({bytes}, x.options().dtype(at::kByte));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch(kOp, expand_depthwise(call.params, call.dtype, tile, tf32, workspace.mutable_data_ptr(), stream));
  return {call.y, call.moments};
}

}  // namespace mnet::cuda

TORCH_LIBRARY_IMPL(mnet_cuda, CUDA, m) {
  m.impl("gram", &mnet::cuda::gram_op);
  m.impl("expand_finalize", &mnet::cuda::expand_finalize_op);
  m.impl("expand_depthwise", &mnet::cuda::expand_depthwise_op);
}
