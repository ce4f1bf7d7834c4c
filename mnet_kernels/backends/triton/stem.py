"""Dense 3x3 convolution of an image (the stem of a network): forward; dy and the weight gradient in one pass.

Matrix products as in pointwise.py, whose depth is the taps of a neighbourhood, image channel first: 27 of an image with
three channels.  No neighbourhood is ever in memory: a tile of them is gathered from the image, of any strides, each
value up to nine times, from the first-level cache all but once.
"""

import triton
import triton.language as tl

from ...schema import STEM_CHANNELS, STEM_KERNEL, depthwise_size
from .combine import combine_moments, combine_sums
from .device import chunk_rows, load_upstream, merge_tile, operand, rounded, store_moments, to_storage
from .launch import (
    FIXED,
    alignment,
    capability,
    check_act,
    check_map,
    check_storage,
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

_IMAGE = [
    "taps", "height", "width", "out_height", "out_width", "stride_n", "stride_c", "stride_h", "stride_w",
]  # fmt: skip
_COUNTS = ["segment_rows", "per_segment", "chunk_size", *_IMAGE]


@triton.jit
def load_neighbours(
    x, row, p, t, valid, height, width, out_height, out_width, stride_n, stride_c, stride_h, stride_w,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """[positions, taps] of the 3x3 neighbourhoods of a zero-padded image.

    Of positions and of taps apart the offsets are 64-bit: an image may be a slice of anything.
    """
    image_rows = out_height * out_width
    first = row // image_rows
    q = (p + (row - first * image_rows)).to(tl.int32)
    at = q % image_rows
    h, w = at // out_width * STRIDE - 1, at % out_width * STRIDE - 1
    c, i, j = t // 9, t % 9 // 3, t % 3
    rows, columns = h[:, None] + i[None, :], w[:, None] + j[None, :]
    inside = valid & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    of_position = (first + q // image_rows) * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    of_tap = c.to(tl.int64) * stride_c + i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w
    return tl.load(x + (of_position[:, None] + of_tap[None, :]), mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_COUNTS)
def stem_kernel(
    x, weight, y, partials, segment_rows, per_segment, chunk_size, taps, height, width, out_height, out_width,
    stride_n, stride_c, stride_h, stride_w, units_out, ALIGN_OUT: tl.constexpr, STRIDE: tl.constexpr,
    MOMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """y = the convolution of an image; partials [chunks, 3, E]: count, mean, M2 of the stored values."""
    outputs = units_out * ALIGN_OUT
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
        for start in range(0, taps, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            z = load_neighbours(
                x, row, p, t, in_p[:, None] & (t < taps)[None, :], height, width, out_height, out_width,
                stride_n, stride_c, stride_h, stride_w, STRIDE,
            )  # fmt: skip
            w = tl.load(weight + (e[None, :] * taps + t[:, None]), mask=(t < taps)[:, None] & in_e[None, :], other=0.0)
            z, w = operand(z, x.dtype.element_ty), operand(w.to(tl.float32), weight.dtype.element_ty)
            acc = tl.dot(z, w, acc, input_precision=PRECISION)
        valid = in_p[:, None] & in_e[None, :]
        tl.store(
            y + row * outputs + (p[:, None] * outputs + e[None, :]), to_storage(acc, y.dtype.element_ty), mask=valid
        )
        if MOMENTS:
            v = rounded(acc, y.dtype.element_ty)
            count, mean, m2 = merge_tile(count, mean, m2, v, valid, tl.minimum(end - row, BLOCK_P).to(tl.float32))
    if MOMENTS:
        store_moments(partials, chunk, count, mean, m2, outputs, e, in_e)


@triton.jit(do_not_specialize=_COUNTS)
def stem_backward_kernel(
    grad, y, y_bn, coef, x, dy, partials, segment_rows, per_segment, chunk_size, taps, height, width, out_height,
    out_width, stride_n, stride_c, stride_h, stride_w, units_out, ALIGN_OUT: tl.constexpr, Y_ACT: tl.constexpr,
    STRIDE: tl.constexpr, NEEDS_DY: tl.constexpr, NEEDS_DW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dy; partials [chunks, E, taps] = sum over a chunk's positions of dy and their neighbourhoods."""
    outputs = units_out * ALIGN_OUT
    t_blocks, e_blocks = tl.cdiv(taps, BLOCK_T), tl.cdiv(outputs, BLOCK_E)
    if not NEEDS_DW:
        t_blocks = 1
    pid = tl.program_id(0)
    t_block = pid % t_blocks
    t = t_block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = (pid // t_blocks % e_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = pid // t_blocks // e_blocks
    p = tl.arange(0, BLOCK_P)
    writes = e < tl.where(t_block == 0, outputs, 0)  # dy: once
    begin, end = chunk_rows(chunk, segment_rows, per_segment, chunk_size)
    acc = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    for row in range(begin, end, BLOCK_P):
        in_p = p < end - row
        valid = in_p[:, None] & (e < outputs)[None, :]
        g = load_upstream(grad, y, y_bn, coef, None, row, p, e, valid, outputs, 1, Y_ACT, False)
        if NEEDS_DY:
            at = dy + row * outputs + (p[:, None] * outputs + e[None, :])
            tl.store(at, to_storage(g.to(tl.float32), dy.dtype.element_ty), mask=valid & writes[None, :])
        if NEEDS_DW:
            z = load_neighbours(
                x, row, p, t, in_p[:, None] & (t < taps)[None, :], height, width, out_height, out_width,
                stride_n, stride_c, stride_h, stride_w, STRIDE,
            )  # fmt: skip
            acc = tl.dot(tl.trans(g), operand(z, x.dtype.element_ty), acc, input_precision=PRECISION)
    if NEEDS_DW:
        at = partials + chunk.to(tl.int64) * outputs * taps + (e[:, None] * taps + t[None, :])
        tl.store(at, acc, mask=(e < outputs)[:, None] & (t < taps)[None, :])


def _check_image(x, stride):
    check_storage("x", x)
    if not 1 <= x.shape[1] <= STEM_CHANNELS or not x.shape[2] or not x.shape[3]:
        raise RuntimeError(
            f"x has shape {list(x.shape)}; expected an image of 1 to {STEM_CHANNELS} channels, H and W of at least 1; "
            "use torch.nn.functional.conv2d for more"
        )
    if stride not in (1, 2):
        raise RuntimeError(f"stride is {stride}; expected 1 or 2")


def _image(x, stride):
    """The kernels' arguments about an image: taps, sizes, strides."""
    out = (depthwise_size(size, stride) for size in x.shape[2:])
    return x.shape[1] * STEM_KERNEL * STEM_KERNEL, *x.shape[2:], *out, *x.stride()


def stem(x, weight, stride, moments):
    """Launches ``stem_kernel``: (y, moments)."""
    _check_image(x, stride)
    outputs = weight.shape[0]
    weight = check_weight(weight, (outputs, x.shape[1], STEM_KERNEL, STEM_KERNEL), x)
    taps, height, width, out_h, out_w, *strides = _image(x, stride)
    y = new_map(x, x.shape[0], outputs, out_h, out_w)
    row, align = config("stem", "any", x), alignment(outputs)
    blocks = triton.cdiv(outputs, row.columns)
    cut = chunks(1, positions(y), row.rows, blocks, capability(x))
    partials = new_table(x, cut.count, 3, outputs) if moments else None
    if y.numel():
        with device_of(x):
            stem_kernel[(cut.count * blocks,)](
                x, weight, y, partials, cut.segment, cut.per_segment, cut.rows, taps, height, width, out_h, out_w,
                *strides, outputs // align, ALIGN_OUT=align, STRIDE=stride, MOMENTS=moments,
                PRECISION=dot_precision(x), BLOCK_P=row.rows, BLOCK_E=row.columns, BLOCK_T=row.depth,
                num_warps=row.warps, num_stages=row.stages, **FIXED,
            )  # fmt: skip
    return y, combine_moments(partials) if moments else new_table(x, 0)


def stem_backward(grad, y, y_bn, coef, y_act, x, stride, needs_dy, needs_dw):
    """Launches ``stem_backward_kernel``: (dy, dw)."""
    _check_image(x, stride)
    taps, height, width, out_h, out_w, *strides = _image(x, stride)
    check_map("y", y)
    outputs = y.shape[1]
    check_map("y", y, x, (x.shape[0], outputs, out_h, out_w))
    check_map("grad", grad, x, y.shape)
    check_act("y_act", y_act)
    y_bn, coef = table("y_bn", y_bn, (5, outputs), x), table("coef", coef, (2, outputs), x)
    dy = new_map(x, *y.shape) if needs_dy else x.new_empty(0)
    if not (needs_dy or needs_dw):
        return dy, new_table(x, 0)
    row, align = config("stem_backward", "any", x), alignment(outputs)
    blocks = triton.cdiv(outputs, row.rows) * (triton.cdiv(taps, row.columns) if needs_dw else 1)
    cut = of_short_runs(chunks(1, positions(y), row.depth, blocks, capability(x)))
    partials = new_table(x, cut.count, 1, outputs * taps) if needs_dw else None
    if y.numel():
        with device_of(x):
            stem_backward_kernel[(cut.count * blocks,)](
                grad, y, y_bn, coef, x, dy, partials, cut.segment, cut.per_segment, cut.rows, taps, height, width,
                out_h, out_w, *strides, outputs // align, ALIGN_OUT=align, Y_ACT=y_act, STRIDE=stride,
                NEEDS_DY=needs_dy, NEEDS_DW=needs_dw, PRECISION=dot_precision(x), BLOCK_E=row.rows,
                BLOCK_T=row.columns, BLOCK_P=row.depth, num_warps=row.warps, num_stages=row.stages, **FIXED,
            )  # fmt: skip
    if not needs_dw:
        return dy, new_table(x, 0)
    return dy, combine_sums(partials, 1).view(outputs, x.shape[1], STEM_KERNEL, STEM_KERNEL)
