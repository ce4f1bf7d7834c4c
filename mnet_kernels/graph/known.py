"""The classes whose forward is known, and what it does.

A module is understood if the class that its ``forward`` comes from is listed here, by name: libraries that may not be
installed are recognised without importing them.  Nothing is guessed from attributes or from the names of children, and
an object or class whose methods were replaced is not known.
"""

from typing import NamedTuple

import torch
from torch import nn


class Recipe(NamedTuple):
    """What a known ``forward`` does with its children: calls them one after another, then adds and pools.

    The children are given by name; one that is missing or None is passed over.
    """

    names: tuple[str, ...]
    residual: bool = False  # the input is added to what comes out
    drop: str | None = None  # stochastic depth of the branch that the input is added to
    pool: str | None = None  # of a network: the pool after its features, a child's name or MEAN
    tail: object = None  # of a network: tail(module, pooled) -> the output


MEAN = "mean"  # torch.nn.functional's, or the mean over H and W


class Known(NamedTuple):
    """The recipe of a class, and the methods besides ``forward`` that it rests on."""

    recipe: object  # recipe(module) -> Recipe, or None where this object does something else
    methods: tuple[str, ...] = ()


def _flag(value):
    """A setting that decides what is computed; anything but a bool (a tensor, a list) may change without being seen."""
    return value if type(value) is bool else None


def _body(name, attribute, drop=None):
    def recipe(module):
        residual = _flag(getattr(module, attribute, None))
        return None if residual is None else Recipe((name,), residual, drop)

    return recipe


def _timm_block(*names):
    def recipe(module):
        residual = _flag(getattr(module, "has_skip", None))
        if residual is None or module._modules.get("conv_s2d") is not None:
            return None
        return Recipe(names, residual, "drop_path")

    return recipe


def _inverted_residual(module):
    body, residual = "conv" if "conv" in module._modules else "block", _flag(getattr(module, "use_res_connect", None))
    return None if residual is None else Recipe((body,), residual)


def _classify(module, pooled):
    return module.classifier(torch.flatten(pooled, 1))


def _network(*names, pool=MEAN, tail=_classify):
    return lambda module: Recipe(names, pool=pool, tail=tail)


def _timm_classify(module, pooled):
    if module.drop_rate > 0.0:
        pooled = nn.functional.dropout(pooled, p=module.drop_rate, training=module.training)
    return module.classifier(pooled)


def _timm_efficientnet(module):
    if getattr(module, "grad_checkpointing", True):
        return None
    return Recipe(("conv_stem", "bn1", "blocks", "conv_head", "bn2"), pool="global_pool", tail=_timm_classify)


def _timm_head(module, pooled):
    x = module.flatten(module.act2(module.norm_head(module.conv_head(pooled))))
    return _timm_classify(module, x)


def _timm_mobilenetv3(module):
    if getattr(module, "grad_checkpointing", True):
        return None
    return Recipe(("conv_stem", "bn1", "blocks"), pool="global_pool", tail=_timm_head)


_TIMM_METHODS = ("forward_features", "forward_head")
KNOWN = {
    "torch.nn.modules.container.Sequential": Known(lambda m: Recipe(tuple(m._modules)), ("__iter__",)),
    "torchvision.models.mobilenetv2.InvertedResidual": Known(_body("conv", "use_res_connect")),
    "torchvision.models.mobilenetv3.InvertedResidual": Known(_body("block", "use_res_connect")),
    "torchvision.models.mnasnet._InvertedResidual": Known(_body("layers", "apply_residual")),
    "torchvision.models.efficientnet.MBConv": Known(_body("block", "use_res_connect", "stochastic_depth")),
    "timm.models._efficientnet_blocks.InvertedResidual": Known(
        _timm_block("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3")
    ),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": Known(
        _timm_block("conv_dw", "bn1", "aa", "se", "conv_pw", "bn2")
    ),
    "timm.models._efficientnet_blocks.ConvBnAct": Known(_timm_block("conv", "bn1", "aa")),
    "mnet_kernels.nn.inverted_residual.InvertedResidual": Known(_inverted_residual),
    "mnet_kernels.nn.separable.Separable": Known(
        lambda m: Recipe(("conv_dw", "bn1", "act1", "conv_pw", "bn2", "act2"))
    ),
    "mnet_kernels.nn.conv_bn_act.ConvBNActPool": Known(
        lambda m: Recipe(tuple(m._modules), pool=MEAN, tail=lambda module, pooled: pooled), ("__iter__",)
    ),
}
NETWORKS = {
    "torchvision.models.mobilenetv2.MobileNetV2": Known(_network("features"), ("_forward_impl",)),
    "torchvision.models.mobilenetv3.MobileNetV3": Known(_network("features", pool="avgpool"), ("_forward_impl",)),
    "torchvision.models.efficientnet.EfficientNet": Known(_network("features", pool="avgpool"), ("_forward_impl",)),
    "torchvision.models.mnasnet.MNASNet": Known(_network("layers")),
    "timm.models.efficientnet.EfficientNet": Known(_timm_efficientnet, _TIMM_METHODS),
    "timm.models.mobilenetv3.MobileNetV3": Known(_timm_mobilenetv3, _TIMM_METHODS),
    "mnet_kernels.models.v1.MobileNetV1": Known(
        _network("conv_stem", "bn1", "act1", "blocks", tail=lambda m, pooled: m.classifier(m.dropout(pooled)))
    ),
    "mnet_kernels.models.v2.MobileNetV2": Known(_network("features")),
    "mnet_kernels.models.v3.MobileNetV3": Known(_network("features", pool="avgpool")),
}

SEQUENTIAL = "torch.nn.modules.container.Sequential"
FOLDED = ("folded", None)  # the pins of what fold(fused=True) makes: rows of layers without batch norm

# ---- classes that run fused ------------------------------------------------------------------------------------------

_plain = {}  # class that runs fused, or guards methods -> the class that it takes the place of
_pins = {}  # the same -> the backend and mode that it asks for; None: its objects do
_forwards = set()  # the forwards that run fused


def register(cls, plain, pins=None):
    """Note that a class runs what ``plain`` computes, fused.

    ``pins``: the backend and mode that it asks for; None where its objects have them as attributes.
    """
    _plain[cls] = plain
    _pins[cls] = pins
    _forwards.add(cls.forward)


def register_guard(cls, plain):
    """Note that a class differs from ``plain`` by guarded methods alone."""
    _plain[cls] = plain


def swapped(cls):
    """The class that a class takes the place of, or None for any other class."""
    return _plain.get(cls)


def swapped_base(cls):
    """The first class in a class's order that takes another's place."""
    return next((c for c in cls.__mro__ if c in _plain and is_fused_class(c)), None)


def is_fused(module):
    """Whether a module's forward is one of those that run fused."""
    return is_fused_class(type(module))


def is_fused_class(cls):
    return cls.forward in _forwards


is_fused_class._dynamo_marked_constant = True  # of the class alone


def runs_fused(cls):
    """Whether a class is a fused one, or made from one."""
    return is_fused_class(cls) or swapped_base(cls) is not None


runs_fused._dynamo_marked_constant = True


def plain_class(cls):
    """The class whose forward a class runs: its own, or that of the class which the fused one in it stands for."""
    base = swapped_base(cls)
    return cls if base is None else _plain[base]


def overrides(cls):
    """Whether a class made from a fused one has a forward of its own."""
    return plain_class(cls) is not cls and not is_fused_class(cls)


overrides._dynamo_marked_constant = True


def pins(module):
    """The backend and mode that a fused module asks for, or :data:`FOLDED`."""
    found = class_pins(type(module))
    return (module.backend, module.mode) if found is None else found


def class_pins(cls):
    """The pins of a class that accelerate made; None for this package's own, whose objects have them as attributes."""
    return next((_pins[c] for c in cls.__mro__ if c in _pins), (None, None))


class_pins._dynamo_marked_constant = True


def name(cls):
    """The name in :data:`KNOWN` or :data:`NETWORKS` of a class's :func:`plain_class`, or None.

    None too where a method that the recipe rests on is not that class's own any more.
    """
    plain = plain_class(cls)
    owner = _owner(plain, "forward")
    found = f"{owner.__module__}.{owner.__qualname__}"
    known = KNOWN.get(found) or NETWORKS.get(found)
    if known is None or _owner(cls, "__call__") is not nn.Module:
        return None
    for method in ("forward", *known.methods):
        # the one that the recipe was written for: neither overridden further down nor replaced where it stands
        home = _owner(owner, method)
        if _owner(plain if method == "forward" else cls, method) is not home:
            return None
        function = vars(home)[method]
        source = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        if source != (home.__module__, f"{home.__qualname__}.{method}"):
            return None
    return found


name._dynamo_marked_constant = True


def _owner(cls, method):
    return next(c for c in cls.__mro__ if method in vars(c))


def recipe(module):
    """The :class:`Recipe` of what a module's call runs, or None where it is not known."""
    return None if overrides(type(module)) else fused_recipe(module)


def fused_recipe(module):
    """The same of what its fused forward stands for, which a class made from a fused one may call in its own."""
    found = name(type(module))
    if found is None:
        return None
    known = KNOWN[found] if found in KNOWN else NETWORKS[found]
    for method in known.methods:
        if method in module.__dict__:
            return None
    return known.recipe(module)


def is_sequential(module):
    """Whether it calls its children one after another, by nn.Sequential's own forward or fused."""
    cls = type(module)
    return isinstance(module, nn.Sequential) and not overrides(cls) and name(cls) == SEQUENTIAL
