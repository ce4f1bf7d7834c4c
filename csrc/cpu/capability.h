// Which instruction set the CPU kernels use, decided once at run time.
#pragma once

// Compilers that know the instructions, on the system that lets a process use them (and that we know how to ask).
#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12))
#define MNET_BUILD_AMX 1
#endif

namespace mnet::cpu {

enum class Capability : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
constexpr int kNumCapabilities = 5;

// The best this processor can run.
Capability supported_capability();

// The one in use: the fastest, or the one that MNET_CPU_CAPABILITY names ("default", "avx2", "avx512", "avx512bf16" or
// "amx") as far as the processor goes.
Capability capability();

// "DEFAULT", "AVX2" or "AVX512", the words torch.backends.cpu.get_cpu_capability() uses; or "AVX512BF16" or "AMX".
const char* capability_name(Capability capability);

}  // namespace mnet::cpu
