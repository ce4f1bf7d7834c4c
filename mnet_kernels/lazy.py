"""Optional dependencies, imported where they are used."""

import importlib


def require(module, extra, purpose):
    """Import an optional module or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".", 1)[0]
        raise ImportError(f"{purpose} needs {package}: pip install 'mnet-kernels[{extra}]' ({error})") from error
