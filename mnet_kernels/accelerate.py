"""Swap the blocks of an existing model for fused ones, in place, and back."""

import logging
from dataclasses import dataclass, field

from torch import nn

from .log import logger
from .nn import fusable, structure
from .nn.base import FusedModule
from .nn.twin import FusedSequentialTwin, FusedTwin


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
    """Replace the blocks in ``model`` that the fused kernels can run by their fused twins, in place.

    Known are torchvision's InvertedResidual (mobilenet_v2, mobilenet_v3_*, mnasnet*) and MBConv (efficientnet_b*),
    timm's InvertedResidual, DepthwiseSeparableConv and ConvBnAct (mobilenetv1_*, mobilenetv2_*, mobilenetv3_*,
    mnasnet_*, efficientnet_*, fbnetc_100, ...), and any nn.Sequential whose children are convolution, batch norm and
    activation in a row, by its structure.  Anything else is left as it is.

    The fused modules share the children of those they replace: the same parameter objects (optimizers made before
    stay valid), the same state_dict keys, the same training flags.  A block that may not be fused (hooks, replaced
    children, other geometry) is kept and reported with the reason.  :func:`restore` undoes it.

    Args:
        model: any nn.Module.
        backend, mode: pin the choice of the fused modules (see ``mnet_kernels.backend``).

    Returns:
        :class:`AccelerateReport`; ``print`` shows it line by line.

    Raises:
        TypeError: model is not an nn.Module, or is itself a single block (wrap it in a container first).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate needs an nn.Module, got {type(model).__name__}")
    if structure.read(model) is not None:
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
        full, found = f"{prefix}{name}", structure.read(child)
        why = None if found is None else fusable.untouched(child, "the block") or found.why_native()
        if found is not None and not why:
            cls = FusedSequentialTwin if structure.is_sequential(child) else FusedTwin
            _replace(parent, name, cls(child, backend, mode), found.op, full, report)
        elif structure.is_known(child):
            report.kept.append((full, type(child).__name__, why or structure.UNREAD))
        else:
            count = len(report.replaced)
            _segments(parent, name, child, full, report, backend, mode)
            _walk(child, f"{full}.", report, backend, mode)
            if why and count == len(report.replaced):
                report.kept.append((full, type(child).__name__, why))


def _segments(parent, name, child, full, report, backend, mode):
    """Replace a Sequential of which some runs of layers are ops."""
    if structure.is_sequential(child) and not fusable.untouched(child, ""):
        ops = [part.op for part in structure.segments(child) if isinstance(part, structure.Structure)]
        if ops:
            twin = FusedSequentialTwin(child, backend, mode)
            _replace(parent, name, twin, f"a Sequential that runs {', '.join(ops)}", full, report)


def _replace(parent, name, twin, what, full, report):
    report.replaced.append((full, type(parent._modules[name]).__name__, what))
    parent._modules[name] = twin
