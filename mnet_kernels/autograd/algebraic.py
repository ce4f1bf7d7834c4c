"""Algebraic mode of the inverted residual: the expanded tensor is never written (docs/mathematics.md, "Algebraic").

Layers: expand (pointwise), depthwise, project (pointwise).  Saved: the input, two raw maps and small tables.
"""

from . import excite as se
from .batch_norm import PER_LAYER, backward_coefficients, coefficients, expand_coefficients, output, positions


def _split(block, extra):
    """(squeeze-excite's tensors, gram of x or None)."""
    return (extra[:-1], extra[-1]) if block.takes_gram else (extra, None)


def forward(stage, block, x, layers, weights, extra):
    """Returns (out, saved tensors, [mean, unbiased variance] of every layer with batch statistics).

    ``extra``: squeeze-excite's tensors, then the gram of x if ``block.takes_gram``.  out is (map, its gram) if
    ``block.gives_gram``.
    """
    expand, depthwise, project = block.layers
    w1, w2, w3 = weights
    excite, gram = _split(block, extra)
    gram, shift, bn1, mean1, var1 = expand_coefficients(stage, expand, layers[0], w1, x, gram)
    y2, moments = stage.expand_depthwise(x, shift, w1, bn1, expand.act, w2, depthwise.stride, depthwise.batch_stats)
    bn2 = coefficients(stage, depthwise, layers[1], moments, y2)
    gates, gate = [], None
    if block.excite:
        squeezed = stage.squeeze(y2, bn2, depthwise.act)
        gates = [squeezed, *se.gate(block.excite, squeezed[0], excite)]
        gate = gates[1]
    y3, moments = stage.pointwise(y2, w3, bn2, depthwise.act, gate, project.batch_stats)
    bn3 = coefficients(stage, project, layers[2], moments, y3)
    out = output(stage, block, y3, bn3, project.act, x)
    means = ((expand, mean1, var1), (depthwise, bn2[2], bn2[4]), (project, bn3[2], bn3[4]))
    stats = [t for layer, mean, var in means if layer.batch_stats for t in (mean, var)]
    return out, [gram, shift, y2, y3, bn1, bn2, bn3, *gates], stats


def tables(block, saved):
    """bn [5, E or O] of every layer, among what :func:`forward` saved; the expand layer's is of W (x - shift)."""
    return saved[4:7]


def backward(stage, block, grad, x, saved, weights, extra, needs_x, needs):
    """Returns (dx or None, gradients in the order of the tensors given to ``FusedBlock.apply``)."""
    expand, depthwise, project = block.layers
    w1, w2, w3 = weights
    gram, shift, y2, y3, bn1, bn2, bn3, *gates = saved
    excite, _ = _split(block, extra)
    count = len(block.layers) * PER_LAYER
    grads = [None] * (count + len(extra))

    def batch_norm_grads(layer, dgamma, dbeta):
        at = layer * PER_LAYER
        grads[at + 1] = dgamma if needs[at + 1] else None
        grads[at + 2] = dbeta if needs[at + 2] else None

    sums = stage.normalize_backward(grad, y3, bn3, project.act)
    coef3, *affine = backward_coefficients(stage, project, sums, bn3, y3)
    batch_norm_grads(2, *affine)

    upstream3 = (grad, y3, bn3, coef3, project.act)
    needs_expand = needs_x or any(needs[:PER_LAYER])
    below = needs_expand or any(needs[: 2 * PER_LAYER]) or any(needs[count:])
    needs_w3 = needs[2 * PER_LAYER]
    if not (below or needs_w3):
        return None, grads
    # B1 only reduces: g2 is rebuilt in B2 from narrow tensors rather than written and read at full width
    gate, offset = (gates[1] if gates else None), None
    _, sums, dw3 = stage.pointwise_backward(
        *upstream3, None, y2, w3, bn2, depthwise.act, gate, None, False, below, needs_w3
    )
    grads[2 * PER_LAYER] = dw3 if needs_w3 else None
    if not below:
        return None, grads
    if gates:
        area = y2.shape[2] * y2.shape[3]
        offset, sums, grads[count : count + len(excite)] = se.backward(block.excite, sums, *gates, excite, area)
    coef2, *affine = backward_coefficients(stage, depthwise, sums, bn2, y2)
    batch_norm_grads(1, *affine)

    needs_w2 = needs[PER_LAYER]
    if not (needs_expand or needs_w2):
        return None, grads
    dx, gramgrad, dw2 = stage.expand_depthwise_backward(
        *upstream3, w3, gate, offset, y2, bn2, coef2, depthwise.act,
        x, shift, w1, bn1, expand.act, w2, depthwise.stride, needs_x, needs_w2,
    )  # fmt: skip
    grads[PER_LAYER] = dw2 if needs_w2 else None
    if not needs_expand:
        return None, grads
    dw1, dgamma, dbeta, mix = stage.expand_finalize_backward(gramgrad, gram, shift, bn1, w1, positions(x))
    grads[0] = dw1 if needs[0] else None
    batch_norm_grads(0, dgamma, dbeta)
    if not needs_x:
        return None, grads
    return stage.expand_mix(dx, x, shift, mix, grad if block.residual else None), grads
