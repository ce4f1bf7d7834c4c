// Launcher of CUDA's expand_finalize: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/expand_params.h"

namespace mnet::cuda {

// `dtype` is the weight's.
cudaError_t expand_finalize(const ExpandFinalizeParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace mnet::cuda
