"""The stage ops: definition in every backend's namespace, choice of namespace, and a counter of calls.

``stage(backend)`` gives a table with one callable per stage of ``schema.py``.  Where a backend has no kernel for a
stage, the table holds the reference's (functional.py says so once; see backends.missing_stages).
"""

import collections
import contextlib
import types

import torch

from .. import schema
from ..backends import implemented, triton
from . import reference

# Kept alive: dropping a Library undefines its ops.
_LIBRARIES = {}
_counts = None


class _Stages:
    """One callable per stage, each bound once to its overload and counted while a count is on."""

    def __init__(self, backend):
        own, namespace = implemented(backend), schema.NAMESPACES[backend]
        for name in schema.NAMES:
            home = namespace if name in own else schema.NAMESPACES["reference"]
            setattr(self, name, counted(f"{home}::{name}", getattr(getattr(torch.ops, home), name).default))


def counted(label, overload):
    """``overload`` as a callable that is counted while a count is on."""

    def call(*args):
        if _counts is not None and not torch.compiler.is_compiling():
            _counts[label] += 1
        return overload(*args)

    return call


def note(label):
    """Count a call that is no stage op (the native path)."""
    if _counts is not None and not torch.compiler.is_compiling():
        _counts[label] += 1


@contextlib.contextmanager
def count_stages():
    """Count stage calls within the context; yields a ``collections.Counter`` keyed ``"namespace::stage"``.

    The native path counts as ``"native::<op>"``.  Calls inside compiled graphs are not seen.
    """
    global _counts
    outer, _counts = _counts, collections.Counter()
    try:
        yield _counts
    finally:
        inner, _counts = _counts, outer
        if outer is not None:
            outer.update(inner)


@contextlib.contextmanager
def wrapped(wrap):
    """Within the context every stage is called through ``wrap(name, call)``, a callable with the stage's arguments.

    For tracing, which so costs nothing at other times.  Compiled graphs keep the calls they were traced with.
    """
    before = dict(_tables)
    for backend, table in before.items():
        _tables[backend] = types.SimpleNamespace(**{name: wrap(name, call) for name, call in vars(table).items()})
    try:
        yield
    finally:
        _tables.update(before)


def setup():
    """Define the ops in every namespace and register reference and Triton; the package does this once, at import."""
    for backend, namespace in schema.NAMESPACES.items():
        _LIBRARIES[backend] = schema.define(namespace)
    reference.register(_LIBRARIES["reference"])
    triton.register(_LIBRARIES["triton"])


_tables = {}


def stage(backend):
    """The table of stage callables of a backend (built once all backends are loaded)."""
    return _tables[backend]


def bind():
    """Bind the tables, after the compiled kernels have registered themselves."""
    for backend in schema.NAMESPACES:
        _tables[backend] = _Stages(backend)
