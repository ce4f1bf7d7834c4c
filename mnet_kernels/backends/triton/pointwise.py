"""Pointwise (1x1) convolution: forward, input gradient, weight gradient.

Each is a matrix product over [positions, channels] with the batch norm, activation and gate of what it reads applied
on load.  A program owns one block of output channels and a chunk of positions, over which it walks tile by tile; the
programs of one chunk are neighbours, so that they share what they read in the second-level cache.  The weight gradient
splits the positions over programs and sums the parts afterwards: a chunk is also the length of a run on the tensor
cores, whose long sums truncate.
"""

import triton
import triton.language as tl

from . import configs
from .combine import combine_moments, combine_sums
from .device import (
    activate,
    chunk_rows,
    load_operand,
    load_upstream,
    masked,
    merge_tile,
    normalized,
    operand,
    rounded,
    store_moments,
    to_storage,
)
from .launch import (
    FIXED,
    alignment,
    capability,
    check_act,
    check_map,
    check_one_of,
    check_shape,
    check_weight,
    chunks,
    config,
    device_of,
    dot_precision,
    new_map,
    new_table,
    of_short_runs,
    positions,
    table,
)

_COUNTS = ["segment_rows", "per_segment", "chunk_size", "image_rows"]


@triton.jit(do_not_specialize=_COUNTS)
def pointwise_kernel(
    x, weight, bn, gate, y, partials, segment_rows, per_segment, chunk_size, image_rows, units_in, units_out,
    ALIGN_IN: tl.constexpr, ALIGN_OUT: tl.constexpr, ACT: tl.constexpr, NORMALIZED: tl.constexpr,
    GATED: tl.constexpr, MOMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = W act(bn(x)) [* gate]; partials [chunks, 3, E]: count, mean, M2 of the stored values."""
    channels, outputs = units_in * ALIGN_IN, units_out * ALIGN_OUT
    blocks = tl.cdiv(outputs, BLOCK_E)
    chunk = tl.program_id(0) // blocks
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_e = e < outputs
    p = tl.arange(0, BLOCK_P)
    begin, end = chunk_rows(chunk, segment_rows, per_segment, chunk_size)
    count = 0.0
    mean = tl.zeros((BLOCK_E,), tl.float32)
    m2 = tl.zeros((BLOCK_E,), tl.float32)
    for row in range(begin, end, BLOCK_P):
        in_p = p < end - row
        acc = tl.zeros((BLOCK_P, BLOCK_E), tl.float32)
        for start in range(0, channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            valid = in_p[:, None] & (c < channels)[None, :]
            z = load_operand(x, bn, gate, row, p, c, valid, channels, image_rows, ACT, NORMALIZED, GATED)
            in_w = (c < channels)[:, None] & in_e[None, :]
            w = tl.load(weight + (e[None, :] * channels + c[:, None]), mask=in_w, other=0.0)
            acc = tl.dot(z, operand(w.to(tl.float32), weight.dtype.element_ty), acc, input_precision=PRECISION)
        stored = to_storage(acc, y.dtype.element_ty)
        valid = in_p[:, None] & in_e[None, :]
        tl.store(y + row * outputs + (p[:, None] * outputs + e[None, :]), stored, mask=valid)
        if MOMENTS:
            v = rounded(acc, y.dtype.element_ty)
            count, mean, m2 = merge_tile(count, mean, m2, v, valid, tl.minimum(end - row, BLOCK_P).to(tl.float32))
    if MOMENTS:
        store_moments(partials, chunk, count, mean, m2, outputs, e, in_e)


@triton.jit(do_not_specialize=_COUNTS)
def pointwise_dgrad_kernel(
    grad, y, y_bn, coef, offset, x, weight, bn, residual, gx, partials, segment_rows, per_segment, chunk_size,
    image_rows, units_in, units_out, ALIGN_IN: tl.constexpr, ALIGN_OUT: tl.constexpr, Y_ACT: tl.constexpr,
    OFFSET: tl.constexpr, ACT: tl.constexpr, NORMALIZED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    STORE: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """gx = W^T dy, masked by the activation of x or plus the residual; partials: sums over the chunk's positions.

    partials [chunks, 2, C]: sum gx, sum gx (x - mean).  GATED: gx is not masked, and [chunks, 3, C]: sum gx z,
    sum act' gx, sum act' gx (x - mean).
    """
    channels, outputs = units_in * ALIGN_IN, units_out * ALIGN_OUT
    blocks = tl.cdiv(channels, BLOCK_C)
    chunk = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    p = tl.arange(0, BLOCK_P)
    begin, end = chunk_rows(chunk, segment_rows, per_segment, chunk_size)
    sum_z = tl.zeros((BLOCK_C,), tl.float32)
    sum_g = tl.zeros((BLOCK_C,), tl.float32)
    sum_gy = tl.zeros((BLOCK_C,), tl.float32)
    for row in range(begin, end, BLOCK_P):
        in_p = p < end - row
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(0, outputs, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            valid = in_p[:, None] & (e < outputs)[None, :]
            dy = load_upstream(
                grad, y, y_bn, coef, offset, row, p, e, valid, outputs, image_rows, Y_ACT, OFFSET
            )  # fmt: skip
            in_w = (e < outputs)[:, None] & in_c[None, :]
            w = tl.load(weight + (e[:, None] * channels + c[None, :]), mask=in_w, other=0.0)
            acc = tl.dot(dy, operand(w.to(tl.float32), weight.dtype.element_ty), acc, input_precision=PRECISION)
        valid = in_p[:, None] & in_c[None, :]
        at = p[:, None] * channels + c[None, :]
        if RESIDUAL:
            acc += tl.load(residual + row * channels + at, mask=valid, other=0.0).to(tl.float32)
        if NORMALIZED:
            v = tl.load(x + row * channels + at, mask=valid, other=0.0).to(tl.float32)
            scale = tl.load(bn + c, mask=in_c, other=0.0)[None, :]
            shift = tl.load(bn + channels + c, mask=in_c, other=0.0)[None, :]
            u = normalized(v, scale, shift)
            if not GATED:
                acc = masked(acc, u, ACT)
        if STORE:
            tl.store(gx + row * channels + at, to_storage(acc, gx.dtype.element_ty), mask=valid)
            acc = rounded(acc, gx.dtype.element_ty)
        if SUMS:
            g = tl.where(valid, acc, 0.0)
            if GATED:
                sum_z += tl.sum(g * activate(u, ACT), 0)
                g = masked(g, u, ACT)
            mean = tl.load(bn + 2 * channels + c, mask=in_c, other=0.0)[None, :]
            sum_g += tl.sum(g, 0)
            sum_gy += tl.sum(g * (v - mean), 0)
    if SUMS:
        if GATED:
            at = partials + chunk.to(tl.int64) * 3 * channels + c
            tl.store(at, sum_z, mask=in_c)
            at += channels
        else:
            at = partials + chunk.to(tl.int64) * 2 * channels + c
        tl.store(at, sum_g, mask=in_c)
        tl.store(at + channels, sum_gy, mask=in_c)


@triton.jit(do_not_specialize=_COUNTS)
def pointwise_wgrad_kernel(
    grad, y, y_bn, coef, offset, x, bn, gate, partials, segment_rows, per_segment, chunk_size, image_rows,
    units_in, units_out, ALIGN_IN: tl.constexpr, ALIGN_OUT: tl.constexpr, Y_ACT: tl.constexpr, OFFSET: tl.constexpr,
    ACT: tl.constexpr, NORMALIZED: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """partials [chunks, E, C] = sum over a chunk's positions of dy z^T, z = act(bn(x)) [* gate]"""
    channels, outputs = units_in * ALIGN_IN, units_out * ALIGN_OUT
    c_blocks, e_blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(outputs, BLOCK_E)
    pid = tl.program_id(0)
    c = (pid % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    e = (pid // c_blocks % e_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = pid // c_blocks // e_blocks
    p = tl.arange(0, BLOCK_P)
    begin, end = chunk_rows(chunk, segment_rows, per_segment, chunk_size)
    acc = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    for row in range(begin, end, BLOCK_P):
        in_p = p < end - row
        dy = load_upstream(
            grad, y, y_bn, coef, offset, row, p, e, in_p[:, None] & (e < outputs)[None, :], outputs, image_rows,
            Y_ACT, OFFSET,
        )  # fmt: skip
        z = load_operand(
            x, bn, gate, row, p, c, in_p[:, None] & (c < channels)[None, :], channels, image_rows,
            ACT, NORMALIZED, GATED,
        )  # fmt: skip
        acc = tl.dot(tl.trans(dy), z, acc, input_precision=PRECISION)
    at = partials + chunk.to(tl.int64) * outputs * channels + (e[:, None] * channels + c[None, :])
    tl.store(at, acc, mask=(e < outputs)[:, None] & (c < channels)[None, :])


def _widths(channels, outputs):
    """Channel counts as the kernels take them: units of a power of two known to the compiler."""
    align_in, align_out = alignment(channels), alignment(outputs)
    return (channels // align_in, outputs // align_out), {"ALIGN_IN": align_in, "ALIGN_OUT": align_out}


def _options(row):
    return {"num_warps": row.warps, "num_stages": row.stages, **FIXED}


def wgrad_row(row, gated, pooled):
    """The table's row for a weight gradient with a gate, an offset, or both.

    Their float32 values are copied ahead as the maps are: with both, three stages need more shared memory than the
    99 KiB that a block has on 8.6 and 8.9.
    """
    return row._replace(stages=min(row.stages, 2)) if gated and pooled else row


def _check_input(x, weight, bn, act, gate, outputs):
    check_map("x", x)
    n, channels = x.shape[:2]
    if outputs is None:
        outputs = weight.shape[0]
    if tuple(weight.shape) != (outputs, channels, 1, 1):
        expected = f"[{'E' if outputs == weight.shape[0] else outputs}, {channels}, 1, 1]"
        raise RuntimeError(f"weight has shape {list(weight.shape)}; expected {expected}")
    check_act("act", act, bn is not None)
    return (
        check_weight(weight, (outputs, channels, 1, 1), x),
        table("bn", bn, (5, channels), x),
        table("gate", gate, (n, channels), x),
    )


def pointwise(x, weight, bn, act, gate, moments):
    """Launches ``pointwise_kernel``: (y, moments)."""
    weight, bn, gate = _check_input(x, weight, bn, act, gate, None)
    (n, channels, h, w), outputs = x.shape, weight.shape[0]
    y = new_map(x, n, outputs, h, w)
    row = config("pointwise", configs.width_class(outputs), x)
    blocks = triton.cdiv(outputs, row.columns)
    cut = chunks(1, positions(x), row.rows, blocks, capability(x))
    partials = new_table(x, cut.count, 3, outputs) if moments else None
    units, aligns = _widths(channels, outputs)
    if y.numel():
        with device_of(x):
            pointwise_kernel[(cut.count * blocks,)](
                x, weight, bn, gate, y, partials, cut.segment, cut.per_segment, cut.rows, h * w, *units, **aligns,
                ACT=act, NORMALIZED=bn is not None, GATED=gate is not None, MOMENTS=moments,
                PRECISION=dot_precision(x), BLOCK_P=row.rows, BLOCK_E=row.columns, BLOCK_C=row.depth, **_options(row),
            )  # fmt: skip
    return y, combine_moments(partials) if moments else new_table(x, 0)


def pointwise_backward(
    grad, y, y_bn, coef, y_act, offset, x, weight, bn, act, gate, residual, needs_dx, needs_sums, needs_dw
):
    """Launches ``pointwise_dgrad_kernel`` and ``pointwise_wgrad_kernel``: (gx, sums, dw)."""
    check_map("y", y)
    weight, bn, gate = _check_input(x, weight, bn, act, gate, y.shape[1])
    n, outputs, h, w = y.shape
    check_map("y", y, x, (n, outputs, *x.shape[2:]))
    check_shape("x", x, (n, x.shape[1], h, w))
    if (grad is None) == (offset is None):
        given = "neither" if grad is None else "both"
        raise RuntimeError(f"got {given} of grad and offset; expected one of them")
    if grad is not None:
        check_map("grad", grad, x, y.shape)
    check_act("y_act", y_act)
    if residual is not None:
        check_map("residual", residual, x, x.shape)
        check_one_of(residual, bn)
    offset = table("offset", offset, (n, outputs), x)
    up = (grad, y, table("y_bn", y_bn, (5, outputs), x), table("coef", coef, (2, outputs), x), offset)
    wants_sums = needs_sums and bn is not None
    gx, sums = x.new_empty(0), new_table(x, 0)
    if needs_dx or wants_sums:
        gx, sums = _dgrad(*up, y_act, x, weight, bn, act, gate is not None, residual, needs_dx, wants_sums)
    dw = _wgrad(*up, y_act, x, bn, act, gate).view(weight.shape) if needs_dw else new_table(x, 0)
    return gx, sums, dw


def _dgrad(grad, y, y_bn, coef, offset, y_act, x, weight, bn, act, gated, residual, store, wants_sums):
    n, channels, h, w = x.shape
    outputs, by_image = y.shape[1], gated and wants_sums
    gx = new_map(x, *x.shape) if store else x.new_empty(0)
    row = config("pointwise_dgrad", configs.width_class(channels), x)
    blocks = triton.cdiv(channels, row.columns)
    segments, segment_rows = (n, h * w) if by_image else (1, positions(x))
    cut = chunks(segments, segment_rows, row.rows, blocks, capability(x))
    partials = new_table(x, cut.count, 3 if gated else 2, channels) if wants_sums else None
    units, aligns = _widths(channels, outputs)
    if x.numel():
        with device_of(x):
            pointwise_dgrad_kernel[(cut.count * blocks,)](
                grad, y, y_bn, coef, offset, x, weight, bn, residual, gx, partials, cut.segment, cut.per_segment,
                cut.rows, h * w, *units, **aligns, Y_ACT=y_act, OFFSET=offset is not None, ACT=act,
                NORMALIZED=bn is not None, GATED=gated, RESIDUAL=residual is not None, STORE=store, SUMS=wants_sums,
                PRECISION=dot_precision(x), BLOCK_P=row.rows, BLOCK_C=row.columns, BLOCK_E=row.depth, **_options(row),
            )  # fmt: skip
    if not wants_sums:
        return gx, new_table(x, 0)
    return gx, combine_sums(partials, 3, n, new_table(x, 3, n, channels)) if gated else combine_sums(partials, 2)


def _wgrad(grad, y, y_bn, coef, offset, y_act, x, bn, act, gate):
    _, channels, h, w = x.shape
    outputs = y.shape[1]
    row = config("pointwise_wgrad", configs.width_class(channels, outputs), x)
    row = wgrad_row(row, gate is not None, offset is not None)
    blocks = triton.cdiv(outputs, row.rows) * triton.cdiv(channels, row.columns)
    cut = of_short_runs(chunks(1, positions(x), row.depth, blocks, capability(x)))
    partials = new_table(x, cut.count, 1, outputs * channels)
    units, aligns = _widths(channels, outputs)
    if x.numel():
        with device_of(x):
            pointwise_wgrad_kernel[(cut.count * blocks,)](
                grad, y, y_bn, coef, offset, x, bn, gate, partials, cut.segment, cut.per_segment, cut.rows, h * w,
                *units, **aligns, Y_ACT=y_act, OFFSET=offset is not None, ACT=act, NORMALIZED=bn is not None,
                GATED=gate is not None, PRECISION=dot_precision(x), BLOCK_E=row.rows, BLOCK_C=row.columns,
                BLOCK_P=row.depth, **_options(row),
            )  # fmt: skip
    return combine_sums(partials, 1)
