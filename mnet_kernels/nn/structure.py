"""The layers that a module of another library runs, read off its children.

A module is understood if it is an nn.Sequential (whatever it is called) or one of the classes listed here, whose
forward is known; nothing is guessed from names or attributes.
"""

from typing import NamedTuple

from torch import nn

from ..schema import STEM_CHANNELS, STEM_KERNEL
from . import fusable

EXCITES = (
    "torchvision.ops.misc.SqueezeExcitation",
    "timm.models._efficientnet_blocks.SqueezeExcite",
    "mnet_kernels.nn.squeeze_excite.SqueezeExcite",
)


UNREAD = "its children are no row of convolution, batch norm and activation"


class Layer(NamedTuple):
    """A convolution, its batch norm and what follows it (None: nothing), as modules."""

    kind: str  # pointwise, depthwise or dense
    conv: nn.Module
    bn: nn.Module
    act: nn.Module | None


class Structure(NamedTuple):
    """A row of layers: what they come to is one op of the functional API, or none (``op`` None)."""

    layers: tuple
    excite: nn.Module | None = None  # before the last layer
    residual: bool = False
    drop: nn.Module | None = None  # stochastic depth of the branch that x is added to
    passed: tuple = ()  # containers and identities between

    @property
    def op(self):
        kinds, acts = [layer.kind for layer in self.layers], [_activation(layer) for layer in self.layers]
        if kinds[-2:] == ["depthwise", "pointwise"] and len(set(acts[:-1])) == 1:
            if kinds[:-2] in ([], ["pointwise"]) and acts[-1] is None:
                return "inverted_residual"
            if kinds[:-2] == [] and acts[0] == acts[1] and self.excite is None:
                return "separable_conv"
        if len(kinds) == 1 and self.excite is None:
            return f"{'stem' if kinds[0] == 'dense' else kinds[0]}_conv_bn_act"
        return None

    def why_native(self):
        """Why the modules must be called one by one, or None."""
        for layer in self.layers:
            if layer.kind == "dense" and (len(self.layers) > 1 or not _is_stem(layer.conv)):
                height, width = layer.conv.kernel_size
                return f"a dense {height}x{width} convolution has no fused stage"
        if self.op is None:
            return f"its layers are {', '.join(map(_describe, self.layers))}: no fused op has this order"
        why = None if self.excite is None else fusable.squeeze_excite(self.excite)
        for layer in self.layers:
            why = why or fusable.conv_bn_act(layer.conv, layer.bn, layer.act, layer.kind, layer.kind)
        for module in (*self.passed, *(() if self.drop is None else (self.drop,))):
            why = why or fusable.untouched(module, type(module).__name__)
        return why


def _activation(layer):
    return None if layer.act is None or type(layer.act) is nn.Identity else type(layer.act)


def _describe(layer):
    act = _activation(layer)
    return f"{layer.kind}{'' if act is None else ' ' + act.__name__}"


def _kind(conv):
    if conv.groups == conv.in_channels and conv.groups > 1:
        return "depthwise"
    return "pointwise" if conv.kernel_size == (1, 1) and conv.groups == 1 else "dense"


def _is_stem(conv):
    return conv.kernel_size == (STEM_KERNEL, STEM_KERNEL) and conv.groups == 1 and conv.in_channels <= STEM_CHANNELS


def _is_norm(module):
    return isinstance(module, nn.GroupNorm) or hasattr(module, "running_var")


def _is_activation(module):
    return type(module).__module__ in ("torch.nn.modules.activation", "timm.layers.activations")


def take_layer(modules):
    """(Layer at the start of the list, modules it takes), or None."""
    if len(modules) < 2 or not isinstance(modules[0], nn.Conv2d) or not _is_norm(modules[1]):
        return None
    conv, bn = modules[:2]
    if fusable.qualified_name(bn) in fusable.NORM_ACT:
        return Layer(_kind(conv), conv, bn, bn.act), 2
    act = modules[2] if len(modules) > 2 and _is_activation(modules[2]) else None
    return Layer(_kind(conv), conv, bn, act), 2 + (act is not None)


def is_sequential(module):
    """Whether it calls its children one after another."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _flatten(modules, passed):
    for module in modules:
        if is_sequential(module):
            passed.append(module)
            yield from _flatten(module._modules.values(), passed)
        elif type(module) is nn.Identity:
            passed.append(module)
        else:
            yield module


def parse(modules):
    """The structure of modules called one after another, or None if they are not just layers and squeeze-excite."""
    passed, layers, excite = [], [], None
    rest = list(_flatten(modules, passed))
    while rest:
        if fusable.qualified_name(rest[0]) in EXCITES and excite is None and layers:
            excite, rest, excited = rest[0], rest[1:], len(layers)
            continue
        taken = take_layer(rest)
        if taken is None:
            return None
        layers.append(taken[0])
        rest = rest[taken[1] :]
    if not layers or (excite is not None and excited != len(layers) - 1):
        return None
    return Structure(tuple(layers), excite, passed=tuple(passed))


def _block(modules, residual, drop=None):
    found = parse(modules)
    return found and found._replace(residual=residual, drop=None if type(drop) is nn.Identity else drop)


def _timm_block(names):
    def structure(block):
        if block._modules.get("conv_s2d") is not None:
            return None
        modules = [block._modules[name] for name in names if name in block._modules]
        return _block(modules, block.has_skip, block._modules.get("drop_path"))

    return structure


# The classes whose forward is known, and what it runs.
BLOCKS = {
    "torchvision.models.mobilenetv2.InvertedResidual": lambda b: _block([b.conv], b.use_res_connect),
    "torchvision.models.mobilenetv3.InvertedResidual": lambda b: _block([b.block], b.use_res_connect),
    "torchvision.models.mnasnet._InvertedResidual": lambda b: _block([b.layers], b.apply_residual),
    "torchvision.models.efficientnet.MBConv": lambda b: _block([b.block], b.use_res_connect, b.stochastic_depth),
    "timm.models._efficientnet_blocks.InvertedResidual": _timm_block(
        ("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3")
    ),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": _timm_block(
        ("conv_dw", "bn1", "aa", "se", "conv_pw", "bn2")
    ),
    "timm.models._efficientnet_blocks.ConvBnAct": _timm_block(("conv", "bn1", "aa")),
}


def is_known(module):
    """Whether it is of one of the classes whose forward is known."""
    return fusable.qualified_name(module) in BLOCKS


def read(module):
    """The structure of a block or of an nn.Sequential, or None for any other module or content."""
    if is_known(module):
        return BLOCKS[fusable.qualified_name(module)](module)
    return parse([module]) if is_sequential(module) else None


def segments(sequential):
    """A Sequential's children, with every run of layers that one op covers as one :class:`Structure`.

    The longest runs come first: expand, depthwise, project; depthwise and pointwise; single layers.
    """
    rest, found = list(sequential._modules.values()), []
    while rest:
        layers, counts = [], []
        at = 0
        while len(layers) < 3 and (taken := take_layer(rest[at:])):
            layers.append(taken[0])
            at += taken[1]
            counts.append(at)
        for length in range(len(layers), 0, -1):
            run = Structure(tuple(layers[:length]))
            if run.op is not None and run.why_native() is None:
                found.append(run)
                rest = rest[counts[length - 1] :]
                break
        else:
            found.append(rest.pop(0))
    return found
