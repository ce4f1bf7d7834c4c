"""Rows of layers, read off modules that are called one after another: one reading for every way in."""

from typing import NamedTuple

from torch import nn

from . import eligibility, known

UNREAD = "its children are no row of convolution, batch norm and activation"
EXCITES = (
    "torchvision.ops.misc.SqueezeExcitation",
    "timm.models._efficientnet_blocks.SqueezeExcite",
    "mnet_kernels.nn.squeeze_excite.SqueezeExcite",
)


class ConvLayer(NamedTuple):
    """A convolution, its batch norm (None: folded into the convolution, which has a bias) and what follows (None:
    nothing), as modules."""

    kind: str  # pointwise, depthwise or dense
    conv: nn.Module
    bn: nn.Module | None
    act: nn.Module | None

    @property
    def activation(self):
        """The activation's module, None for none."""
        return None if type(self.act) is nn.Identity else self.act

    def __str__(self):
        return self.kind if self.activation is None else f"{self.kind} {type(self.act).__name__}"


class Block(NamedTuple):
    """A row of layers that is one op of the functional API, or none (``op`` None)."""

    layers: tuple[ConvLayer, ...]
    excite: nn.Module | None = None  # before the last layer
    residual: bool = False
    drop: nn.Module | None = None
    passed: tuple = ()  # containers and identities between
    pins: tuple = (None, None)  # the backend and mode that the module asks for

    @property
    def op(self):
        kinds = [layer.kind for layer in self.layers]
        if self.layers[0].bn is None:
            whole = kinds in eligibility.FOLDED_ROWS and (self.excite is None or kinds[-1] == "pointwise")
            return "folded_row" if whole else None
        acts = [eligibility.activation_name(layer.activation) for layer in self.layers]
        if kinds[-2:] == ["depthwise", "pointwise"] and None not in acts:
            if kinds[:-2] in ([], ["pointwise"]) and len(set(acts[:-1])) == 1 and acts[-1] == "identity":
                return "inverted_residual"
            if kinds[:-2] == [] and self.excite is None:
                return "separable_conv"
        if len(kinds) == 1 and self.excite is None:
            return f"{'stem' if kinds[0] == 'dense' else kinds[0]}_conv_bn_act"
        return None

    @property
    def fits_residual(self):
        """Whether what comes out has the shape of what went in."""
        first, last = (eligibility.tensor(layer.conv, "weight").shape for layer in (self.layers[0], self.layers[-1]))
        channels = first[0] if self.layers[0].kind == "depthwise" else first[1]
        return channels == last[0] and all(layer.conv.stride == (1, 1) for layer in self.layers)

    @property
    def is_separable(self):
        """Whether it may stand in a row of separable blocks."""
        alone = len(self.layers) == 2 and self.excite is None and not self.residual
        return alone and self.op in ("separable_conv", "inverted_residual")

    def why_native(self):
        """Why the modules must be called one by one, or None."""
        why = None
        for layer in self.layers:
            why = why or eligibility.conv_bn_act(layer.conv, layer.bn, layer.act, layer.kind, layer.kind)
        if not why and self.op is None:
            if len(self.layers) == 1 and self.excite is None:
                return f"a {self.layers[0]} layer has no fused op"
            return f"its layers are {', '.join(map(str, self.layers))}: no fused op has this order"
        if not why and self.excite is not None:
            why = eligibility.squeeze_excite(self.excite)
        for module in (*self.passed, *(() if self.drop is None else (self.drop,))):
            why = why or eligibility.untouched(module, type(module).__name__)
        return why

    @property
    def modules(self):
        """Every module that it stands for."""
        found = [m for layer in self.layers for m in layer[1:] if m is not None]
        return [*found, *(m for m in (self.excite, self.drop) if m is not None), *self.passed]

    @property
    def convolutions(self):
        """Those that run within the op, squeeze-excite's too."""
        excite = () if self.excite is None else self.excite.modules()
        return [layer.conv for layer in self.layers] + [m for m in excite if isinstance(m, nn.Conv2d)]


def take_layer(modules, folded=False):
    """(ConvLayer at the start of the list, modules it takes), or None; ``folded``: one without a batch norm."""
    if not modules or not isinstance(modules[0], nn.Conv2d):
        return None
    conv, kind, bn, taken = modules[0], eligibility.kind(modules[0]), None, 1
    following = modules[1] if len(modules) > 1 else None
    if (following is not None and eligibility.is_norm(following)) is folded:
        return None
    if not folded:
        bn, taken = following, 2
        if eligibility.qualified_name(bn) in eligibility.NORM_ACT:
            return ConvLayer(kind, conv, bn, bn.act), taken
    act = modules[taken] if len(modules) > taken else None
    act = act if act is not None and eligibility.is_activation(act) else None
    return ConvLayer(kind, conv, bn, act), taken + (act is not None)


def _flatten(modules, passed):
    for module in modules:
        if known.is_sequential(module):
            passed.append(module)
            yield from _flatten(module._modules.values(), passed)
        elif type(module) is nn.Identity:
            passed.append(module)
        else:
            yield module


def row(modules, folded=False):
    """The :class:`Block` of modules called one after another, or None if they are not just layers and squeeze-excite.

    ``folded``: layers without batch norms.
    """
    passed, layers, excite, excited = [], [], None, 0
    rest = list(_flatten(modules, passed))
    while rest:
        if excite is None and layers and eligibility.qualified_name(rest[0]) in EXCITES:
            excite, rest, excited = rest[0], rest[1:], len(layers)
            continue
        taken = take_layer(rest, folded)
        if taken is None:
            return None
        layers.append(taken[0])
        rest = rest[taken[1] :]
    if not layers or (excite is not None and excited != len(layers) - 1):
        return None
    return Block(tuple(layers), excite, passed=tuple(passed))


LONGEST = 3  # layers of a block


def first_block(modules, folded=False):
    """(the longest Block at the start of a list of modules, how many it takes), or None."""
    for end in reversed(list(_ends(modules, folded))):
        block = row(modules[:end], folded)
        if block is not None and block.why_native() is None:
            return block, end
    return None


def _ends(modules, folded):
    """How many modules the first layer takes, the first two, ..."""
    rest, count = list(modules), 0
    for layer in range(LONGEST):
        at = 0
        if layer:
            while at < len(rest) and _is_between(rest[at]):
                at += 1
        taken = _take(rest[at:], folded)
        if taken is None:
            return
        count += at + taken
        rest = rest[at + taken :]
        yield count


def _is_between(module):
    return type(module) is nn.Identity or eligibility.qualified_name(module) in EXCITES


def _take(modules, folded):
    """How many modules the layer at the start of a list takes, identities between its parts counted, or None."""
    kept = [i for i, module in enumerate(modules[:6]) if type(module) is not nn.Identity]
    if not kept or kept[0] != 0:
        return None
    taken = take_layer([modules[i] for i in kept], folded)
    return None if taken is None else kept[taken[1] - 1] + 1
