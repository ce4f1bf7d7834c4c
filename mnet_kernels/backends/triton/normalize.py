"""Batch norm, activation and residual of a finished block; the sums its backward starts from; squeeze-excite's pool."""

import triton
import triton.language as tl

from .combine import combine_sums
from .device import activate, chunk_rows, masked, normalized, to_storage
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

_COUNTS = ["segment_rows", "per_segment", "chunk_size"]


@triton.jit(do_not_specialize=["rows"])
def normalize_kernel(
    y, bn, residual, out, rows, channel_units, ALIGN: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = act(bn(y)) [+ residual]"""
    channels = channel_units * ALIGN
    blocks = tl.cdiv(channels, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    in_c = c < channels
    valid = (p < rows - row)[:, None] & in_c[None, :]
    at = row * channels + (p[:, None] * channels + c[None, :])
    v = tl.load(y + at, mask=valid, other=0.0).to(tl.float32)
    scale, shift = tl.load(bn + c, mask=in_c, other=0.0), tl.load(bn + channels + c, mask=in_c, other=0.0)
    v = activate(normalized(v, scale[None, :], shift[None, :]), ACT)
    if RESIDUAL:
        v += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + at, to_storage(v, out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=_COUNTS)
def normalize_backward_kernel(
    grad, y, bn, partials, segment_rows, per_segment, chunk_size, channel_units,
    ALIGN: tl.constexpr, ACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials [chunks, 2, C]: sum g, sum g (y - mean) with g = grad act'(bn(y))"""
    channels = channel_units * ALIGN
    blocks = tl.cdiv(channels, BLOCK_C)
    chunk = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    in_c = c < channels
    scale = tl.load(bn + c, mask=in_c, other=0.0)[None, :]
    shift = tl.load(bn + channels + c, mask=in_c, other=0.0)[None, :]
    mean = tl.load(bn + 2 * channels + c, mask=in_c, other=0.0)[None, :]
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_gy = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    begin, end = chunk_rows(chunk, segment_rows, per_segment, chunk_size)
    for row in range(begin, end, BLOCK_P):
        valid = (p < end - row)[:, None] & in_c[None, :]
        at = row * channels + (p[:, None] * channels + c[None, :])
        v = tl.load(y + at, mask=valid, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
        g = masked(g, normalized(v, scale, shift), ACT)
        sum_g += g
        sum_gy = tl.fma(g, v - mean, sum_gy)
    at = partials + chunk.to(tl.int64) * 2 * channels + c
    tl.store(at, tl.sum(sum_g, 0), mask=in_c)
    tl.store(at + channels, tl.sum(sum_gy, 0), mask=in_c)


@triton.jit(do_not_specialize=_COUNTS)
def squeeze_kernel(
    y, bn, partials, segment_rows, per_segment, chunk_size, channel_units,
    ALIGN: tl.constexpr, ACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials [chunks, 3, C], a segment an image: sum z / positions, sum act'(u), sum act'(u) (y - mean)"""
    channels = channel_units * ALIGN
    blocks = tl.cdiv(channels, BLOCK_C)
    chunk = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    in_c = c < channels
    scale = tl.load(bn + c, mask=in_c, other=0.0)[None, :]
    shift = tl.load(bn + channels + c, mask=in_c, other=0.0)[None, :]
    mean = tl.load(bn + 2 * channels + c, mask=in_c, other=0.0)[None, :]
    sum_z = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_d = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_dy = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    begin, end = chunk_rows(chunk, segment_rows, per_segment, chunk_size)
    for row in range(begin, end, BLOCK_P):
        valid = (p < end - row)[:, None] & in_c[None, :]
        at = row * channels + (p[:, None] * channels + c[None, :])
        v = tl.load(y + at, mask=valid, other=0.0).to(tl.float32)
        u = normalized(v, scale, shift)
        sum_z += tl.where(valid, activate(u, ACT), 0.0)
        d = masked(tl.where(valid, 1.0, 0.0), u, ACT)
        sum_d += d
        sum_dy = tl.fma(d, v - mean, sum_dy)
    at = partials + chunk.to(tl.int64) * 3 * channels + c
    tl.store(at, tl.sum(sum_z, 0) / (segment_rows + 0.0), mask=in_c)
    tl.store(at + channels, tl.sum(sum_d, 0), mask=in_c)
    tl.store(at + 2 * channels, tl.sum(sum_dy, 0), mask=in_c)


def _check(y, bn, act):
    check_map("y", y)
    check_act("act", act)
    return table("bn", bn, (5, y.shape[1]), y)


def normalize(y, bn, act, residual):
    """Launches ``normalize_kernel``: out."""
    bn = _check(y, bn, act)
    if residual is not None:
        check_map("residual", residual, y, y.shape)
    out, channels, rows = new_map(y, *y.shape), y.shape[1], positions(y)
    row, align = config("elementwise", "any", y), alignment(channels)
    if y.numel():
        grid = (triton.cdiv(rows, row.rows) * triton.cdiv(channels, row.columns),)
        with device_of(y):
            normalize_kernel[grid](
                y, bn, residual, out, rows, channels // align, ALIGN=align, ACT=act, RESIDUAL=residual is not None,
                BLOCK_P=row.rows, BLOCK_C=row.columns, num_warps=row.warps, num_stages=row.stages, **FIXED,
            )  # fmt: skip
    return out


def _reduce(kernel, maps, bn, act, rows_of_table, by_image):
    """Launch a kernel that leaves [chunks, rows, C], by image or over all of them, and combine."""
    y = maps[-1]
    n, channels, h, w = y.shape
    row, align = config("elementwise", "any", y), alignment(channels)
    blocks = triton.cdiv(channels, row.columns)
    segments, segment_rows = (n, h * w) if by_image else (1, positions(y))
    cut = chunks(segments, segment_rows, row.rows, blocks, capability(y))
    partials = new_table(y, cut.count, rows_of_table, channels)
    if y.numel():
        with device_of(y):
            kernel[(cut.count * blocks,)](
                *maps, bn, partials, cut.segment, cut.per_segment, cut.rows, channels // align, ALIGN=align, ACT=act,
                BLOCK_P=row.rows, BLOCK_C=row.columns, num_warps=row.warps, num_stages=row.stages, **FIXED,
            )  # fmt: skip
    if by_image:
        return combine_sums(partials, rows_of_table, n, new_table(y, rows_of_table, n, channels))
    return combine_sums(partials, rows_of_table)


def normalize_backward(grad, y, bn, act):
    """Launches ``normalize_backward_kernel``: sums."""
    bn = _check(y, bn, act)
    check_map("grad", grad, y, y.shape)
    return _reduce(normalize_backward_kernel, (grad, y), bn, act, 2, by_image=False)


def squeeze(y, bn, act):
    """Launches ``squeeze_kernel``: the squeeze table."""
    return _reduce(squeeze_kernel, (y,), _check(y, bn, act), act, 3, by_image=True)
