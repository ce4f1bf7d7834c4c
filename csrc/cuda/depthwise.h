// Launcher of the CUDA depthwise convolution: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/params.h"
#include "tiles.h"

namespace mnet::cuda {

// Floats of workspace `depthwise` needs when moments are wanted, none otherwise.
int64_t depthwise_workspace(const DepthwiseParams& params, Dtype dtype, const Tile& tile);

// Enqueues the kernels on `stream`; the first error, if any.  An empty batch writes moments of zero.
cudaError_t depthwise(const DepthwiseParams& params, Dtype dtype, const Tile& tile, float* workspace, cudaStream_t stream);

}  // namespace mnet::cuda
