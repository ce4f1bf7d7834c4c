// Launcher of the CUDA depthwise convolution's backward: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/params.h"
#include "tiles.h"

namespace mnet::cuda {

// Floats of workspace for the blocks' parts of dW and of the sums.
int64_t depthwise_backward_workspace(const DepthwiseBackwardParams& params, Dtype dtype, const Tile& tile);

// Enqueues the kernels on `stream`; the first error, if any.  An empty batch has dW and sums of zero.
cudaError_t depthwise_backward(const DepthwiseBackwardParams& params, Dtype dtype, const Tile& tile, float* workspace,
                               cudaStream_t stream);

}  // namespace mnet::cuda
