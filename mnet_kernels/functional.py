"""The public ops: one function each, with argument checks, the AMP rule and the choice of backend.

All take x [N, C, H, W] in float32, bfloat16, float16 or float64 (any memory layout; fused backends compute in
channels_last and return it), convolution weights in torch's layout and batch norms as :class:`BatchNormParams` tuples
(``BatchNormParams.of(module)`` reads an ``nn.BatchNorm2d``).  Convolutions have no bias, as everywhere before a batch
norm.

AMP: under autocast x and the convolution weights are used in the autocast dtype; statistics, batch-norm parameters and
squeeze-excite stay in float32, and weight gradients are accumulated in float32.

Every function raises TypeError on a wrong type or dtype, ValueError on a wrong shape, device or setting (including a
single value per channel when training, as torch does), BackendUnavailableError on a backend that cannot run here.
"""

from functools import partial

import torch

from . import checks, schema
from .autograd import Block, FusedBlock, Layer, autocast_off, autocast_on
from .backends import native
from .choice import choose
from .params import BatchNormParams, ConvBNAct, SqueezeExciteParams
from .stages import note, stage

__all__ = [
    "BatchNormParams",
    "ConvBNAct",
    "SqueezeExciteParams",
    "depthwise_conv_bn_act",
    "inverted_residual",
    "pointwise_conv_bn_act",
    "pointwise_conv_bn_act_pool",
    "separable_conv",
    "separable_sequence",
    "squeeze_excite",
]


def depthwise_conv_bn_act(x, weight, bn, *, stride=1, activation="relu6", backend=None, mode=None):
    """act(BN(depthwise(x))): MobileNet's depthwise layer (Howard et al. 2017, section 3.1).

    Args:
        x: [N, C, H, W].
        weight: [C, 1, k, k], k 3 or 5; zero padding k // 2.
        bn: :class:`BatchNormParams` of C channels.
        stride: 1 or 2.
        activation: "relu", "relu6", "hardswish", "silu" or "identity".
        backend, mode: see ``mnet_kernels.backend``.

    Returns:
        [N, C, (H - 1) // stride + 1, (W - 1) // stride + 1] in x's dtype (the autocast dtype under autocast).
    """
    layers = (ConvBNAct("depthwise", weight, bn, activation, stride),)
    return _run("depthwise_conv_bn_act", x, layers, False, None, backend, mode)


def pointwise_conv_bn_act(x, weight, bn, *, activation="relu6", backend=None, mode=None):
    """act(BN(1x1 convolution of x)).

    Args:
        x: [N, C, H, W].
        weight: [O, C, 1, 1].
        bn: :class:`BatchNormParams` of O channels.
        activation, backend, mode: as for :func:`depthwise_conv_bn_act`.

    Returns:
        [N, O, H, W].
    """
    layers = (ConvBNAct("pointwise", weight, bn, activation),)
    return _run("pointwise_conv_bn_act", x, layers, False, None, backend, mode)


def pointwise_conv_bn_act_pool(x, weight, bn, *, activation="relu6", backend=None, mode=None):
    """Mean over H and W of act(BN(1x1 convolution of x)): what MobileNetV2 and V3 end with before the classifier
    (Sandler et al. 2018, table 2; Howard et al. 2019, figure 5).

    The activated map, and in the backward pass its gradient, are never written.

    Args:
        x, weight, bn, activation, backend, mode: as for :func:`pointwise_conv_bn_act`.

    Returns:
        [N, O] in x's dtype (the autocast dtype under autocast).
    """
    layers = (ConvBNAct("pointwise", weight, bn, activation),)
    return _run("pointwise_conv_bn_act_pool", x, layers, False, None, backend, mode, pooled=True)


def separable_conv(
    x,
    depthwise_weight,
    depthwise_bn,
    pointwise_weight,
    pointwise_bn,
    *,
    stride=1,
    activation="relu6",
    backend=None,
    mode=None,
):
    """MobileNetV1's block: act(BN(pointwise(act(BN(depthwise(x)))))) (Howard et al. 2017, figure 3).

    Shapes as in :func:`depthwise_conv_bn_act` and :func:`pointwise_conv_bn_act`; one activation for both.
    """
    layers = (
        ConvBNAct("depthwise", depthwise_weight, depthwise_bn, activation, stride),
        ConvBNAct("pointwise", pointwise_weight, pointwise_bn, activation),
    )
    return _run("separable_conv", x, layers, False, None, backend, mode)


def separable_sequence(x, blocks, *, backend=None, mode=None):
    """Several of MobileNetV1's blocks in a row, of which only the last writes its output.

    The others leave their pointwise layer's raw output, and the next block's depthwise layer applies batch norm and
    activation as it reads it.

    Args:
        x: [N, C, H, W].
        blocks: non-empty sequence of pairs (depthwise, pointwise) of :class:`ConvBNAct`.
        backend, mode: see ``mnet_kernels.backend``.

    Returns:
        The last block's output.
    """
    kinds = [tuple(getattr(layer, "kind", type(layer).__name__) for layer in block) for block in blocks]
    if not kinds or any(kind != ("depthwise", "pointwise") for kind in kinds):
        raise ValueError(
            f"separable_sequence: blocks must be one or more pairs of ConvBNAct, depthwise then pointwise; got {kinds}"
        )
    layers = tuple(layer for block in blocks for layer in block)
    return _run("separable_sequence", x, layers, False, None, backend, mode, node=2)


def inverted_residual(
    x,
    expand_weight,
    expand_bn,
    depthwise_weight,
    depthwise_bn,
    project_weight,
    project_bn,
    *,
    stride=1,
    activation="relu6",
    residual=False,
    squeeze_excite=None,
    backend=None,
    mode=None,
):
    """MobileNetV2/V3's block: BN(project([SE] act(BN(depthwise(act(BN(expand(x)))))))) [+ x].

    Sandler et al. 2018, table 1 and figure 4; squeeze-excite before the project layer as in Howard et al. 2019,
    figure 4.

    Args:
        x: [N, C, H, W].
        expand_weight, expand_bn: [E, C, 1, 1] and its batch norm, or both None for a block without expansion (E = C).
        depthwise_weight, depthwise_bn: [E, 1, k, k], k 3 or 5, and its batch norm.
        project_weight, project_bn: [O, E, 1, 1] and its batch norm.
        stride: of the depthwise layer, 1 or 2.
        activation: after the expand and the depthwise batch norm; none follows the project layer.
        residual: add x; needs stride 1 and O = C.
        squeeze_excite: :class:`SqueezeExciteParams` over E channels, or None.
        backend, mode: see ``mnet_kernels.backend``; ``mode="algebraic"`` needs an expand layer (else chain runs).

    Returns:
        [N, O, (H - 1) // stride + 1, (W - 1) // stride + 1].
    """
    if (expand_weight is None) != (expand_bn is None):
        raise ValueError("expand_weight and expand_bn go together: give both, or None for both (no expansion)")
    layers = (
        ConvBNAct("depthwise", depthwise_weight, depthwise_bn, activation, stride),
        ConvBNAct("pointwise", project_weight, project_bn, "identity"),
    )
    if expand_weight is not None:
        layers = (ConvBNAct("pointwise", expand_weight, expand_bn, activation), *layers)
    return _run("inverted_residual", x, layers, residual, squeeze_excite, backend, mode)


def squeeze_excite(x, reduce_weight, reduce_bias, expand_weight, expand_bias, *, activation="relu", gate="hardsigmoid"):
    """x * gate(expand(act(reduce(mean of x over H and W)))) (Hu et al. 2018; Howard et al. 2019, section 5.3).

    Standing alone it has no batch norm to be fused with and runs on native torch ops on every backend; inside
    :func:`inverted_residual` it is part of the fused block.

    Args:
        x: [N, C, H, W].
        reduce_weight, reduce_bias: [R, C, 1, 1] and [R] or None.
        expand_weight, expand_bias: [C, R, 1, 1] and [C] or None.
        activation: "relu", "relu6", "hardswish" or "silu".
        gate: "hardsigmoid" or "sigmoid".

    Returns:
        [N, C, H, W].
    """
    se = SqueezeExciteParams(reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate)
    checks.check_input("squeeze_excite", x)
    checks.check_squeeze_excite("squeeze_excite", x, se, x.shape[1])
    note("native::squeeze_excite")
    return native.squeeze_excite(x, se)


def _compute_dtype(x):
    """The storage dtype: autocast's where it is on (float64 is left alone, as by torch), else x's."""
    if autocast_on(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _run(op, x, layers, residual, se, backend, mode, node=None, pooled=False):
    """``node``: layers that make one autograd node of the fused path (None: all of them).  ``pooled``: the mean over H
    and W of what comes out, [N, C]."""
    checks.check_input(op, x)
    dtype = _compute_dtype(x)
    checks.check_block(op, x, layers, residual, se, autocast=autocast_on(x.device.type))
    # Three layers: the first one expands.  Algebraic mode has no moments of it that processes could share.
    expands = len(layers) == 3 and layers[0].bn.group is None
    expanded = (x.shape[2] * x.shape[3], x.shape[1], _trains(x, layers, se)) if expands else ()
    choice = choose(x.device, dtype, backend, mode, *expanded)
    # An empty batch has no statistics: torch's own ops define what then happens.
    if choice.backend == "native" or x.numel() == 0:
        note(f"native::{op}")
        out = native.block(x, layers, residual, se)
        return native.pool(out) if pooled else out
    with autocast_off(x.device.type):
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        node = node or len(layers)
        source = None  # x's bn table and activation while x is raw
        for start in range(0, len(layers), node):
            raw = start + node < len(layers)
            x, source = _run_node(x, layers[start : start + node], residual, se, choice, source, raw, pooled)
        return x


def _trains(x, layers, se):
    """Whether a gradient of a block may be asked for."""
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad:
        return True
    tensors = [t for layer in layers for t in (layer.weight, layer.bn.weight, layer.bn.bias)]
    tensors += se.tensors if se is not None else ()
    return any(t is not None and t.requires_grad for t in tensors)


def _run_node(x, layers, residual, se, choice, source, raw, pooled):
    """One autograd node; returns its output and, if that is raw, (bn table, activation)."""
    rows = tuple(
        Layer(c.kind, c.stride, schema.ACTIVATIONS.index(c.activation), c.bn.eps, c.bn.batch_stats, c.bn.group)
        for c in layers
    )
    block = Block(
        choice.backend, choice.mode, rows, residual, se and (se.activation, se.gate), source and source[1], raw, pooled
    )
    tensors = []
    for layer in layers:
        bn = layer.bn
        # With batch statistics the running ones are outputs of the step (below), not inputs of the block.
        running = (None, None) if bn.batch_stats else (bn.running_mean, bn.running_var)
        tensors += [layer.weight, bn.weight, bn.bias, *running]
    if se is not None:
        tensors += se.tensors
    if source is not None:
        tensors.append(source[0])
    update = partial(_update_running_stats, stage(choice.backend), [c.bn for c in layers if c.bn.batch_stats])
    if torch.compiler.is_compiling():  # a traced autograd.Function may not change buffers
        out, *stats = FusedBlock.apply(block, None, x, *tensors)
        update(stats[1:] if raw else stats)
    else:
        out, *stats = FusedBlock.apply(block, update, x, *tensors)
    return out, (stats[0], rows[-1].act) if raw else None


def _update_running_stats(stages, batch_norms, stats):
    for bn, mean, var in zip(batch_norms, stats[::2], stats[1::2], strict=True):
        if bn.updates:
            stages.update_running_stats(bn.running_mean, bn.running_var, bn.num_batches_tracked, mean, var, bn.momentum)
