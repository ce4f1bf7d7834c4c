// Launchers of normalize, normalize_backward and squeeze in CUDA: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/params.h"
#include "tiles.h"

namespace mnet::cuda {

// Floats of workspace that the two reductions need.  Their tiles are of kNormalizeSums.
int64_t normalize_backward_workspace(const NormalizeParams& params, Dtype dtype, const Tile& tile);
int64_t squeeze_workspace(const NormalizeParams& params, Dtype dtype, const Tile& tile);

// Each enqueues its kernels on `stream`; the first error, if any.  An empty batch has sums of zero.
cudaError_t normalize(const NormalizeParams& params, Dtype dtype, const Tile& tile, cudaStream_t stream);
cudaError_t normalize_backward(const NormalizeParams& params, Dtype dtype, const Tile& tile, float* workspace,
                               cudaStream_t stream);
cudaError_t squeeze(const NormalizeParams& params, Dtype dtype, const Tile& tile, float* workspace, cudaStream_t stream);

}  // namespace mnet::cuda
