"""The CPU pointwise stages against torch's own products, at the shapes of MobileNetV2 (batch 16), on one thread.

    python bench/cpu_gemm.py [--dtype float32 bfloat16] [--seconds 0.3]

For every shape, milliseconds and GFLOP/s of: torch's batch norm, ReLU6 and convolution, and their backward (what the
stages replace, but that they take the statistics of the map after, not before, the convolution); torch.mm, F.conv2d,
the stage as a bare product, the stage with its batch norm, activation and moments; and of the backward: two torch.mm
(dgrad, wgrad) and the stage with everything.  The variants of a shape take turns; times are the thread's own CPU time,
so that other processes cost little, and the lower quartile of them.  The peak is measured by a loop of fused
multiply-adds, compiled on the spot where there is AVX2.
glibc gives large tensors back to the system after every call; to leave the page faults out, set
GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592.
"""

import argparse
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import mnet_kernels  # noqa: F401  (registers the stages)

# input channels, output channels, height = width
SHAPES = [
    (16, 96, 112),
    (96, 24, 56),
    (24, 144, 56),
    (144, 24, 56),
    (64, 384, 14),
    (384, 64, 14),
    (160, 960, 7),
    (960, 160, 7),
    (320, 1280, 7),
]
PEAK = r"""
#include <immintrin.h>
#include <stdio.h>
#include <time.h>
int main(void) {
  double best = 0;
  for (int repeat = 0; repeat < 20; ++repeat) {
    __m256 a[12], m = _mm256_set1_ps(0.999f), c = _mm256_set1_ps(0.1f);
    for (int i = 0; i < 12; ++i) a[i] = _mm256_set1_ps(i);
    struct timespec s, e;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &s);
    for (long k = 0; k < 2000000; ++k) {
      _Pragma("GCC unroll 12") for (int i = 0; i < 12; ++i) a[i] = _mm256_fmadd_ps(a[i], m, c);
      __asm__ volatile("" ::"x"(a[0]));
    }
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &e);
    double rate = 2000000 * 12 * 16 / ((e.tv_sec - s.tv_sec) * 1e9 + (e.tv_nsec - s.tv_nsec)), sum = 0;
    for (int i = 0; i < 12; ++i) sum += a[i][0];
    if (rate > best && sum == sum) best = rate;
  }
  printf("%.1f\n", best);
  return 0;
}
"""


def peak():
    """GFLOP/s of 256-bit fused multiply-adds on one core, or None."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "peak.c"), Path(folder, "peak")
        source.write_text(PEAK)
        done = subprocess.run([compiler, "-O2", "-mavx2", "-mfma", source, "-o", program], capture_output=True)
        if done.returncode:
            return None
        ran = subprocess.run([program], capture_output=True, text=True)
    return float(ran.stdout) if ran.returncode == 0 else None


def measure(functions, seconds):
    """Lower quartile of each function's times, in seconds; the functions take turns."""
    times = [[] for _ in functions]
    for f in functions:
        f()
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(times[0]) < 5:
        for f, t in zip(functions, times, strict=True):
            start = time.thread_time()
            f()
            t.append(time.thread_time() - start)
    return [sorted(t)[len(t) // 4] for t in times]


def variants(c, e, size, dtype, batch=16):
    """{name: (function, multiply-adds in units of the product's)} of one shape."""

    def map_(channels):
        return torch.randn(batch, channels, size, size).to(dtype).contiguous(memory_format=torch.channels_last)

    def matrix(t):
        return t.permute(0, 2, 3, 1).flatten(0, 2)

    stages = torch.ops.mnet_cpu
    x, grad, weight = map_(c), map_(e), (torch.randn(e, c, 1, 1) / c**0.5).to(dtype)
    bn, y_bn, coef = torch.rand(5, c), torch.rand(5, e), 0.1 * torch.randn(2, e)
    flat = weight.flatten(1)
    y, _ = stages.pointwise(x, weight, bn, 2, None, True)

    def backward(dx, dw):
        return stages.pointwise_backward(grad, y, y_bn, coef, 0, None, x, weight, bn, 2, None, None, dx, dx, dw)

    ones, zeros = torch.ones(c), torch.zeros(c)
    wx, ww, wg, wb = (t.clone().requires_grad_() for t in (x, weight, ones, zeros))

    def native(x, weight, gamma, beta):
        return F.conv2d(F.relu6(F.batch_norm(x, None, None, gamma, beta, True)), weight)

    graph = native(wx, ww, wg, wb)

    def native_backward():
        return torch.autograd.grad(graph, (wx, ww, wg, wb), grad, retain_graph=True)

    return {
        "native": (lambda: native(x, weight, ones, zeros), 1),
        "native backward": (native_backward, 2),
        "mm": (lambda: matrix(x) @ flat.t(), 1),
        "conv2d": (lambda: F.conv2d(x, weight), 1),
        "bare": (lambda: stages.pointwise(x, weight, None, 0, None, False), 1),
        "pointwise": (lambda: stages.pointwise(x, weight, bn, 2, None, True), 1),
        "2 mm": (lambda: (matrix(grad) @ flat, matrix(grad).t() @ matrix(x)), 2),
        "backward": (lambda: backward(True, True), 2),
        "dx only": (lambda: backward(True, False), 1),
        "dw only": (lambda: backward(False, True), 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each variant of a shape")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"peak {peak()} GFLOP/s; each entry: ms (GFLOP/s)")
    for dtype in options.dtype:
        for c, e, size in SHAPES:
            found = variants(c, e, size, getattr(torch, dtype))
            times = measure([f for f, _ in found.values()], options.seconds)
            flops = 2e-9 * 16 * size * size * c * e
            row = ((name, t, flops * n / t) for (name, (_, n)), t in zip(found.items(), times, strict=True))
            print(
                f"{dtype} {c}->{e} {size}x{size}:",
                ", ".join(f"{n} {t * 1e3:.2f} ({r:.0f})" for n, t, r in row),
                flush=True,
            )


if __name__ == "__main__":
    main()
