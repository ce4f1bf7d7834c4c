"""From the ops that a training step calls to kernels with their bytes and arithmetic."""

import dataclasses

import torch
from torch.utils._pytree import tree_leaves


@dataclasses.dataclass(frozen=True)
class Device:
    """Peaks that floors are taken at.  The defaults are round figures for an H100."""

    bandwidth: float = 3.0e12  # bytes/s
    tensor: float = 700e12  # FLOP/s of the matrix units
    vector: float = 29.6e12  # lane instructions/s


@dataclasses.dataclass
class Kernel:
    """One kernel of a training step: the layer it is for, its phase and its work."""

    layer: int
    phase: str  # forward, backward
    op: str
    bytes: int
    tensor: float = 0.0  # FLOPs on the matrix units
    vector: float = 0.0  # lane instructions

    def floor(self, device):
        """Seconds that it takes at least."""
        return max(self.bytes / device.bandwidth, self.tensor / device.tensor, self.vector / device.vector)


# Lane instructions: k*k multiply-adds of a depthwise output and its unpacking and packing; normalising and activating a
# value as it is read; adding a value to its channel's moments or sums.
_NORMALISE, _MOMENTS = 5, 3


def _taps(weight):
    return weight.shape[-1] * weight.shape[-2] + 2


def _halo(size, stride, kernel):
    """How often an input of a depthwise layer is computed anew: tiles of 14x14 outputs, 7x7 at stride 2."""
    if size <= 14:
        return 1.0
    tile = 14 if stride == 1 else 7
    return ((tile - 1) * stride + kernel) ** 2 / (tile * stride) ** 2


def _product(weight, positions):
    return 2.0 * weight.numel() * positions


def _positions(t):
    return t.numel() // t.shape[1]


def _convolution(weight, out, depthwise):
    """(matrix FLOPs, lane instructions) of one direction."""
    if depthwise:
        return 0.0, float(_taps(weight) * out.numel())
    return _product(weight, _positions(out)), 0.0


def _work(op, args, outputs):
    """(matrix FLOPs, lane instructions) of an op other than a convolution's backward; 0, 0 if it is all bytes."""
    if op == "convolution":
        return _convolution(args[1], outputs[0], args[8] > 1)
    if op in ("mm", "addmm"):
        a, b = args[-2:]
        return 2.0 * a.shape[0] * a.shape[1] * b.shape[1], 0.0
    if op == "pointwise":
        x, weight, bn = args[:3]
        y = outputs[0]
        return _product(weight, _positions(y)), _NORMALISE * x.numel() * (bn is not None) + _MOMENTS * y.numel()
    if op == "stem":
        return _product(args[1], _positions(outputs[0])), _MOMENTS * outputs[0].numel()
    if op == "depthwise":
        x, weight, bn = args[:3]
        y = outputs[0]
        return 0.0, (_taps(weight) + _MOMENTS) * y.numel() + _NORMALISE * x.numel() * (bn is not None)
    if op == "pointwise_backward":
        y, x, weight, bn = args[1], args[6], args[7], args[8]
        dx, sums, dw = args[12:15]
        lanes = _NORMALISE * (y.numel() + 2 * x.numel() * (bn is not None))
        return ((dx or sums) + dw) * _product(weight, _positions(y)), lanes
    if op == "stem_backward":
        y, dw = args[1], outputs[1]
        return _product(dw, _positions(y)), _NORMALISE * y.numel()
    if op == "depthwise_backward":
        y, x, weight, bn = args[1], args[7], args[8], args[9]
        dx, dw = args[13:15]
        lanes = (dx + dw) * _taps(weight) * y.numel() + _NORMALISE * y.numel()
        return 0.0, lanes + 2 * _NORMALISE * x.numel() * (bn is not None)
    if op in ("gram", "normalize_gram"):
        return 2.0 * args[0].shape[1] * args[0].numel(), 0.0
    if op == "expand_depthwise":
        return _expand_depthwise(args[0], args[2], args[5], args[6], outputs[0])
    if op == "expand_depthwise_backward":
        return _expand_depthwise_backward(args)
    if op == "expand_mix":
        return 2.0 * args[0].shape[1] * args[0].numel(), 10.0 * args[0].numel()
    return 0.0, 0.0


def _expand_depthwise(x, expand_weight, weight, stride, y):
    again = _halo(x.shape[2], stride, weight.shape[-1])
    expanded = again * expand_weight.shape[0] * _positions(x)
    lanes = _NORMALISE * expanded + (_taps(weight) + _MOMENTS) * y.numel()
    return again * _product(expand_weight, _positions(x)), lanes


def _expand_depthwise_backward(args):
    project, y, x, expand, weight, stride = args[5], args[8], args[12], args[14], args[17], args[18]
    again = _halo(y.shape[2], 1, weight.shape[-1]) if stride == 1 else 1.15
    flops = again * _product(project, _positions(y)) + 3 * _product(expand, _positions(x))
    lanes = again * (2 * _taps(weight) + 2 * _NORMALISE) * y.numel()
    return flops, lanes + 3 * _NORMALISE * expand.shape[0] * _positions(x)


def _size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def kernels(calls):
    """Kernels of traced calls, each with its own reads and writes."""
    result = []
    for layer, phase, op, args, outputs in calls:
        if op == "convolution_backward":
            result += _convolution_backward(layer, args, outputs)
            continue
        moved = _size(tree_leaves(args)) + _size(outputs)
        if op == "native_batch_norm" and args[5]:  # statistics of the batch
            moved += _size(args[:1])
        elif op == "native_batch_norm_backward":
            moved += _size(args[:2])
        result.append(Kernel(layer, phase, op, moved, *_work(op, args, outputs)))
    return result


def _convolution_backward(layer, args, outputs):
    grad, x, weight = args[:3]
    flops, lanes = _convolution(weight, grad, args[9] > 1)
    made = iter(outputs)
    result = []
    for wanted, name, other in zip(args[10], ("dgrad", "wgrad", "bias grad"), (weight, x, None), strict=True):
        if wanted:
            work = (flops, lanes) if other is not None else (0.0, 0.0)
            result.append(Kernel(layer, "backward", name, _size([grad, other, next(made)]), *work))
    return result


# Element-wise ops that torch.compile fuses into the batch norm beside them.
_FUSED_AWAY = {
    "relu", "relu_", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "silu", "silu_", "sigmoid",
    "clone", "expand", "div",
    "threshold_backward", "hardtanh_backward", "hardswish_backward", "hardsigmoid_backward",
    "silu_backward", "sigmoid_backward",
}  # fmt: skip


def compiled(calls):
    """Kernels of eager's calls after fusion: convolutions as they are, batch norm in two passes with its neighbours.

    An addition (the residual, or two gradients) costs one more read in the kernel that it is fused into.  The scale of
    squeeze-excite is a kernel of its own; its backward rides along, but for the reduction to the gate's gradient.
    """
    result = []
    for call in calls:
        layer, phase, op, args, outputs = call
        is_map = bool(outputs) and outputs[0].dim() == 4 and outputs[0].shape[2:] != (1, 1)
        if op in _FUSED_AWAY or (op == "mul" and phase == "backward"):
            continue
        if op in ("add", "add_") and is_map:
            result.append(Kernel(layer, phase, op, _size(outputs)))
        elif op == "sum" and args[0].dim() == 4:
            result.append(Kernel(layer, phase, op, 2 * _size(args[:1]) + _size(outputs)))
        else:
            result += kernels([call])
    return result
