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

from . import checks, context, schema
from .autograd import Block, FusedBlock, Layer, autocast_off, autocast_on
from .backends import native
from .choice import choose, fuses_stem
from .log import say_once
from .params import BatchNormParams, ConvBNAct, InvertedResidualParams, SqueezeExciteParams
from .stages import note, stage

__all__ = [
    "BatchNormParams",
    "ConvBNAct",
    "InvertedResidualParams",
    "SqueezeExciteParams",
    "depthwise_conv_bn_act",
    "inverted_residual",
    "inverted_residual_sequence",
    "pointwise_conv_bn_act",
    "pointwise_conv_bn_act_pool",
    "separable_conv",
    "separable_sequence",
    "squeeze_excite",
    "stem_conv_bn_act",
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


def stem_conv_bn_act(x, weight, bn, *, stride=2, activation="relu6", backend=None, mode=None):
    """act(BN(dense 3x3 convolution of x)): the first layer of every MobileNet, over the image.

    Args:
        x: [N, C, H, W], C 1 to 8; read as it lies in memory (a data loader's NCHW needs no conversion).
        weight: [O, C, 3, 3]; zero padding 1.
        bn: :class:`BatchNormParams` of O channels.
        stride: 1 or 2.
        activation, backend, mode: as for :func:`depthwise_conv_bn_act`.

    Returns:
        [N, O, (H - 1) // stride + 1, (W - 1) // stride + 1].
    """
    layers = (ConvBNAct("dense", weight, bn, activation, stride),)
    return _run("stem_conv_bn_act", x, layers, False, None, backend, mode)


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


def separable_sequence(x, blocks, *, stem=None, backend=None, mode=None):
    """Several of MobileNetV1's blocks in a row, of which only the last writes its output.

    The others leave their pointwise layer's raw output, and the next block's depthwise layer applies batch norm and
    activation as it reads it.

    Args:
        x: [N, C, H, W].
        blocks: non-empty sequence of pairs (depthwise, pointwise) of :class:`ConvBNAct`.
        stem: :class:`ConvBNAct` of kind "dense" before them (x and weight as in :func:`stem_conv_bn_act`), whose output
            the first block reads raw; or None.
        backend, mode: see ``mnet_kernels.backend``.

    Returns:
        The last block's output.
    """
    kinds = [tuple(getattr(layer, "kind", type(layer).__name__) for layer in block) for block in blocks]
    _check_stem("separable_sequence", stem)
    if not kinds or any(kind != ("depthwise", "pointwise") for kind in kinds):
        raise ValueError(
            f"separable_sequence: blocks must be one or more pairs of ConvBNAct, depthwise then pointwise; got {kinds}"
        )
    layers = tuple(layer for block in blocks for layer in block)
    nodes = (2,) * len(kinds)
    if stem is not None:
        layers, nodes = (stem, *layers), (1, *nodes)
    return _run("separable_sequence", x, layers, False, None, backend, mode, nodes)


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


def inverted_residual_sequence(x, blocks, *, stem=None, backend=None, mode=None):
    """Several of MobileNetV2/V3's blocks in a row, each of which computes what :func:`inverted_residual` does.

    A block in algebraic mode needs mean and covariance of its input's channels.  Here the block before it gathers them
    as it writes that map, where its backend can (stage ``normalize_gram``), so that the map is not read for them.

    Args:
        x: [N, C, H, W].
        blocks: non-empty sequence of :class:`InvertedResidualParams`.
        stem: :class:`ConvBNAct` of kind "dense" before them (x and weight as in :func:`stem_conv_bn_act`), whose output
            the first block reads raw, which must be without an expand layer and without a residual; or None.
        backend, mode: see ``mnet_kernels.backend``.

    Returns:
        The last block's output.
    """
    for i, block in enumerate(blocks):
        if not isinstance(block, InvertedResidualParams):
            found = type(block).__name__
            raise TypeError(f"inverted_residual_sequence: blocks[{i}] must be an InvertedResidualParams, got {found}")
        kinds = [layer.kind for layer in block.layers]
        if kinds not in (["pointwise", "depthwise", "pointwise"], ["depthwise", "pointwise"]):
            raise ValueError(
                f"inverted_residual_sequence: blocks[{i}].layers must be [pointwise,] depthwise, pointwise; got {kinds}"
            )
    if not blocks:
        raise ValueError("inverted_residual_sequence: blocks is empty, expected at least one InvertedResidualParams")
    _check_stem("inverted_residual_sequence", stem)
    if stem is not None and (len(blocks[0].layers) != 2 or blocks[0].residual):
        found = "a residual" if blocks[0].residual else "an expand layer"
        raise ValueError(
            f"inverted_residual_sequence: blocks[0] has {found}, expected a block without expand layer and residual "
            "where a stem is given, since its input is never written; call stem_conv_bn_act first"
        )
    gram = nodes = None
    for block, follower in zip(blocks, (*blocks[1:], None), strict=True):
        layers, residual, excite = block
        if stem is not None:
            layers, nodes, stem = (stem, *layers), (1, len(layers)), None
        x, gram = _run_block(
            "inverted_residual", x, layers, residual, excite, backend, mode, nodes, gram=gram, follower=follower
        )
        nodes = None
    return x


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


def _check_stem(op, stem):
    if stem is not None and getattr(stem, "kind", None) != "dense":
        found = getattr(stem, "kind", type(stem).__name__)
        raise ValueError(f"{op}: stem must be a ConvBNAct of kind 'dense' or None; got {found}")


def _run(*args, **options):
    return _run_block(*args, **options)[0]


def _run_block(op, x, layers, residual, se, backend, mode, nodes=None, pooled=False, gram=None, follower=None):
    """``nodes``: of how many layers each autograd node of the fused path consists (None: one of all).  ``pooled``: the
    mean over H and W of what comes out, [N, C].  ``gram``: of x, or None.  ``follower``: the InvertedResidualParams of
    the block that reads what comes out, or None.

    Returns (output, its gram if ``follower`` takes it and it could be gathered, else None).
    """
    checks.check_input(op, x)
    dtype = _compute_dtype(x)
    checks.check_block(op, x, layers, residual, se, autocast=autocast_on(x.device.type))
    why = context.why_native(x) or context.why_native_parameters(layers, se)
    if why is not None:  # whatever backend was asked for: none could do it
        say_once(f"running native torch ops on {x.device.type}: {why}")
        return _run_native(op, x, layers, residual, se, pooled), None
    # Three layers: the first one expands.  Algebraic mode has no moments of it that processes could share.
    expands = len(layers) == 3 and layers[0].kind == "pointwise" and layers[0].bn.group is None
    expanded = (x.shape[2] * x.shape[3], x.shape[1], _trains(x, layers, se)) if expands else ()
    choice = choose(x.device, dtype, backend, mode, *expanded, op=op, size=x.shape[2] * x.shape[3])
    # An empty batch has no statistics: torch's own ops define what then happens.
    if choice.backend == "native" or x.numel() == 0:
        return _run_native(op, x, layers, residual, se, pooled), None
    if layers[0].kind == "dense" and not _fuses_stem(x, layers[0], choice, backend):
        note("native::stem_conv_bn_act")
        x, layers, nodes = native.block(x, layers[:1], False, None), layers[1:], nodes and nodes[1:]
        if not layers:
            return x, None
    if not (choice.mode == "algebraic" and layers[0].bn.batch_stats and x.dtype == dtype):
        gram = None
    gives_gram = choice.gram and follower is not None and _takes_gram(follower, x, dtype, layers, se, backend, mode)
    with autocast_off(x.device.type):
        x = x.to(dtype)
        if layers[0].kind != "dense":  # the stem reads an image as it lies
            x = x.contiguous(memory_format=torch.channels_last)
        source = None  # x's bn table and activation while x is raw
        shared = [] if nodes and len(nodes) > 1 and not torch.compiler.is_compiling() else None
        for count in nodes or (len(layers),):
            node, layers = layers[:count], layers[count:]
            raw = len(layers) > 0
            last = (False, None, False, False) if raw else (residual, se, pooled, gives_gram)
            x, more = _run_node(x, node, choice, source, shared, raw, gram, *last)
            source = (more, schema.ACTIVATIONS.index(node[-1].activation)) if raw else None
        return x, more


def _run_native(op, x, layers, residual, se, pooled):
    note(f"native::{op}")
    if layers[0].kind == "dense" and len(layers) > 1:
        note("native::stem_conv_bn_act")
    out = native.block(x, layers, residual, se)
    return native.pool(out) if pooled else out


def _takes_gram(follower, x, dtype, layers, se, backend, mode):
    """Whether the block after ``layers``, of which x is the input, takes the gram of its own input."""
    first, (height, width) = follower.layers[0], x.shape[2:]
    if first.kind != "pointwise" or first.bn.group is not None or not first.bn.batch_stats:
        return False
    for layer in layers:
        height, width = schema.depthwise_size(height, layer.stride), schema.depthwise_size(width, layer.stride)
    positions = height * width
    trains = _trains(x, layers, se) or _trains(x, follower.layers, follower.squeeze_excite)
    width, known = layers[-1].weight.shape[0], {"op": "inverted_residual", "size": positions}
    return choose(x.device, dtype, backend, mode, positions, width, trains, **known).mode == "algebraic"


def _fuses_stem(x, layer, choice, backend):
    if layer.bn.group is not None and choice.stem:  # torch's own ops share statistics between processes on CUDA only
        return True
    height, width = (schema.depthwise_size(size, layer.stride) for size in x.shape[2:])
    training = torch.is_grad_enabled() and layer.bn.batch_stats and not x.requires_grad
    return fuses_stem(choice, training, x.shape[0] * height * width, backend)


def _trains(x, layers, se):
    """Whether a gradient of a block may be asked for."""
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad:
        return True
    tensors = [t for layer in layers for t in (layer.weight, layer.bn.weight, layer.bn.bias)]
    tensors += se.tensors if se is not None else ()
    return any(t is not None and t.requires_grad for t in tensors)


def _run_node(x, layers, choice, source, shared, raw, gram, residual, se, pooled, gives_gram):
    """One autograd node; returns its output and, if that is raw, its bn table, or its gram if ``gives_gram``."""
    rows = tuple(
        Layer(c.kind, c.stride, schema.ACTIVATIONS.index(c.activation), c.bn.eps, c.bn.batch_stats, c.bn.group)
        for c in layers
    )
    excite, source_act = se and (se.activation, se.gate), source and source[1]
    takes_gram = gram is not None
    flags = raw, pooled, takes_gram, gives_gram
    block = Block(choice.backend, choice.mode, rows, residual, excite, source_act, *flags, shared)
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
    if gram is not None:
        tensors.append(gram)
    update = partial(_update_running_stats, stage(choice.backend), [c.bn for c in layers if c.bn.batch_stats])
    if torch.compiler.is_compiling():  # a traced autograd.Function may not change buffers
        out, *stats = FusedBlock.apply(block, None, x, *tensors)
        update(stats[1:] if raw or gives_gram else stats)
    else:
        out, *stats = FusedBlock.apply(block, update, x, *tensors)
    return out, stats[0] if raw or gives_gram else None


def _update_running_stats(stages, batch_norms, stats):
    for bn, mean, var in zip(batch_norms, stats[::2], stats[1::2], strict=True):
        if bn.updates:
            running = bn.running_mean, bn.running_var
            if not torch.compiler.is_compiling():
                # torch's own batch norm does not count this as a change of what an earlier call may have saved
                running = tuple(t.data for t in running)
            stages.update_running_stats(*running, bn.num_batches_tracked, mean, var, bn.momentum)
        elif bn.training and bn.num_batches_tracked is not None:  # as nn.BatchNorm2d, which counts all the same
            bn.num_batches_tracked.add_(1)
