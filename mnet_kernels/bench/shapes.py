"""The shapes that are measured: those of this package's models, found by running them on the meta device."""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..graph import known
from ..models import MODELS
from ..nn import FusedSequential
from ..training.config import build_model
from . import BenchError, providers
from .subjects import CLASSES, Block, Model


class Layer(NamedTuple):
    """A bias-free convolution inside a block; ``act`` of its input's batch norm, None at the block's own input."""

    kind: str  # pointwise, depthwise or dense
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: int
    stride: int
    act: str | None

    def __str__(self):
        kind = {"pointwise": f"pw{self.out_channels}", "depthwise": f"dw{self.kernel}s{self.stride}"}
        return kind.get(self.kind, f"conv{self.out_channels}k{self.kernel}s{self.stride}")


class _Recorder(TorchFunctionMode):
    """Writes down the convolutions that run, and the activation before each."""

    ACTIVATIONS = {F.relu: "relu", F.relu6: "relu6", F.hardtanh: "relu6", F.hardswish: "hardswish", F.silu: "silu"}

    def __init__(self):
        super().__init__()
        self.layers, self.activations, self._act, self._gate = [], set(), None, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d:
            self._convolution(*args)
        elif func in self.ACTIVATIONS and not self._gate:
            self._act = self.ACTIVATIONS[func]
            self.activations.add(self._act)
        return func(*args, **(kwargs or {}))

    def _convolution(self, x, weight, bias, stride, padding, dilation, groups):
        self._gate = bias is not None  # squeeze-excite's convolutions have one; its activation is not the map's
        if self._gate:
            return
        kind = "depthwise" if groups > 1 else "pointwise" if weight.shape[-1] == 1 else "dense"
        self.layers.append(Layer(kind, *x.shape[1:], weight.shape[0], weight.shape[-1], stride[0], self._act))
        self._act = None


def record(module, shape):
    """(convolutions of a module for images of ``shape`` in order, names of its activations)."""
    twin = providers.plain(copy.deepcopy(module).to("meta"))
    with _Recorder() as recorder:
        twin(torch.empty(2, *shape, device="meta"))
    return recorder.layers, sorted(recorder.activations)


def _outermost(module, prefix=""):
    for name, child in module.named_children():
        if known.is_fused(child) and not isinstance(child, FusedSequential):
            yield f"{prefix}{name}", child
        else:
            yield from _outermost(child, f"{prefix}{name}.")


def _input_shapes(model):
    """Input shape [C, H, W] of every block, by path."""
    shapes, twin = {}, copy.deepcopy(model.module).to("meta")
    blocks = list(_outermost(twin))
    providers.plain(twin)
    for path, module in blocks:

        def note(_, args, path=path):
            shapes[path] = tuple(args[0].shape[1:])

        module.register_forward_pre_hook(note)
    twin(torch.empty(2, *model.shape, device="meta"))
    return shapes


def models(names=None, width=1.0, resolution=224):
    """Subjects of whole models by name (default: all this package has)."""
    found = []
    for name in names or MODELS:
        if name not in MODELS:
            raise BenchError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
        torch.manual_seed(0)
        title = f"{name} x{width:g} {resolution}x{resolution}"
        found.append(Model(title, build_model(name, CLASSES, width), (3, resolution, resolution)))
    return found


def title(module, shape):
    """What a block is: input size, layers, activation, ``+x`` (residual) and ``+se`` (squeeze-excite)."""
    rows, activations = record(module, shape)
    flags = ["+x"] * getattr(module, "use_res_connect", False)
    flags += ["+se"] * any(child.endswith("fc1") for child, _ in module.named_modules())
    return " ".join(["x".join(map(str, shape)), *map(str, rows), *activations, *flags])


def placed(model):
    """(path, block) of every block of a :class:`Model`, in order; equal ones have equal names, which begin with the
    model's."""
    shapes, name = _input_shapes(model), model.name.split()[0]
    return [
        (path, Block(f"{name} {title(module, shapes[path])}", module, shapes[path]))
        for path, module in _outermost(model.module)
    ]


def blocks(names=None, width=1.0, resolution=224):
    """The distinct blocks of the models, each once."""
    found = {}
    for model in models(names, width, resolution):
        for _, block in placed(model):
            found.setdefault(block.name, block)
    return list(found.values())
