"""Chain mode: every raw convolution output is written once, normalised as it is read, its moments taken as it is
written; backward alike (docs/mathematics.md, "Chain")."""

import torch

from ..schema import IDENTITY
from . import excite as se
from .batch_norm import PER_LAYER, backward_coefficients, coefficients, output


def _source(block, x, extra):
    """The block's input as its first stage reads it: (map, bn table or None, activation)."""
    return (x, None, IDENTITY) if block.source_act is None else (x, extra[-1], block.source_act)


def _image_gradient(dy, x, weight, stride):
    """The gradient of the stem's input, which is rarely wanted, by torch's own op."""
    padding, dilation, wanted = [1, 1], [1, 1], [True, False, False]
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, [stride, stride], padding, dilation, False, [0, 0], 1, wanted
    )[0]


def forward(stage, block, x, layers, weights, extra):
    """Returns (out, saved tensors, [mean, unbiased variance] of every layer with batch statistics).

    ``extra``: squeeze-excite's tensors, then x's bn table if x is raw.  out is (map, bn table) if ``block.raw``, (map,
    its gram) if ``block.gives_gram``, and [N, C] if ``block.pooled``.
    """
    y, bn, act = _source(block, x, extra)
    gate, gates, maps, bns, stats = None, [], [], [], []
    for i, (layer, weight) in enumerate(zip(block.layers, weights, strict=True)):
        if block.excite and i == len(weights) - 1:
            squeezed = stage.squeeze(y, bn, act)
            gates = [squeezed, *se.gate(block.excite, squeezed[0], extra[: se.TENSORS])]
            gate = gates[1]
        if layer.kind == "pointwise":
            y, moments = stage.pointwise(y, weight, bn, act, gate, layer.batch_stats)
        elif layer.kind == "dense":
            y, moments = stage.stem(y, weight, layer.stride, layer.batch_stats)
        else:
            y, moments = stage.depthwise(y, weight, bn, act, layer.stride, layer.batch_stats)
        bn, act = coefficients(stage, layer, layers[i], moments, y), layer.act
        maps.append(y)
        bns.append(bn)
        if layer.batch_stats:
            stats += [bn[2], bn[4]]
    if block.pooled:
        squeezed = stage.squeeze(y, bn, act)
        # a copy: who changes the output in place does not change what is saved
        return squeezed[0].to(x.dtype, copy=True), [*maps, *bns, squeezed], stats
    # a copy of the table: the statistics are rows of it, and would carry its gradient into the running ones
    out = (y, bn.clone()) if block.raw else output(stage, block, y, bn, act, x)
    return out, [*maps, *bns, *gates], stats


def tables(block, saved):
    """bn [5, C] of every layer, among what :func:`forward` saved."""
    count = len(block.layers)
    return saved[count : 2 * count]


def backward(stage, block, grad, x, saved, weights, extra, needs_x, needs):
    """Returns (dx or None, gradients in the order of the tensors given to ``FusedBlock.apply``).

    ``grad`` is (masked gradient, sums in a bn table) if ``block.raw``; what is returned for x and for its bn table is
    the same if x is raw.  If ``block.pooled`` it is [N, C], and no map of gradients is made of it.
    """
    count = len(block.layers)
    excites = slice(count * PER_LAYER, count * PER_LAYER + se.TENSORS)
    maps, bns, gates = saved[:count], saved[count : 2 * count], saved[2 * count :]
    grads = [None] * (count * PER_LAYER + len(extra))
    gate, offset, dx = None, None, None
    # the last layer's activation is still to be masked; further down the stages hand on masked gradients
    y_act = block.layers[-1].act
    if block.raw:
        grad, sums, y_act = grad[0], grad[1][:2].contiguous(), IDENTITY
    elif block.pooled:
        slopes = gates[0][1:]  # sums of act' and act' (y - mean) an image, which offset is the factor of
        offset = (grad.to(slopes.dtype) / (maps[-1].shape[2] * maps[-1].shape[3])).contiguous()
        grad, sums = None, (offset * slopes).sum(1)
    else:
        sums = stage.normalize_backward(grad, maps[-1], bns[-1], y_act)
    residual = grad if block.residual else None
    for i in reversed(range(count)):
        layer, at = block.layers[i], i * PER_LAYER
        coef, dgamma, dbeta = backward_coefficients(stage, layer, sums, bns[i], maps[i])
        grads[at + 1] = dgamma if needs[at + 1] else None
        grads[at + 2] = dbeta if needs[at + 2] else None
        excited = block.excite and i == count - 1
        below = needs_x or any(needs[:at]) or (excited and any(needs[excites]))
        if not (below or needs[at]):
            break
        source, bn, act = (maps[i - 1], bns[i - 1], block.layers[i - 1].act) if i else _source(block, x, extra)
        upstream = (grad, maps[i], bns[i], coef, y_act)
        skip = residual if i == 0 else None
        if layer.kind == "pointwise":
            inner = gates[1] if excited else None
            grad, sums, dw = stage.pointwise_backward(
                *upstream, offset, source, weights[i], bn, act, inner, skip, below, below, needs[at]
            )
        elif layer.kind == "dense":
            dy, dw = stage.stem_backward(*upstream, source, layer.stride, below, needs[at])
            grad = _image_gradient(dy, source, weights[i], layer.stride) if below else None
        else:
            grad, sums, dw = stage.depthwise_backward(
                *upstream, gate, offset, source, weights[i], bn, act, layer.stride, skip, below, needs[at]
            )
        grads[at] = dw if needs[at] else None
        y_act, gate, offset = IDENTITY, None, None
        if not below:
            break
        if excited:
            area = source.shape[2] * source.shape[3]
            gate, y_act = gates[1], act
            tensors = extra[: se.TENSORS]
            offset, sums, grads[excites] = se.backward(block.excite, sums, *gates, tensors, area)
        if i == 0:
            dx = grad
            if block.source_act is not None:
                grads[-1] = torch.nn.functional.pad(sums, (0, 0, 0, extra[-1].shape[0] - 2))
    return dx, grads
