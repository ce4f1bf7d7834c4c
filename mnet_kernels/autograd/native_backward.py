"""A fused block's derivatives in torch's own ops: where the backward is itself differentiated, batched or transformed.

The backward stages are no differentiable ops.  So the node is computed once more from its inputs, differentiably, and
torch differentiates that, to any order.

Between two raw nodes (see ``Block``) the fused backward hands on masked gradients and sums.  Here both exchange what
they are to autograd: the derivatives of the map and of its table.  The two forms must never meet in one sum:

- In one backward pass all nodes are of one form.  Grad mode, transforms and forward-mode levels hold for the whole
  pass, and a raw node's gradients come from one node alone, which returns batched ones exactly where its own were.
- A pass that leaves a graph leaves one that reads the raw maps, and gives true derivatives to the nodes that wrote
  them whenever it is gone through, next to what the readers of these maps give in the same pass.  So from then on
  (``Block.differentiated``) all nodes of the call are of this form.

Nothing here is in place, and the running statistics are not touched: they moved in the forward.
"""

import torch
import torch.nn.functional as F

from .. import context
from ..schema import ACTIVATIONS, IDENTITY, accumulate_dtype
from . import excite as se
from .batch_norm import PER_LAYER

_CHECKED = 3  # of a layer's tensors: weight, gamma, beta
_ACTIVATIONS = {"identity": lambda u: u, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}
# torch has no second derivative of its own hardsigmoid
_GATES = {"hardsigmoid": lambda u: F.relu6(u + 3) / 6, "sigmoid": torch.sigmoid}


def wanted(block, grad):
    """Whether a node's backward has to be made of torch's own ops; ``grad`` is one of its incoming gradients."""
    if torch.compiler.is_dynamo_compiling():
        return False
    if torch.is_grad_enabled():
        if block.differentiated is not None:
            block.differentiated[:] = [True]
        return True
    return bool(block.differentiated) or context.why_native(grad) is not None


def versions(layers):
    """What tells later whether any layer's weight, gamma or beta was changed in place; None where torch keeps no count.

    ``layers``: PER_LAYER tensors (or None) each.  The running statistics may move: the bn tables hold what was used.
    """
    try:
        return [None if t is None else t._version for layer in layers for t in layer[:_CHECKED]]
    except RuntimeError:  # inference tensors have none, and nothing changes them while a graph is recorded
        return None


def gradients(block, grads, x, parameters, before, extra, tables, needs):
    """The derivatives of a node, as tensors that can be differentiated again where a graph is asked for.

    Args:
        block: the node's description.
        grads: of (output, bn table if ``block.raw``), each a tensor or None.
        x: the node's input.
        parameters: PER_LAYER a layer, as they were given.
        before: their :func:`versions` in the forward.
        extra: squeeze-excite's tensors, then x's bn table or gram, as ``FusedBlock.apply`` takes them.
        tables: bn [5, C] of every layer, of which those with running statistics are read (algebraic mode's expand layer
            has the mean of W x in it then).
        needs: of x, every parameter and everything extra, whether its gradient is wanted.

    Returns:
        One gradient, or None, for each of ``needs``.

    Raises:
        RuntimeError: a layer's statistics are of several processes, or a parameter was changed in place.
    """
    if any(layer.group is not None for layer in block.layers):
        raise RuntimeError(
            "mnet_kernels: batch norm over several processes has no second derivative and no batched one, here as in "
            "torch.nn.SyncBatchNorm: use nn.BatchNorm2d, or leave out create_graph=True and is_grads_batched=True"
        )
    layers = [parameters[i : i + PER_LAYER] for i in range(0, len(parameters), PER_LAYER)]
    if before != versions(layers):
        raise RuntimeError(
            "mnet_kernels: a parameter of a fused block needed for gradient computation has been modified by an "
            "inplace operation since the forward: change it after the last backward that goes through it"
        )
    with torch.enable_grad():
        # Aliases: the derivative is by each argument alone, even where one was made of another.
        inputs = [_alias(t) if need else t for t, need in zip((x, *parameters, *extra), needs, strict=True)]
        outputs = _forward(block, inputs[0], inputs[1 : 1 + len(parameters)], inputs[1 + len(parameters) :], tables)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    asked = [i for i, need in enumerate(needs) if need]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [inputs[i] for i in asked],
        [grad for _, grad in pairs],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    result = [None] * len(needs)
    for i, grad in zip(asked, found, strict=True):
        result[i] = grad
    return result


def _alias(t):
    # requires_grad may have been switched off since the forward, as for a parameter that was frozen in between
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _channel(v):
    return v.view(1, -1, 1, 1)


def _batch_norm(layer, y, gamma, beta, table):
    """(scale, shift, mean, rstd, unbiased variance) of a layer's raw output y."""
    if layer.batch_stats:
        count = y.numel() // y.shape[1]
        mean = y.mean((0, 2, 3))
        var = (y - _channel(mean)).square().mean((0, 2, 3))
        rstd, unbiased = (var + layer.eps).rsqrt(), var * (count / max(count - 1, 1))
    else:
        _, _, mean, rstd, unbiased = table.unbind(0)
    scale = rstd if gamma is None else rstd * gamma.to(y.dtype)
    shift = -mean * scale if beta is None else beta.to(y.dtype) - mean * scale
    return scale, shift, mean, rstd, unbiased


def _normalized(y, bn, act):
    return _ACTIVATIONS[ACTIVATIONS[act]](y.to(bn[0].dtype) * _channel(bn[0]) + _channel(bn[1]))


def _convolved(layer, z, weight):
    groups = weight.shape[0] if layer.kind == "depthwise" else 1
    return F.conv2d(z, weight.to(z.dtype), None, layer.stride, weight.shape[-1] // 2, 1, groups)


def _gate(names, q, reduce_weight, reduce_bias, expand_weight, expand_bias):
    """Squeeze-excite's gate [N, C] of a pooled map q [N, C]; ``names``: of the activation and the gate."""
    inner = _ACTIVATIONS[names[0]](se.linear(q, reduce_weight, reduce_bias))
    return _GATES[names[1]](se.linear(inner, expand_weight, expand_bias))


def _forward(block, x, parameters, extra, tables):
    """(output, bn table if ``block.raw``): what the stages compute, rounded to the storage dtype where they round."""
    storage, wide = x.dtype, accumulate_dtype(x.dtype)
    y, bn, act = x, None, IDENTITY
    if block.source_act is not None:
        bn, act = extra[-1].unbind(0), block.source_act
    for i, layer in enumerate(block.layers):
        weight, gamma, beta = parameters[i * PER_LAYER : i * PER_LAYER + 3]
        z = y if bn is None else _normalized(y, bn, act)
        if block.excite and i == len(block.layers) - 1:
            z = z * _gate(block.excite, z.mean((2, 3)), *extra[: se.TENSORS])[:, :, None, None]
        y = _convolved(layer, z.to(storage), weight)
        bn, act = _batch_norm(layer, y.to(wide), gamma, beta, tables[i]), layer.act
    if block.raw:
        return y, torch.stack(bn)
    z = _normalized(y, bn, act)
    if block.pooled:
        return (z.mean((2, 3)).to(storage),)
    return ((z + x if block.residual else z).to(storage),)
