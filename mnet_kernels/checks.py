"""Argument checks of the public ops: what was given, what is expected, what to do."""

import torch

from .params import BatchNormParams, SqueezeExciteParams
from .schema import ACTIVATIONS, STEM_CHANNELS, STEM_KERNEL, depthwise_size

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNELS = (3, 5)
SE_ACTIVATIONS = ("relu", "relu6", "hardswish", "silu")
GATES = ("hardsigmoid", "sigmoid")


def check_input(op, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x must be float32, bfloat16, float16 or float64, got {x.dtype}: convert it with x.to()")
    if x.dim() != 4:
        hint = ": add the batch dimension with x.unsqueeze(0)" if x.dim() == 3 else ""
        raise ValueError(f"{op}: x must be [N, C, H, W], got shape {list(x.shape)}{hint}")


def check_block(op, x, layers, residual, se, autocast):
    channels, height, width = x.shape[1:]
    name = op
    for i, layer in enumerate(layers):
        if len(layers) > 3:
            op = f"{name}, layer {i}"
        if se is not None and i == len(layers) - 1:
            check_squeeze_excite(op, x, se, channels)
        _check_conv(op, x, layer, channels, autocast)
        if layer.kind != "pointwise":
            height, width = depthwise_size(height, layer.stride), depthwise_size(width, layer.stride)
        channels = layer.weight.shape[0]
        _check_batch_norm(op, x, layer, channels)
        if layer.bn.batch_stats and x.shape[0] * height * width == 1:
            raise ValueError(
                f"{op}: expected more than 1 value per channel when training, got {layer.kind} output of size "
                f"{[x.shape[0], channels, height, width]}: use a larger batch or image, or eval mode"
            )
    if residual and (channels != x.shape[1] or (height, width) != (x.shape[2], x.shape[3])):
        raise ValueError(
            f"{op}: a residual needs stride 1 and as many output as input channels, got input {list(x.shape)} and "
            f"output {[x.shape[0], channels, height, width]}: pass residual=False"
        )


def _check_conv(op, x, layer, channels, autocast):
    weight, kind = layer.weight, layer.kind
    _check_tensor(op, f"{kind} weight", weight, x)
    if weight.dtype != x.dtype and not autocast:
        raise TypeError(
            f"{op}: {kind} weight is {weight.dtype} but x is {x.dtype}: convert one, or run under torch.autocast"
        )
    shape = tuple(weight.shape)
    if kind == "depthwise":
        if len(shape) != 4 or shape[1] != 1 or shape[0] != channels:
            raise ValueError(
                f"{op}: depthwise weight must be [{channels}, 1, k, k] (one filter a channel, groups = channels), got "
                f"{list(shape)}: for other groups use torch.nn.functional.conv2d"
            )
        if shape[2] != shape[3] or shape[2] not in KERNELS:
            raise ValueError(f"{op}: depthwise kernels are 3x3 or 5x5, got {shape[2]}x{shape[3]}")
    elif kind == "dense":
        if channels > STEM_CHANNELS:
            raise ValueError(
                f"{op}: x must have at most {STEM_CHANNELS} channels (it is an image), got {channels}: use "
                "torch.nn.functional.conv2d"
            )
        if len(shape) != 4 or shape[1:] != (channels, STEM_KERNEL, STEM_KERNEL):
            raise ValueError(
                f"{op}: dense weight must be [O, {channels}, {STEM_KERNEL}, {STEM_KERNEL}], got {list(shape)}"
            )
    elif len(shape) != 4 or shape[1] != channels or shape[2:] != (1, 1):
        raise ValueError(f"{op}: pointwise weight must be [O, {channels}, 1, 1], got {list(shape)}")
    if kind != "pointwise" and layer.stride not in (1, 2):
        raise ValueError(f"{op}: stride must be 1 or 2, got {layer.stride!r}")
    if layer.activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {layer.activation!r}")


def _check_tensor(op, name, t, x):
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device} but x is on {x.device}: move the model and the input together")
    if not t.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {t.dtype}")


def _check_batch_norm(op, x, layer, channels):
    bn, name = layer.bn, f"{layer.kind} batch norm"
    if not isinstance(bn, BatchNormParams):
        raise TypeError(
            f"{op}: {name} must be a mnet_kernels.BatchNormParams, got {type(bn).__name__}: BatchNormParams.of(module) "
            "reads an nn.BatchNorm2d"
        )
    for field in ("weight", "bias", "running_mean", "running_var"):
        t = getattr(bn, field)
        if t is None:
            continue
        _check_tensor(op, f"{name} {field}", t, x)
        if t.shape != (channels,):
            raise ValueError(f"{op}: {name} {field} must be [{channels}], got {list(t.shape)}")
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(f"{op}: {name}: running_mean and running_var go together: give both or neither")
    if bn.updates and bn.momentum is None and bn.num_batches_tracked is None:
        raise ValueError(f"{op}: {name}: momentum=None (a cumulative average) needs num_batches_tracked")


def check_squeeze_excite(op, x, se, channels):
    if not isinstance(se, SqueezeExciteParams):
        raise TypeError(f"{op}: squeeze_excite must be a mnet_kernels.SqueezeExciteParams, got {type(se).__name__}")
    for what, allowed in (("activation", SE_ACTIVATIONS), ("gate", GATES)):
        if getattr(se, what) not in allowed:
            raise ValueError(
                f"{op}: squeeze-excite {what} must be one of {', '.join(allowed)}, got {getattr(se, what)!r}"
            )
    for name, t in zip(se._fields, se.tensors, strict=False):
        if t is not None or name.endswith("weight"):
            _check_tensor(op, f"squeeze-excite {name}", t, x)
    squeezed = se.reduce_weight.shape[0]
    expected = {
        "reduce_weight": (squeezed, channels, 1, 1),
        "reduce_bias": (squeezed,),
        "expand_weight": (channels, squeezed, 1, 1),
        "expand_bias": (channels,),
    }
    for name, shape in expected.items():
        t = getattr(se, name)
        if t is not None and t.shape != shape:
            raise ValueError(f"{op}: squeeze-excite {name} must be {list(shape)}, got {list(t.shape)}")
