"""The choice of backend and mode: one file, one rule.

Who decides, the strongest first:

1. ``MNET_BACKEND=native`` in the environment, and ``torch.export``: everything runs native, whatever else is asked for.
2. ``with mnet_kernels.backend(name, mode=...)``, the innermost.
3. The module or the call (``backend=``, ``mode=``).
4. ``MNET_BACKEND`` and ``MNET_MODE``, read once at import.
5. Automatic.  The backend: where the card was measured (``fastest.json``), the one that was fastest for the op on maps
   of the size, native included; else the first fused backend of the device that has every stage of the mode
   (``PREFERENCE``), else native.  A block runs on one backend.  The mode: the one that measured faster
   (``modes.json``): algebraic for a block with an expand layer whose maps have at least :func:`least_positions`, chain
   for all others.

A backend asked for by name that cannot run raises :class:`BackendUnavailableError`; a choice that falls back to native
says so once, with the reason.
"""

import contextlib
import functools
import json
import logging
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from . import backends
from .backends import BackendUnavailableError, compiled
from .log import say_once

BACKENDS = ("auto", *backends.NAMES)
MODES = ("auto", "chain", "algebraic")
# Automatic choice: backends to try on a device, in order.  cuda and triton are taken by name only until their tests
# have passed on a card: so far all of them did on the CPU alone (csrc/tests/cuda_host.h, Triton's interpreter).
PREFERENCE = {"cpu": ("cpu",)}
BY_NAME = {"cuda": ("cuda", "triton")}


# What `python -m mnet_kernels.bench block --write-modes` measured.
MEASURED = Path(__file__).with_name("modes.json")
FASTEST = Path(__file__).with_name("fastest.json")  # and `--write-backends`
NEVER = 2**62  # positions no map has
# op -> the one whose measured blocks stand for it
_MEASURED_AS = {"separable_sequence": "separable_conv", "pointwise_conv_bn_act_pool": "pointwise_conv_bn_act"}
# The stem runs fused of its own accord in training, on outputs of at least so many positions (N*H*W): there the
# median of whole training steps was nowhere longer than with the stem left to torch's own ops (V1, V2, V3 in float32
# and bfloat16, steps in turns, one thread of an AVX-512 processor): clearly shorter for images in NCHW, as data
# loaders give them, within chance for channels_last.  Below, nothing was measured; in evaluation torch was faster.
STEM_POSITIONS = 2**14


class Choice(NamedTuple):
    """What runs one call: a backend, a mode (None for native), why; and the line to say about it, once."""

    backend: str
    mode: str | None
    reason: str
    message: str
    level: int
    stem: bool = False  # whether the backend has the stages of the stem
    gram: bool = False  # whether it can gather the gram of what it writes


def _check(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def check(backend=None, mode=None):
    """Check names of a backend and a mode, None for none.

    Raises:
        ValueError: an unknown one.
    """
    if backend is not None:
        _check("backend", backend, BACKENDS)
    if mode is not None:
        _check("mode", mode, MODES)


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
    check(name, mode)
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


def thresholds(rows):
    """From measured rows, ``{(backend, dtype): positions}``: from how large a map on algebraic mode is the faster one.

    The rows (``backend``, ``dtype``, ``height``, ``width``, ``speedup`` of algebraic over chain) of one map size count
    by their geometric mean; the threshold is the smallest size from which on every measured size has a mean above 1.
    A backend and dtype without such a size is left out.
    """
    sizes = {}
    for row in rows:
        key = row["backend"], getattr(torch, row["dtype"])
        sizes.setdefault(key, {}).setdefault(row["height"] * row["width"], []).append(math.log(row["speedup"]))
    found = {}
    for key, by_size in sizes.items():
        for size in sorted(by_size, reverse=True):
            if sum(by_size[size]) <= 0:
                break
            found[key] = size
    return found


_THRESHOLDS = thresholds(json.loads(MEASURED.read_text(encoding="utf-8"))["rows"])


def fastest_by_size(rows):
    """From measured rows, ``{(card, dtype, op): ((positions, backend), ...)}``: the fastest backend from a size on.

    The rows (``card``, ``dtype``, ``op``, ``height``, ``width``, ``backend``, ``speedup`` over the fastest of native's
    forms) of one map size and backend count by their geometric mean; where no backend's is above 1, native is fastest.
    """
    means = {}
    for row in rows:
        key, size = (row["card"], getattr(torch, row["dtype"]), row["op"]), row["height"] * row["width"]
        means.setdefault(key, {}).setdefault(size, {}).setdefault(row["backend"], []).append(math.log(row["speedup"]))
    found = {}
    for key, sizes in means.items():
        best = []
        for size, logs in sorted(sizes.items()):
            speed, name = max((sum(values) / len(values), name) for name, values in logs.items())
            best.append((size, name if speed > 0 else "native"))
        found[key] = tuple(best)
    return found


_FASTEST = fastest_by_size(json.loads(FASTEST.read_text(encoding="utf-8"))["rows"])


def fastest(device, dtype, op, size):
    """The backend that measured fastest in training on this card for an op on maps of H*W ``size``, by the next smaller
    size that was measured, else the smallest; None where nothing was."""
    found = None
    for least, name in _FASTEST.get((_card(device), dtype, _MEASURED_AS.get(op, op)), ()) if _FASTEST else ():
        if found is None or size >= least:
            found = name
    return found


@functools.lru_cache(maxsize=64)
def _card(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


_card._dynamo_marked_constant = True  # see `decide`


def least_positions(backend, dtype):
    """H*W of the input from which on automatic mode runs a block with an expand layer in algebraic mode."""
    return _THRESHOLDS.get((backend, dtype), NEVER)


def choose(
    device, dtype, backend=None, mode=None, positions=None, channels=1, trains=True, op=None, size=None
):  # fmt: skip
    """Pick backend and mode for a call, and say it once.

    Args:
        device, dtype: of the input as the block will see it (after autocast).
        backend, mode: asked for by the call or module; None if it leaves the choice open.
        positions: H*W of the input of an op that has an expanded tensor, which algebraic mode can do without; None for
            an op that has not.
        channels: of the input of such an op.
        trains: whether a gradient may be asked for: without one, algebraic mode needs its forward stages only.
        op, size: the functional op and H*W of its input, by which measured backends are known; None for neither.

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
    if positions is None:
        mode = "chain"
    elif mode == "auto":
        # compared here, not in the constant `decide`: Dynamo then guards on it, once, whatever sizes follow
        mode = "auto" if positions >= _least_of(device.type, dtype) else "chain"
    measured = fastest(device, dtype, op, size) if name == "auto" and op is not None else None
    # as a flag, for the same reason
    wide = channels > backends.WIDEST.get(measured or name, NEVER)
    choice = decide(name, who, device, dtype, mode, wide, trains, measured)
    if not torch.compiler.is_compiling() and say_once(choice.message, choice.level):
        say_once(compiled.describe())
    return choice


def fuses_stem(choice, training, positions, asked=None):
    """Whether the stem of a call that runs fused is fused as well, or left to torch's own ops.

    A backend asked for by name fuses it wherever it has the stages (where it lacks them, that is said once), automatic
    choice where it measured faster.

    Args:
        choice: of the call.
        training: whether a backward follows that goes through the batch's own statistics and not into the image.
        positions: N*H*W of its output.
        asked: backend asked for by the call or module.
    """
    if not choice.stem:
        lacking = ", ".join(sorted(backends.STEM_STAGES))
        say_once(f"backend {choice.backend!r} leaves the stem to torch's own ops: it has no {lacking}", logging.WARNING)
        return False
    if _requested(0, asked, BACKENDS, "backend")[0] != "auto":
        return True
    return training and positions >= STEM_POSITIONS


def _least_of(device_type, dtype):
    """The threshold of the backend that automatic choice prefers on a device."""
    return min((least_positions(name, dtype) for name in PREFERENCE.get(device_type, ())), default=NEVER)


_least_of._dynamo_marked_constant = True  # see `decide`


# Its result depends on its arguments and on the installation alone, so a traced graph may hold it as a constant; what
# was asked for is resolved outside, where Dynamo guards on it.
def decide(name, who, device, dtype, mode, wide, trains, measured=None):
    """The choice for one request, device and dtype (``choose`` without the asking and the measured tables).

    Mode ``auto`` is algebraic where the backend measured faster with it and can run the block in it, else chain; so is
    mode ``algebraic`` where the backend has chain mode alone for the block, and that is said.
    """
    return _decide(name, who, device, dtype, mode, wide, trains, measured)


# All that torch.compiler.assume_constant_result does, but it imports Dynamo first: two seconds for every user.
decide._dynamo_marked_constant = True


@functools.lru_cache(maxsize=1024)
def _decide(name, who, device, dtype, mode, wide, trains, measured=None):
    found = _find(name, who, device, dtype, mode, wide, trains, measured)
    if found.backend == "native":
        return found
    return found._replace(stem=backends.has_stem(found.backend), gram=backends.hands_on_gram(found.backend))


def _find(name, who, device, dtype, mode, wide, trains, measured):
    if name == "native":
        return _native(who, device, logging.INFO)
    if name == "auto":
        return _automatic(device, dtype, mode, trains, measured, wide)
    mode, refused = _mode_of(name, dtype, mode, wide, trains)
    why = backends.why_unavailable(name, device)
    if why:
        raise BackendUnavailableError(f"backend {name!r} was asked for ({who}) but cannot run: {why}")
    if name != "reference" and dtype not in backends.FUSED_DTYPES:
        why = f"backend {name!r} has no {dtype} kernels (float32, bfloat16 and float16 only)"
        return _native(why, device, logging.WARNING)
    if refused:
        message = f"running backend {name!r}, mode {mode!r} ({who}): mode 'algebraic' was asked for, but {refused}"
        return Choice(name, mode, who, message, logging.WARNING)
    lacking = backends.missing_stages(name, mode, trains)
    if lacking:
        names = ", ".join(lacking)
        message = f"running backend {name!r}, mode {mode!r} ({who}), but these stages on the slow reference: {names}"
        return Choice(name, mode, who, message, logging.WARNING)
    return Choice(name, mode, who, f"running backend {name!r}, mode {mode!r} ({who})", logging.INFO)


def _mode_of(backend, dtype, mode, wide, trains):
    """The mode a backend runs a block in, and why it is not the algebraic one that was asked for, if so."""
    if mode == "chain":
        return mode, None
    refused = backends.why_not_algebraic(backend, wide, trains)
    if mode == "algebraic":
        return ("chain", refused) if refused else (mode, None)
    return "algebraic" if (backend, dtype) in _THRESHOLDS and refused is None else "chain", None


def _native(reason, device, level):
    return Choice("native", None, reason, f"running native torch ops on {device.type}: {reason}", level)


def _automatic(device, dtype, mode, trains=True, measured=None, wide=False):
    """``measured``: the backend that was fastest; ``wide``: whether the block's input is too wide for its kernels."""
    if dtype not in backends.FUSED_DTYPES:
        return _native(f"no fused backend takes {dtype}", device, logging.WARNING)
    if measured == "native":
        return _native(f"measured fastest on this card for this op and size ({FASTEST.name})", device, logging.INFO)
    reasons = []
    for name in (measured, *PREFERENCE.get(device.type, ())) if measured else PREFERENCE.get(device.type, ()):
        # none of PREFERENCE is in backends.WIDEST
        own, refused = _mode_of(name, dtype, mode, wide and name == measured, trains)
        why, lacking = backends.why_unavailable(name, device), backends.missing_stages(name, own, trains)
        if why is None and lacking:
            why = f"no kernel yet for {', '.join(lacking)}"
        if why is None:
            reason = f"the first backend for {device.type} that has every stage of mode {own!r}"
            if name == measured:
                reason = f"measured fastest on this card for this op and size ({FASTEST.name})"
            if mode == "auto":
                reason += ", and the mode that measured faster on maps of this size"
            if refused:
                reason += f", for of mode 'algebraic', {refused}"
            return Choice(name, own, reason, f"running backend {name!r}, mode {own!r}: {reason}", logging.INFO)
        reasons.append(f"{name}: {why}")
    by_name = [name for name in BY_NAME.get(device.type, ()) if backends.why_unavailable(name, device) is None]
    if by_name:
        names = " or ".join(f"mnet_kernels.backend({name!r})" for name in by_name)
        reasons.append(
            f"the kernels for {device.type} have not passed all their tests on a card yet; choose them by name: {names}"
        )
    reason = "; ".join(reasons) or f"no fused backend runs on {device.type}"
    return _native(reason, device, logging.WARNING)


def default_fused(device, dtype=torch.float32):
    """The fused backend to hold against native: the automatic one, one that is taken by name, else the reference."""
    device = torch.device(device)
    choice = _automatic(device, dtype, "chain")
    if choice.backend != "native":
        return choice.backend
    for name in BY_NAME.get(device.type, ()):
        if backends.why_unavailable(name, device) is None and backends.whole(name, "chain"):
            return name
    return "reference"
