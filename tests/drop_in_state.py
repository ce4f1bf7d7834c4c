"""What users change about a model's hooks and weights: rules as those of drop_in_edits."""

from functools import partial

import torch
from drop_in_compare import loss_of, see
from drop_in_edits import at, edit, is_block
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

# ---- hooks ----------------------------------------------------------------------------------------------------------

HOOKS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


def _hook(tag, kind, factor, module, *values):
    """Any hook: sees what it is given, and gives that times a factor unless the factor is None."""
    see((tag, kind), values)
    last = values[0] if kind in ("forward_pre", "full_backward", "full_backward_pre") else values[-1]
    if factor is None:
        return None
    scaled = [None if t is None else t * factor for t in (last if isinstance(last, tuple) else (last,))]
    return tuple(scaled) if isinstance(last, tuple) else scaled[0]


@edit
def add_hook(p, d):
    name, kind, factor = d.pick(p.names(lambda m: True)), d.pick(HOOKS), d.pick([None, None, 0.5])
    hook = partial(_hook, name, kind, factor)
    p.handles.append(p.edit("a hook", lambda model: getattr(at(name)(model), f"register_{kind}_hook")(hook)))
    return f"{name}.register_{kind}_hook, factor {factor}"


@edit(gentle=True)
def remove_hook(p, d):
    for handle in p.handles.pop(d.pick(range(len(p.handles)))):
        if handle is not None:
            handle.remove()
    return "a hook removed"


def _global_hook(module, args, out=None):
    see(("any", None), (args, out), module)


@edit
def global_hook(p, d):
    """A hook on all modules, or the last one off."""
    if p.global_handles:
        p.global_handles.pop().remove()
        return "a global hook removed"
    kind = d.pick(["forward", "forward_pre"])
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    p.global_handles.append(register(_global_hook))
    return f"a global {kind} hook"


# ---- parameters -----------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A parametrization of anything."""

    def forward(self, weight):
        return 2 * weight


def _is_free(m):
    """A layer whose weight is a plain parameter."""
    return isinstance(m, (nn.Conv2d, nn.Linear)) and "weight" in m._parameters


@edit
def parametrization(p, d):
    name = d.pick(p.names(_is_free))
    layer = p.plain.get_submodule(name)
    kinds = [parametrizations.weight_norm, parametrizations.spectral_norm]
    kinds += [parametrizations.orthogonal] if isinstance(layer, nn.Linear) else []
    kind = d.pick(kinds)
    p.edit("a parametrization", lambda model: kind(at(name)(model)))
    return f"{kind.__name__}({name})"


@edit
def parametrize_block(p, d):
    """A parametrization of a block's own parameter: torch changes the block's class for it."""
    name = d.pick(p.names(lambda m: "alpha" in m._parameters))
    p.edit("a parametrization", lambda model: parametrize.register_parametrization(at(name)(model), "alpha", Doubled()))
    return f"{name}.alpha parametrized"


@edit
def unparametrize(p, d):
    name = d.pick(p.names(parametrize.is_parametrized))
    key = next(iter(p.plain.get_submodule(name).parametrizations))
    p.edit("no parametrization", lambda model: parametrize.remove_parametrizations(at(name)(model), key) and None)
    return f"remove_parametrizations({name}, {key})"


@edit
def prune_weight(p, d):
    name = d.pick(p.names(_is_free))
    p.edit("pruning", lambda model: prune.l1_unstructured(at(name)(model), "weight", 0.4) and None)
    return f"prune.l1_unstructured({name})"


@edit
def unprune(p, d):
    name = d.pick(p.names(lambda m: "weight_orig" in m._parameters))
    p.edit("prune.remove", lambda model: prune.remove(at(name)(model), "weight") and None)
    return f"prune.remove({name})"


@edit(gentle=True)
def own_state(p, d):
    """A parameter, a buffer and a plain attribute of a block's own; or away with them."""
    name = d.pick(p.names(is_block))

    def change(model):
        block = at(name)(model)
        if "alpha" in block._parameters:
            del block.alpha, block.mask, block.note
            return
        block.alpha = nn.Parameter(torch.rand(2, dtype=p.dtype))
        block.register_buffer("mask", torch.rand(3, dtype=p.dtype))
        block.note = "mine"

    p.edit("a block's own state", change)
    return f"{name}.alpha, mask, note"


def _scale_data(parameter):
    parameter.data.mul_(1.1)


def _copy_in(parameter):
    with torch.no_grad():
        parameter.copy_(parameter * 0.9 + 0.01)


def _other_data(parameter):
    parameter.data = parameter.data.clone() * 1.1


@edit(gentle=True)
def weights(p, d):
    name, how = d.pick(p.parameters()), d.pick([_scale_data, _copy_in, _other_data])
    p.edit("a weight changed", lambda model: how(model.get_parameter(name)))
    return f"{how.__name__}({name})"


@edit(gentle=True)
def new_parameter(p, d):
    name, grad = d.pick([n for n in p.parameters() if "parametrizations" not in n]), d.pick([True, True, False])
    owner, _, key = name.rpartition(".")

    def change(model):
        old = model.get_parameter(name)
        setattr(at(owner)(model), key, nn.Parameter(old.detach() * 0.9 + 0.01, requires_grad=grad))

    p.edit("a new parameter", change)
    return f"{name} = nn.Parameter"


@edit(gentle=True)
def optimizer_step(p, d):
    variant, momentum = p.variant(d), d.pick([0.0, 0.9])

    def change(model):
        if not any(q.requires_grad for q in model.parameters()):
            return
        optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum)
        optimizer.zero_grad()
        loss_of(model(p.input(variant))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    p.edit("an optimizer step", change, runs=True)
    return "a step of SGD"
