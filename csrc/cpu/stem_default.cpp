// The stem's kernels with the instruction set the compiler assumes anyway (SSE2 on x86-64, NEON on aarch64).
#define MNET_CPU_NAMESPACE baseline
#define MNET_CPU_LANES 8
#include "stem_kernel.h"

#include "stem_backward_kernel.h"
