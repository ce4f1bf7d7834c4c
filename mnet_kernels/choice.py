"""The choice of backend and mode: one file, one rule.

Who decides, the strongest first:

1. ``MNET_BACKEND=native`` in the environment, and ``torch.export``: everything runs native, whatever else is asked for.
2. ``with mnet_kernels.backend(name, mode=...)``, the innermost.
3. The module or the call (``backend=``, ``mode=``).
4. ``MNET_BACKEND`` and ``MNET_MODE``, read once at import.
5. Automatic: the first fused backend of the device that has every stage of the mode, else native.

A backend asked for by name that cannot run raises :class:`BackendUnavailableError`; a choice that falls back to native
says so once, with the reason.
"""

import contextlib
import functools
import logging
import os
from typing import NamedTuple

import torch

from . import backends
from .backends import BackendUnavailableError, compiled
from .log import say_once

BACKENDS = ("auto", *backends.NAMES)
MODES = ("auto", "chain", "algebraic")
# Automatic choice: backends to try on a device, in order.  triton is taken by name only until its tests have passed on
# a card: so far it ran in Triton's interpreter alone.
PREFERENCE = {"cuda": ("cuda",), "cpu": ("cpu",)}


class Choice(NamedTuple):
    """What runs one call: a backend, a mode (None for native), why; and the line to say about it, once."""

    backend: str
    mode: str | None
    reason: str
    message: str
    level: int


def _check(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def _from_environment():
    found = []
    for name, allowed in (("MNET_BACKEND", BACKENDS), ("MNET_MODE", MODES)):
        value = os.environ.get(name, "auto").strip().lower() or "auto"
        found.append(_check(f"environment variable {name}", value, allowed))
    return tuple(found)


_environment = _from_environment()
_scopes = ()  # (backend, mode) of the open `with backend(...)` contexts, outermost first


@contextlib.contextmanager
def backend(name=None, mode=None):
    """Choose the backend and/or the mode of everything called within the context (process-wide, nestable).

    Args:
        name: one of ``auto``, ``native``, ``reference``, ``cpu``, ``triton``, ``cuda``; None leaves it as it is.
        mode: one of ``auto``, ``chain``, ``algebraic``; None leaves it as it is.

    Raises:
        ValueError: on an unknown name. Whether the backend can run is found out at the first call.
    """
    global _scopes
    if name is not None:
        _check("backend", name, BACKENDS)
    if mode is not None:
        _check("mode", mode, MODES)
    outer, _scopes = _scopes, (*_scopes, (name, mode))
    try:
        yield
    finally:
        _scopes = outer


def _requested(index, argument, allowed, what):
    """Value asked for (backend: index 0, mode: index 1) and by whom."""
    for scope in reversed(_scopes):
        if scope[index] is not None:
            return scope[index], f"with mnet_kernels.backend({scope[index]!r})"
    if argument is not None:
        return _check(what, argument, allowed), f"{what}={argument!r} of the call or module"
    return _environment[index], f"MNET_{what.upper()}={_environment[index]}"


def choose(device, dtype, backend=None, mode=None, expands=False):
    """Pick backend and mode for a call, and say it once.

    Args:
        device, dtype: of the input as the block will see it (after autocast).
        backend, mode: asked for by the call or module; None if it leaves the choice open.
        expands: whether the op has an expanded tensor that algebraic mode can do without.

    Raises:
        BackendUnavailableError: a backend named explicitly cannot run here.
        ValueError: an unknown backend or mode.
    """
    if _environment[0] == "native":
        name, who = "native", "MNET_BACKEND=native"
    elif torch.compiler.is_exporting():
        name, who = "native", "an exported program holds torch's own ops only"
    else:
        name, who = _requested(0, backend, BACKENDS, "backend")
    mode, _ = _requested(1, mode, MODES, "mode")
    # No measured rows yet: chain is the rule, and algebraic runs where it is asked for.
    choice = decide(name, who, device, dtype, "algebraic" if mode == "algebraic" and expands else "chain")
    if not torch.compiler.is_compiling() and say_once(choice.message, choice.level):
        say_once(compiled.describe())
    return choice


# Its result depends on its arguments and on the installation alone, so a traced graph may hold it as a constant; what
# was asked for is resolved outside, where Dynamo guards on it.
def decide(name, who, device, dtype, mode):
    """The choice for one request, device and dtype (``choose`` without the asking)."""
    return _decide(name, who, device, dtype, mode)


# All that torch.compiler.assume_constant_result does, but it imports Dynamo first: two seconds for every user.
decide._dynamo_marked_constant = True


@functools.lru_cache(maxsize=1024)
def _decide(name, who, device, dtype, mode):
    if name == "native":
        return _native(who, device, logging.INFO)
    if name == "auto":
        return _automatic(device, dtype, mode)
    why = backends.why_unavailable(name, device)
    if why:
        raise BackendUnavailableError(f"backend {name!r} was asked for ({who}) but cannot run: {why}")
    if name != "reference" and dtype not in backends.FUSED_DTYPES:
        why = f"backend {name!r} has no {dtype} kernels (float32, bfloat16 and float16 only)"
        return _native(why, device, logging.WARNING)
    lacking = backends.missing_stages(name, mode)
    if lacking:
        names = ", ".join(lacking)
        message = f"running backend {name!r}, mode {mode!r} ({who}), but these stages on the slow reference: {names}"
        return Choice(name, mode, who, message, logging.WARNING)
    return Choice(name, mode, who, f"running backend {name!r}, mode {mode!r} ({who})", logging.INFO)


def _native(reason, device, level):
    return Choice("native", None, reason, f"running native torch ops on {device.type}: {reason}", level)


def _automatic(device, dtype, mode):
    if dtype not in backends.FUSED_DTYPES:
        return _native(f"no fused backend takes {dtype}", device, logging.WARNING)
    reasons = []
    for name in PREFERENCE.get(device.type, ()):
        why = backends.why_unavailable(name, device)
        if why is None and not backends.whole(name, mode):
            why = f"no kernel yet for {', '.join(backends.missing_stages(name, mode))}"
        if why is None:
            reason = f"the first backend for {device.type} that has every stage of mode {mode!r}"
            return Choice(name, mode, reason, f"running backend {name!r}, mode {mode!r}: {reason}", logging.INFO)
        reasons.append(f"{name}: {why}")
    reason = "; ".join(reasons) or f"no fused backend runs on {device.type}"
    return _native(reason, device, logging.WARNING)


def default_fused(device, dtype=torch.float32):
    """The fused backend to hold against native: the automatic one, else the reference."""
    choice = _automatic(torch.device(device), dtype, "chain")
    return choice.backend if choice.backend != "native" else "reference"
