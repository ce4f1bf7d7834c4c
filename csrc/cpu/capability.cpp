#include "capability.h"

#include <cstdlib>
#include <cstring>

#if defined(MNET_BUILD_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mnet::cpu {

#if defined(MNET_BUILD_AMX)
// The processor has it, the system saves its registers, and this process may use it (which it must ask for).
static bool may_use_amx() {
#if defined(MNET_AMX_EMULATED)
  return true;
#else
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kOsXsave = 1u << 27;
  constexpr unsigned kTileState = 3u << 17;  // configuration and data, of XCR0
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsXsave) == 0) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

Capability supported_capability() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(MNET_BUILD_AMX)
  static const bool amx = may_use_amx();
  if (bf16 && amx) return Capability::kAmx;
#endif
  if (bf16) return Capability::kAvx512Bf16;
  return avx512 ? Capability::kAvx512 : avx2 ? Capability::kAvx2 : Capability::kDefault;
#else
  return Capability::kDefault;
#endif
}

// Intel's cores multiply pairs of bfloat16 in vectors at half the rate of float32's: on an Emerald Rapids V2's 1x1 layers at
// 14x14 and 7x7 run at 70 to 85 GFLOP/s with them and at 110 to 165 without (bench/cpu_gemm.py --dtype bfloat16).
static bool pairs_are_slow() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

static Capability decide() {
  const Capability best = supported_capability();
  const char* wish = std::getenv("MNET_CPU_CAPABILITY");
  if (wish == nullptr) return best == Capability::kAvx512Bf16 && pairs_are_slow() ? Capability::kAvx512 : best;
  Capability wanted = best;
  if (std::strcmp(wish, "default") == 0) wanted = Capability::kDefault;
  if (std::strcmp(wish, "avx2") == 0) wanted = Capability::kAvx2;
  if (std::strcmp(wish, "avx512") == 0) wanted = Capability::kAvx512;
  if (std::strcmp(wish, "avx512bf16") == 0) wanted = Capability::kAvx512Bf16;
  return wanted < best ? wanted : best;
}

Capability capability() {
  static const Capability decided = decide();
  return decided;
}

const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::kAmx:
      return "AMX";
    case Capability::kAvx512Bf16:
      return "AVX512BF16";
    case Capability::kAvx512:
      return "AVX512";
    case Capability::kAvx2:
      return "AVX2";
    default:
      return "DEFAULT";
  }
}

}  // namespace mnet::cpu
