"""A row of folded layers as a step of a plan: packed weights that are renewed when the layers' own change."""

import torch
from torch import nn

from .. import folded
from ..stages import note
from . import eligibility


class FoldedRow:
    """A block of layers without batch norm, by the fused CPU kernels; elsewhere the modules one by one.

    They run where the kernels cannot (another device or dtype, an empty batch), where a gradient is asked for, under
    torch.compile and export, with ``MNET_BACKEND``, and where a weight is not a module's own parameter
    (functional_call).  Packed weights are of a parameter object, its storage and its version counter, which every
    in-place change raises but one through ``parameter.data``.
    """

    stem = None

    def __init__(self, block):
        self.block, self.blocks = block, (block,)
        self._owners = [layer.conv for layer in block.layers]
        if block.excite is not None:
            self._owners += [m for m in block.excite.modules() if isinstance(m, nn.Conv2d)]
        self._weights = None  # (a convolution's parameters, name, tensor, storage's address, version) of each weight
        self._packed = {}  # dtype -> PackedRow of them

    def run(self, x):
        packed = self._find(x)
        if packed is None:
            note("native::folded_row")
            return self._native(x)
        return packed(x)

    def _native(self, x):
        y = x
        for i, layer in enumerate(self.block.layers):
            if self.block.excite is not None and i == len(self.block.layers) - 1:
                y = self.block.excite(y)
            y = layer.conv(y)
            if layer.activation is not None:
                y = layer.act(y)
        return y + x if self.block.residual else y

    def _find(self, x):
        """The packed row for an input, made anew if the weights are others; None where the modules must be called."""
        if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
            return None
        if self._weights is None or self._changed():
            self._packed, self._weights = {}, self._look()
            if self._weights is None:
                return None
        if torch.is_grad_enabled() and any(entry[2].requires_grad for entry in self._weights):
            return None
        weight = self._weights[0][2]
        dtype = folded.dtype_of(x, weight.dtype)
        if dtype is None or weight.device.type != "cpu":
            return None
        if dtype not in self._packed:
            self._packed[dtype] = self._pack(dtype)
        return self._packed[dtype]

    def _changed(self):
        for parameters, name, tensor, pointer, version in self._weights:
            if parameters.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != pointer:
                return True
        return False

    def _look(self):
        """What tells of every weight whether it is changed; None if one is no parameter, or tells nothing."""
        found = []
        for conv in self._owners:
            for name in ("weight", "bias"):
                tensor = conv._parameters.get(name)
                if type(tensor) is not nn.Parameter or tensor.is_inference():
                    return None
                found.append((conv._parameters, name, tensor, tensor.data_ptr(), tensor._version))
        return found

    def _pack(self, dtype):
        block = self.block
        layers = [
            folded.FoldedLayer(
                layer.kind, layer.conv.weight, layer.conv.bias,
                eligibility.activation_name(layer.activation), layer.conv.stride[0],
            )
            for layer in block.layers
        ]  # fmt: skip
        excite = None if block.excite is None else eligibility.squeeze_excite_params(block.excite)
        return folded.PackedRow(layers, dtype, excite, block.residual)
