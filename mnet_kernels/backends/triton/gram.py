"""Mean, covariance and shift of a map's channels: of a map in memory, or of a block's output as it is written.

A program owns a block of channel pairs, of the lower triangle, and a chunk of positions, over which it walks tile by
tile.  Each tile is centred about its own mean before the product, so that a constant channel has variance exactly 0 and
a distant mean costs no digits; tiles and chunks are merged by Chan's formula.  The products are of float32 values,
whatever the storage dtype (docs/mathematics.md).
"""

import torch
import triton
import triton.language as tl

from . import configs
from .combine import combine_gram
from .device import activate, merge_gram, near_mean, normalized, rounded, to_storage
from .launch import (
    FIXED,
    alignment,
    capability,
    check_act,
    check_map,
    chunks,
    config,
    device_of,
    new_map,
    new_table,
    positions,
    table,
)

# Of the products.  On tensor cores three of TF32 come to float32's, which NVIDIA's do not have; AMD's do.
PRECISION = "ieee" if torch.version.hip else "tf32x3"
# Chunks are of at least so many positions a channel: their products are a fraction of what is read.
LEAST_RUN = 8


@triton.jit
def load_values(
    y, bn, residual, row, p, c, valid, channels,
    ACT: tl.constexpr, NORMALIZED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A tile of y, or of act(bn(y)) [+ residual], in float32, rounded to storage."""
    at = row * channels + (p[:, None] * channels + c[None, :])
    v = tl.load(y + at, mask=valid, other=0.0).to(tl.float32)
    if NORMALIZED:
        in_c = c < channels
        scale, shift = tl.load(bn + c, mask=in_c, other=0.0), tl.load(bn + channels + c, mask=in_c, other=0.0)
        v = activate(normalized(v, scale[None, :], shift[None, :]), ACT)
        if RESIDUAL:
            v += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
        v = rounded(v, y.dtype.element_ty)
    return v


@triton.jit(do_not_specialize=["positions", "chunk_size"])
def gram_kernel(
    y, bn, residual, out, means, products, positions, chunk_size, channel_units, ALIGN: tl.constexpr,
    ACT: tl.constexpr, NORMALIZED: tl.constexpr, RESIDUAL: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = act(bn(y)) [+ residual] where NORMALIZED; means [chunks, C], products [chunks, C, C] about them.

    Of the products only blocks on and below the diagonal.
    """
    channels = channel_units * ALIGN
    blocks = tl.cdiv(channels, BLOCK_C)
    pairs = blocks * (blocks + 1) // 2
    chunk = tl.program_id(0) // pairs
    pair = tl.program_id(0) % pairs
    upper = 0
    while (upper + 1) * (upper + 2) // 2 <= pair:
        upper += 1
    other = pair - upper * (upper + 1) // 2
    i, j = upper * BLOCK_C + tl.arange(0, BLOCK_C), other * BLOCK_C + tl.arange(0, BLOCK_C)
    in_i, in_j = i < channels, j < channels
    writes = i < tl.where(upper == other, channels, 0)  # a channel's own values: once
    p = tl.arange(0, BLOCK_P)
    begin = chunk.to(tl.int64) * chunk_size
    end = tl.minimum(begin + chunk_size, positions)
    count = 0.0
    mean_i = tl.zeros((BLOCK_C,), tl.float32)
    mean_j = tl.zeros((BLOCK_C,), tl.float32)
    acc = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for row in range(begin, end, BLOCK_P):
        added = tl.minimum(end - row, BLOCK_P).to(tl.float32)
        valid = (p < end - row)[:, None] & in_i[None, :]
        v = load_values(y, bn, residual, row, p, i, valid, channels, ACT, NORMALIZED, RESIDUAL)
        if NORMALIZED:
            at = row * channels + (p[:, None] * channels + i[None, :])
            tl.store(out + at, to_storage(v, out.dtype.element_ty), mask=valid & writes[None, :])
        centre_i = near_mean(v, valid, added)
        left = tl.where(valid, v - centre_i[None, :], 0.0)
        rest_i = tl.sum(left, 0) / added
        if ONE_BLOCK:
            right, centre_j, rest_j = left, centre_i, rest_i
        else:
            valid = (p < end - row)[:, None] & in_j[None, :]
            v = load_values(y, bn, residual, row, p, j, valid, channels, ACT, NORMALIZED, RESIDUAL)
            centre_j = near_mean(v, valid, added)
            right = tl.where(valid, v - centre_j[None, :], 0.0)
            rest_j = tl.sum(right, 0) / added
        # subtracted: an added product would be summed with `acc` as its start, where long sums truncate
        acc -= tl.dot(tl.trans(-left), right, input_precision=PRECISION)
        delta_i, delta_j = centre_i - mean_i + rest_i, centre_j - mean_j + rest_j
        acc = merge_gram(acc, count, added, delta_i, delta_j, rest_i, rest_j)
        count += added
        mean_i += delta_i * (added / count)
        mean_j += delta_j * (added / count)
    tl.store(means + chunk.to(tl.int64) * channels + i, mean_i, mask=writes)
    at = products + chunk.to(tl.int64) * channels * channels + (i[:, None] * channels + j[None, :])
    tl.store(at, acc, mask=in_i[:, None] & in_j[None, :])


def gram(x):
    """Launches ``gram_kernel``: the gram of a map."""
    check_map("x", x)
    return _gather(x, None, 0, None, None)


def normalize_gram(y, bn, act, residual):
    """Launches ``gram_kernel``: (out, its gram)."""
    check_map("y", y)
    check_act("act", act)
    bn = table("bn", bn, (5, y.shape[1]), y)
    if residual is not None:
        check_map("residual", residual, y, y.shape)
    out = new_map(y, *y.shape)
    return out, _gather(y, bn, act, residual, out)


def _gather(y, bn, act, residual, out):
    channels, rows = y.shape[1], positions(y)
    row, align = config("gram", configs.width_class(channels), y), alignment(channels)
    blocks = triton.cdiv(channels, row.columns)
    pairs = blocks * (blocks + 1) // 2
    cut = chunks(1, rows, row.rows, pairs, capability(y))
    least = triton.cdiv(LEAST_RUN * channels, row.rows) * row.rows if capability(y) > (0, 0) else cut.rows
    run = max(cut.rows, least)
    count = triton.cdiv(rows, run)
    means, products = new_table(y, count, channels), new_table(y, count, channels, channels)
    if y.numel():
        with device_of(y):
            gram_kernel[(count * pairs,)](
                y, bn, residual, out, means, products, rows, run, channels // align, ALIGN=align, ACT=act,
                NORMALIZED=out is not None, RESIDUAL=residual is not None, ONE_BLOCK=blocks == 1,
                PRECISION=PRECISION, BLOCK_P=row.rows, BLOCK_C=row.columns, num_warps=row.warps,
                num_stages=row.stages, **FIXED,
            )  # fmt: skip
    return combine_gram(means, products, rows, run, y.dtype)
