// mnet_cuda::normalize, normalize_gram, normalize_backward and squeeze: check, allocate, launch on torch's current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../normalize_checks.h"
#include "check_device.h"
#include "expand_gram.h"
#include "normalize.h"
#include "normalize_gram.h"

namespace mnet::cuda {

static at::Tensor normalize_op(const at::Tensor& y, const at::Tensor& bn, int64_t act,
                               const std::optional<at::Tensor>& residual) {
  const c10::cuda::CUDAGuard guard(y.device());
  const int architecture = check_device("normalize", y.device());
  const NormalizeCall call = prepare_normalize(y, bn, act, residual);
  const Tile tile = choose_tile(Kernel::kNormalize, call.dtype, call.params.c, architecture);
  check_launch("normalize", normalize(call.params, call.dtype, tile, c10::cuda::getCurrentCUDAStream().stream()));
  return call.result;
}

static std::tuple<at::Tensor, at::Tensor> normalize_gram_op(const at::Tensor& y, const at::Tensor& bn, int64_t act,
                                                            const std::optional<at::Tensor>& residual) {
  constexpr auto kOp = "normalize_gram";
  const c10::cuda::CUDAGuard guard(y.device());
  const int architecture = check_device(kOp, y.device());
  TORCH_CHECK(y.dim() != 4 || y.size(1) <= kMaxGramChannels, kOp, ": y has ", y.size(1), " channels, expected at most ",
              kMaxGramChannels, " on the cuda backend; normalize takes any number");
  const NormalizeCall call = prepare_normalize_gram(y, bn, act, residual);
  const Tile tile = choose_tile(Kernel::kGram, call.dtype, call.params.c, architecture);
  const int64_t bytes = normalize_gram_workspace(call.params, call.dtype, tile);
  const at::Tensor workspace = at::empty({bytes}, y.options().dtype(at::kByte));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch(kOp, normalize_gram(call.params, call.dtype, tile, workspace.mutable_data_ptr(), stream));
  return {call.result, call.gram};
}

static at::Tensor normalize_backward_op(const at::Tensor& grad, const at::Tensor& y, const at::Tensor& bn, int64_t act) {
  const c10::cuda::CUDAGuard guard(y.device());
  const int architecture = check_device("normalize_backward", y.device());
  const NormalizeCall call = prepare_normalize_backward(grad, y, bn, act);
  const Tile tile = choose_tile(Kernel::kNormalizeSums, call.dtype, call.params.c, architecture);
  const int64_t floats = normalize_backward_workspace(call.params, call.dtype, tile);
  const at::Tensor workspace = at::empty({floats}, y.options().dtype(at::kFloat));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch("normalize_backward",
               normalize_backward(call.params, call.dtype, tile, workspace.mutable_data_ptr<float>(), stream));
  return call.result;
}

static at::Tensor squeeze_op(const at::Tensor& y, const at::Tensor& bn, int64_t act) {
  const c10::cuda::CUDAGuard guard(y.device());
  const int architecture = check_device("squeeze", y.device());
  const NormalizeCall call = prepare_squeeze(y, bn, act);
  const Tile tile = choose_tile(Kernel::kNormalizeSums, call.dtype, call.params.c, architecture);
  const int64_t floats = squeeze_workspace(call.params, call.dtype, tile);
  const at::Tensor workspace = at::empty({floats}, y.options().dtype(at::kFloat));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch("squeeze", squeeze(call.params, call.dtype, tile, workspace.mutable_data_ptr<float>(), stream));
  return call.result;
}

}  // namespace mnet::cuda

TORCH_LIBRARY_IMPL(mnet_cuda, CUDA, m) {
  m.impl("normalize", &mnet::cuda::normalize_op);
  m.impl("normalize_gram", &mnet::cuda::normalize_gram_op);
  m.impl("normalize_backward", &mnet::cuda::normalize_backward_op);
  m.impl("squeeze", &mnet::cuda::squeeze_op);
}
