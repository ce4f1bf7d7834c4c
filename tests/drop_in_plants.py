"""Faults to plant: small stand-ins for accelerate and restore, right but for one thing each.

Like the package's they change the class of the user's own blocks to a subclass with another forward.  They replace the
package's functions whole, so that what is shown of the machine does not hang on how the package is written.
"""

import functools
import weakref
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn

import mnet_kernels as mk

_classes = {}  # (fault, class of the block) -> the subclass
_read = weakref.WeakKeyDictionary()  # block -> what was read at its first call


def _right(self, x, base):
    return base.forward(self, x)


def _is_row(self, base):
    return isinstance(self, nn.Sequential) and base.forward is nn.Sequential.forward


def _cached_reading(self, x, base):
    if not _is_row(self, base):
        return base.forward(self, x)
    for child in _read.setdefault(self, list(self)):
        x = child(x)
    return x


def _ignored_hooks(self, x, base):
    if not _is_row(self, base):
        return base.forward(self, x)
    for child in self:
        x = child.forward(x)
    return x


def _shared_replica(self, x, base):
    """A replica, which torch makes from the block's __dict__, goes on with the block itself."""
    return base.forward(vars(self).get("_origin", (self,))[0], x)


def _copied_attributes(self, x, base):
    """The block's own numbers and switches (stride, use_res_connect, has_skip), but for training."""
    now = {k: v for k, v in vars(self).items() if isinstance(v, (bool, int)) and k != "training"}
    vars(self).update(_read.setdefault(self, now))
    try:
        return base.forward(self, x)
    finally:
        vars(self).update(now)


def _first_derivative_only(self, x, base):
    out = base.forward(self, x)
    if isinstance(out, torch.Tensor) and out.requires_grad:
        out.register_hook(lambda grad: grad.detach() if grad.requires_grad else None)
    return out


RIGHT = "nothing"
FORWARDS = {
    RIGHT: _right,
    "the reading is cached for ever": _cached_reading,
    "hooks are ignored": _ignored_hooks,
    "replicas share the original's parameters": _shared_replica,
    "attributes are copied at the first call": _copied_attributes,
    "second derivatives are silently wrong": _first_derivative_only,
    "restore leaves the block itself": _right,
    "restore leaves an attribute": _right,
}
# What the machine says of them, somewhere in its message.
FAULTS = {
    "the reading is cached for ever": "the step after it",
    "hooks are ignored": "hook",
    "replicas share the original's parameters": "a replica, out is off",
    "attributes are copied at the first call": "the step after it|state_dict|a part",
    "second derivatives are silently wrong": "a second derivative, d .* is",
    "restore leaves the block itself": "class of .* after restore",
    "restore leaves an attribute": "attributes of .* after restore",
}


def _rebuilt(fault, base):
    cls = _class(fault, base)
    return cls.__new__(cls)


def _class(fault, base):
    if (fault, base) not in _classes:
        change = FORWARDS[fault]

        @functools.wraps(base.forward)  # torch.fx names its nodes by the arguments
        def forward(self, *args, **kwargs):
            (x,) = *args, *kwargs.values()
            return change(self, x, base)

        body = {
            "forward": forward,
            "__reduce_ex__": lambda self, protocol: (_rebuilt, (fault, base), dict(self.__dict__)),
            "__module__": base.__module__,
        }
        _classes[fault, base] = type(base.__name__, (base,), body)
    return _classes[fault, base]


def _is_parametrized(module):
    return type(module).__module__ == "torch.nn.utils.parametrize"


@contextmanager
def planted(fault):
    """Within the context the package's accelerate and restore are stand-ins with the fault."""

    def accelerate(model):
        for module in model.modules():
            if module._modules and not _is_parametrized(module) and type(module) not in _classes.values():
                if fault == "restore leaves an attribute" or FORWARDS[fault] is _shared_replica:
                    module._origin = (module,)
                module.__class__ = _class(fault, type(module))

    def restore(model):
        for module in model.modules():
            if module is model and fault == "restore leaves the block itself":
                continue
            cls = type(module)
            if cls in _classes.values():
                module.__class__ = cls.__bases__[0]
            elif _is_parametrized(module) and cls.__bases__[0] in _classes.values():
                module.__class__ = type(cls.__name__, cls.__bases__[0].__bases__, dict(vars(cls)))
            if fault != "restore leaves an attribute":
                vars(module).pop("_origin", None)

    with mock.patch.object(mk, "accelerate", accelerate), mock.patch.object(mk, "restore", restore):
        yield
