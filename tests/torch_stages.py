"""The stages by torch's own ops in the storage dtype: what a backend's error is measured against (the pass rule).

Every intermediate is rounded to the storage dtype and every sum is torch's, as in the same network without fusing.
"""

import torch
import torch.nn.functional as F

from mnet_kernels.schema import ACTIVATIONS
from mnet_kernels.stages import reference


def _channel(v):
    return v.view(1, -1, 1, 1)


def _act_backward(g, u, act):
    """g * act'(u) by torch's own backward."""
    name = ACTIVATIONS[act]
    if name == "relu":
        return torch.ops.aten.threshold_backward(g, u, 0)
    if name == "relu6":
        return torch.ops.aten.hardtanh_backward(g, u, 0.0, 6.0)
    backward = {"hardswish": torch.ops.aten.hardswish_backward, "silu": torch.ops.aten.silu_backward}.get(name)
    return g if backward is None else backward(g, u)


def depthwise(x, weight, bn, act, stride, moments):
    z = x if bn is None else reference._act(_normalize(x, bn), act)
    y = F.conv2d(z, weight, None, stride, weight.shape[-1] // 2, 1, weight.shape[0])
    return y, _moments(y, moments)


def _moments(y, wanted):
    v = y.float()
    return torch.stack([v.mean((0, 2, 3)), v.var((0, 2, 3), correction=0)]) if wanted else v.new_empty(0)


def _normalize(x, bn):
    """The affine in the storage dtype, as batch_norm returns it."""
    return (x.float() * _channel(bn[0]) + _channel(bn[1])).to(x.dtype)


def depthwise_backward(
    grad, y, y_bn, coef, y_act, gate, offset, x, weight, bn, act, stride, residual, needs_dx, needs_dw
):
    dy = _upstream(grad, y, y_bn, coef, y_act, gate, offset)
    z = x if bn is None else reference._act(_normalize(x, bn), act)
    gz, dw = _convolution_backward(dy, z, weight, stride)
    none = gz.new_empty(0)
    if bn is None:
        gx, sums = (gz if residual is None else gz + residual), none
    else:
        gx = _act_backward(gz, _normalize(x, bn), act)
        sums = _sums(gx, x, bn)
    return gx if needs_dx else none, sums if needs_dx else none, dw if needs_dw else none


def _upstream(grad, y, y_bn, coef, y_act, gate=None, offset=None):
    """dy, the gradient at a convolution's output."""
    g = torch.zeros_like(y) if grad is None else grad
    if gate is not None:
        g = g * gate[:, :, None, None].to(g.dtype)
    if offset is not None:
        g = g + offset[:, :, None, None].to(g.dtype)
    g = _act_backward(g, _normalize(y, y_bn), y_act)
    dy = _channel(y_bn[0]) * g.float() + _channel(coef[0]) * (y.float() - _channel(y_bn[2])) + _channel(coef[1])
    return dy.to(y.dtype)


def _convolution_backward(dy, z, weight, stride):
    """Gradients of input and weight."""
    pad, groups = weight.shape[-1] // 2, 1 if weight.shape[-1] == 1 else weight.shape[0]
    gz, dw, _ = torch.ops.aten.convolution_backward(
        dy, z, weight, None, [stride, stride], [pad, pad], [1, 1], False, [0, 0], groups, [True, True, False]
    )
    return gz, dw


def _sums(g, y, bn):
    g = g.float()
    return torch.stack([g.sum((0, 2, 3)), (g * (y.float() - _channel(bn[2]))).sum((0, 2, 3))])


def stem(x, weight, stride, moments):
    y = F.conv2d(x, weight, None, stride, 1)
    return y, _moments(y, moments)


def stem_backward(grad, y, y_bn, coef, y_act, x, stride, needs_dy, needs_dw):
    dy, none = _upstream(grad, y, y_bn, coef, y_act), x.new_empty(0)
    weight = x.new_empty(y.shape[1], x.shape[1], 3, 3)
    _, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [stride, stride], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    return dy if needs_dy else none, dw if needs_dw else none


def normalize(y, bn, act, residual):
    out = reference._act(_normalize(y, bn), act)
    return out if residual is None else out + residual


def normalize_backward(grad, y, bn, act):
    return _sums(_act_backward(grad, _normalize(y, bn), act), y, bn)


def squeeze(y, bn, act):
    u = _normalize(y, bn)
    d = _act_backward(torch.ones_like(u), u, act).float()
    centred = y.float() - _channel(bn[2])
    return torch.stack([reference._act(u, act).mean((2, 3)).float(), d.sum((2, 3)), (d * centred).sum((2, 3))])


def pointwise(x, weight, bn, act, gate, moments):
    z = x if bn is None else reference._act(_normalize(x, bn), act)
    y = F.conv2d(z if gate is None else z * gate[:, :, None, None].to(z.dtype), weight)
    return y, _moments(y, moments)


def pointwise_backward(
    grad, y, y_bn, coef, y_act, offset, x, weight, bn, act, gate, residual, needs_dx, needs_sums, needs_dw
):
    dy = _upstream(grad, y, y_bn, coef, y_act, None, offset)
    z = x if bn is None else reference._act(_normalize(x, bn), act)
    operand = z if gate is None else z * gate[:, :, None, None].to(z.dtype)
    gz, dw = _convolution_backward(dy, operand, weight, 1)
    none = x.new_empty(0)
    if gate is not None and bn is not None:
        u = _normalize(x, bn)
        masked = _act_backward(gz, u, act).float()
        centred = x.float() - _channel(bn[2])
        sums = torch.stack([t.sum((2, 3)) for t in (gz.float() * z.float(), masked, masked * centred)])
    elif bn is not None:
        gz = _act_backward(gz, _normalize(x, bn), act)
        sums = _sums(gz, x, bn)
    else:
        gz, sums = (gz if residual is None else gz + residual), none
    return gz if needs_dx else none, sums if needs_sums else none, dw if needs_dw else none


def gram(x):
    table = reference.gram(x)  # its shift is a choice, not a result
    v = x.float().transpose(0, 1).flatten(1)
    d = v - v.mean(1, keepdim=True)
    return torch.cat([d @ d.T / v.shape[1], v.mean(1)[None], table[-1:]])


def normalize_gram(y, bn, act, residual):
    out = normalize(y, bn, act, residual)
    return out, gram(out)


def _expanded(x, shift, weight, bn):
    """The argument of the activation behind the expand layer."""
    return _normalize(F.conv2d((x.float() - _channel(shift)).to(x.dtype), weight), bn)


def expand_depthwise(x, shift, expand_weight, bn, act, weight, stride, moments):
    z = reference._act(_expanded(x, shift, expand_weight, bn), act)
    return depthwise(z, weight, None, 0, stride, moments)


def expand_depthwise_backward(
    grad, y3, y3_bn, y3_coef, y3_act, project_weight, gate, offset, y, y_bn, y_coef, y_act,
    x, shift, expand_weight, bn, act, weight, stride, needs_dx, needs_dw,
):  # fmt: skip
    dz2, _ = _convolution_backward(_upstream(grad, y3, y3_bn, y3_coef, y3_act), y, project_weight, 1)
    dy2 = _upstream(dz2, y, y_bn, y_coef, y_act, gate, offset)
    u1 = _expanded(x, shift, expand_weight, bn)
    dz1, dw = _convolution_backward(dy2, reference._act(u1, act), weight, stride)
    g1 = _act_backward(dz1, u1, act)
    scaled = (bn[0][:, None, None, None] * expand_weight.float()).to(x.dtype)
    dx, _ = _convolution_backward(g1, x, scaled, 1)
    _, dw1 = _convolution_backward(g1, (x.float() - _channel(shift)).to(x.dtype), expand_weight, 1)
    table = torch.cat([dw1.flatten(1).float(), g1.float().sum((0, 2, 3))[:, None]], 1)
    none = x.new_empty(0)
    return dx if needs_dx else none, table, dw if needs_dw else none


# these work on small tables in float32, or element by element: the reference is torch's own arithmetic
finalize = reference.finalize
finalize_backward = reference.finalize_backward
update_running_stats = reference.update_running_stats
expand_finalize = reference.expand_finalize
expand_finalize_backward = reference.expand_finalize_backward
expand_mix = reference.expand_mix
