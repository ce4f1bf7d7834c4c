"""Squeeze-excite inside a block: the gate is a few small matrix products between stages, in plain torch.

Its pooled input costs the forward one read; the backward needs none, because the per-image sums that the project
layer's backward stage gathers determine both the gate's gradient and the sums of the batch norm before it.
"""

import torch
import torch.nn.functional as F

TENSORS = 4  # weight and bias of both convolutions


def linear(q, weight, bias):
    """A 1x1 convolution of a pooled map q [N, C], in q's dtype."""
    return F.linear(q, weight.flatten(1).to(q.dtype), None if bias is None else bias.to(q.dtype))


def _mask(kept):
    return lambda g, u: g * kept(u).to(g.dtype)


# (function, gradient at its argument u from the gradient g at its value)
_ACTIVATIONS = {
    "relu": (F.relu, _mask(lambda u: u > 0)),
    "relu6": (F.relu6, _mask(lambda u: (u > 0) & (u < 6))),
    "hardswish": (F.hardswish, torch.ops.aten.hardswish_backward),
    "silu": (F.silu, torch.ops.aten.silu_backward),
}
_GATES = {
    "hardsigmoid": (F.hardsigmoid, torch.ops.aten.hardsigmoid_backward),
    "sigmoid": (torch.sigmoid, lambda g, u: torch.ops.aten.sigmoid_backward(g, torch.sigmoid(u))),
}


def gate(names, q, excite):
    """Per-image gate [N, C] from the pooled map q [N, C]; also the arguments of the activation and of the gate.

    ``names``: of the activation and the gate.
    """
    reduce_weight, reduce_bias, expand_weight, expand_bias = excite
    inner = linear(q, reduce_weight, reduce_bias)
    argument = linear(_ACTIVATIONS[names[0]][0](inner), expand_weight, expand_bias)
    return _GATES[names[1]][0](argument), inner, argument


def backward(names, stage_sums, squeezed, gate_, inner, argument, excite, area):
    """From the image table [3, N, C] and the squeeze table [3, N, C] (schema.py): everything about the gate.

    Returns (offset [N, C], sums [2, C] of the batch norm before the gate, gradients of the four parameters).
    """
    reduce_weight, reduce_bias, expand_weight, expand_bias = excite
    d_gate, masked, masked_y = stage_sums.unbind(0)
    q, slope, slope_y = squeezed.unbind(0)
    activation, activation_backward = _ACTIVATIONS[names[0]]
    d_argument = _GATES[names[1]][1](d_gate.contiguous(), argument)
    d_inner = activation_backward(d_argument @ expand_weight.flatten(1).to(q.dtype), inner)
    offset = d_inner @ reduce_weight.flatten(1).to(q.dtype) / area
    # g = (gate dz + offset) act'(u), summed over a whole image by its parts
    sums = torch.stack([(gate_ * m + offset * s).sum(0) for m, s in ((masked, slope), (masked_y, slope_y))])
    grads = [
        (d_inner.T @ q).view(reduce_weight.shape),
        None if reduce_bias is None else d_inner.sum(0),
        (d_argument.T @ activation(inner)).view(expand_weight.shape),
        None if expand_bias is None else d_argument.sum(0),
    ]
    return offset, sums, grads
