// Launcher of CUDA's gram: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/expand_params.h"
#include "tiles.h"

namespace mnet::cuda {

constexpr int kMaxGramChannels = 64;

// Bytes of workspace `gram` needs, aligned to 16 bytes.
int64_t gram_workspace(const GramParams& params, Dtype dtype, const Tile& tile);

// Enqueues the kernels on `stream`; the first error, if any.  No positions give a table of zeros.
cudaError_t gram(const GramParams& params, Dtype dtype, const Tile& tile, void* workspace, cudaStream_t stream);

}  // namespace mnet::cuda
