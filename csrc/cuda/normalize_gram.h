// Launcher of normalize with gram gathered as it writes: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/params.h"
#include "tiles.h"

namespace mnet::cuda {

// Bytes of workspace `normalize_gram` needs, aligned to 16 bytes.  The tile is gram's: both deal alike, and compute the same.
int64_t normalize_gram_workspace(const NormalizeParams& params, Dtype dtype, const Tile& tile);

// Enqueues the kernels on `stream`; the first error, if any.  params.table is the gram [c + 2, c] of the output, zeros
// without positions; c is at most kMaxGramChannels.
cudaError_t normalize_gram(const NormalizeParams& params, Dtype dtype, const Tile& tile, void* workspace, cudaStream_t stream);

}  // namespace mnet::cuda
