// Launcher of the CUDA pointwise convolution: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/pointwise_params.h"
#include "tiles.h"

namespace mnet::cuda {

// Bytes of workspace `pointwise` needs, aligned to 16 bytes.
int64_t pointwise_workspace(const PointwiseParams& params, Dtype dtype, const Tile& tile);

// Enqueues the kernels on `stream`; the first error, if any.  float32 is rounded to tf32 where `tf32`.  An empty batch
// writes moments of zero.
cudaError_t pointwise(const PointwiseParams& params, Dtype dtype, const Tile& tile, bool tf32, void* workspace,
                      cudaStream_t stream);

}  // namespace mnet::cuda
