"""Rows of folded layers that run fused: what ``fold(model, fused=True)`` puts in place of plain ones."""

from typing import NamedTuple

import torch
from torch import nn

from ..autograd import autocast_off, autocast_on, excite
from ..choice import choose
from ..schema import ACTIVATIONS
from ..stages import counted, note, stage
from . import fusable


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


KINDS = ("pointwise", "depthwise", "dense")
ROWS = (
    ["dense"],
    ["depthwise"],
    ["pointwise"],
    ["depthwise", "pointwise"],
    ["pointwise", "depthwise", "pointwise"],
    ["dense", "depthwise", "pointwise"],
)


class FoldedRow(nn.Module):
    """Folded layers in a row: ``body(x)`` by the fused CPU kernels, whose results differ by rounding alone.

    The kernels read a snapshot of the layers, made at the first call with a dtype: their weights packed for this
    processor.  ``.to()`` and ``load_state_dict`` take a new one; a weight that is changed in place is not seen.

    Where the kernels cannot run (another device or dtype, an empty batch, a gradient asked for, torch.compile,
    export, ``MNET_BACKEND``), ``body`` does.  Hooks of modules within it are called there alone.

    Args:
        body: plain modules, [N, C, H, W] -> [N, C', H', W'].
        row: what they compute (:func:`read`).
    """

    def __init__(self, body, row):
        super().__init__()
        self.body = body
        self.row = row
        self._plans = {}

    def forward(self, x):
        dtype = self._dtype(x)
        if dtype is None:
            note("native::folded")
            return self.body(x)
        plan = self._plans.get(dtype)
        if plan is None:
            with torch.inference_mode(False), torch.no_grad():
                plan = self._plans[dtype] = _plan(self.row, dtype)
        x = x.to(dtype)
        if self.row.layers[0].kind != "dense":  # a stem reads an image as it lies
            x = x.contiguous(memory_format=torch.channels_last)
        y = x
        for step in plan:
            y = step(x, y)
        return y

    def _dtype(self, x):
        """The dtype that the kernels compute in, None where the modules must be called."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor:
            return None
        if x.device.type != "cpu" or x.dim() != 4 or x.numel() == 0 or (x.requires_grad and torch.is_grad_enabled()):
            return None
        dtype = x.dtype
        if autocast_on("cpu") and dtype != torch.float64:
            dtype = torch.get_autocast_dtype("cpu")
        elif dtype != self.row.layers[0].conv.weight.dtype:
            return None  # torch says so
        return dtype if choose(x.device, dtype).backend == "cpu" else None

    def _apply(self, fn, recurse=True):
        self._plans = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._plans = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "_plans": {}}


class FoldedLayer(NamedTuple):
    """A convolution with a bias and the name of the activation after it."""

    kind: str  # of KINDS
    conv: nn.Conv2d
    activation: str


class Row(NamedTuple):
    """Layers one after another, squeeze-excite before the last, x added to what comes out."""

    layers: tuple
    excite: nn.Module | None = None
    residual: bool = False


def read(module):
    """What a plain module computes as a :class:`Row`, or None where no kernels do that."""
    residual = type(module) is Residual
    rest, layers, se = list(_flat(module.body if residual else module)), [], None
    while rest:
        first = rest.pop(0)
        if se is None and fusable.squeeze_excite(first) is None:
            se, at = first, len(layers)
            continue
        kind = next((kind for kind in KINDS if fusable.conv(first, kind, "", biased=True) is None), None)
        if kind is None:
            return None
        activation = "identity"
        if rest and type(rest[0]) in fusable.ACTIVATIONS and not fusable.untouched(rest[0], ""):
            activation = fusable.ACTIVATIONS[type(rest.pop(0))]
        layers.append(FoldedLayer(kind, first, activation))
    kinds = [layer.kind for layer in layers]
    if se is not None and (at != len(layers) - 1 or at == 0 or kinds[-1] != "pointwise"):
        return None
    if kinds not in ROWS:
        return None
    return Row(tuple(layers), se, residual)


def _flat(module):
    if type(module) is nn.Sequential and not fusable.untouched(module, ""):
        for child in module._modules.values():
            yield from _flat(child)
    elif type(module) is not nn.Identity:
        yield module


def _op(name):
    return counted(f"mnet_cpu::{name}", getattr(torch.ops.mnet_cpu, name).default)


def _table(conv):
    """The bias as a batch norm's table (schema.py): scale 1, shift."""
    table = torch.zeros(5, conv.out_channels)
    table[0] = 1
    table[1] = conv.bias
    return table


def _plan(row, dtype):
    """The row as calls ``step(x, y) -> y``: x is the row's input, y what the step before gave."""
    steps, stages, rest = [], stage("cpu"), list(row.layers)
    table, act = None, 0  # of y while it is raw
    while rest:
        layer = rest.pop(0)
        weight, out, out_act = (
            layer.conv.weight.detach().to(dtype),
            _table(layer.conv),
            ACTIVATIONS.index(layer.activation),
        )
        stride = layer.conv.stride[0]
        if layer.kind == "pointwise" and rest:
            depthwise = rest.pop(0).conv
            steps.append(_expand_depthwise(weight, out, out_act, depthwise, dtype))
            table, act = _table(depthwise), out_act
        elif layer.kind == "pointwise":
            gate = None if row.excite is None else _gate(stages, row.excite, table, act)
            steps.append(_pointwise(weight, table, act, gate, out, out_act, row.residual))
            table = None
        elif layer.kind == "depthwise":
            steps.append(_raw(stages.depthwise, weight, table, act, stride))
            table, act = out, out_act
        else:
            steps.append(_raw(stages.stem, weight, stride))
            table, act = out, out_act
    if table is not None:
        steps.append(lambda x, y: stages.normalize(y, table, act, x if row.residual else None))
    return steps


def _raw(call, *args):
    return lambda x, y: call(y, *args, False)[0]


def _expand_depthwise(weight, table, act, conv, dtype):
    run, shift, packed = _op("folded_expand_depthwise"), torch.zeros(weight.shape[1]), _op("folded_pack")(weight, True)
    depthwise, stride = conv.weight.detach().to(dtype), conv.stride[0]
    return lambda x, y: run(y, shift, weight, packed, table, act, depthwise, stride)


def _pointwise(weight, table, act, gate, out, out_act, residual):
    run, packed = _op("folded_pointwise"), _op("folded_pack")(weight, False)

    def step(x, y):
        gates = None if gate is None else gate(y)
        return run(y, weight, packed, table, act, gates, out, out_act, x if residual else None)

    return step


def _gate(stages, module, table, act):
    params = fusable.squeeze_excite_params(module)
    tensors = [None if t is None else t.detach().float() for t in params.tensors]
    names = params.activation, params.gate

    def run(y):
        with autocast_off("cpu"):  # a gate is float32
            return excite.gate(names, stages.squeeze(y, table, act)[0], tensors)[0]

    return run
