"""What every stage computes, in plain torch, for any dtype and device: the oracle of all backends.

Nothing here is fast, and nothing is saved on: every stage reads and writes exactly what ``schema.py`` says, rounds to
the storage dtype exactly where a fused kernel must, and does all arithmetic in the accumulate dtype, sums over
positions in float64.  Derivations: docs/mathematics.md.
"""

import torch
import torch.nn.functional as F

from .. import schema
from ..schema import accumulate_dtype

GATE_RATIO = 4.0  # gram: shift only channels with |mean| > 4 std; there x - k is exact (Sterbenz), elsewhere k = 0


# ---- helpers -------------------------------------------------------------------------------------------------------


def _acc(t):
    return t.to(accumulate_dtype(t.dtype))


def _store(t, like):
    """Round to the storage dtype of ``like``, in a fresh channels_last map (the strides the fakes promise)."""
    out = torch.empty(t.shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return out.copy_(t)


def _fresh(t):
    """A contiguous tensor that aliases nothing (custom ops may not return views of their inputs)."""
    return t.clone(memory_format=torch.contiguous_format)


def _none(like):
    return like.new_empty(0, dtype=accumulate_dtype(like.dtype))


def _channel(v):
    return v.view(1, -1, 1, 1)


def _image(v):
    return v[:, :, None, None]


def _sum(t):
    return t.double().sum((0, 2, 3)).to(t.dtype)


def _outer_sum(a, b):
    """Sum over positions of a b^T: [N, I, H, W], [N, J, H, W] -> [I, J]."""
    return torch.einsum("nihw,njhw->ij", a.double(), b.double()).to(a.dtype)


def _act(u, act):
    name = schema.ACTIVATIONS[act]
    if name == "identity":
        return u
    return {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}[name](u)


def _act_grad(u, act):
    """act'(u), with torch's own values at the kinks."""
    name, one = schema.ACTIVATIONS[act], torch.ones_like(u)
    if name == "identity":
        return one
    if name == "relu":
        return (u > 0).to(u.dtype)
    if name == "relu6":
        return torch.ops.aten.hardtanh_backward(one, u, 0.0, 6.0)
    backward = torch.ops.aten.silu_backward if name == "silu" else torch.ops.aten.hardswish_backward
    return backward(one, u)


def _normalized(y, bn):
    return torch.addcmul(_channel(bn[1]), _acc(y), _channel(bn[0]))


def _prologue(x, bn, act, gate=None):
    """act(bn(x)) [* gate], rounded to storage: the operand of a convolution."""
    z = _acc(x) if bn is None else _act(_normalized(x, bn), act)
    if gate is not None:
        z = z * _image(gate)
    return _acc(z.to(x.dtype))


def _matmul(weight, z):
    """1x1 convolution as a matrix product: [O, I] x [N, I, H, W] -> [N, O, H, W]."""
    return torch.einsum("oi,nihw->nohw", _acc(weight).flatten(1), z)


def _taps(padded, weight, stride, height, width):
    """(weight of a tap [1, C, 1, 1], the inputs it meets [N, C, H', W']) of every tap of a depthwise convolution."""
    k = weight.shape[-1]
    for i in range(k):
        for j in range(k):
            rows, columns = slice(i, i + stride * height, stride), slice(j, j + stride * width, stride)
            yield _channel(_acc(weight)[:, 0, i, j]), padded[:, :, rows, columns]


def _conv(z, weight, stride):
    """Depthwise convolution: torch's own is slow in float64."""
    pad = weight.shape[-1] // 2
    height, width = (schema.depthwise_size(size, stride) for size in z.shape[2:])
    out = z.new_zeros(*z.shape[:2], height, width)
    for tap, inputs in _taps(_padded(z, pad, stride), weight, stride, height, width):
        out.addcmul_(tap, inputs)
    return out


def _padded(z, pad, stride):
    # slices of a step may end beyond the padding
    return F.pad(z, (pad, pad + stride, pad, pad + stride))


def _conv_backward(dy, z, weight, stride):
    """Input and weight gradient of the depthwise convolution, in the accumulate dtype."""
    pad, (height, width) = weight.shape[-1] // 2, dy.shape[2:]
    padded = _padded(z, pad, stride)
    gz, dw = torch.zeros_like(padded), []
    pairs = zip(_taps(padded, weight, stride, height, width), _taps(gz, weight, stride, height, width), strict=True)
    for (tap, inputs), (_, gradients) in pairs:
        gradients.addcmul_(tap, dy)
        dw.append(_sum(dy * inputs))
    gz = gz[:, :, pad : pad + z.shape[2], pad : pad + z.shape[3]]
    return gz, torch.stack(dw, 1).view(weight.shape)


def _moments(y, wanted):
    """Mean and biased variance of the stored values (two passes: a constant channel has variance exactly 0)."""
    if not wanted:
        return _none(y)
    v = _acc(y)
    if y.numel() == 0:
        return v.new_zeros(2, y.shape[1])
    # The mean is taken about the first value, so that it is exact for a constant channel.
    first = v[:1, :, :1, :1]
    count = v.numel() // v.shape[1]
    mean = _sum(v - first) / count + first.flatten()
    return torch.stack([mean, _sum((v - _channel(mean)).square()) / count])


def _upstream(grad, y, y_bn, coef, y_act, gate=None, offset=None):
    """g and dy of a backward stage's upstream (schema.py), dy rounded to storage as the operand of a product."""
    g = 0.0 if grad is None else _acc(grad)
    if gate is not None:
        g = g * _image(gate)
    if offset is not None:
        g = g + _image(offset)
    g = g * _act_grad(_normalized(y, y_bn), y_act)
    dy = _channel(y_bn[0]) * g + _channel(coef[0]) * (_acc(y) - _channel(y_bn[2])) + _channel(coef[1])
    return g, _acc(dy.to(y.dtype))


def _sums(g, y, bn):
    return torch.stack([_sum(g), _sum(g * (_acc(y) - _channel(bn[2])))])


def _masked(gz, x, bn, act, residual):
    """Gradient at x's batch norm (mask of the activation applied), or at x itself."""
    if bn is not None:
        return gz * _act_grad(_normalized(x, bn), act)
    return gz if residual is None else gz + _acc(residual)


# ---- forward -------------------------------------------------------------------------------------------------------


def pointwise(x, weight, bn, act, gate, moments):
    y = _store(_matmul(weight, _prologue(x, bn, act, gate)), x)
    return y, _moments(y, moments)


def depthwise(x, weight, bn, act, stride, moments):
    y = _store(_conv(_prologue(x, bn, act), weight, stride), x)
    return y, _moments(y, moments)


def _neighbourhoods(x, stride):
    """The 3x3 neighbourhoods of a zero-padded image, one behind another: [N, C, H, W] -> [N, 9 C, H', W']."""
    k, n = schema.STEM_KERNEL, x.shape[0]
    height, width = (schema.depthwise_size(size, stride) for size in x.shape[2:])
    columns = F.unfold(_acc(x), k, padding=k // 2, stride=stride)
    return columns.view(n, k * k * x.shape[1], height, width)


def stem(x, weight, stride, moments):
    y = _store(_matmul(weight, _neighbourhoods(x, stride)), x)
    return y, _moments(y, moments)


def finalize(moments, gamma, beta, eps, count):
    mean, var = moments.unbind(0)
    rstd = (var + eps).rsqrt()
    scale = rstd if gamma is None else rstd * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    # count 1 never gets here with batch statistics (functional.py refuses it, as torch does)
    unbiased = var * (count / max(count - 1, 1))
    return torch.stack([scale, shift, mean, rstd, unbiased])


def update_running_stats(running_mean, running_var, num_batches_tracked, mean, var, momentum):
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        momentum = num_batches_tracked.to(mean.dtype).reciprocal()
    for running, new in ((running_mean, mean), (running_var, var)):
        running.copy_((1 - momentum) * running.to(new.dtype) + momentum * new)


def normalize(y, bn, act, residual):
    out = _act(_normalized(y, bn), act)
    return _store(out if residual is None else out + _acc(residual), y)


def normalize_gram(y, bn, act, residual):
    out = normalize(y, bn, act, residual)
    return out, gram(out)


def squeeze(y, bn, act):
    u = _normalized(y, bn)
    d = _act_grad(u, act)
    tables = [_act(u, act).mean((2, 3)), d.sum((2, 3)), (d * (_acc(y) - _channel(bn[2]))).sum((2, 3))]
    return torch.stack(tables)


# ---- backward ------------------------------------------------------------------------------------------------------


def normalize_backward(grad, y, bn, act):
    return _sums(_acc(grad) * _act_grad(_normalized(y, bn), act), y, bn)


def finalize_backward(sums, bn, count, batch_stats):
    s, sy = sums.unbind(0)
    scale, rstd = bn[0], bn[3]
    b = -scale * rstd.square() * sy / count if batch_stats else torch.zeros_like(s)
    c = -scale * s / count if batch_stats else torch.zeros_like(s)
    return torch.stack([b, c]), rstd * sy, s.clone()


def depthwise_backward(
    grad, y, y_bn, coef, y_act, gate, offset, x, weight, bn, act, stride, residual, needs_dx, needs_dw
):
    _, dy = _upstream(grad, y, y_bn, coef, y_act, gate, offset)
    gz, dw = _conv_backward(dy, _prologue(x, bn, act), weight, stride)
    gx, sums = x.new_empty(0), _none(x)
    if needs_dx:
        gx = _store(_masked(gz, x, bn, act, residual), x)
        sums = _none(x) if bn is None else _sums(_acc(gx), x, bn)
    return gx, sums, (_fresh(dw) if needs_dw else _none(x))


def pointwise_backward(
    grad, y, y_bn, coef, y_act, offset, x, weight, bn, act, gate, residual, needs_dx, needs_sums, needs_dw
):
    _, dy = _upstream(grad, y, y_bn, coef, y_act, None, offset)
    gx, sums, dw = x.new_empty(0), _none(x), _none(x)
    if needs_dw:
        dw = _outer_sum(dy, _prologue(x, bn, act, gate)).view(weight.shape)
    if needs_dx or needs_sums:
        gz = torch.einsum("oi,nohw->nihw", _acc(weight).flatten(1), dy)
        # With a gate gx is neither gated nor masked: its reader does both, once the gate's own gradient is known.
        gz = gz if gate is not None else _masked(gz, x, bn, act, residual)
        if needs_dx:
            # The sums are of what the next stage reads: the stored value, where it is stored.
            gx = _store(gz, x)
            gz = _acc(gx)
        if needs_sums and bn is not None:
            sums = _sums(gz, x, bn) if gate is None else _image_sums(gz, x, bn, act)
    return gx, sums, dw


def stem_backward(grad, y, y_bn, coef, y_act, x, stride, needs_dy, needs_dw):
    _, dy = _upstream(grad, y, y_bn, coef, y_act)
    dw = _none(x)
    if needs_dw:
        dw = _outer_sum(dy, _neighbourhoods(x, stride)).view(-1, x.shape[1], schema.STEM_KERNEL, schema.STEM_KERNEL)
    return _store(dy, x) if needs_dy else x.new_empty(0), dw


def _image_sums(dz, x, bn, act):
    u = _normalized(x, bn)
    masked = dz * _act_grad(u, act)
    tables = [dz * _act(u, act), masked, masked * (_acc(x) - _channel(bn[2]))]
    return torch.stack([t.sum((2, 3)) for t in tables])


# ---- algebraic mode ------------------------------------------------------------------------------------------------


def _shifted(x, shift):
    return _acc((_acc(x) - _channel(shift)).to(x.dtype))


def _expanded(x, shift, expand_weight, bn, act):
    """z1 = act(bn(W (x - k))) rounded to storage, and its argument; both live in a tile only, in a real kernel."""
    y1k = _matmul(expand_weight, _shifted(x, shift))
    u = torch.addcmul(_channel(bn[1]), y1k, _channel(bn[0]))
    return _acc(_act(u, act).to(x.dtype)), u


def gram(x):
    v = x.double().transpose(0, 1).flatten(1)  # [C, P]
    c, p = v.shape
    if p == 0:
        return _acc(x).new_zeros(c + 2, c)
    mean, std = v.mean(1), v.std(1, correction=0)
    # k must be a value of the storage dtype, or x - k would not be exact
    k = torch.where(mean.abs() > GATE_RATIO * std, mean.to(x.dtype).double(), 0.0)
    d = v - k[:, None]
    m = d.mean(1)
    d = d - m[:, None]
    return torch.cat([d @ d.T / p, (k + m)[None], k[None]]).to(accumulate_dtype(x.dtype))


def expand_finalize(gram, weight, gamma, beta, eps, count):
    c = gram.shape[1]
    w = weight.flatten(1).to(gram.dtype)
    cov, mean, k = gram[:c], gram[c], gram[c + 1]
    var = ((w @ cov) * w).sum(1).clamp(min=0)
    bn = finalize(torch.stack([w @ (mean - k), var]), gamma, beta, eps, count)
    return bn, w @ mean


def expand_depthwise(x, shift, expand_weight, bn, act, weight, stride, moments):
    z, _ = _expanded(x, shift, expand_weight, bn, act)
    y = _store(_conv(z, weight, stride), x)
    return y, _moments(y, moments)


def expand_depthwise_backward(
    grad, y3, y3_bn, y3_coef, y3_act, project_weight, gate, offset, y, y_bn, y_coef, y_act,
    x, shift, expand_weight, bn, act, weight, stride, needs_dx, needs_dw,
):  # fmt: skip
    _, dy3 = _upstream(grad, y3, y3_bn, y3_coef, y3_act)
    dz2 = torch.einsum("oi,nohw->nihw", _acc(project_weight).flatten(1), dy3)
    _, dy2 = _upstream(dz2, y, y_bn, y_coef, y_act, gate, offset)
    z1, u1 = _expanded(x, shift, expand_weight, bn, act)
    dz1, dw = _conv_backward(dy2, z1, weight, stride)
    g1 = _acc((dz1 * _act_grad(u1, act)).to(x.dtype))
    xk = _shifted(x, shift)
    gramgrad = torch.cat([_outer_sum(g1, xk), _sum(g1)[:, None]], 1)
    dx = x.new_empty(0)
    if needs_dx:
        dx = _store(torch.einsum("ec,nehw->nchw", _scaled_weight(expand_weight, bn), g1), x)
    return dx, gramgrad, (_fresh(dw) if needs_dw else _none(x))


def _scaled_weight(weight, bn):
    """W~ = round(diag(scale) W): dx' and its correction must use the same rounded weights."""
    return _acc((bn[0][:, None] * _acc(weight).flatten(1)).to(weight.dtype))


def expand_finalize_backward(gramgrad, gram, shift, bn, weight, count):
    e, c = weight.shape[:2]
    w = weight.flatten(1).to(gramgrad.dtype)
    g, s = gramgrad[:, :c], gramgrad[:, c]
    scale, mean_k, rstd = bn[0], bn[2], bn[3]
    sy = (w * g).sum(1) - s * mean_k
    dw = scale[:, None] * (g + torch.outer(s, shift))
    mix = g.new_zeros(c + 1, c)
    if gram is not None:
        cov, mean = gram[:c], gram[c]
        # sum dy1 x^T = a sum g1 (x-mu)^T + b W n Cov: the terms in c and in the mean cancel
        dw = scale[:, None] * (g - torch.outer(s, mean - shift))
        dw = dw + (-scale * rstd.square() * sy / count)[:, None] * (w @ cov) * count
        scaled = _scaled_weight(weight, bn).to(g.dtype)
        m = scaled.T @ ((-rstd.square() * sy / count)[:, None] * w)
        v = scaled.T @ (-s / count) - m @ (mean - shift)
        mix = torch.cat([m, v[None]])
    return dw.reshape(weight.shape).contiguous(), rstd * sy, s.clone(), mix


def expand_mix(dx_partial, x, shift, mix, residual):
    c = x.shape[1]
    xk = _shifted(x, shift)
    dx = _acc(dx_partial) + torch.einsum("oc,nchw->nohw", mix[:c], xk) + _channel(mix[c])
    return _store(dx if residual is None else dx + _acc(residual), x)


IMPLEMENTATIONS = {name: globals()[name] for name in schema.NAMES}


def register(library):
    """Serve the reference for every device: it is plain torch."""
    for name, function in IMPLEMENTATIONS.items():
        library.impl(name, function, "CompositeExplicitAutograd")
