"""What the kernels share: activations, rounding to storage, the prologues, moments.  Device code only.

Activations are read as matrices [positions, channels] (channels_last memory).  A tile starts at a 64-bit position;
offsets within it are 32-bit.  Everything is float32 between a load and a store.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def activate(u, ACT: tl.constexpr):
    """act(u); the comparisons are such that a NaN passes, as it does in torch."""
    if ACT == 1:
        u = tl.where(u < 0.0, 0.0, u)
    elif ACT == 2:
        u = tl.where(u < 0.0, 0.0, u)
        u = tl.where(u > 6.0, 6.0, u)
    elif ACT == 3:
        v = u + 3.0
        v = tl.where(v < 0.0, 0.0, v)
        u = u * tl.where(v > 6.0, 6.0, v) * (1.0 / 6.0)
    elif ACT == 4:
        u = u / (1.0 + tl.exp(-u))
    return u


@triton.jit
def masked(g, u, ACT: tl.constexpr):
    """g act'(u), with torch's derivatives at the kinks."""
    if ACT == 1:
        g = g * tl.where(u <= 0.0, 0.0, 1.0)
    elif ACT == 2:
        g = g * tl.where((u <= 0.0) | (u >= 6.0), 0.0, 1.0)
    elif ACT == 3:
        g = g * tl.where(u <= -3.0, 0.0, tl.where(u >= 3.0, 1.0, u * (1.0 / 3.0) + 0.5))
    elif ACT == 4:
        s = 1.0 / (1.0 + tl.exp(-u))
        g = g * s * (1.0 + u * (1.0 - s))
    return g


@triton.jit
def to_storage(v, DTYPE: tl.constexpr):
    """Round to the storage dtype, to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # the interpreter's own conversion to bfloat16 truncates
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v.to(DTYPE)


@triton.jit
def rounded(v, DTYPE: tl.constexpr):
    """The float32 value of v as stored."""
    return to_storage(v, DTYPE).to(tl.float32)


@triton.jit
def operand(v, DTYPE: tl.constexpr):
    """An operand of tl.dot: in the storage dtype, or upcast again where the interpreter's bfloat16 product is wrong."""
    v = to_storage(v, DTYPE)
    if INTERPRETED and tl.bfloat16 == DTYPE:
        v = v.to(tl.float32)
    return v


@triton.jit
def normalized(v, scale, shift):
    """scale * v + shift, in one rounding: forward and backward must agree on the side of a kink."""
    return tl.fma(v, scale, shift)


@triton.jit
def chunk_rows(chunk, segment_rows, per_segment, rows):
    """First and past-the-end position (int64) of a chunk: every segment is cut into ``per_segment`` chunks."""
    segment = (chunk // per_segment).to(tl.int64)
    begin = segment * segment_rows + (chunk % per_segment).to(tl.int64) * rows
    return begin, tl.minimum(begin + rows, (segment + 1) * segment_rows)


@triton.jit
def load_image_values(table, row, p, c, valid, channels, image_rows):
    """A tile of what a table [images, channels] holds for the image of each position.

    The division is of 32-bit offsets from the tile's first image: one of 64-bit positions costs registers.
    """
    first = row // image_rows
    image = (p + (row - first * image_rows)).to(tl.int32) // image_rows
    return tl.load(table + first * channels + (image[:, None] * channels + c[None, :]), mask=valid, other=0.0)


@triton.jit
def load_operand(
    x, bn, gate, row, p, c, valid, channels, image_rows,
    ACT: tl.constexpr, NORMALIZED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """A tile of act(bn(x)) [* gate], rounded to storage, zero where not valid: what a convolution multiplies."""
    in_c = c < channels
    v = tl.load(x + row * channels + (p[:, None] * channels + c[None, :]), mask=valid, other=0.0).to(tl.float32)
    if NORMALIZED:
        scale = tl.load(bn + c, mask=in_c, other=0.0)
        shift = tl.load(bn + channels + c, mask=in_c, other=0.0)
        v = activate(normalized(v, scale[None, :], shift[None, :]), ACT)
    if GATED:
        v = v * load_image_values(gate, row, p, c, valid, channels, image_rows)
    if NORMALIZED:
        v = tl.where(valid, v, 0.0)
    return operand(v, x.dtype.element_ty)


@triton.jit
def upstream(grad, y, scale, shift, mean, b, c, ACT: tl.constexpr):
    """dy of the batch norm and activation that follow a convolution, from raw pieces (schema.py), in float32."""
    g = masked(grad, normalized(y, scale, shift), ACT)
    return tl.fma(scale, g, tl.fma(b, y - mean, c))


@triton.jit
def load_upstream(
    grad, y, y_bn, coef, offset, row, p, e, valid, channels, image_rows, Y_ACT: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """A tile of dy, rounded to storage, zero where not valid.  OFFSET: an image's offset takes the place of grad."""
    in_e = e < channels
    at = p[:, None] * channels + e[None, :]
    if OFFSET:
        g = load_image_values(offset, row, p, e, valid, channels, image_rows)
    else:
        g = tl.load(grad + row * channels + at, mask=valid, other=0.0).to(tl.float32)
    v = tl.load(y + row * channels + at, mask=valid, other=0.0).to(tl.float32)
    scale = tl.load(y_bn + e, mask=in_e, other=0.0)[None, :]
    shift = tl.load(y_bn + channels + e, mask=in_e, other=0.0)[None, :]
    mean = tl.load(y_bn + 2 * channels + e, mask=in_e, other=0.0)[None, :]
    b = tl.load(coef + e, mask=in_e, other=0.0)[None, :]
    c = tl.load(coef + channels + e, mask=in_e, other=0.0)[None, :]
    dy = tl.where(valid, upstream(g, v, scale, shift, mean, b, c, Y_ACT), 0.0)
    return operand(dy, y.dtype.element_ty)


# ---- moments: of short runs about one of their values or near their mean, merged by Chan's formula -----------------


@triton.jit
def first_row(v):
    """Row 0 of a tile."""
    return tl.sum(tl.where(tl.arange(0, v.shape[0])[:, None] == 0, v, 0.0), 0)


@triton.jit
def near_mean(v, valid, count):
    """The mean of a tile's ``count`` valid rows, nearly: the value itself where they are all the same."""
    first = first_row(v)
    return first + tl.sum(tl.where(valid, v - first[None, :], 0.0), 0) / count


@triton.jit
def from_shifted(count, shift, sum1, sum2):
    """(mean, M2) of ``count`` values from the sums of their distances from ``shift``.

    The closer that is to their mean, the less is lost; a constant run has it exactly.
    """
    delta = sum1 / count
    m2 = sum2 - sum1 * delta
    return shift + delta, tl.where(m2 < 0.0, 0.0, m2)


@triton.jit
def merge(count, mean, m2, other_count, other_mean, other_m2):
    """Chan's formula; equal means add exactly nothing.  other_count > 0."""
    delta = other_mean - mean
    weight = other_count / (count + other_count)
    return count + other_count, mean + delta * weight, m2 + other_m2 + delta * delta * (count * weight)


@triton.jit
def merge_tile(count, mean, m2, v, valid, added):
    """The moments of a tile's ``added`` valid rows merged into those of a run."""
    shift = near_mean(v, valid, added)
    d = tl.where(valid, v - shift[None, :], 0.0)
    tile_mean, tile_m2 = from_shifted(added, shift, tl.sum(d, 0), tl.sum(d * d, 0))
    return merge(count, mean, m2, added, tile_mean, tile_m2)


@triton.jit
def store_moments(partials, chunk, count, mean, m2, channels, c, in_c):
    """A chunk's row of partials [chunks, 3, channels]: count, mean, M2."""
    at = partials + chunk.to(tl.int64) * 3 * channels + c
    tl.store(at, tl.zeros_like(mean) + count, mask=in_c)
    tl.store(at + channels, mean, mask=in_c)
    tl.store(at + 2 * channels, m2, mask=in_c)


@triton.jit
def merge_gram(products, count, added, delta_i, delta_j, rest_i, rest_j):
    """Chan's formula of products of two channels' values about their means, of which those of a tile are in already.

    delta: the tile's mean less the run's; rest: the tile's mean less the value that was subtracted for it.
    """
    weight = count * added / (count + added)
    products += (weight * delta_i)[:, None] * delta_j[None, :]
    return products - (added * rest_i)[:, None] * rest_j[None, :]


# ---- tuples of tiles ----------------------------------------------------------------------------------------------


@triton.jit
def tiles(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """COUNT tiles of zeros."""
    zero = tl.zeros((ROWS, COLUMNS), tl.float32)
    group = (zero,)
    for _ in tl.static_range(COUNT - 1):
        group = group + (zero,)
    return group


@triton.jit
def put(group, i: tl.constexpr, value):
    """The tuple with item i replaced."""
    return group[:i] + (value,) + group[i + 1 :]
