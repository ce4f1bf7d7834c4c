"""Classes that run fused: a subclass of a module's own class that overrides ``forward`` alone.

Everything else of an object whose class is changed stays Python's own: its children, parameters, buffers, attributes,
hooks, what refers to it, ``isinstance``, copies, replicas, pickles and slices.  What the forward runs is read off the
object at the call (``reading.py``); wherever something looks inside or transforms the call, it is the forward of the
module's own class.
"""

import functools
import logging
import types

import torch

from .. import context
from ..log import logger, say_once
from . import eligibility, known, reading


def run(module, plain, args, kwargs):
    """The forward of a module that runs fused: its plan, or that of ``plain``, its own class."""
    if len(args) != 1 or kwargs:
        return plain.forward(module, *args, **kwargs)
    (x,) = args
    # a method that somebody kept is called after the module was restored
    if not isinstance(x, torch.Tensor) or eligibility.global_hooks() or not known.runs_fused(type(module)):
        return plain.forward(module, x)
    why = context.why_native(x) or context.watched()
    if why:
        say_once(f"fused modules call their children one by one: {why}")
        return plain.forward(module, x)
    found = reading.of(module)
    if found.why is not None:
        say_once(f"{type(module).__name__} runs its children one by one: {found.why}", logging.WARNING)
    if found.steps is None:
        return plain.forward(module, x)
    for step in found.steps:
        x = step.run(x)
    recipe = found.recipe
    if recipe.pool is None:
        return x
    return recipe.tail(module, _pooled(module, recipe, x, found.pooled))


def _pooled(module, recipe, x, pooled):
    """What the network's pool gives: by itself, or of what a fused layer has pooled already."""
    if recipe.pool == known.MEAN:
        return x if pooled else torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
    pool = module._modules[recipe.pool]
    if not pooled:
        return pool(x)
    return x[:, :, None, None] if eligibility.mean_pool(pool) == "map" else x


def fused_forward(plain):
    """The forward that runs fused in the place of that of a class, ``plain``.

    torch.jit.script and torch.fx read a function's source and its globals: with those of the plain forward they see
    that one.
    """
    _mnet_run, _mnet_plain = run, plain

    def forward(self, *args, **kwargs):
        return _mnet_run(self, _mnet_plain, args, kwargs)

    own = plain.forward
    made = types.FunctionType(forward.__code__, own.__globals__, "forward", None, forward.__closure__)
    return functools.wraps(own)(made)


def fuses(plain):
    """Class decorator: the class runs what the class ``plain`` before it computes, fused; ``restore`` makes it that."""

    def decorate(cls):
        cls.forward, cls.__getstate__ = fused_forward(plain), _state_of(cls)
        known.register(cls, plain)
        return cls

    return decorate


# Methods by which quantisable models fuse layers, and in which they compare exact types (type(m) is X): on a module
# whose class was changed they would find nothing, and say nothing.
GUARDED = ("fuse_model",)
_made = {}  # (class, pins) -> the class that runs it fused; (class, None) -> the class that only guards its methods


def fused_class(cls, backend=None, mode=None):
    """The subclass of a module's class that runs fused with this choice of backend and mode."""
    pins = (backend, mode)
    if (cls, pins) not in _made:
        made = _make(cls, {"forward": fused_forward(cls)})
        known.register(made, cls, pins)
        _made[cls, pins] = made
    return _made[cls, pins]


def _guard_class(cls):
    """The subclass of a module's class that restores the module before a method of :data:`GUARDED` runs."""
    if (cls, None) not in _made:
        _made[cls, None] = _make(cls, {})
        known.register_guard(_made[cls, None], cls)
    return _made[cls, None]


def _make(cls, overrides):
    body = {
        "__module__": cls.__module__,
        "__qualname__": f"Accelerated{cls.__qualname__}",
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "__getstate__": _state_of(cls),
        **{name: _guarded(getattr(cls, name)) for name in GUARDED if callable(getattr(cls, name, None))},
        **overrides,
    }
    return types.new_class(f"Accelerated{cls.__name__}", (cls,), {}, lambda namespace: namespace.update(body))


def _state_of(cls):
    """What copies and pickles take of an object of a class: not its reading."""
    inherited = cls.__getstate__

    def __getstate__(self):
        state = inherited(self)
        if not isinstance(state, dict) or reading.KEPT not in state:
            return state
        return {name: value for name, value in state.items() if name != reading.KEPT}

    return __getstate__


def _guarded(method):
    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        name = method.__name__
        logger.warning("%s compares exact types: %s is restored first", name, type(self).__name__)
        unswap_all(self)
        return getattr(self, name)(*args, **kwargs)

    return guarded


def _reduce(self, protocol):
    """As the module's own class has it, with that class named: this one cannot be imported."""
    cls = type(self)
    plain = known.swapped(cls)
    if plain is None:  # of a class made from this one, which can be imported
        return super(next(c for c in cls.__mro__ if known.swapped(c)), self).__reduce_ex__(protocol)
    reduced = super(cls, self).__reduce_ex__(protocol)
    if not isinstance(reduced, tuple):
        return reduced
    function, arguments, *rest = reduced
    arguments = tuple(plain if argument is cls else argument for argument in arguments)
    pins = known.class_pins(cls) if known.is_fused_class(cls) else None
    return _rebuild, (pins, function, *arguments), *rest


def _rebuild(pins, function, *arguments):
    module = function(*arguments)
    module.__class__ = _guard_class(type(module)) if pins is None else fused_class(type(module), *pins)
    return module


# torch makes classes at run time from that of a module: for a parametrized attribute, for sharding.  Such a class stays
# the outermost, as torch takes it away again by its base.
_MADE_AT_RUN_TIME = ("torch.nn.utils.parametrize", "torch.distributed.")


def _rebased(cls, change):
    """``change(cls)``; of a class that torch made at run time one like it whose base is changed."""
    if not cls.__module__.startswith(_MADE_AT_RUN_TIME):
        return change(cls)
    bases = tuple(_rebased(base, change) if issubclass(base, torch.nn.Module) else base for base in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    name = cls.__name__
    for was, now in zip(cls.__bases__, bases, strict=True):
        name = name.replace(was.__name__, now.__name__)
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return types.new_class(name, bases, {}, lambda namespace: namespace.update(body))


def swap(module, backend=None, mode=None):
    """Make a module run fused with this choice of backend and mode."""
    unswap(module)
    module.__class__ = _rebased(type(module), lambda cls: fused_class(cls, backend, mode))


def guard(module):
    """Guard the methods of :data:`GUARDED` of a module; returns whether it has any."""
    if not any(callable(getattr(type(module), name, None)) for name in GUARDED):
        return False
    if not any(map(known.swapped, type(module).__mro__)):  # else its class does so already
        module.__class__ = _rebased(type(module), _guard_class)
    return True


def unswap(module):
    """Make a module's class what it was; returns whether it was another."""
    plain = _rebased(type(module), lambda cls: known.swapped(cls) or cls)
    if plain is type(module):
        return False
    module.__class__ = plain
    module.__dict__.pop(reading.KEPT, None)
    return True


def unswap_all(module):
    """The same for everything in a module; returns the names of the modules changed."""
    return [name for name, child in module.named_modules() if unswap(child)]


def pin(module, backend, mode):
    """Pin the choice of a fused module."""
    if known.class_pins(type(module)) is None:
        module.backend, module.mode = backend, mode
    else:
        swap(module, backend, mode)
