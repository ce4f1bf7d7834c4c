#include "expand_finalize.h"

#include "expand_finalize.cuh"
#include "launch.h"

namespace mnet::cuda {

cudaError_t expand_finalize(const ExpandFinalizeParams& p, Dtype dtype, cudaStream_t stream) {
  return with_storage(dtype, [&](auto zero) {
    const auto blocks = static_cast<unsigned>(divide_up(p.e, ExpandFinalizeTraits::kWarps));
    MNET_LAUNCH(expand_finalize_kernel<decltype(zero)>, blocks, ExpandFinalizeTraits::kThreads, stream, p);
    return launch_status();
  });
}

}  // namespace mnet::cuda
