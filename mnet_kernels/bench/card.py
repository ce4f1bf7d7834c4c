"""What the device itself can do: the rates that kernels are held against."""

import time

import torch
import torch.nn.functional as F

from ..cost import Device
from . import statistics, timing

# copied bytes (read and written), side of the square matrices
SIZES = {"cuda": (4 << 30, 8192), "cpu": (256 << 20, 1024)}
REHEARSAL = (1 << 20, 128)  # no measurement: for tests of what uses the rates
# name of a matrix rate -> storage dtype, whether TF32 is allowed
MATRIX = {"bf16": (torch.bfloat16, False), "fp16": (torch.float16, False), "tf32": (torch.float32, True)}
MATRIX["fp32"] = (torch.float32, False)


def _median_ms(calls, device, seconds, now):
    samples = timing.interleave(calls, device, seconds=seconds, min_rounds=5, max_rounds=30, warmup=1, now=now)
    return {name: statistics.quantiles(found)[1] for name, found in samples.items()}


def copy_bandwidth(device, seconds=1.0, count=None, now=time.perf_counter_ns):
    """Bytes per second of a large copy on the device, read and written bytes both counted."""
    count = count or SIZES[device.type][0]
    source = torch.randint(0, 255, (count // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return count / (_median_ms({"copy": lambda: target.copy_(source)}, device, seconds, now)["copy"] * 1e-3)


def matrix_rates(device, seconds=1.0, n=None, names=("bf16", "tf32", "fp32"), now=time.perf_counter_ns):
    """Operations per second of a large product of random matrices, by name of :data:`MATRIX` (tf32: cards only).

    The faster of torch.mm and the same product as a 1x1 convolution: on the CPU they come from different libraries.
    """
    n, rates = n or SIZES[device.type][1], {}
    for name in names:
        dtype, tf32 = MATRIX[name]
        if tf32 and device.type != "cuda":
            continue
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        image, weight = a.reshape(1, n, 1, n).contiguous(memory_format=torch.channels_last), b.reshape(n, n, 1, 1)
        calls = {
            "mm": lambda a=a, b=b: torch.mm(a, b),
            "conv": lambda x=image, w=weight: F.conv2d(x, w),
        }
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        try:
            rates[name] = 2 * n**3 / (min(_median_ms(calls, device, seconds, now).values()) * 1e-3)
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    return rates


def rates(device, seconds=1.0, sizes=None, names=("bf16", "tf32", "fp32"), now=time.perf_counter_ns):
    """Both, as one dict of plain values; ``sizes`` in the place of the device's :data:`SIZES`, ``now`` as in
    :mod:`timing`."""
    count, n = sizes or SIZES[device.type]
    return {
        "copy_bytes_per_s": copy_bandwidth(device, seconds, count, now),
        "matrix_flops": matrix_rates(device, seconds, n, names, now),
    }


def peaks(card, amp):
    """The rates as the cost model's :class:`~mnet_kernels.cost.Device`; what vector units can do was not measured."""
    found = card["matrix_flops"]
    matrix = found.get(amp if amp != "off" else "tf32", found.get("bf16" if amp != "off" else "fp32"))
    return Device(card["copy_bytes_per_s"], matrix, float("inf"))


def floor_ms(card, bytes_, flops, amp):
    """The least time for that many bytes and operations, by the measured rates."""
    peak = peaks(card, amp)
    return 1e3 * max(bytes_ / peak.bandwidth, flops / peak.tensor)
