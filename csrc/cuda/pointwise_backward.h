// Launcher of the CUDA pointwise convolution's backward: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/pointwise_params.h"
#include "tiles.h"

namespace mnet::cuda {

struct PointwiseBackwardTiles {
  Tile input;   // of kPointwiseInputGradient
  Tile weight;  // of kPointwiseWeightGradient
  Tile both;    // of kPointwiseBothGradients
};

// Bytes of workspace `pointwise_backward` needs, aligned to 16 bytes.
int64_t pointwise_backward_workspace(const PointwiseBackwardParams& params, Dtype dtype, const PointwiseBackwardTiles& tiles);

// Enqueues the kernels on `stream`; the first error, if any.  float32 is rounded to tf32 where `tf32`.  An empty batch
// writes sums and a weight gradient of zero.
cudaError_t pointwise_backward(const PointwiseBackwardParams& params, Dtype dtype, const PointwiseBackwardTiles& tiles,
                               bool tf32, void* workspace, cudaStream_t stream);

}  // namespace mnet::cuda
