"""What users change about a model: every rule makes one drawn change to a plain model and to its accelerated copy.

A rule takes the program (drop_in_program.Program) and something to draw from, and returns what it did, or None where
there is nothing to do.  A change is a function of the model alone, so that both get the same.
"""

import copy
import pickle
from functools import partial

import torch
from drop_in_compare import public_class
from drop_in_models import ACTIVATIONS, BLOCKS, Row, Scaled, Shortcut, convolutions, norms, randomise
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

EDITS = {}
GENTLE = set()  # rules after which everything that was fused must still be


def edit(function=None, *, gentle=False):
    """Register a rule; ``gentle``: it gives no block a reason not to run fused."""
    if function is None:
        return partial(edit, gentle=gentle)
    EDITS[function.__name__] = function
    if gentle:
        GENTLE.add(function.__name__)
    return function


def is_a(*classes):
    return lambda m: isinstance(m, classes)


def is_block(m):
    return bool(m._modules) and not isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))


def sequentials(p, least=1):
    return p.names(lambda m: isinstance(m, nn.Sequential) and len(m) >= least, root=True)


def at(name):
    """The module of a name, in whichever model."""
    return lambda model: model.get_submodule(name)


def put(model, name, new):
    """Put a module in the place of another, as users do."""
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    if isinstance(parent, nn.Sequential) and child.isdigit():
        parent[int(child)] = new
    else:
        setattr(parent, child, new)


def fresh(p, make):
    return randomise(make()).to(p.dtype)


# ---- accelerate, modes, copies --------------------------------------------------------------------------------------


@edit(gentle=True)
def accelerate(p, d):
    """Again: the whole, or a part that may be a block itself or a plain layer."""
    name = d.pick(["", *p.names(lambda m: True)])
    p.accelerate(name)
    return f"accelerate({name!r})"


@edit
def restore(p, d):
    name = d.pick(["", "", *p.names(is_block)])
    p.restore(name)
    return f"restore({name!r})"


@edit(gentle=True)
def train(p, d):
    name, mode = d.pick(["", "", *p.names(lambda m: True)]), d.pick([True, False])
    p.edit("train()", lambda model: at(name)(model).train(mode))
    return f"{name!r}.train({mode})"


@edit(gentle=True)
def freeze(p, d):
    names = sorted({d.pick(p.parameters()) for _ in range(4)})
    mode = d.pick([True, False, False])
    p.edit("requires_grad_()", lambda model: [model.get_parameter(n).requires_grad_(mode) for n in names])
    return f"requires_grad_({mode}) of {', '.join(names)}"


@edit(gentle=True)
def freeze_module(p, d):
    name, mode = d.pick(p.names(lambda m: True)), d.pick([True, False])
    p.edit("requires_grad_()", lambda model: at(name)(model).requires_grad_(mode))
    return f"{name!r}.requires_grad_({mode})"


@edit(gentle=True)
def cast(p, d):
    dtype = d.pick([torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16])
    method = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half"}[dtype]
    p.edit(method, lambda model: getattr(model, method)())
    p.dtype = dtype
    return f"{method}()"


@edit(gentle=True)
def memory_format(p, d):
    layout = d.pick([torch.channels_last, torch.contiguous_format])
    p.edit("to(memory_format)", lambda model: model.to(memory_format=layout))
    return f"to(memory_format={layout})"


@edit(gentle=True)
def backend(p, d):
    p.backend = d.pick(p.backends())
    return f"backend{p.backend}"


@edit(gentle=True)
def duplicate(p, d):
    """Go on with a copy: the handles of hooks are those of the original."""
    how = d.pick([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    p.replace("a copy of the model", how)
    return "go on with a copy"


@edit(gentle=True)
def load(p, d):
    """A state dict into itself, or across and back: strict, by copy or by assignment."""
    if d.pick([True, False]):
        p.edit("load_state_dict()", lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())))
        return "load_state_dict of its own"
    theirs = copy.deepcopy(p.plain.state_dict())
    assign = d.pick([True, False])
    p.edit("load_state_dict()", lambda model: model.load_state_dict(copy.deepcopy(p.ours.state_dict())))
    p.edit("load_state_dict()", lambda model: model.load_state_dict(copy.deepcopy(theirs), assign=assign))
    return f"load_state_dict across, assign={assign}"


# ---- children -------------------------------------------------------------------------------------------------------


@edit
def replace_child(p, d):
    kinds = {nn.Conv2d: convolutions, nn.BatchNorm2d: norms, nn.GroupNorm: None, InvertedResidual: None}
    name = d.pick(p.names(lambda m: isinstance(m, tuple(kinds)) or type(m).__module__.endswith("activation")))
    child = p.plain.get_submodule(name)
    if isinstance(child, nn.Conv2d):
        make = d.pick(convolutions(child))
    elif isinstance(child, nn.BatchNorm2d):
        make = d.pick(norms(child))
    elif isinstance(child, nn.GroupNorm):
        make = partial(nn.BatchNorm2d, child.num_channels)
    else:
        make = d.pick(BLOCKS if isinstance(child, InvertedResidual) else ACTIVATIONS)
    p.edit("a child replaced", lambda model: put(model, name, fresh(p, make)))
    return f"{name} = {public_class(p.plain.get_submodule(name)).__name__}"


@edit
def append(p, d):
    name, make = d.pick(sequentials(p)), d.pick([*ACTIVATIONS, *BLOCKS])
    p.edit("append()", lambda model: at(name)(model).append(fresh(p, make)))
    return f"{name!r}.append({public_class(p.plain.get_submodule(name)[-1]).__name__})"


@edit
def insert(p, d):
    name, make = d.pick(sequentials(p)), d.pick([*ACTIVATIONS, *BLOCKS])
    index = d.pick(range(len(at(name)(p.plain)) + 1))
    p.edit("insert()", lambda model: at(name)(model).insert(index, fresh(p, make)))
    return f"{name!r}.insert({index}, {public_class(p.plain.get_submodule(name)[index]).__name__})"


@edit
def take_out(p, d):
    """del or pop of one child: mostly of one whose absence the rest can bear."""
    shapes, options = p.shapes(), []
    for name in sequentials(p, 2):
        for i in range(len(at(name)(p.plain))):
            child = list(at(name)(p.plain)._modules)[i]
            given, made = shapes.get(f"{name}.{child}".lstrip("."), (None, 0))
            options += [(name, i)] * (5 if given == made else 1)
    name, i = d.pick(options)
    if d.pick([True, False]):
        p.edit("pop()", lambda model: at(name)(model).pop(i) and None)
    else:
        p.edit("del", lambda model: at(name)(model).__delitem__(i))
    return f"del {name!r}[{i}]"


@edit
def share(p, d):
    """One block object in two places, or a shallow copy of it in its own."""
    shapes = p.shapes()
    name = d.pick(p.names(lambda m: is_block(m)))
    if name not in shapes or not name:
        return None
    if d.pick([True, False]):
        p.edit("copy.copy", lambda model: put(model, name, copy.copy(at(name)(model))))
        return f"{name} = copy.copy({name})"
    other = d.pick([n for n in p.names(is_block) if shapes.get(n) == shapes[name] and not _within(n, name)])
    p.edit("a block in two places", lambda model: put(model, other, at(name)(model)))
    return f"{other} = {name}"


def _within(a, b):
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


# ---- attributes -----------------------------------------------------------------------------------------------------

OF_BLOCKS = [
    (lambda m: hasattr(m, "use_res_connect"), "use_res_connect", (False, False, True)),
    (lambda m: hasattr(m, "has_skip"), "has_skip", (False, False, True)),
    (lambda m: hasattr(m, "drop_prob"), "drop_prob", (0.0, 0.5)),
]
OF_LAYERS = [
    (is_a(nn.Conv2d), "stride", ((1, 1), 1, (2, 2), 2)),
    (is_a(nn.Conv2d), "padding", ("same", (1, 1), 0)),
    (is_a(nn.Conv2d), "dilation", ((1, 1), (2, 2))),
    (is_a(nn.Conv2d), "padding_mode", ("zeros", "reflect", "circular")),
    (is_a(nn.BatchNorm2d), "eps", (1e-5, 1e-2, 0.3)),
    (is_a(nn.BatchNorm2d), "momentum", (0.3, None, 0.0, 1.0)),
    (is_a(nn.BatchNorm2d), "track_running_stats", (False, True)),
    (lambda m: hasattr(m, "inplace"), "inplace", (True, False)),
]


def _attribute(p, d, table):
    matches, key, values = d.pick([row for row in table if p.names(row[0])])
    name, value = d.pick(p.names(matches)), d.pick(values)
    p.edit("an attribute", lambda model: setattr(at(name)(model), key, value))
    return f"{name}.{key} = {value}"


@edit
def block_attribute(p, d):
    return _attribute(p, d, OF_BLOCKS)


@edit
def layer_attribute(p, d):
    return _attribute(p, d, OF_LAYERS)


@edit
def no_statistics(p, d):
    """A batch norm without running statistics: those of the batch in eval too."""
    name = d.pick(p.names(lambda m: isinstance(m, nn.BatchNorm2d) and m.running_mean is not None))

    def change(model):
        bn = at(name)(model)
        bn.track_running_stats, bn.running_mean, bn.running_var = False, None, None

    p.edit("running statistics taken away", change)
    return f"{name} without running statistics"


def _twice(module, *args):
    return 2 * type(module).forward(module, *args)


def _half(before, *args):
    return 0.5 * before(*args)


def _conv_forward(module, *args):
    return 0.5 * type(module)._conv_forward(module, *args)


@edit
def replace_forward(p, d):
    """An object's own forward: around its class's, or around the method it had; of a block or a layer.

    Not of a class whose forward is patched just now: the method that a plain object had would keep the patch when it is
    taken away again, while the one of an accelerated object calls whatever forward its class has.
    """
    name = d.pick(p.names(lambda m: not isinstance(m, tuple(p.patched))))
    how = d.pick([_twice, _half])

    def change(model):
        module = at(name)(model)
        module.forward = partial(how, module if how is _twice else module.forward)

    p.edit("forward replaced", change)
    return f"{name}.forward = {how.__name__}"


@edit
def replace_conv_forward(p, d):
    name = d.pick(p.names(is_a(nn.Conv2d)))

    def change(model):
        at(name)(model)._conv_forward = partial(_conv_forward, at(name)(model))

    p.edit("_conv_forward replaced", change)
    return f"{name}._conv_forward replaced"


@edit
def put_forward_back(p, d):
    name = d.pick(p.names(lambda m: {"forward", "_conv_forward"} & vars(m).keys()))
    key = next(k for k in ("forward", "_conv_forward") if k in vars(p.plain.get_submodule(name)))
    p.edit("forward put back", lambda model: delattr(at(name)(model), key))
    return f"del {name}.{key}"


def _patched(original, self, *args):
    return 0.5 * original(self, *args)


@edit
def patch_class(p, d):
    """Another forward for all objects of a user's or a library's class, or the old one again."""
    cls = d.pick([Row, Shortcut, Scaled, InvertedResidual])
    if cls in p.patched:
        p.unpatch(cls)
        return f"{cls.__name__}.forward put back"
    if any(isinstance(m, cls) and "forward" in vars(m) for m in p.plain.modules()):
        return None  # as above, of a method that was kept before
    original = cls.forward
    p.patched[cls] = vars(cls).get("forward")
    cls.forward = lambda self, *args: _patched(original, self, *args)
    return f"{cls.__name__}.forward patched"
