"""The second half of every reduction: partial results of the programs, in a fixed order and in float64.

No atomics: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

from .device import rounded
from .launch import FIXED, device_of

_ROWS, _COLUMNS = 16, 64
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
GATE_RATIO = tl.constexpr(4.0)  # stages/reference.py


@triton.jit(do_not_specialize=["chunks", "groups", "rows"])
def combine_sums_kernel(partials, out, chunks, groups, rows, columns, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """partials [groups, chunks, rows, columns] -> out [rows, groups, columns]"""
    blocks = tl.cdiv(columns, BLOCK_C)
    pid = tl.program_id(0)
    c = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row, group = (pid // blocks) % rows, pid // blocks // rows
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float64)
    for start in range(0, chunks, BLOCK_K):
        chunk = (group.to(tl.int64) * chunks + start + k) * rows + row
        valid = (start + k < chunks)[:, None] & (c < columns)[None, :]
        total += tl.load(partials + chunk[:, None] * columns + c[None, :], mask=valid, other=0.0).to(tl.float64)
    at = (row.to(tl.int64) * groups + group) * columns + c
    tl.store(out + at, tl.sum(total, 0).to(tl.float32), mask=c < columns)


@triton.jit(do_not_specialize=["chunks"])
def combine_moments_kernel(partials, out, chunks, channels, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """partials [chunks, 3, channels] of count, mean, M2 -> out [2, channels] of mean, biased variance.

    Summed about the first chunk's mean: equal means give exactly zero.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    k = tl.arange(0, BLOCK_K)
    shift = tl.load(partials + channels + c, mask=c < channels * tl.minimum(chunks, 1), other=0.0).to(tl.float64)
    count = tl.zeros((BLOCK_K, BLOCK_C), tl.float64)
    sum1, sum2 = count, count
    for start in range(0, chunks, BLOCK_K):
        valid = (start + k < chunks)[:, None] & in_c[None, :]
        at = partials + (start + k).to(tl.int64)[:, None] * 3 * channels + c[None, :]
        n = tl.load(at, mask=valid, other=0.0).to(tl.float64)
        d = tl.load(at + channels, mask=valid, other=0.0).to(tl.float64) - shift[None, :]
        d = tl.where(valid, d, 0.0)
        m2 = tl.load(at + 2 * channels, mask=valid, other=0.0).to(tl.float64)
        count += n
        sum1 += n * d
        sum2 += m2 + n * d * d
    count, sum1, sum2 = tl.sum(count, 0), tl.sum(sum1, 0), tl.sum(sum2, 0)
    count = tl.where(count > 0.0, count, 1.0)
    delta = sum1 / count
    var = (sum2 - sum1 * delta) / count
    tl.store(out + c, (shift + delta).to(tl.float32), mask=in_c)
    tl.store(out + channels + c, tl.where(var < 0.0, 0.0, var).to(tl.float32), mask=in_c)


@triton.jit(do_not_specialize=["chunks", "positions", "chunk_size"])
def combine_gram_kernel(
    means, products, gram, chunks, positions, chunk_size, channels, DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The chunks' means and products, in a fixed order and in float64 -> gram [C + 2, C]; DTYPE: of the map."""
    element = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = element < channels * channels
    i, j = element // channels, element % channels
    at = tl.maximum(i, j) * channels + tl.minimum(i, j)
    k = tl.arange(0, BLOCK_K)
    known = element < channels * channels * tl.minimum(chunks, 1)
    first_i = tl.load(means + i, mask=known, other=0.0).to(tl.float64)
    first_j = tl.load(means + j, mask=known, other=0.0).to(tl.float64)
    sum_i = tl.zeros((BLOCK_K, BLOCK_C), tl.float64)
    sum_j, total = sum_i, sum_i
    for start in range(0, chunks, BLOCK_K):
        chunk = (start + k).to(tl.int64)[:, None]
        valid = (chunk < chunks) & exists[None, :]
        n = tl.minimum(positions - chunk * chunk_size, chunk_size).to(tl.float64)
        d_i = tl.load(means + chunk * channels + i[None, :], mask=valid, other=0.0).to(tl.float64) - first_i[None, :]
        d_j = tl.load(means + chunk * channels + j[None, :], mask=valid, other=0.0).to(tl.float64) - first_j[None, :]
        product = tl.load(products + chunk * channels * channels + at[None, :], mask=valid, other=0.0).to(tl.float64)
        sum_i += tl.where(valid, n * d_i, 0.0)
        sum_j += tl.where(valid, n * d_j, 0.0)
        total += tl.where(valid, product + n * d_i * d_j, 0.0)
    sum_i, sum_j, total = tl.sum(sum_i, 0), tl.sum(sum_j, 0), tl.sum(total, 0)
    n = tl.maximum(positions, 1).to(tl.float64)
    covariance = (total - sum_i * (sum_j / n)) / n
    covariance = tl.where((i == j) & (covariance < 0.0), 0.0, covariance).to(tl.float32)
    tl.store(gram + element, covariance, mask=exists)
    mean = (first_i + sum_i / n).to(tl.float32)
    diagonal = exists & (i == j)
    tl.store(gram + channels * channels + i, mean, mask=diagonal)
    # a value of the storage dtype, or x - k would not be exact
    distant = tl.abs(mean) > tl.sqrt_rn(tl.abs(covariance)) * GATE_RATIO
    tl.store(gram + (channels + 1) * channels + i, tl.where(distant, rounded(mean, DTYPE), 0.0), mask=diagonal)


def combine_sums(partials, rows, groups=1, out=None):
    """[groups * chunks, rows, ...] -> ``out``, or [rows, columns] ([rows, groups, columns] with groups > 1)."""
    count = partials.shape[0] // groups if groups else 0
    columns = partials.shape[2:].numel()
    if out is None:
        out = partials.new_empty((rows, columns))
    if out.numel():
        grid = (triton.cdiv(columns, _COLUMNS) * rows * groups,)
        with device_of(partials):
            combine_sums_kernel[grid](
                partials, out, count, groups, rows, columns, BLOCK_K=_ROWS, BLOCK_C=_COLUMNS, num_warps=4, **FIXED
            )
    return out


def combine_moments(partials):
    """[chunks, 3, C] -> moments [2, C]."""
    chunks, _, channels = partials.shape
    out = partials.new_empty((2, channels))
    with device_of(partials):
        combine_moments_kernel[(triton.cdiv(channels, _COLUMNS),)](
            partials, out, chunks, channels, BLOCK_K=_ROWS, BLOCK_C=_COLUMNS, num_warps=4, **FIXED
        )
    return out


def combine_gram(means, products, positions, run, dtype):
    """[chunks, C] and [chunks, C, C] of chunks of ``run`` positions -> gram [C + 2, C] of a map of ``dtype``."""
    chunks, channels = means.shape
    out = means.new_empty((channels + 2, channels))
    if out.numel():
        with device_of(means):
            combine_gram_kernel[(triton.cdiv(channels * channels, _COLUMNS),)](
                means, products, out, chunks, positions, run, channels, DTYPE=_DTYPES[dtype], BLOCK_K=_ROWS,
                BLOCK_C=_COLUMNS, num_warps=4, **FIXED,
            )  # fmt: skip
    return out
