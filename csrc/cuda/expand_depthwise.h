// Launcher of F1, the CUDA expand layer and depthwise convolution in one: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/expand_params.h"
#include "tiles.h"

namespace mnet::cuda {

constexpr int kMaxExpandSource = 64;  // channels of x that expand_depthwise takes

// Bytes of workspace `expand_depthwise` needs, aligned to 16 bytes.
int64_t expand_depthwise_workspace(const ExpandDepthwiseParams& params, Dtype dtype, const Tile& tile);

// Enqueues the kernels on `stream`; the first error, if any.  float32 is rounded to tf32 where `tf32`.  An empty batch
// writes moments of zero.
cudaError_t expand_depthwise(const ExpandDepthwiseParams& params, Dtype dtype, const Tile& tile, bool tf32, void* workspace,
                             cudaStream_t stream);

}  // namespace mnet::cuda
