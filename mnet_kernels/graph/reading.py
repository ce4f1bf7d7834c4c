"""The plan of a module as it is now: read once, and again as soon as anything of it has changed.

A reading remembers the state of every module that it looked at: its class and that class's forward, its attributes, its
children, whether it has hooks, the shape of a convolution's weight.  At every call all of that is compared with what is
there.  So an edit of any kind is seen without anybody having to tell, and what is kept is nothing but a shortcut: a
plan never holds what a module holds, only which modules to ask.

A module keeps its own reading, as an attribute that copies and pickles leave out: the two refer to each other, which
only the garbage collector can see as long as nothing else refers to them.
"""

import torch
from torch import nn

from . import eligibility, known
from .plan import steps
from .read import UNREAD, first_block, row

KEPT = "_fused_reading"  # the attribute


class Reading:
    """What a module runs: its steps (None: its own forward, and ``why``), and the :class:`~.known.Recipe` of its
    forward."""

    __slots__ = ("_classes", "_empty", "_hooked", "_states", "_weights", "pooled", "recipe", "steps", "why")

    def __init__(self, recipe, steps, pooled, why):
        self.recipe, self.steps, self.pooled, self.why = recipe, steps, pooled, why

    def __deepcopy__(self, memo):
        """A copy of a module begins without one, however it is made."""

    @property
    def blocks(self):
        """The blocks that run fused."""
        found = [] if self.steps is None else [(step.stem, *step.blocks) for step in self.steps]
        return [block for blocks in found for block in blocks if block is not None]

    def remember(self, module, looked_at):
        """Keep the state of what was looked at."""
        modules = list(dict.fromkeys((module, *looked_at)))
        self._states, self._empty, self._hooked, self._weights = [], [], [], []
        for m in modules:
            state = m.__dict__
            children = state["_modules"]
            of_children = (tuple(children), tuple(children.values())) if children else None
            # its own module is the one that asks: a replica comes with the reading of what it was made from
            asked = None if m is module else m
            self._states.append((asked, type(m), tuple(state), tuple(state.values()), of_children))
            if not children:
                self._empty.append(children)
            # Hooks on a module are run around its forward: the one that is read for its own call does not mind them.
            if m is not module:
                hooks = [state[name] for name in eligibility.HOOKS]
                (self._hooked if any(hooks) else self._empty).extend([hooks] if any(hooks) else hooks)
            weight = eligibility.tensor(m, "weight") if type(m) is nn.Conv2d else None
            if isinstance(weight, torch.Tensor):
                self._weights.append((m, weight.shape, eligibility.tensor(m, "bias") is None))
        classes = {type(m) for m in modules}
        self._classes = [(cls, cls.forward) for cls in classes | {known.plain_class(cls) for cls in classes}]

    def holds(self, asking):
        """Whether everything that was looked at is as it was, the module ``asking`` being the one that was read.

        An attribute is compared by identity first, and by == where it is another object.  A dictionary that is still
        the same object may have other contents: those that were empty are looked at together, and children apart.
        """
        if any(self._empty):
            return False
        try:
            for m, cls, keys, values, children in self._states:
                module = asking if m is None else m
                state = module.__dict__
                if module.__class__ is not cls or (*state,) != keys or (*state.values(),) != values:
                    return False
                if children is not None:
                    names, inner = children
                    now = state["_modules"]
                    if (*now,) != names or (*now.values(),) != inner:
                        return False
            for module, shape, unbiased in self._weights:
                parameters = module._parameters
                weight = parameters.get("weight")
                if weight is None or "bias" not in parameters:
                    now = eligibility.tensor(module, "weight").shape, eligibility.tensor(module, "bias") is None
                    if now != (shape, unbiased):
                        return False
                elif weight.shape != shape or (parameters["bias"] is None) is not unbiased:
                    return False
            for cls, forward in self._classes:
                if cls.forward is not forward:
                    return False
        except Exception:  # of an attribute that cannot be compared (a tensor with another): it is another one
            return False
        return all(map(any, self._hooked))


def of(module):
    """The :class:`Reading` of a module as it is now."""
    if torch.compiler.is_compiling():  # traced: whatever it depends on is guarded
        return read(module, known.pins(module))
    found = module.__dict__.get(KEPT)
    if found is None or not found.holds(module):
        looked_at = []
        found = module.__dict__[KEPT] = read(module, known.pins(module), looked_at)
        found.remember(module, looked_at if found.steps is not None else module.modules())
    return found


def read(module, pins, looked_at=None):
    """The reading of a module that asks for ``pins``; what was looked at is added to the list ``looked_at``."""
    looked_at = [] if looked_at is None else looked_at
    looked_at.append(module)
    recipe = known.fused_recipe(module)
    if recipe is None:
        return Reading(None, None, False, UNREAD)
    units, why = _open(module, recipe, pins, looked_at)
    pool = None if recipe.pool in (None, known.MEAN) else module._modules.get(recipe.pool)
    lacks_pool = recipe.pool not in (None, known.MEAN) and pool is None  # whatever then happens is torch's to say
    if not lacks_pool and (why is None or any(not isinstance(unit, nn.Module) for unit in units)):
        pooled = recipe.pool == known.MEAN
        if pool is not None:
            looked_at.extend(pool.modules())
            pooled = eligibility.mean_pool(pool) is not None
        found, pooled = steps(units, pooled)
        return Reading(recipe, found, pooled, _said(module, recipe, why))
    return Reading(recipe, None, False, _said(module, recipe, why))


def _said(module, recipe, why):
    """``why`` where it is to be told: that a sequence or a network calls other modules is no news."""
    return None if recipe.pool is not None or (why == UNREAD and known.is_sequential(module)) else why


def _children(module, recipe):
    """The children that a recipe calls, in order."""
    return [child for child in map(module._modules.get, recipe.names) if child is not None]


def whole(module, recipe, pins):
    """The block that a module is as a whole, or None; a network is none."""
    if recipe.pool is not None:
        return None
    found = row(_children(module, recipe), pins == known.FOLDED)
    if found is None:
        return None
    drop = None if recipe.drop is None else module._modules.get(recipe.drop)
    passed = found.passed
    if type(drop) is nn.Identity:
        passed, drop = (*passed, drop), None
    return found._replace(residual=recipe.residual, drop=drop, passed=passed, pins=pins)


def _open(module, recipe, pins, looked_at):
    """(units: blocks, and modules to be called; why there is no block for all of it, or None)."""
    modules, block = _children(module, recipe), whole(module, recipe, pins)
    why = UNREAD if block is None else block.why_native()
    if why is None:
        for m in block.modules:
            looked_at.extend(m.modules())
        return [block], None
    if recipe.residual:
        return modules, why
    units = []
    while modules:
        child = modules[0]
        inner = _opened(child, looked_at)
        if inner is not None:
            units += inner
            del modules[0]
            continue
        found = first_block(modules, pins == known.FOLDED)
        if found is None:
            looked_at.append(child)
            units.append(modules.pop(0))
            continue
        block, taken = found
        for m in modules[:taken]:
            looked_at.extend(m.modules())
        units.append(block._replace(pins=pins))
        del modules[:taken]
    return units, why


def _opened(child, looked_at):
    """The units of a fused child that may run within its parent's plan, or None: it is called.

    A block that is not one op is called: it says why.
    """
    if not known.is_fused(child) or eligibility.untouched(child, ""):
        return None
    recipe = known.recipe(child)
    if recipe is None or recipe.pool is not None:
        return None
    inside = []
    units, why = _open(child, recipe, known.pins(child), inside)
    if why is not None and not known.is_sequential(child):
        return None
    if all(isinstance(unit, nn.Module) for unit in units):
        return None
    looked_at.append(child)
    looked_at.extend(inside)
    return units
