"""Rows of convolutions with a bias (batch norm folded in) on the CPU kernels, their weights packed beforehand.

Inference alone: nothing is gathered for a backward pass.  What a row computes is what its layers do one after another;
the results differ by rounding.
"""

from typing import NamedTuple

import torch

from .autograd import autocast_off, autocast_on, excite
from .choice import choose
from .params import SqueezeExciteParams
from .schema import ACTIVATIONS
from .stages import counted, stage


class FoldedLayer(NamedTuple):
    """A convolution with a bias and the activation after it."""

    kind: str  # pointwise, depthwise or dense
    weight: torch.Tensor
    bias: torch.Tensor
    activation: str
    stride: int = 1


def dtype_of(x, weight_dtype):
    """The dtype that the kernels compute in for an input, or None where torch's own ops must run."""
    if x.device.type != "cpu" or x.dim() != 4 or x.numel() == 0 or (x.requires_grad and torch.is_grad_enabled()):
        return None
    dtype = x.dtype
    if autocast_on("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    elif dtype != weight_dtype:
        return None  # torch says so
    return dtype if choose(x.device, dtype).backend == "cpu" else None


class PackedRow:
    """Layers in a row, packed for this processor in one dtype; call it with x [N, C, H, W].

    Args:
        layers: :class:`FoldedLayer` of the kinds of one of ``graph.eligibility.FOLDED_ROWS``.
        dtype: float32, bfloat16 or float16.
        excite: SqueezeExciteParams before the last layer, or None.
        residual: add x to what comes out.
    """

    def __init__(self, layers, dtype, excite=None, residual=False):
        # a stem reads an image as it lies; what is added at the end lies as the output does
        self.dtype, self.as_it_lies = dtype, layers[0].kind == "dense" and not residual
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            self._steps = _steps(layers, dtype, excite, residual)

    def __call__(self, x):
        x = x.to(self.dtype)
        if not self.as_it_lies:
            x = x.contiguous(memory_format=torch.channels_last)
        y = x
        for step in self._steps:
            y = step(x, y)
        return y


def _op(name):
    return counted(f"mnet_cpu::{name}", getattr(torch.ops.mnet_cpu, name).default)


def _table(bias):
    """The bias as a batch norm's table (schema.py): scale 1, shift."""
    table = torch.zeros(5, bias.shape[0], dtype=torch.float32)
    table[0] = 1
    table[1] = bias.detach()
    return table


def _steps(layers, dtype, excite_params, residual):
    """The row as calls ``step(x, y) -> y``: x is the row's input, y what the step before gave."""
    steps, stages, rest = [], stage("cpu"), list(layers)
    table, act = None, 0  # of y while it is raw
    while rest:
        layer = rest.pop(0)
        weight, out, out_act = layer.weight.detach().to(dtype), _table(layer.bias), ACTIVATIONS.index(layer.activation)
        if layer.kind == "pointwise" and rest:
            depthwise = rest.pop(0)
            steps.append(_expand_depthwise(weight, out, out_act, depthwise, dtype))
            table, act = _table(depthwise.bias), ACTIVATIONS.index(depthwise.activation)
        elif layer.kind == "pointwise":
            gate = None if excite_params is None else _gate(stages, excite_params, table, act)
            steps.append(_pointwise(weight, table, act, gate, out, out_act, residual))
            table = None
        elif layer.kind == "depthwise":
            steps.append(_raw(stages.depthwise, weight, table, act, layer.stride))
            table, act = out, out_act
        else:
            steps.append(_raw(stages.stem, weight, layer.stride))
            table, act = out, out_act
    if table is not None:
        steps.append(lambda x, y: stages.normalize(y, table, act, x if residual else None))
    return steps


def _raw(call, *args):
    return lambda x, y: call(y, *args, False)[0]


def _expand_depthwise(weight, table, act, layer, dtype):
    run, packed = _op("folded_expand_depthwise"), _op("folded_pack")(weight, True)
    shift = torch.zeros(weight.shape[1], dtype=torch.float32)
    depthwise, stride = layer.weight.detach().to(dtype), layer.stride
    return lambda x, y: run(y, shift, weight, packed, table, act, depthwise, stride)


def _pointwise(weight, table, act, gate, out, out_act, residual):
    run, packed = _op("folded_pointwise"), _op("folded_pack")(weight, False)

    def step(x, y):
        gates = None if gate is None else gate(y)
        return run(y, weight, packed, table, act, gates, out, out_act, x if residual else None)

    return step


def _gate(stages, params: SqueezeExciteParams, table, act):
    tensors = [None if t is None else t.detach().to(torch.float32, copy=True) for t in params.tensors]
    names = params.activation, params.gate

    def run(y):
        with autocast_off("cpu"):  # a gate is float32
            return excite.gate(names, stages.squeeze(y, table, act)[0], tensors)[0]

    return run
