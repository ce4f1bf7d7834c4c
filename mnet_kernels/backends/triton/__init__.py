"""The Triton backend: which stages it has, and their registration.

Importing this module does not import triton: that happens at the first call of a stage.  Every kernel of chain mode is
here, and of algebraic mode the forward ones.  ``TRITON_INTERPRET=1``, set before the process starts, runs the kernels
in triton's interpreter, on CPU tensors too: slow, for tests of their arithmetic.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os

import torch

from . import configs

STAGES = {
    "pointwise": "pointwise",
    "pointwise_backward": "pointwise",
    "depthwise": "depthwise",
    "depthwise_backward": "depthwise",
    "normalize": "normalize",
    "normalize_backward": "normalize",
    "squeeze": "normalize",
    "finalize": "finalize",
    "finalize_backward": "finalize",
    "update_running_stats": "finalize",
    "stem": "stem",
    "stem_backward": "stem",
    "gram": "gram",
    "normalize_gram": "gram",
    "expand_finalize": "finalize",
    "expand_depthwise": "depthwise",
}
"""Stage -> the module of this package that has its launcher."""

MIN_VERSION = (3, 6)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)  # device types the kernels are registered for


@functools.cache
def why_missing():
    """Why this installation has no Triton kernels, and what to do; None if it has."""
    needed = ".".join(map(str, MIN_VERSION))
    remedy = f"pip install 'triton>={needed}' (Linux), or use 'native'"
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed: {remedy}"
    try:
        version = importlib.metadata.version("triton")
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return f"the version of the triton that is installed cannot be read: {remedy}"
    if numbers < MIN_VERSION:
        return f"it needs triton {needed} or newer and {version} is installed: {remedy}"
    return None


def card(device):
    """(name, capability) that the configurations know a card by: to them every card of AMD's is ``configs.AMD``."""
    capability = configs.AMD if torch.version.hip else torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), capability


def implemented():
    """Names of the stages with a kernel here."""
    return frozenset() if why_missing() else frozenset(STAGES)


def _launcher(stage):
    """The stage's launcher; its module, and triton, are imported at the first call."""
    found = None

    def call(*args):
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f"{__name__}.{STAGES[stage]}"), stage)
        return found(*args)

    return call


def register(library):
    """Register the launchers with the dispatcher (plain ``impl``: the lowest cost per call)."""
    for stage in implemented():
        for device in DEVICES:
            library.impl(stage, _launcher(stage), device.upper())
