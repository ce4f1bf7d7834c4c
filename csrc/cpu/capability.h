// Which instruction set the CPU kernels use, decided once at run time.
#pragma once

namespace mnet::cpu {

enum class Capability : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
constexpr int kNumCapabilities = 4;

// The best this processor can run.
Capability supported_capability();

// The one in use: the best, or less when MNET_CPU_CAPABILITY is "default", "avx2", "avx512" or "avx512bf16".
Capability capability();

// "DEFAULT", "AVX2" or "AVX512", the words torch.backends.cpu.get_cpu_capability() uses; or "AVX512BF16".
const char* capability_name(Capability capability);

}  // namespace mnet::cpu
