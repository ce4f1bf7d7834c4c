"""The compiled extension's loader: when it refuses, it says so, and the package runs without."""

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mnet_kernels
from mnet_kernels.backends import compiled

MANIFEST = {
    "extension": True,
    "cuda": False,
    "reason": "MNET_NO_CUDA=1",
    "torch_version": torch.__version__,
    "torch_cuda": torch.version.cuda,
}
SCRIPT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, mnet_kernels
    from mnet_kernels import nn
    block = nn.FusedDepthwiseConvBNAct(4)
    block(torch.randn(2, 4, 5, 5)).sum().backward()
said = [str(w.message) for w in caught if "mnet_kernels" in str(w.message)]
print(json.dumps([mnet_kernels.build_info()["extension"], said, mnet_kernels.__file__]))
"""
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.fixture
def package(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    return shutil.copytree(Path(mnet_kernels.__file__).parent, tmp_path / "mnet_kernels", ignore=ignore)


def run(package, manifest=None, library=None, **environment):
    """Imports the package with this _build.json and this extension; (extension's info, warnings)."""
    if manifest is not None:
        (package / "_build.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    if library is not None:
        (package / f"_C{SUFFIX}").write_bytes(library)
    env = {k: v for k, v in os.environ.items() if not k.startswith("MNET_")} | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=package.parent, env=env | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    info, said, file = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).parent == package
    return info, said


def refused(package, manifest, reason, library=b""):
    """An extension that must not be touched (an empty file would fail to import, with another reason)."""
    info, said = run(package, manifest, library)
    assert info["extension"] is False
    assert reason in info["reason"], info
    assert len(said) == 1 and reason in said[0] and "pip install --no-build-isolation" in said[0], said


def test_another_torch(package):
    reason = f"it was built for torch 2.3.1+cu121, but torch {torch.__version__} is running"
    refused(package, MANIFEST | {"torch_version": "2.3.1+cu121"}, reason)


def test_another_cuda(package):
    reason = "it was built for torch with CUDA 11.8, but torch with"
    refused(package, MANIFEST | {"cuda": True, "torch_cuda": "11.8"}, reason)


@pytest.mark.parametrize("manifest", ["{", "[]", "{}"])
def test_damaged_manifest(package, manifest):
    refused(package, manifest, "_build.json, which says what it was built for, is unreadable")


def test_damaged_library(package):
    refused(package, MANIFEST, "it failed to import:", library=b"\x7fELF, once")


def test_missing_library(package):
    refused(package, MANIFEST, "it failed to import: No module named", library=None)


def test_switched_off(package):
    """Nothing of it is even looked at."""
    info, said = run(package, "{", b"\x7fELF, once", MNET_NO_EXT="1")
    assert (info["extension"], info["reason"], said) == (False, "MNET_NO_EXT=1", [])


def test_not_built(package):
    info, said = run(package)
    assert (info["extension"], said) == (False, []) and "not built" in info["reason"]
    manifest = MANIFEST | {"extension": False, "reason": "no C++ compiler found (c++, g++, clang++)"}
    info, said = run(package, manifest)
    assert (info["extension"], said) == (False, []) and "no C++ compiler found" in info["reason"]


def test_patch_release_is_the_same_torch():
    assert compiled._mismatch(MANIFEST | {"torch_version": "2.14.0"}, "2.14.1+cu130", None) is None
    assert compiled._mismatch(MANIFEST | {"torch_version": "2.1.4"}, "2.14.0", None) is not None


def test_what_was_built_is_loaded():
    path = Path(mnet_kernels.__file__).parent / "_build.json"
    if not path.is_file() or not json.loads(path.read_text())["extension"]:
        pytest.skip("the package under test was built without the extension")
    built = json.loads(path.read_text())
    info = mnet_kernels.build_info()["extension"]
    assert info["extension"] is True and info["reason"] == built["reason"], info
    assert info["torch_built"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert (info["cuda_built"] is not None) == built["cuda"]
    assert "depthwise" in mnet_kernels.build_info()["backends"]["cpu"]["stages"]
    assert ("depthwise" in mnet_kernels.build_info()["backends"]["cuda"]["stages"]) == built["cuda"]
    line = compiled.describe()
    assert f"CPU kernels ({info['cpu_capability']})" in line and ("no CUDA kernels" in line) != built["cuda"]
