"""A trained model as plain convolutions and activations, for inference and for other programs."""

import collections
import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from . import eligibility, known, swap
from .accelerate import AccelerateReport, walk

# Subclasses of nn.Conv2d whose forward is a convolution of the input, padded, with their weight and bias.
_CONVOLUTIONS = ("torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame")


def fold(model, *, fused=False):
    """A copy of ``model`` in eval mode whose batch norms are part of the convolutions before them.

    Every convolution that is followed by a batch norm within an nn.Sequential, a fused module, or one of the blocks and
    networks that :func:`mnet_kernels.accelerate` knows becomes one nn.Conv2d with a bias.  The modules keep their
    names, order and classes; where a batch norm was stands an nn.Identity, so that what is taken by index, slice or
    name is what it was.  The copy runs torch's own ops only and exports as it is.  Batch norms elsewhere stay, and so
    does a pair of which somebody may see the halves (hooks, parametrizations, a replaced forward).

    With ``fused`` the compiled CPU kernels run the blocks of the copy, wherever they can; elsewhere (another device,
    a gradient asked for, torch.compile, export) the same plain modules do.  The kernels take weights packed for this
    processor, and pack them anew when a weight has changed.  One change cannot be seen, as torch itself does not note
    it: writing through ``parameter.data`` in place; write under ``torch.no_grad()`` instead.

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
    with torch.inference_mode(False):  # whose parameters would have no version by which a change is seen
        folded = copy.deepcopy(model).eval().requires_grad_(False)
        swap.unswap_all(folded)
        uses = collections.Counter(id(c) for m in folded.modules() for c in m._modules.values() if c is not None)
        for module in list(folded.modules()):
            recipe = known.recipe(module)
            if recipe is not None:
                _fold(list(_places(module, recipe.names, uses)))
    if fused:
        walk(folded, "", AccelerateReport(), known.FOLDED, set())
    return folded


def _places(module, names, uses):
    """(parent, name) of the modules that are called one after another, those within sequences too.

    A sequence that stands in several places is called in several rows: what follows it is not always the same.
    """
    for name in list(names):
        child = module._modules.get(name)
        if child is None:
            continue
        if known.is_sequential(child) and uses[id(child)] == 1 and not eligibility.untouched(child, ""):
            yield from _places(child, child._modules, uses)
        else:
            yield module, name


def _fold(places):
    """Make every convolution and the batch norm right after it one convolution and what is left of the norm."""
    for (parent, name), (norm_parent, norm_name) in zip(places, places[1:], strict=False):
        conv, norm = parent._modules[name], norm_parent._modules[norm_name]
        if _is_convolution(conv) and _is_norm(norm):
            parent._modules[name] = fuse_conv_bn_eval(conv, norm).requires_grad_(False)
            norm_parent._modules[norm_name] = _rest(norm).eval()


def _is_convolution(module):
    if not isinstance(module, nn.Conv2d) or eligibility.untouched(module, ""):
        return False
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    plain = type(module)._conv_forward is nn.Conv2d._conv_forward
    # a parametrized weight is no parameter of its own
    weight = module._parameters.get("weight")
    return plain and weight is not None and f"{owner.__module__}.{owner.__qualname__}" in _CONVOLUTIONS


def _is_norm(module):
    return eligibility.is_norm(module) and not eligibility.batch_norm(module, "") and module.running_mean is not None


def _rest(norm):
    """What stands where a batch norm was: timm's hold the activation too."""
    if eligibility.qualified_name(norm) in eligibility.NORM_ACT:
        return nn.Sequential(collections.OrderedDict(norm._modules))
    return nn.Identity()
