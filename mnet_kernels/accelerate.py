"""Swap the blocks of an existing model for fused ones, in place, and back."""

import logging
from dataclasses import dataclass, field

from torch import nn

from .log import logger
from .nn import FusedDepthwiseConvBNAct, FusedInvertedResidual, FusedPointwiseConvBNAct, fusable
from .nn.base import FusedModule


@dataclass
class AccelerateReport:
    """What :func:`accelerate` did: ``replaced`` rows (name, was, now), ``kept`` rows (name, type, why)."""

    replaced: list = field(default_factory=list)
    kept: list = field(default_factory=list)

    def __str__(self):
        lines = [f"replaced {len(self.replaced)} blocks, kept {len(self.kept)}"]
        lines += [f"  {name}: {was} -> {now}" for name, was, now in self.replaced]
        lines += [f"  {name}: {kind} kept: {why}" for name, kind, why in self.kept]
        return "\n".join(lines)


def accelerate(model, *, backend=None, mode=None):
    """Replace torchvision's blocks in ``model`` by fused ones, in place.

    The fused modules share the children of those they replace: the same parameter objects (optimizers made before
    stay valid), the same state_dict keys, the same training flags.  A block that may not be fused (hooks, replaced
    children, other geometry) is kept and reported with the reason.  :func:`restore` undoes it.

    Args:
        model: a model holding torchvision's InvertedResidual and Conv2dNormActivation blocks (mobilenet_v2,
            mobilenet_v3_large, mobilenet_v3_small).
        backend, mode: pin the choice of the fused modules (see ``mnet_kernels.backend``).

    Returns:
        :class:`AccelerateReport`; ``print`` shows it line by line.

    Raises:
        TypeError: model is not an nn.Module, or is itself a single block (wrap it in a container first).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate needs an nn.Module, got {type(model).__name__}")
    if _recognise(model) is not None:
        raise TypeError(
            f"accelerate replaces blocks inside a model, and {type(model).__name__} is a block itself: put it into an "
            "nn.Sequential first"
        )
    report = AccelerateReport()
    _walk(model, "", report, backend, mode)
    logger.log(logging.INFO, "accelerate: %s", report)
    return report


def restore(model):
    """Undo :func:`accelerate`: put the original blocks back, in place.

    Returns:
        The names of the blocks put back.
    """
    names = []
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):
            original = getattr(child, "_replaces", None)
            if original is not None:
                original[0].training = child.training
                parent._modules[child_name] = original[0]
                names.append(f"{parent_name}.{child_name}".lstrip("."))
    return names


def _walk(parent, prefix, report, backend, mode):
    for name, child in list(parent._modules.items()):
        if child is None or isinstance(child, FusedModule):
            continue
        full = f"{prefix}{name}"
        recognised = _recognise(child)
        if recognised is None:
            _walk(child, f"{full}.", report, backend, mode)
            continue
        kind, make = recognised
        why = fusable.untouched(child, "the block")
        if not why and make is None:
            why = kind
        fused = None if why else make(child, backend, mode)
        why = why or fused.why_native()
        if why:
            report.kept.append((full, type(child).__name__, why))
            continue
        fused.train(child.training)
        # In a tuple, so that the original is no registered child: no second set of keys, yet copied and pickled along.
        fused._replaces = (child,)
        parent._modules[name] = fused
        report.replaced.append((full, type(child).__name__, kind))


def _recognise(module):
    """(what it becomes or why not, maker or None) for a block that accelerate knows; None for any other module."""
    name = type(module).__name__
    if name == "InvertedResidual" and {"conv", "block"} & set(module._modules) and hasattr(module, "use_res_connect"):
        return FusedInvertedResidual.__name__, FusedInvertedResidual.of
    if name in ("Conv2dNormActivation", "ConvBNActivation", "ConvBNReLU") and isinstance(module, nn.Sequential):
        return _recognise_conv(module)
    return None


def _recognise_conv(module):
    conv = next(iter(module._modules.values()), None)
    if not isinstance(conv, nn.Conv2d):
        return f"its first child is {type(conv).__name__}, not Conv2d", None
    if conv.groups == conv.in_channels and conv.groups > 1:
        cls = FusedDepthwiseConvBNAct
    elif conv.kernel_size == (1, 1) and conv.groups == 1:
        cls = FusedPointwiseConvBNAct
    else:
        return f"a dense {conv.kernel_size[0]}x{conv.kernel_size[1]} convolution has no fused stage", None
    return cls.__name__, lambda m, backend, mode: cls.of(m._modules.values(), backend, mode)
