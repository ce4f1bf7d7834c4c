"""Make the blocks of an existing model run fused, in place, and back."""

import logging
from dataclasses import dataclass, field

from torch import fx, nn

from .. import choice
from ..log import logger
from . import eligibility, known, reading, swap
from . import fx as graphs
from .read import UNREAD


@dataclass
class AccelerateReport:
    """What :func:`accelerate` did.

    ``replaced``: rows (name, class, op) of the blocks that run fused; ``joined``: (name, class) of the modules whose
    neighbouring blocks run as one; ``guarded``: (name, class) of the modules that restore themselves before a method
    that compares exact types (``fuse_model``); ``kept``: (name, class, why) of blocks that do not run fused;
    ``plain``: (name, why) of every nn.Conv2d that torch's own convolution runs; ``convolutions``: how many there are.
    """

    replaced: list = field(default_factory=list)
    joined: list = field(default_factory=list)
    guarded: list = field(default_factory=list)
    kept: list = field(default_factory=list)
    plain: list = field(default_factory=list)
    convolutions: int = 0

    def __str__(self):
        fused = self.convolutions - len(self.plain)
        lines = [
            f"replaced {len(self.replaced)} blocks, kept {len(self.kept)}; "
            f"{fused} of {self.convolutions} convolutions run fused"
        ]
        lines += [f"  {name or '(model)'}: {was} -> {op}" for name, was, op in self.replaced]
        lines += [f"  {name or '(model)'}: {was} runs neighbouring blocks as one" for name, was in self.joined]
        guards = ", ".join(swap.GUARDED)
        lines += [
            f"  {name or '(model)'}: {guards} of {was} compares exact types, and restores it first"
            for name, was in self.guarded
        ]
        lines += [f"  {name or '(model)'}: {kind} kept: {why}" for name, kind, why in self.kept]
        lines += [f"  {name or '(model)'}: plain: {why}" for name, why in self.plain]
        return "\n".join(lines)


def accelerate(model, *, backend=None, mode=None):
    """Make the blocks in ``model`` that the fused kernels can run do so, in place.

    Known are torchvision's InvertedResidual (mobilenet_v2, mobilenet_v3_*, mnasnet*) and MBConv (efficientnet_b*),
    timm's InvertedResidual, DepthwiseSeparableConv and ConvBnAct (mobilenetv1_*, mobilenetv2_*, mobilenetv3_*,
    mnasnet_*, efficientnet_*, fbnetc_100, ...), any nn.Sequential whose children are convolution, batch norm and
    activation in a row, the networks of torchvision and timm around them, whose last layer is pooled as it is
    computed, and in a torch.fx.GraphModule every such row of which only the end is used.  Anything else is left as it
    is.

    No module is replaced: a block's class becomes a subclass of its own class that overrides ``forward`` alone.
    Children, parameters (optimizers made before stay valid), buffers, attributes, hooks, state_dict keys, copies and
    whatever refers to the block are what they were, and any later edit counts.  What may not be fused (hooks on
    children, replaced layers, other geometry) runs its children, as does everything under tracers and transforms
    (torch.fx, torch.jit, torch.export, torch.func).  :func:`restore` undoes it.

    Args:
        model: any nn.Module, a block too.
        backend, mode: pin the choice of the fused modules (see ``mnet_kernels.backend``).

    Returns:
        :class:`AccelerateReport`; ``print`` shows it line by line.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: an unknown backend or mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate needs an nn.Module, got {type(model).__name__}")
    choice.check(backend, mode)
    report, pins = AccelerateReport(), (backend, mode)
    walk(model, "", report, pins, set())
    for name, module in model.named_modules():
        was = type(module).__name__
        if any(map(known.is_fused, module.modules())) and swap.guard(module):
            report.guarded.append((name, was))
    _list_convolutions(model, report)
    logger.log(logging.INFO, "accelerate: %s", report)
    return report


def restore(model):
    """Undo :func:`accelerate`, in place: every module's class is what it was.

    A model of this package's own becomes its plain network in torch's ops.

    Returns:
        The names of the modules changed ("" is the model itself).

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore needs an nn.Module, got {type(model).__name__}")
    changed = set(swap.unswap_all(model))
    changed |= {name for name, m in model.named_modules() if isinstance(m, fx.GraphModule) and graphs.unfuse_rows(m)}
    return [name for name, _ in model.named_modules() if name in changed]


def walk(module, name, report, pins, done, within=None):
    """Fuse a block as a whole, else what is within it, and then the module itself if it joins that.

    ``within``: whether a block around it was kept, and the report has said so.
    """
    if id(module) in done:
        return
    done.add(id(module))
    if isinstance(module, fx.GraphModule):
        for first, last, op in graphs.fuse_rows(module, pins):
            report.replaced.append((f"{name}.{first}".lstrip("."), f"row to {last}", op))
        for child in graphs.called(module):
            walk(module.get_submodule(child), f"{name}.{child}".lstrip("."), report, pins, done)
        return
    was = known.plain_class(type(module)).__name__
    recipe = known.recipe(module)
    block = None if recipe is None else reading.whole(module, recipe, pins)
    why = None if block is None else _own_forward(module) or block.why_native()
    if block is not None and not why:
        if not known.is_fused(module):
            report.replaced.append((name, was, block.op))
        _swap(module, pins)
        return
    is_block = block is not None or (recipe is not None and recipe.pool is None and not known.is_sequential(module))
    count, place = len(report.replaced), len(report.kept)
    for child_name, child in module._modules.items():
        if child is not None:
            walk(child, f"{name}.{child_name}".lstrip("."), report, pins, done, within or is_block)
    own = recipe is not None and not _own_forward(module) and _join(module, name, was, report, pins)
    sequence = known.is_sequential(module) and count < len(report.replaced)
    if is_block and not (own or sequence or within or known.is_fused(module)):
        report.kept.insert(place, (name, was, why or UNREAD))


def _own_forward(module):
    """Why a module's class does not matter, or None.  Its hooks do not: they are run around whatever its forward is."""
    return "the block has a replaced forward" if "forward" in module.__dict__ else None


def _join(module, name, was, report, pins):
    """Fuse a module that runs layers of its own or neighbouring blocks, unless its children do alone what it does.

    Returns whether it runs layers of its own.
    """
    found = reading.read(module, pins)
    if found.steps is None:
        return False
    children = list(module._modules.values())
    own = [block for block in found.blocks if any(layer.conv in children for layer in block.layers)]
    # a sequence of one block too: it may stand between others
    joins = found.pooled or bool(found.blocks)
    if not known.is_fused(module) and own:
        ops = ", ".join(block.op for block in own)
        report.replaced.append((name, was, f"a {was} that runs {ops}"))
    elif not known.is_fused(module) and joins:
        report.joined.append((name, was))
    if own or joins:
        _swap(module, pins)
    return bool(own)


def _swap(module, pins):
    if not known.is_fused(module):
        swap.swap(module, *pins)
    elif pins != (None, None):
        swap.pin(module, *pins)


def _list_convolutions(model, report):
    fused = set()
    for module in model.modules():
        if known.is_fused(module):
            fused |= {id(conv) for block in reading.of(module).blocks for conv in block.convolutions}
        elif isinstance(module, fx.GraphModule):
            fused |= {id(conv) for conv in graphs.fused_convolutions(module)}
    kept = {name: why for name, _, why in report.kept}
    unknown = {}
    for name, module in model.named_modules():
        for child in module._modules:
            unknown[f"{name}.{child}".lstrip(".")] = module
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        report.convolutions += 1
        if id(module) not in fused:
            report.plain.append((name, _why_plain(name, module, kept, unknown)))


def _why_plain(name, conv, kept, parents):
    at = name
    while at:
        if at in kept:
            return kept[at]
        at = at.rpartition(".")[0]
    why = eligibility.conv(conv, eligibility.kind(conv), "it", biased=eligibility.tensor(conv, "bias") is not None)
    if why:
        return why
    parent = parents.get(name)
    if parent is None:
        return "it stands alone"
    if known.recipe(parent) is None:
        return f"the forward of {type(parent).__name__} is not known"
    return "no batch norm stands right after it, or what follows has no fused op"
