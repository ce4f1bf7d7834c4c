"""The tables between stages: moments to bn, sums to coef, running statistics.

A kernel each although they are tiny: in torch ops ``finalize`` alone would be eight launches, and at small batches a
network's time is its launches.
"""

import torch
import triton
import triton.language as tl

from .launch import FIXED, check_shape, check_storage, device_of, table

_BLOCK = 256
_EXPANDED, _INPUTS = 8, 32  # of expand_finalize: channels of its output, and of the gram at a time


@triton.jit
def store_bn(
    out, gamma, beta, mean, var, eps, count, c, valid, channels, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr
):
    """bn [5, C] from mean and biased variance."""
    # compiled graphs pass Python floats as float64
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + tl.cast(eps, tl.float32)))
    scale = rstd
    if HAS_GAMMA:
        scale *= tl.load(gamma + c, mask=valid, other=0.0)
    shift = -mean * scale
    if HAS_BETA:
        shift += tl.load(beta + c, mask=valid, other=0.0)
    n = tl.cast(count, tl.float32)
    unbiased = var * tl.div_rn(n, tl.cast(tl.maximum(count - 1, 1), tl.float32))
    tl.store(out + c, scale, mask=valid)
    tl.store(out + channels + c, shift, mask=valid)
    tl.store(out + 2 * channels + c, mean, mask=valid)
    tl.store(out + 3 * channels + c, rstd, mask=valid)
    tl.store(out + 4 * channels + c, unbiased, mask=valid)


@triton.jit(do_not_specialize=["eps", "count", "channels"])
def finalize_kernel(
    moments, gamma, beta, out, eps, count, channels, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """moments [2, C] -> bn [5, C]"""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = c < channels
    mean = tl.load(moments + c, mask=valid, other=0.0)
    var = tl.load(moments + channels + c, mask=valid, other=0.0)
    store_bn(out, gamma, beta, mean, var, eps, count, c, valid, channels, HAS_GAMMA, HAS_BETA)


@triton.jit(do_not_specialize=["eps", "count", "channels", "inputs"])
def expand_finalize_kernel(
    gram, weight, gamma, beta, out, out_mean, eps, count, inputs, channels, HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gram [C + 2, C], weight [E, C] -> bn [5, E] of W (x - k), mean [E] of W x; sums in float64.

    A product of a million terms at most, one column of the weight after another: what it costs is its launch.
    """
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_e = e < channels
    var = tl.zeros((BLOCK, BLOCK_C), tl.float64)
    mean_k, mean = var, var
    for start in range(0, inputs, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        in_c = c < inputs
        wide = tl.zeros((BLOCK, BLOCK_C), tl.float64)
        for k in range(0, inputs):
            w = tl.load(weight + e * inputs + k, mask=in_e, other=0.0).to(tl.float64)
            covariance = tl.load(gram + k * inputs + c, mask=in_c, other=0.0).to(tl.float64)
            wide += w[:, None] * covariance[None, :]
        at = e[:, None] * inputs + c[None, :]
        w = tl.load(weight + at, mask=in_e[:, None] & in_c[None, :], other=0.0).to(tl.float64)
        of_x = tl.load(gram + inputs * inputs + c, mask=in_c, other=0.0).to(tl.float64)
        shift = tl.load(gram + (inputs + 1) * inputs + c, mask=in_c, other=0.0).to(tl.float64)
        var += w * wide
        mean_k += w * (of_x - shift)[None, :]
        mean += w * of_x[None, :]
    var, mean_k = tl.sum(var, 1), tl.sum(mean_k, 1).to(tl.float32)
    var = tl.where(var < 0.0, 0.0, var).to(tl.float32)
    store_bn(out, gamma, beta, mean_k, var, eps, count, e, in_e, channels, HAS_GAMMA, HAS_BETA)
    tl.store(out_mean + e, tl.sum(mean, 1).to(tl.float32), mask=in_e)


@triton.jit(do_not_specialize=["count", "channels"])
def finalize_backward_kernel(
    sums, bn, out, dgamma, dbeta, count, channels, BATCH_STATS: tl.constexpr, BLOCK: tl.constexpr
):
    """sums [2, C], bn [5, C] -> coef [2, C], dgamma [C], dbeta [C]"""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = c < channels
    s = tl.load(sums + c, mask=valid, other=0.0)
    sy = tl.load(sums + channels + c, mask=valid, other=0.0)
    scale = tl.load(bn + c, mask=valid, other=0.0)
    rstd = tl.load(bn + 3 * channels + c, mask=valid, other=0.0)
    b, offset = s * 0.0, s * 0.0
    if BATCH_STATS:
        n = tl.cast(count, tl.float32)
        b = -scale * rstd * rstd * sy / n
        offset = -scale * s / n
    tl.store(out + c, b, mask=valid)
    tl.store(out + channels + c, offset, mask=valid)
    tl.store(dgamma + c, rstd * sy, mask=valid)
    tl.store(dbeta + c, s, mask=valid)


@triton.jit(do_not_specialize=["momentum", "channels"])
def update_running_stats_kernel(
    running_mean, running_var, batches, mean, var, momentum, channels, AVERAGE: tl.constexpr, BLOCK: tl.constexpr
):
    """running = (1 - m) running + m batch; AVERAGE: m = 1 / batches"""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = c < channels
    m = 1.0 / tl.load(batches).to(tl.float32) if AVERAGE else tl.cast(momentum, tl.float32)
    old = tl.load(running_mean + c, mask=valid, other=0.0).to(tl.float32)
    new = (1.0 - m) * old + m * tl.load(mean + c, mask=valid, other=0.0)
    tl.store(running_mean + c, new.to(running_mean.dtype.element_ty), mask=valid)
    old = tl.load(running_var + c, mask=valid, other=0.0).to(tl.float32)
    new = (1.0 - m) * old + m * tl.load(var + c, mask=valid, other=0.0)
    tl.store(running_var + c, new.to(running_var.dtype.element_ty), mask=valid)


def _grid(channels):
    return (triton.cdiv(channels, _BLOCK),)


def finalize(moments, gamma, beta, eps, count):
    """Launches ``finalize_kernel``: bn."""
    channels = moments.shape[-1]
    moments = table("moments", moments, (2, channels), moments)
    gamma, beta = table("gamma", gamma, (channels,), moments), table("beta", beta, (channels,), moments)
    out = moments.new_empty((5, channels))
    with device_of(moments):
        finalize_kernel[_grid(channels)](
            moments, gamma, beta, out, eps, count, channels,
            HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None, BLOCK=_BLOCK, num_warps=4, **FIXED,
        )  # fmt: skip
    return out


def expand_finalize(gram, weight, gamma, beta, eps, count):
    """Launches ``expand_finalize_kernel``: (bn, mean)."""
    inputs, channels = gram.shape[-1], weight.shape[0]
    gram = table("gram", gram, (inputs + 2, inputs), gram)
    check_storage("weight", weight)
    check_shape("weight", weight, (channels, inputs, 1, 1))
    if weight.device != gram.device:
        raise RuntimeError(f"weight is on {weight.device}; expected {gram.device}: move it")
    gamma, beta = table("gamma", gamma, (channels,), gram), table("beta", beta, (channels,), gram)
    out, mean = gram.new_empty((5, channels)), gram.new_empty(channels)
    with device_of(gram):
        expand_finalize_kernel[(triton.cdiv(channels, _EXPANDED),)](
            gram, weight.contiguous(), gamma, beta, out, mean, eps, count, inputs, channels,
            HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None, BLOCK=_EXPANDED, BLOCK_C=_INPUTS, num_warps=4,
            **FIXED,
        )  # fmt: skip
    return out, mean


def finalize_backward(sums, bn, count, batch_stats):
    """Launches ``finalize_backward_kernel``: (coef, dgamma, dbeta)."""
    channels = bn.shape[-1]
    sums, bn = table("sums", sums, (2, channels), bn), table("bn", bn, (5, channels), bn)
    out, dgamma, dbeta = sums.new_empty((2, channels)), sums.new_empty(channels), sums.new_empty(channels)
    with device_of(sums):
        finalize_backward_kernel[_grid(channels)](
            sums, bn, out, dgamma, dbeta, count, channels, BATCH_STATS=batch_stats, BLOCK=_BLOCK, num_warps=4, **FIXED
        )
    return out, dgamma, dbeta


def update_running_stats(running_mean, running_var, num_batches_tracked, mean, var, momentum):
    """Launches ``update_running_stats_kernel``, in place."""
    channels = mean.shape[0]
    mean, var = table("mean", mean, (channels,), mean), table("var", var, (channels,), mean)
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        check_shape(name, running, (channels,))
        if not running.is_contiguous() or running.device != mean.device:
            raise RuntimeError(
                f"{name} has strides {running.stride()} on {running.device}; expected contiguous, {mean.device}"
            )
    if num_batches_tracked is not None:
        # A torch op: within the kernel, other programs could read the count before or after it.
        num_batches_tracked.add_(1)
    elif momentum is None:
        raise RuntimeError("momentum is None without num_batches_tracked; expected one of them")
    with device_of(mean), torch.no_grad():
        update_running_stats_kernel[_grid(channels)](
            running_mean, running_var, num_batches_tracked, mean, var, 0.0 if momentum is None else momentum, channels,
            AVERAGE=momentum is None, BLOCK=_BLOCK, num_warps=4, **FIXED,
        )  # fmt: skip
