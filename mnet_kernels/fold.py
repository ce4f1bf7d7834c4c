"""A trained model as plain convolutions and activations, for inference and for other programs."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .accelerate import restore
from .nn import FusedInvertedResidual, FusedPointwiseConvBNActPool, FusedSeparable, fusable, structure
from .nn.base import FusedModule
from .nn.folded import FoldedRow, Residual, read

# Convolution and batch norm that a model calls one after the other by name.
PAIRS = {
    "mnet_kernels.models.v1.FusedMobileNetV1": (("conv_stem", "bn1"),),
    "timm.models.efficientnet.EfficientNet": (("conv_stem", "bn1"), ("conv_head", "bn2")),
    "timm.models.mobilenetv3.MobileNetV3": (("conv_stem", "bn1"),),
}


LONGEST_ROW = 7  # modules: three convolutions, their activations and squeeze-excite


def fold(model, *, fused=False):
    """A copy of ``model`` in eval mode whose batch norms are part of the convolutions before them.

    Every convolution that is followed by a batch norm within a fused module, an nn.Sequential, or one of the blocks
    that :func:`mnet_kernels.accelerate` knows becomes one nn.Conv2d with a bias, and so do the stems and heads of the
    models here and of timm's.  The copy runs torch's own ops only and exports as it is.  Batch norms elsewhere stay.

    With ``fused`` the compiled CPU kernels run the blocks of the copy, wherever they can; elsewhere (another device,
    torch.compile, export) the same plain convolutions do.  The kernels take their weights once, at the first call with
    a dtype: to change the copy's weights afterwards, fold again or load a state_dict, but don't write into them.

    Args:
        model: an nn.Module, accelerated or not; it is left as it is.
        fused: whether blocks run fused on the CPU.

    Returns:
        The copy: the same outputs as ``model.eval()`` up to rounding; parameters require no gradient.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold needs an nn.Module, got {type(model).__name__}")
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    holder = nn.ModuleList([folded])
    restore(holder)
    _walk(holder)
    if fused:
        _fuse(holder)
    return holder[0]


def _fuse(parent):
    """Puts a :class:`FoldedRow` in the place of what the kernels can run, as long rows as there are."""
    if type(parent) is nn.Sequential:
        _fuse_rows(parent)
    for name, child in list(parent._modules.items()):
        row = read(child) if isinstance(child, (nn.Sequential, Residual)) else None
        if row is not None:
            parent._modules[name] = FoldedRow(child, row)
        elif child is not None and not isinstance(child, FoldedRow):
            _fuse(child)


def _fuse_rows(sequential):
    """The same for several children one after another; the places of all but the first are left to identities."""
    names, at = list(sequential._modules), 0
    while at < len(names):
        for end in range(min(len(names), at + LONGEST_ROW), at + 1, -1):
            group = [sequential._modules[name] for name in names[at:end]]
            row = None if type(group[-1]) is nn.Identity else read(nn.Sequential(*group))
            if row is not None:
                sequential._modules[names[at]] = FoldedRow(nn.Sequential(*group), row)
                for name in names[at + 1 : end]:
                    sequential._modules[name] = nn.Identity()
                at = end - 1
                break
        at += 1


def _walk(parent):
    for name, child in list(parent._modules.items()):
        if child is not None:
            parent._modules[name] = _folded(child)


def _folded(module):
    """The module that takes this one's place."""
    if isinstance(module, FusedInvertedResidual):
        body = _sequence(module._modules[module._body]._modules.values())
        return Residual(body) if module.use_res_connect else body
    if isinstance(module, FusedSeparable):
        return _sequence(module._modules.values())
    if isinstance(module, FusedPointwiseConvBNActPool):
        return nn.Sequential(*_sequence(module._modules.values()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if structure.is_known(module):
        found = structure.read(module)
        if found is not None and all(map(_can_fold, found.layers)):
            body = _layers(found)
            return Residual(body) if found.residual else body
    if isinstance(module, FusedModule) or structure.is_sequential(module):
        return _sequence(module._modules.values())
    for conv, bn in PAIRS.get(fusable.qualified_name(module), ()):
        taken = structure.take_layer([module._modules[conv], module._modules[bn]])
        if taken is not None and _can_fold(taken[0]):
            module._modules[conv], *act = _fused_layer(taken[0])
            module._modules[bn] = nn.Sequential(*act)
    _walk(module)
    return module


def _can_fold(layer):
    return isinstance(layer.bn, nn.BatchNorm2d) and layer.bn.running_mean is not None


def _layers(found):
    modules = []
    for i, layer in enumerate(found.layers):
        if found.excite is not None and i == len(found.layers) - 1:
            modules.append(found.excite)
        modules += _fused_layer(layer)
    return nn.Sequential(*modules)


def _fused_layer(layer):
    conv = fuse_conv_bn_eval(layer.conv, layer.bn)
    return [conv] if layer.act is None or type(layer.act) is nn.Identity else [conv, layer.act]


def _sequence(modules):
    """A Sequential in which every convolution and the batch norm after it are one convolution."""
    rest, out = list(modules), []
    while rest:
        taken = structure.take_layer(rest)
        if taken is None or not _can_fold(taken[0]):
            out.append(_folded(rest.pop(0)))
            continue
        out += _fused_layer(taken[0])
        rest = rest[taken[1] :]
    return nn.Sequential(*out)
