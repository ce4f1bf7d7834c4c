"""Squeeze-excite inside a block: the gate is a few small matrix products between stages, in plain torch.

Its pooled input costs the forward one read; the backward needs none, because the per-image sums that the project
layer's backward stage gathers determine both the gate's gradient and the sums of the batch norm before it.
"""

import torch
import torch.nn.functional as F


def _linear(q, weight, bias):
    return F.linear(q, weight.flatten(1).to(q.dtype), None if bias is None else bias.to(q.dtype))


def gate(q, excite):
    """Per-image gate [N, C] from the pooled map q [N, C]; also the hidden value and the gate's argument."""
    reduce_weight, reduce_bias, expand_weight, expand_bias = excite
    hidden = F.relu(_linear(q, reduce_weight, reduce_bias))
    argument = _linear(hidden, expand_weight, expand_bias)
    return F.hardsigmoid(argument), hidden, argument


def backward(stage_sums, squeezed, gate_, hidden, argument, excite, area):
    """From the image table [3, N, C] and the squeeze table [3, N, C] (schema.py): everything about the gate.

    Returns (offset [N, C], sums [2, C] of the batch norm before the gate, gradients of the four parameters).
    """
    reduce_weight, reduce_bias, expand_weight, expand_bias = excite
    d_gate, masked, masked_y = stage_sums.unbind(0)
    q, slope, slope_y = squeezed.unbind(0)
    d_argument = torch.ops.aten.hardsigmoid_backward(d_gate.contiguous(), argument)
    d_hidden = (d_argument @ expand_weight.flatten(1).to(q.dtype)) * (hidden > 0).to(q.dtype)
    offset = d_hidden @ reduce_weight.flatten(1).to(q.dtype) / area
    # g = (gate dz + offset) act'(u), summed over a whole image by its parts
    sums = torch.stack([(gate_ * m + offset * s).sum(0) for m, s in ((masked, slope), (masked_y, slope_y))])
    grads = [
        (d_hidden.T @ q).view(reduce_weight.shape),
        None if reduce_bias is None else d_hidden.sum(0),
        (d_argument.T @ hidden).view(expand_weight.shape),
        None if expand_bias is None else d_argument.sum(0),
    ]
    return offset, sums, grads
