"""Running a model on the meta device, and what it calls there."""

import copy
import dataclasses
import math
import os

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..choice import backend, choose, least_positions
from ..graph import known, swap

# scheme -> backend and mode that run it (no mode: each module's own)
TRACED = {
    "eager": ("native", None),
    "chain": ("reference", "chain"),
    "algebraic": ("reference", "algebraic"),
    "auto": ("reference", None),
}


@dataclasses.dataclass
class Layer:
    """A convolution or linear layer with its batch norm; shapes without the batch, multiply-adds of one image."""

    name: str
    kind: str  # dense, depthwise, pointwise, linear
    in_shape: tuple
    out_shape: tuple
    parameters: int
    madds: int


def _meta_twin(model, dtype):
    """A copy on the meta device with weights in ``dtype``, and batch norms as they are."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        keep = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, p in module._parameters.items():
            if p is not None:
                value = torch.empty(p.shape, dtype=p.dtype if keep else dtype, device="meta")
                module._parameters[name] = nn.Parameter(value, requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty_like(b, device="meta")
    return twin


def _walk(model):
    """[(layer module, its name, parameters with its batch norm's)] in the order of registration."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found.append([module, name, 0])
        if module._parameters:
            if not found:
                raise ValueError(f"{name} has parameters but stands before every convolution and linear layer")
            found[-1][2] += sum(p.numel() for p in module._parameters.values() if p is not None)
    return found


def _kind(module):
    if isinstance(module, nn.Linear):
        return "linear"
    if module.groups == module.in_channels == module.out_channels and module.groups > 1:
        return "depthwise"
    return "pointwise" if module.kernel_size == (1, 1) and module.groups == 1 else "dense"


class _Recorder(TorchDispatchMode):
    """Writes down every op with the layer it belongs to: the one whose weight was used last in the forward pass, and
    the one whose weight is used next in the backward pass."""

    sees_stages = True

    def __init__(self, weights):
        super().__init__()
        self.weights = dict(weights)  # id of a weight, or of a view of one -> layer
        self.alive = []
        self.phase, self.layer = "forward", 0
        self.calls = []  # (layer, phase, op, arguments, outputs)
        self.pending = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = tree_map_only(torch.Tensor, _channels_last, func(*args, **(kwargs or {})))
        inputs = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        layers = [self.weights[id(t)] for t in inputs if id(t) in self.weights]
        op = func._schema.name.partition("::")[2]
        if func.is_view or op in _FREE:
            if layers:
                self.weights.update((id(t), layers[0]) for t in outputs)
                self.alive += outputs  # an id is good while its tensor is there
            return out
        if layers and "expand_" in op:
            # the stages of algebraic mode serve the expand and the depthwise layer: the depthwise one is listed last
            layers = layers[-1:]
        if layers:
            self.layer = layers[0]
        call = [self.layer, self.phase, op, args, outputs]
        self.calls.append(call)
        # algebraic mode's first stage of a block comes before its weights, and the last one after them
        if (self.phase == "backward") != (op in ("gram", "expand_mix")):
            self.pending.append(call)
        if layers:
            for waiting in self.pending:
                waiting[0] = self.layer
            self.pending = []
        return out


_FREE = {"device", "empty", "detach", "empty_like", "new_empty", "new_empty_strided", "as_strided_", "_unsafe_view"}


def _channels_last(t):
    # convolutions on the meta device forget the memory format, which would show as copies that no real device makes
    if t.dim() == 4 and not t._is_view() and not t.is_contiguous(memory_format=torch.channels_last):
        return t.contiguous(memory_format=torch.channels_last)
    return t


def _weights(found):
    return {id(module.weight): i for i, (module, _, _) in enumerate(found)}


def layers(model, input_shape):
    """The convolution and linear layers of a model for one input, with their multiply-adds.

    Args:
        model: an nn.Module that takes one batch of images or feature maps; it is copied, not run.
        input_shape: (C, H, W).

    Returns:
        List of :class:`Layer` in the order of registration.

    Raises:
        ValueError: a layer is not called, or more than once.
    """
    twin = _meta_twin(model, torch.float32).eval()
    found = _walk(twin)
    recorder = _Recorder(_weights(found))
    with torch.no_grad(), backend("native"), recorder:
        twin(torch.empty(1, *input_shape, device="meta"))
    result = {}
    for layer, _, op, args, (out, *_) in recorder.calls:
        if op not in ("convolution", "addmm", "mm"):
            continue
        module, name, parameters = found[layer]
        shape, source = tuple(out.shape[1:]), args[1] if op == "addmm" else args[0]
        madds = math.prod(shape) * module.weight[0].numel()
        if layer in result:
            raise ValueError(f"{name} is called more than once")
        result[layer] = Layer(name, _kind(module), tuple(source.shape[1:]), shape, parameters, madds)
    missing = [name for i, (_, name, _) in enumerate(found) if i not in result]
    if missing:
        raise ValueError(f"the model does not call {', '.join(missing)}")
    return [result[i] for i in range(len(found))]


def _mix_modes(twin, input_shape, dtype):
    """Give every fused module the mode that automatic choice on the CPU has for maps of its size."""
    least = least_positions("cpu", dtype)
    shapes = {layer.name: layer.in_shape for layer in layers(twin, input_shape)}
    for path, module in twin.named_modules():
        if known.is_fused(module):
            prefix = f"{path}." if path else ""
            first = next((shape for name, shape in shapes.items() if name.startswith(prefix)), None)
            if first is not None:
                mode = "algebraic" if math.prod(first[1:]) >= least else "chain"
                swap.pin(module, known.pins(module)[0], mode)


def trace(model, input_shape, batch, dtype, scheme, training=True):
    """(calls of one training step, bytes saved for backward); not ``training``: of a forward pass in eval mode."""
    twin = _meta_twin(model, dtype).train(training)
    if scheme == "auto":
        _mix_modes(twin, input_shape, dtype)
    recorder = _Recorder(_weights(_walk(twin)))
    kept, storages = {p.untyped_storage()._cdata for p in twin.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:
            storages[storage._cdata] = storage
        return tensor

    x = torch.empty(batch, *input_shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    name, mode = TRACED[scheme]
    with backend(name, mode), recorder:
        if choose(x.device, dtype).backend != name:
            raise ValueError(f"{scheme} cannot be traced while MNET_BACKEND={os.environ['MNET_BACKEND']}: unset it")
        if not training:
            with torch.no_grad():
                twin(x)
            return recorder.calls, 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = twin(x)
        recorder.phase = "backward"
        out.backward(torch.empty_like(out))
    return recorder.calls, sum(storage.nbytes() for storage in storages.values())
