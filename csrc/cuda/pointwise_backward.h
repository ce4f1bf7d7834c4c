// Launcher of the CUDA pointwise convolution's backward: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/pointwise_params.h"

namespace mnet::cuda {

// Bytes of workspace `pointwise_backward` needs, aligned to 16 bytes.
int64_t pointwise_backward_workspace(const PointwiseBackwardParams& params, Dtype dtype);

// Enqueues the kernels on `stream`; the first error, if any.  float32 is rounded to tf32 where `tf32`.  An empty batch
// writes sums and a weight gradient of zero.
cudaError_t pointwise_backward(const PointwiseBackwardParams& params, Dtype dtype, bool tf32, void* workspace,
                               cudaStream_t stream);

}  // namespace mnet::cuda
