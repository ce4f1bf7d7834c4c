"""What was built and what can run."""

import importlib.util

import torch

from . import backends, schema
from ._version import __version__
from .backends import compiled


def build_info():
    """What this installation holds, as a dict of plain values.

    Keys: ``version``, ``torch`` (running), ``triton`` (bool), ``extension`` (dict: whether the compiled extension is
    loaded, why not, what it was built with), ``backends`` (name -> dict of ``stages`` with own kernels and ``whole``,
    the modes it has every stage of).
    """
    names = [name for name in backends.NAMES if name != "native"]
    return {
        "version": __version__,
        "torch": torch.__version__,
        "triton": importlib.util.find_spec("triton") is not None,
        "extension": compiled.info(),
        "backends": {
            name: {
                "stages": [s for s in schema.NAMES if s in backends.implemented(name)],
                "whole": [mode for mode in backends.MODE_STAGES if backends.whole(name, mode)],
            }
            for name in names
        },
    }
