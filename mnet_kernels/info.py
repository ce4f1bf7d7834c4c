"""What was built and what can run."""

import importlib.util

import torch

from . import backends, schema
from ._version import __version__
from .backends import compiled, triton
from .backends.triton import configs, measured


def build_info():
    """What this installation holds, as a dict of plain values.

    Keys: ``version``, ``torch`` (running), ``triton`` (bool), ``extension`` (dict: whether the compiled extension is
    loaded, why not, what it was built with), ``backends`` (name -> dict of ``stages`` with own kernels and ``whole``,
    the modes it has every stage of), ``tuned`` (of every card that torch sees: dict of the ``file`` in which
    ``python -m mnet_kernels.tune`` leaves what it measured there, and the number of its ``rows`` in use).
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
        "tuned": _tuned(),
    }


def _tuned():
    found = {}
    for i in range(torch.cuda.device_count()):
        card, capability = triton.card(i)
        rows = configs.of_card(card, capability)
        found[card] = {"file": str(measured.path(card)), "rows": len(rows)}
    return found
