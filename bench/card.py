"""What the device itself can do: the rates that kernels are held against."""

import torch

from mnet_kernels.bench import statistics, timing

# copied bytes, side of the square matrices; the CPU's are a rehearsal's
SIZES = {"cuda": (4 << 30, 8192), "cpu": (1 << 20, 128)}


def _median_ms(calls, device, seconds):
    samples = timing.interleave(calls, device, seconds=seconds, min_rounds=5, max_rounds=30)
    return {name: statistics.quantiles(found)[1] for name, found in samples.items()}


def copy_bandwidth(device, seconds=1.0):
    """Bytes per second of a large copy on the device, read and written bytes both counted."""
    count, _ = SIZES[device.type]
    source = torch.randint(0, 255, (count // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return count / (_median_ms({"copy": lambda: target.copy_(source)}, device, seconds)["copy"] * 1e-3)


def matrix_rates(device, seconds=1.0):
    """Operations per second of a large product of random matrices: bf16, tf32 (cards only), float32."""
    _, n = SIZES[device.type]
    rates = {}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        if name == "tf32" and device.type != "cuda":
            continue
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            call = {name: lambda a=a, b=b: torch.mm(a, b)}
            rates[name] = 2 * n**3 / (_median_ms(call, device, seconds)[name] * 1e-3)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    return rates


def rates(device, seconds=1.0):
    """Both, as one dict of plain values."""
    return {"copy_bytes_per_s": copy_bandwidth(device, seconds), "matrix_flops": matrix_rates(device, seconds)}


def floor_ms(card, bytes_, flops, amp):
    """The least time for that many bytes and operations, by the measured rates."""
    matrix = card["matrix_flops"].get("bf16" if amp != "off" else "tf32", card["matrix_flops"]["fp32"])
    return 1e3 * max(bytes_ / card["copy_bytes_per_s"], flops / matrix)
