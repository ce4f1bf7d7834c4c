"""Fused twins of other libraries' modules, with the same children: what ``mnet_kernels.accelerate`` puts in."""

from torch import nn

from .. import functional
from . import fusable, structure
from .base import FusedModule


class _Twin(FusedModule):
    """Runs the layers of ``original`` fused, and ``original`` itself where they may not be.

    Children are the original's own dictionary, so that a child put into the one is in the other; attributes that the
    twin lacks are the original's.
    """

    def __init__(self, original, backend, mode):
        super().__init__()
        self._modules = original._modules
        # In a tuple, so that the original is no registered child: no second set of keys, yet copied and pickled along.
        self._replaces = (original,)
        self.backend, self.mode = backend, mode
        self.training = original.training

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_replaces" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self._replaces[0], name)

    def train(self, mode=True):
        self._replaces[0].training = mode
        return super().train(mode)

    def run_native(self, x):
        return self._replaces[0](x)


class FusedTwin(_Twin, nn.Module):
    """The twin of a block that comes to one op (``structure.read``)."""

    def why_native(self):
        original = self._replaces[0]
        found = structure.read(original)
        if found is None:
            return structure.UNREAD
        return fusable.untouched(original, "the block") or found.why_native()

    def run_fused(self, x):
        found = structure.read(self._replaces[0])
        drop = found.drop if self.training and found.residual and _drops(found.drop) else None
        residual = found.residual and found.op == "inverted_residual" and drop is None
        out = run(found, x, residual, self.backend, self.mode)
        if found.residual and not residual:
            out = (out if drop is None else drop(out)) + x
        return out


class FusedSequentialTwin(_Twin, nn.Sequential):
    """The twin of an nn.Sequential: one op, or runs of its layers fused and its other children called."""

    def _parts(self):
        whole = structure.parse([self._replaces[0]])
        if whole is not None and whole.why_native() is None:
            return [whole]
        return structure.segments(self)

    def why_native(self):
        why = fusable.untouched(self._replaces[0], "the Sequential")
        if why or any(isinstance(part, structure.Structure) for part in self._parts()):
            return why
        whole = structure.parse([self._replaces[0]])
        return structure.UNREAD if whole is None else whole.why_native()

    def run_fused(self, x):
        for part in self._parts():
            x = run(part, x, False, self.backend, self.mode) if isinstance(part, structure.Structure) else part(x)
        return x


def _drops(module):
    """Whether stochastic depth (torchvision's StochasticDepth, timm's DropPath) ever drops a branch."""
    if module is None:
        return False
    return getattr(module, "p", getattr(module, "drop_prob", None)) != 0


def run(found, x, residual, backend, mode):
    """Run a structure by its op."""
    layers = [fusable.layer(layer.conv, layer.bn, layer.act, layer.kind) for layer in found.layers]
    options = {"activation": layers[0].activation, "backend": backend, "mode": mode}
    if found.op == "pointwise_conv_bn_act":
        return functional.pointwise_conv_bn_act(x, layers[0].weight, layers[0].bn, **options)
    options["stride"] = next(layer.stride for layer in layers if layer.kind != "pointwise")
    if found.op == "stem_conv_bn_act":
        return functional.stem_conv_bn_act(x, layers[0].weight, layers[0].bn, **options)
    if found.op == "depthwise_conv_bn_act":
        return functional.depthwise_conv_bn_act(x, layers[0].weight, layers[0].bn, **options)
    flat = [part for layer in layers for part in (layer.weight, layer.bn)]
    if found.op == "separable_conv":
        return functional.separable_conv(x, *flat, **options)
    if len(layers) == 2:
        flat = [None, None, *flat]
    excite = None if found.excite is None else fusable.squeeze_excite_params(found.excite)
    return functional.inverted_residual(x, *flat, residual=residual, squeeze_excite=excite, **options)
