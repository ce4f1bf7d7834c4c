#include "toolkit.h"

namespace mnet::cuda {

std::string toolkit_version() {
  return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
}

std::vector<int> compiled_architectures() { return {__CUDA_ARCH_LIST__}; }

}  // namespace mnet::cuda
