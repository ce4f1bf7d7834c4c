// Launchers of the CUDA stem and its backward: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/stem_params.h"
#include "tiles.h"

namespace mnet::cuda {

// Floats of workspace that each needs.  All dtypes deal alike.
int64_t stem_workspace(const StemParams& params, const Tile& tile);
int64_t stem_backward_workspace(const StemBackwardParams& params, const Tile& tile);

// Enqueue the kernels on `stream`; the first error, if any.  float32 is rounded to tf32 where `tf32`.  An empty batch
// writes moments and a weight gradient of zero.
cudaError_t stem(const StemParams& params, Dtype dtype, const Tile& tile, bool tf32, float* workspace, cudaStream_t stream);
cudaError_t stem_backward(const StemBackwardParams& params, Dtype dtype, const Tile& tile, bool tf32, float* workspace,
                          cudaStream_t stream);

}  // namespace mnet::cuda
