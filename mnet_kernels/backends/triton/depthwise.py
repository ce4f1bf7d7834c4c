"""Depthwise convolution, k 3 or 5, stride 1 or 2: forward, and input and weight gradient in one pass.

A program owns a block of channels and walks over units: a strip of rows, BLOCK_W columns wide, of one image.  It goes
down a strip row by row and keeps the rows it still needs in registers, so that every input is activated k times (once a
column of the kernel), not k*k times.  Neighbouring columns and the rows above a strip come from the first-level cache.

Rows: output row o reads input rows S*o - PAD + i, 0 <= i < K.  A step takes one output row; after it S input rows are
done with, and LIVE = (K - 1) // S + 1 outputs share an input row.  A strip therefore starts LIVE - 1 steps early.
"""

import triton
import triton.language as tl

from ...schema import depthwise_size
from . import configs
from .combine import combine_moments, combine_sums
from .device import (
    activate,
    first_row,
    from_shifted,
    masked,
    merge,
    normalized,
    operand,
    put,
    rounded,
    store_moments,
    tiles,
    to_storage,
    upstream,
)
from .launch import (
    FIXED,
    alignment,
    capability,
    check_act,
    check_map,
    check_one_of,
    check_weight,
    config,
    device_of,
    dot_precision,
    new_map,
    new_table,
    table,
)

_COUNTS = ["units", "per_program", "height", "width", "out_height", "out_width", "strip", "strips", "columns"]


@triton.jit
def load_pixels(map_, image, h, column, height, width, channels, c, in_c):
    """[columns, channels] of one row in float32, and where they exist; h and column may lie outside of the map."""
    valid = ((column >= 0) & (column < width) & (h >= 0) & (h < height))[:, None] & in_c[None, :]
    row = map_ + (image.to(tl.int64) * height + h) * width * channels
    return tl.load(row + (column[:, None] * channels + c[None, :]), mask=valid, other=0.0).to(tl.float32), valid


@triton.jit
def load_activated(
    x, image, h, column, height, width, channels, c, in_c, scale, shift, ACT: tl.constexpr, NORMALIZED: tl.constexpr
):
    """act(bn(x)) rounded to storage, in float32, with zeros around the map."""
    v, valid = load_pixels(x, image, h, column, height, width, channels, c, in_c)
    if NORMALIZED:
        z = rounded(activate(normalized(v, scale[None, :], shift[None, :]), ACT), x.dtype.element_ty)
        v = tl.where(valid, z, 0.0)
    return v


@triton.jit
def load_expanded(
    x, image, h, column, height, width, shift, weight, inputs, e, in_e, bn_scale, bn_shift,
    ACT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act(bn(W (x - shift))) rounded to storage, in float32, with zeros around the map: an expanded row's tile."""
    acc = tl.zeros((column.shape[0], e.shape[0]), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < inputs
        v, _ = load_pixels(x, image, h, column, height, width, inputs, k, in_k)
        v -= tl.load(shift + k, mask=in_k, other=0.0)[None, :]
        in_w = in_k[:, None] & in_e[None, :]
        w = tl.load(weight + (e[None, :] * inputs + k[:, None]), mask=in_w, other=0.0).to(tl.float32)
        acc = tl.dot(
            operand(v, x.dtype.element_ty), operand(w, weight.dtype.element_ty), acc, input_precision=PRECISION
        )
    z = rounded(activate(normalized(acc, bn_scale[None, :], bn_shift[None, :]), ACT), x.dtype.element_ty)
    valid = ((column >= 0) & (column < width) & (h >= 0) & (h < height))[:, None] & in_e[None, :]
    return tl.where(valid, z, 0.0)


@triton.jit
def load_taps(weight, c, in_c, KERNEL: tl.constexpr):
    """The weights of a channel block: a tuple of KERNEL*KERNEL vectors."""
    taps = (tl.load(weight + c * KERNEL * KERNEL, mask=in_c, other=0.0).to(tl.float32),)
    for t in tl.static_range(1, KERNEL * KERNEL):
        taps = taps + (tl.load(weight + (c * KERNEL * KERNEL + t), mask=in_c, other=0.0).to(tl.float32),)
    return taps


@triton.jit(do_not_specialize=_COUNTS)
def depthwise_kernel(
    x, expand_shift, expand_weight, weight, bn, y, partials, units, per_program, height, width, out_height, out_width,
    strip, strips, columns, input_units, channel_units, ALIGN_IN: tl.constexpr, ALIGN: tl.constexpr, ACT: tl.constexpr,
    NORMALIZED: tl.constexpr, EXPANDED: tl.constexpr, MOMENTS: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = depthwise(act(bn(x))); partials [programs, 3, C]: count, mean, M2 of the stored values.

    EXPANDED: of expand_weight (x - expand_shift) in place of x, which has as many channels as ``input_units`` say.
    """
    PAD: tl.constexpr = KERNEL // 2
    LIVE: tl.constexpr = (KERNEL - 1) // STRIDE + 1
    channels = channel_units * ALIGN
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    taps = load_taps(weight, c, in_c, KERNEL)
    scale = tl.zeros((BLOCK_C,), tl.float32)
    shift = scale
    if NORMALIZED:
        scale = tl.load(bn + c, mask=in_c, other=0.0)
        shift = tl.load(bn + channels + c, mask=in_c, other=0.0)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    first = program * per_program
    for unit in range(first, tl.minimum(first + per_program, units)):
        image = unit // (strips * columns)
        begin = (unit // columns % strips) * strip
        end = tl.minimum(begin + strip, out_height)
        left = (unit % columns) * BLOCK_W
        column = left + tl.arange(0, BLOCK_W)
        origin = tl.zeros((BLOCK_C,), tl.float32)  # of the strip: one value (k = 5 lacks registers for a mean)
        sum1 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
        sum2 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
        acc = tiles(LIVE, BLOCK_W, BLOCK_C)
        for row in range(begin - (LIVE - 1), end):
            for i in tl.static_range(KERNEL - STRIDE, KERNEL):
                for j in tl.static_range(KERNEL):
                    h, w = row * STRIDE - PAD + i, column * STRIDE - PAD + j
                    if EXPANDED:
                        z = load_expanded(
                            x, image, h, w, height, width, expand_shift, expand_weight, input_units * ALIGN_IN, c, in_c,
                            scale, shift, ACT, PRECISION, BLOCK_K,
                        )  # fmt: skip
                    else:
                        z = load_activated(
                            x, image, h, w, height, width, channels, c, in_c, scale, shift, ACT, NORMALIZED
                        )
                    for ahead in tl.static_range(LIVE):
                        if i - ahead * STRIDE >= 0:
                            tap = taps[(i - ahead * STRIDE) * KERNEL + j]
                            acc = put(acc, ahead, tl.fma(z, tap[None, :], acc[ahead]))
            if row >= begin:
                valid = (column < out_width)[:, None] & in_c[None, :]
                at = y + (image.to(tl.int64) * out_height + row) * out_width * channels
                tl.store(
                    at + (column[:, None] * channels + c[None, :]), to_storage(acc[0], y.dtype.element_ty), mask=valid
                )
                if MOMENTS:
                    v = rounded(acc[0], y.dtype.element_ty)
                    if row == begin:
                        origin = first_row(v)
                    d = tl.where(valid, v - origin[None, :], 0.0)
                    sum1 += d
                    sum2 += d * d
            acc = acc[1:] + tiles(1, BLOCK_W, BLOCK_C)
        if MOMENTS:
            added = ((end - begin) * tl.minimum(out_width - left, BLOCK_W)).to(tl.float32)
            run_mean, run_m2 = from_shifted(added, origin, tl.sum(sum1, 0), tl.sum(sum2, 0))
            count, mean, m2 = merge(count, mean, m2, added, run_mean, run_m2)
    if MOMENTS:
        store_moments(partials, program, count, mean, m2, channels, c, in_c)


@triton.jit(do_not_specialize=_COUNTS)
def depthwise_backward_kernel(
    grad, y, y_bn, coef, gate, offset, x, weight, bn, residual, gx, sum_partials, dw_partials,
    units, per_program, height, width, out_height, out_width, strip, strips, columns, channel_units,
    ALIGN: tl.constexpr, Y_ACT: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, OFFSET: tl.constexpr,
    NORMALIZED: tl.constexpr, RESIDUAL: tl.constexpr, NEEDS_DX: tl.constexpr, NEEDS_DW: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gx, masked by the activation of x or plus the residual; partials: sums [programs, 2, C], dw [programs, C, K*K].

    A step takes one row of dy.  Input columns are taken in groups of S, one tile for each place in the group: place s
    of group m is column S*m + s, and meets column m + d of dy at the kernel's column j = s + PAD - S*d.
    """
    PAD: tl.constexpr = KERNEL // 2
    LIVE: tl.constexpr = (KERNEL - 1) // STRIDE + 1
    TAPS: tl.constexpr = KERNEL * KERNEL
    channels = channel_units * ALIGN
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    taps = load_taps(weight, c, in_c, KERNEL)
    y_scale = tl.load(y_bn + c, mask=in_c, other=0.0)[None, :]
    y_shift = tl.load(y_bn + channels + c, mask=in_c, other=0.0)[None, :]
    y_mean = tl.load(y_bn + 2 * channels + c, mask=in_c, other=0.0)[None, :]
    y_b = tl.load(coef + c, mask=in_c, other=0.0)[None, :]
    y_c = tl.load(coef + channels + c, mask=in_c, other=0.0)[None, :]
    scale = tl.zeros((BLOCK_C,), tl.float32)
    shift, mean = scale, scale
    if NORMALIZED:
        scale = tl.load(bn + c, mask=in_c, other=0.0)
        shift = tl.load(bn + channels + c, mask=in_c, other=0.0)
        mean = tl.load(bn + 2 * channels + c, mask=in_c, other=0.0)
    dw = tiles(TAPS, BLOCK_W, BLOCK_C)
    sum_g = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    sum_gy = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    first = program * per_program
    for unit in range(first, tl.minimum(first + per_program, units)):
        image = unit // (strips * columns)
        begin = (unit // columns % strips) * strip
        # the last steps have no dy: they hand out the input rows below the last output's first one
        end = tl.minimum(begin + strip, (height + PAD + STRIDE - 1) // STRIDE)
        group = (unit % columns) * BLOCK_W + tl.arange(0, BLOCK_W)
        if GATED:
            factor = tl.load(gate + image.to(tl.int64) * channels + c, mask=in_c, other=0.0)[None, :]
        if OFFSET:
            term = tl.load(offset + image.to(tl.int64) * channels + c, mask=in_c, other=0.0)[None, :]
        gz = tiles(KERNEL * STRIDE, BLOCK_W, BLOCK_C)
        z = tiles(KERNEL * STRIDE, BLOCK_W, BLOCK_C)
        for row in range(begin - (LIVE - 1), end):
            if NEEDS_DW:
                for i in tl.static_range(KERNEL - STRIDE, KERNEL):
                    for s in tl.static_range(STRIDE):
                        read = load_activated(
                            x, image, row * STRIDE - PAD + i, group * STRIDE + s, height, width, channels, c, in_c,
                            scale, shift, ACT, NORMALIZED,
                        )  # fmt: skip
                        z = put(z, i * STRIDE + s, read)
            for d in tl.static_range(0 - PAD // STRIDE, (STRIDE - 1 + PAD) // STRIDE + 1):
                g, valid = load_pixels(grad, image, row, group + d, out_height, out_width, channels, c, in_c)
                v, _ = load_pixels(y, image, row, group + d, out_height, out_width, channels, c, in_c)
                if GATED:
                    g = g * factor
                if OFFSET:
                    g = g + term
                dy = upstream(g, v, y_scale, y_shift, y_mean, y_b, y_c, Y_ACT)
                dy = tl.where(valid, rounded(dy, grad.dtype.element_ty), 0.0)
                # rows before the strip: their products with the input are another strip's
                own = tl.where(row >= begin, dy, 0.0)
                for s in tl.static_range(STRIDE):
                    if (s + PAD - STRIDE * d >= 0) and (s + PAD - STRIDE * d < KERNEL):
                        for i in tl.static_range(KERNEL):
                            if NEEDS_DX:
                                w = taps[i * KERNEL + s + PAD - STRIDE * d]
                                gz = put(gz, i * STRIDE + s, tl.fma(dy, w[None, :], gz[i * STRIDE + s]))
                            if NEEDS_DW:
                                product = tl.fma(own, z[i * STRIDE + s], dw[i * KERNEL + s + PAD - STRIDE * d])
                                dw = put(dw, i * KERNEL + s + PAD - STRIDE * d, product)
            if NEEDS_DX:
                if row >= begin:
                    for i in tl.static_range(STRIDE):
                        for s in tl.static_range(STRIDE):
                            h = row * STRIDE - PAD + i
                            column = group * STRIDE + s
                            g = gz[i * STRIDE + s]
                            inside = ((h >= 0) & (h < height) & (column < width))[:, None] & in_c[None, :]
                            line = (image.to(tl.int64) * height + h) * width * channels
                            at = column[:, None] * channels + c[None, :]
                            if NORMALIZED:
                                v = tl.load(x + line + at, mask=inside, other=0.0).to(tl.float32)
                                g = masked(g, normalized(v, scale[None, :], shift[None, :]), ACT)
                            if RESIDUAL:
                                g += tl.load(residual + line + at, mask=inside, other=0.0).to(tl.float32)
                            tl.store(gx + line + at, to_storage(g, gx.dtype.element_ty), mask=inside)
                            if NORMALIZED:
                                g = tl.where(inside, rounded(g, gx.dtype.element_ty), 0.0)
                                sum_g += g
                                sum_gy = tl.fma(g, v - mean[None, :], sum_gy)
                gz = gz[STRIDE * STRIDE :] + tiles(STRIDE * STRIDE, BLOCK_W, BLOCK_C)
            if NEEDS_DW:
                z = z[STRIDE * STRIDE :] + tiles(STRIDE * STRIDE, BLOCK_W, BLOCK_C)
    if NEEDS_DX and NORMALIZED:
        at = sum_partials + program.to(tl.int64) * 2 * channels + c
        tl.store(at, tl.sum(sum_g, 0), mask=in_c)
        tl.store(at + channels, tl.sum(sum_gy, 0), mask=in_c)
    if NEEDS_DW:
        at = dw_partials + program.to(tl.int64) * channels * TAPS + c * TAPS
        for t in tl.static_range(TAPS):
            tl.store(at + t, tl.sum(dw[t], 0), mask=in_c)


def _units(n, rows, columns, block_w, blocks, card):
    """How the strips are cut and shared out: (programs, the kernels' arguments about it)."""
    strip = min(configs.strip(card), max(rows, 1))
    strips, across = triton.cdiv(rows, strip), triton.cdiv(columns, block_w)
    units = n * strips * across
    per_program = max(1, triton.cdiv(units * blocks, configs.programs(card)))
    return triton.cdiv(units, per_program), units, per_program, strip, strips, across


def _check_input(x, weight, bn, act, stride):
    check_map("x", x)
    return _check_layer(x, x.shape[1], weight, bn, act, stride)


def _check_layer(x, channels, weight, bn, act, stride):
    kernel = weight.shape[-1]
    if kernel not in (3, 5) or tuple(weight.shape) != (channels, 1, kernel, kernel):
        raise RuntimeError(f"weight has shape {list(weight.shape)}; expected [{channels}, 1, k, k] with k 3 or 5")
    if stride not in (1, 2):
        raise RuntimeError(f"stride is {stride}; expected 1 or 2")
    check_act("act", act, bn is not None)
    return check_weight(weight, weight.shape, x), table("bn", bn, (5, channels), x), kernel


def depthwise(x, weight, bn, act, stride, moments):
    """Launches ``depthwise_kernel``: (y, moments)."""
    weight, bn, kernel = _check_input(x, weight, bn, act, stride)
    return _forward(config("depthwise", f"k{kernel}", x), x, None, None, weight, bn, act, stride, moments)


def expand_depthwise(x, shift, expand_weight, bn, act, weight, stride, moments):
    """Launches ``depthwise_kernel`` on what an expand layer makes of x: (y, moments)."""
    check_map("x", x)
    channels, inputs = expand_weight.shape[0], x.shape[1]
    expand_weight = check_weight(expand_weight, (channels, inputs, 1, 1), x, "expand_weight")
    shift = table("shift", shift, (inputs,), x)
    weight, bn, kernel = _check_layer(x, channels, weight, bn, act, stride)
    row = config("expand_depthwise", f"k{kernel}", x)
    return _forward(row, x, shift, expand_weight, weight, bn, act, stride, moments)


def _forward(row, x, shift, expand_weight, weight, bn, act, stride, moments):
    (n, inputs, h, w), channels, kernel = x.shape, weight.shape[0], weight.shape[-1]
    y = new_map(x, n, channels, depthwise_size(h, stride), depthwise_size(w, stride))
    blocks = triton.cdiv(channels, row.columns)
    count, units, per_program, strip, strips, across = _units(n, *y.shape[2:], row.rows, blocks, capability(x))
    partials = new_table(x, count, 3, channels) if moments else None
    align_in, align = alignment(inputs), alignment(channels)
    if y.numel():
        with device_of(x):
            depthwise_kernel[(count * blocks,)](
                x, shift, expand_weight, weight, bn, y, partials, units, per_program, h, w, *y.shape[2:], strip, strips,
                across, inputs // align_in, channels // align, ALIGN_IN=align_in, ALIGN=align, ACT=act,
                NORMALIZED=bn is not None, EXPANDED=expand_weight is not None, MOMENTS=moments,
                PRECISION=dot_precision(x), KERNEL=kernel, STRIDE=stride, BLOCK_W=row.rows, BLOCK_C=row.columns,
                BLOCK_K=row.depth, num_warps=row.warps, num_stages=row.stages, **FIXED,
            )  # fmt: skip
    return y, combine_moments(partials) if moments else new_table(x, 0)


def depthwise_backward(
    grad, y, y_bn, coef, y_act, gate, offset, x, weight, bn, act, stride, residual, needs_dx, needs_dw
):
    """Launches ``depthwise_backward_kernel``: (gx, sums, dw)."""
    weight, bn, kernel = _check_input(x, weight, bn, act, stride)
    n, channels, h, w = x.shape
    out_h, out_w = depthwise_size(h, stride), depthwise_size(w, stride)
    check_map("y", y, x, (n, channels, out_h, out_w))
    check_map("grad", grad, x, y.shape)
    check_act("y_act", y_act)
    if residual is not None:
        check_map("residual", residual, x, x.shape)
        check_one_of(residual, bn)
    y_bn, coef = table("y_bn", y_bn, (5, channels), x), table("coef", coef, (2, channels), x)
    gate, offset = table("gate", gate, (n, channels), x), table("offset", offset, (n, channels), x)
    gx = new_map(x, *x.shape) if needs_dx else x.new_empty(0)
    if not (needs_dx or needs_dw):
        return gx, new_table(x, 0), new_table(x, 0)
    row = config("depthwise_backward", f"k{kernel}", x)
    blocks = triton.cdiv(channels, row.columns)
    steps, groups = triton.cdiv(h + kernel // 2, stride), triton.cdiv(w, stride)
    count, units, per_program, strip, strips, across = _units(n, steps, groups, row.rows, blocks, capability(x))
    sums = new_table(x, count, 2, channels) if needs_dx and bn is not None else None
    dw = new_table(x, count, 1, channels * kernel * kernel) if needs_dw else None
    align = alignment(channels)
    if x.numel():
        with device_of(x):
            depthwise_backward_kernel[(count * blocks,)](
                grad, y, y_bn, coef, gate, offset, x, weight, bn, residual, gx, sums, dw,
                units, per_program, h, w, out_h, out_w, strip, strips, across, channels // align, ALIGN=align,
                Y_ACT=y_act, ACT=act, GATED=gate is not None, OFFSET=offset is not None, NORMALIZED=bn is not None,
                RESIDUAL=residual is not None, NEEDS_DX=needs_dx, NEEDS_DW=needs_dw, KERNEL=kernel, STRIDE=stride,
                BLOCK_W=row.rows, BLOCK_C=row.columns, num_warps=row.warps, num_stages=row.stages, **FIXED,
            )  # fmt: skip
    sums = new_table(x, 0) if sums is None else combine_sums(sums, 2)
    return gx, sums, new_table(x, 0) if dw is None else combine_sums(dw, 1).view(weight.shape)
