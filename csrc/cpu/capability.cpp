#include "capability.h"

#include <cstdlib>
#include <cstring>

namespace mnet::cpu {

Capability supported_capability() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Capability::kAvx512Bf16;
  return avx512 ? Capability::kAvx512 : avx2 ? Capability::kAvx2 : Capability::kDefault;
#else
  return Capability::kDefault;
#endif
}

static Capability decide() {
  const Capability best = supported_capability();
  const char* wish = std::getenv("MNET_CPU_CAPABILITY");
  if (wish == nullptr) return best;
  Capability wanted = best;
  if (std::strcmp(wish, "default") == 0) wanted = Capability::kDefault;
  if (std::strcmp(wish, "avx2") == 0) wanted = Capability::kAvx2;
  if (std::strcmp(wish, "avx512") == 0) wanted = Capability::kAvx512;
  return wanted < best ? wanted : best;
}

Capability capability() {
  static const Capability decided = decide();
  return decided;
}

const char* capability_name(Capability capability) {
  switch (capability) {
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
