"""The parts of ``python -m mnet_kernels.train``: data, engine, checkpoints, metrics, progress, comparison.

Nothing here is imported by ``import mnet_kernels``; scikit-learn, tqdm and matplotlib are imported where they are used.
"""

import importlib

EXTRA = "pip install 'mnet-kernels[train]'"


class TrainingError(Exception):
    """A failure that the user can act on: shown as one line ``error: ...`` and a non-zero exit code, no traceback."""


def require(module, purpose):
    """Import an optional dependency, or say in one line what needs it and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        name = module.partition(".")[0]
        package = {"sklearn": "scikit-learn"}.get(name, name)
        raise TrainingError(f"{purpose} needs {package}, which cannot be imported ({exc}): {EXTRA}") from exc
