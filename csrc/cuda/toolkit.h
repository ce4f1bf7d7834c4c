// What nvcc knew when the CUDA kernels were compiled.
#pragma once

#include <string>
#include <vector>

namespace mnet::cuda {

std::string toolkit_version();               // "13.0"
std::vector<int> compiled_architectures();   // {800, 900}

}  // namespace mnet::cuda
