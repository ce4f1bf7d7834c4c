"""The compiled extension: whether it may be loaded, and what it offers.

The extension registers its kernels with torch's dispatcher when it is imported.  Built for another torch it may
fail to import, or crash later, so ``_build.json``, written beside it by setup.py, is compared with the running torch
*before* the import.  Without the extension, whatever the reason, the package runs on its other backends.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path

import torch

from .. import schema

_PACKAGE = __name__.split(".", 1)[0]
_FOLDER = Path(__file__).resolve().parent.parent
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
_DISPATCH_KEYS = {"mnet_cpu": "CPU", "mnet_cuda": "CUDA"}

_extension = None
_reason = "not loaded yet"
_no_cuda_reason = ""
_attempted = False


def _manifest():
    """What setup.py built, or None when the package was never built."""
    path = _FOLDER / "_build.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _release(version):
    """(2, 14) of "2.14.1+cu130": the extension is tied to torch's minor version, not to its patch or local label."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _mismatch(manifest, torch_version, torch_cuda):
    """How the running torch differs from the one built for, or None."""
    if _release(manifest["torch_version"]) != _release(torch_version):
        return f"it was built for torch {manifest['torch_version']}, but torch {torch_version} is running"
    if manifest["cuda"] and manifest["torch_cuda"] != torch_cuda:
        return (
            f"it was built for torch with CUDA {manifest['torch_cuda']}, but torch with {_cuda(torch_cuda)} is running"
        )
    return None


def _cuda(version):
    return f"CUDA {version}" if version else "no CUDA"


def _unavailable():
    """Why the extension is not to be imported, or None; warns where the reader has something to repair."""
    global _no_cuda_reason
    if os.environ.get("MNET_NO_EXT") == "1":
        return "MNET_NO_EXT=1"
    try:
        manifest = _manifest()
        if manifest is None:
            return "the package was not built (no _build.json)"
        if not manifest["extension"]:
            return f"installed without it: {manifest['reason']}"
        problem = _mismatch(manifest, torch.__version__, torch.version.cuda)
        _no_cuda_reason = manifest["reason"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"_build.json, which says what it was built for, is unreadable ({type(error).__name__}: {error})"
    if problem:
        _warn(f"is not loaded: {problem}")
    return problem


def _warn(what):
    warnings.warn(f"mnet_kernels: the compiled extension {what}. Rebuild it with: {_REBUILD}", stacklevel=2)


def _import_beside():
    """Imports the library that lies beside the manifest, never one of another copy that an import hook would find."""
    name = f"{_PACKAGE}._C"
    spec = importlib.machinery.PathFinder.find_spec(name, [str(_FOLDER)])
    if spec is None:
        raise ImportError(f"No module named {name!r} in {_FOLDER}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def load():
    """Imports the extension if there is one for this torch.  Called once the schemas of its namespaces are defined."""
    global _extension, _reason, _attempted
    if _attempted:
        return
    _attempted = True
    _reason = _unavailable()
    if _reason is not None:
        return
    try:
        _extension = _import_beside()
    except ImportError as error:
        _reason = f"it failed to import: {error}"
        _warn(_reason)


def extension():
    """The extension's module, None where there is none."""
    return _extension


def info():
    """What is loaded; ``reason`` tells why there is no extension, or no CUDA in it."""
    if _extension is None:
        return {
            "extension": False,
            "reason": _reason,
            "torch_built": None,
            "cuda_built": None,
            "arch_list": None,
            "cpu_capability": None,
            "compiler": None,
        }
    built = _extension.build_info()
    return {
        "extension": True,
        "reason": _no_cuda_reason,
        "torch_built": built["torch"],
        "cuda_built": built["cuda"],
        "arch_list": built["arch_list"],
        "cpu_capability": built["cpu_capability"],
        "compiler": built["compiler"],
    }


def describe():
    """One line about what is loaded, for the log."""
    built = info()
    if not built["extension"]:
        return f"no compiled extension: {built['reason']}"
    architectures = ", ".join(f"{arch // 100}.{arch % 100 // 10}" for arch in built["arch_list"])
    cuda = f"CUDA {built['cuda_built']} kernels for {architectures}" if built["cuda_built"] else "no CUDA kernels"
    why = f" ({built['reason']})" if built["reason"] else ""
    return f"compiled extension: CPU kernels ({built['cpu_capability']}), {cuda}{why}, torch {built['torch_built']}"


def implemented(namespace):
    """Names of the stages with a compiled kernel in a namespace."""
    key = _DISPATCH_KEYS.get(namespace)
    if key is None:
        raise ValueError(f"{namespace!r} has no compiled kernels, expected one of {sorted(_DISPATCH_KEYS)}")
    if _extension is None:
        return frozenset()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(name for name in schema.NAMES if has_kernel(f"{namespace}::{name}", key))
