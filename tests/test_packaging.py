"""setup.py's decisions, what an sdist and a wheel hold, and an import with nothing but torch."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from mnet_kernels import build_info, choice

ROOT = Path(__file__).resolve().parent.parent
TORCH = ("2.14.1+cu130", "13.0")
GIB = 1 << 30


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """setup.py as a module, on a machine without a CUDA toolkit in its usual place."""
    spec = importlib.util.spec_from_file_location("mnet_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mnet_setup", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEFAULT_TOOLKIT", tmp_path / "usr-local-cuda")
    return module


def program(path, text="exit 0"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(root, version="13.0", headers="include"):
    program(root / "bin" / "nvcc", f'echo "Cuda compilation tools, release {version}, V{version}.88"')
    (root / headers).mkdir(parents=True)
    (root / headers / "cuda_runtime.h").touch()
    return root


@pytest.fixture
def path(tmp_path):
    """A PATH with a C++ compiler and nothing else."""
    program(tmp_path / "bin" / "g++")
    return str(tmp_path / "bin")


def test_compiler(setup, tmp_path, path):
    assert setup.find_compiler({"PATH": path}) == str(tmp_path / "bin" / "g++")
    assert setup.find_compiler({"PATH": str(tmp_path / "empty")}) is None
    assert setup.find_compiler({"PATH": path, "CXX": "clang++"}) is None
    assert setup.find_compiler({"PATH": path, "CXX": "ccache g++ -m64"}) is None
    program(tmp_path / "bin" / "ccache")
    assert setup.find_compiler({"PATH": path, "CXX": "ccache g++ -m64"}) == "ccache g++ -m64"
    program(tmp_path / "bin" / "c++")
    assert setup.find_compiler({"PATH": path}) == str(tmp_path / "bin" / "c++")


def test_toolkit_by_environment(setup, tmp_path, path):
    one, two = toolkit(tmp_path / "one"), toolkit(tmp_path / "two", headers="targets/x86_64-linux/include")
    assert setup.find_toolkit({"PATH": path}) is None
    assert setup.find_toolkit({"PATH": path, "CUDA_HOME": str(one), "CUDA_PATH": str(two)}) == one
    assert setup.find_toolkit({"PATH": path, "CUDA_PATH": str(two)}) == two
    assert setup.find_toolkit({"PATH": path, "CUDA_HOME": str(tmp_path / "gone"), "CUDA_PATH": str(two)}) == two
    toolkit(setup.DEFAULT_TOOLKIT)
    assert setup.find_toolkit({"PATH": path}) == setup.DEFAULT_TOOLKIT


def test_toolkit_by_nvcc(setup, tmp_path, path):
    """The nvcc on PATH may be a link into its toolkit, or a wrapper far from it."""
    root = toolkit(tmp_path / "cuda")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(root / "bin" / "nvcc")
    assert setup.find_toolkit({"PATH": str(tmp_path / "links")}) == root
    program(tmp_path / "wrappers" / "nvcc", f"echo '#$ TOP={root}/bin/..' >&2")
    assert setup.find_toolkit({"PATH": str(tmp_path / "wrappers")}) == root


def test_headers_alone_are_no_toolkit(setup, tmp_path, path):
    wheel = tmp_path / "site-packages" / "nvidia" / "cu13"
    (wheel / "include").mkdir(parents=True)
    (wheel / "include" / "cuda_runtime.h").touch()
    assert setup.find_toolkit({"PATH": path, "CUDA_HOME": str(wheel)}) is None


def test_decide(setup, tmp_path, path):
    cuda = {"PATH": path, "CUDA_HOME": str(toolkit(tmp_path / "cuda"))}
    full = setup.decide(cuda, *TORCH)
    assert (full.extension, full.cuda, full.reason, full.arch_list) == (True, True, "", "8.0;9.0+PTX")
    assert (full.torch_version, full.torch_cuda, full.toolkit) == (*TORCH, tmp_path / "cuda")
    # No GPU is asked for, nor missed.
    assert setup.decide(cuda | {"CUDA_VISIBLE_DEVICES": ""}, *TORCH) == full

    def outcome(env, torch=TORCH):
        plan = setup.decide(env, *torch)
        return plan.extension, plan.cuda, plan.reason

    cpu_torch = ("2.13.0+cpu", None)
    assert outcome(cuda, cpu_torch) == (True, False, "torch is not a CUDA build")
    assert outcome(cuda | {"MNET_NO_CUDA": "1"}) == (True, False, "MNET_NO_CUDA=1")
    assert outcome(cuda | {"MNET_NO_EXT": "1"}) == (False, False, "MNET_NO_EXT=1")
    assert outcome({"PATH": path}) == (True, False, "no CUDA toolkit found; set CUDA_HOME")
    bare = cuda | {"PATH": str(tmp_path / "empty")}
    assert outcome(bare) == (False, False, "no C++ compiler found (c++, g++, clang++)")
    assert outcome(bare | {"CXX": "icpx"}) == (False, False, "no C++ compiler found (CXX=icpx)")
    # Pure Python needs no torch to be installed first; a build does.
    assert outcome({"PATH": path, "MNET_NO_EXT": "1"}, (None, None))[0] is False
    with pytest.raises(setup.BuildError, match="torch cannot be imported.*MNET_NO_EXT=1"):
        setup.decide(cuda, None, None)
    # Without the CUDA kernels a toolkit of another version is nobody's business.
    old = {"PATH": path, "CUDA_HOME": str(toolkit(tmp_path / "old", "12.8"))}
    assert outcome(old | {"MNET_NO_CUDA": "1"})[:2] == outcome(old, cpu_torch)[:2] == (True, False)
    with pytest.raises(setup.BuildError, match="nvcc is CUDA 12.8, but torch was built with CUDA 13.0.*MNET_NO_CUDA=1"):
        setup.decide(old, *TORCH)


def test_cuda_versions(setup):
    setup.check_cuda_version("13.2", "13.0")  # one major version is compatible within itself
    with pytest.raises(setup.BuildError, match="Point CUDA_HOME to a CUDA 12 toolkit"):
        setup.check_cuda_version("13.0", "12.8")


def test_architectures(setup):
    chosen = {
        "": "8.0;9.0+PTX",
        "9.0": "9.0",
        "7.0 7.5 8.0 8.6+PTX": "8.0;8.6+PTX",
        "8.0;9.0a;10.0;12.0+PTX": "8.0;9.0a;10.0;12.0+PTX",
        "Ampere; Hopper": "Ampere;Hopper",
    }
    for wish, kept in chosen.items():
        assert setup.architectures({"TORCH_CUDA_ARCH_LIST": wish}) == kept
    with pytest.raises(setup.BuildError, match="'7.0;7.5' names no architecture of 8.0 or higher.*MNET_NO_CUDA=1"):
        setup.architectures({"TORCH_CUDA_ARCH_LIST": "7.0;7.5"})


def test_max_jobs(setup):
    assert setup.max_jobs({}, cores=16, free_bytes=9 * GIB) == 2
    assert setup.max_jobs({}, cores=2, free_bytes=64 * GIB) == 2
    assert setup.max_jobs({}, cores=8, free_bytes=GIB) == 1
    assert setup.max_jobs({"MAX_JOBS": "5"}, cores=2, free_bytes=GIB) == 5
    for wish in ("0", "-1", "many"):
        with pytest.raises(setup.BuildError, match=f"MAX_JOBS must be a positive whole number, got '{wish}'"):
            setup.max_jobs({"MAX_JOBS": wish}, cores=2, free_bytes=GIB)
    assert setup.free_memory() > 0


def test_cuda_headers_from_wheels(setup, tmp_path):
    """A toolkit without the math libraries' headers borrows those in torch's wheels; a whole one does not."""
    cuda, site = toolkit(tmp_path / "cuda"), tmp_path / "site-packages"
    assert setup.extra_cuda_includes(cuda, site) == []
    folders = [site / "nvidia" / name / "include" for name in ("cu13", "cudnn")]
    for folder in folders:
        folder.mkdir(parents=True)
    (site / "nvidia" / "nvtx").mkdir()
    assert sorted(set(setup.extra_cuda_includes(cuda, site))) == [str(folder) for folder in folders]
    (cuda / "include" / "cusparse.h").touch()
    assert setup.extra_cuda_includes(cuda, site) == []


def test_manifest(setup, tmp_path, path):
    plan = setup.decide({"PATH": path, "CUDA_HOME": str(toolkit(tmp_path / "cuda", "13.2"))}, *TORCH)
    setup.write_manifest(plan, tmp_path / "lib")
    written = json.loads((tmp_path / "lib" / "mnet_kernels" / "_build.json").read_text())
    assert written == setup.manifest(plan) == {
        "version": setup.version(),
        "extension": True,
        "cuda": True,
        "reason": "",
        "compiler": str(tmp_path / "bin" / "g++"),
        "toolkit": "13.2",
        "arch_list": "8.0;9.0+PTX",
        "torch_version": "2.14.1+cu130",
        "torch_cuda": "13.0",
    }  # fmt: skip
    assert setup.version() == build_info()["version"]
    assert "CUDA kernels for 8.0;9.0+PTX" in setup.summary(plan)
    assert "no C++ compiler found" in setup.summary(setup.decide({"PATH": str(tmp_path / "empty")}, *TORCH))


def test_sources_are_all_there(setup):
    built = {*setup.CPU_SOURCES, *setup.CUDA_SOURCES}
    written = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.c*") if p.suffix in (".cpp", ".cu")}
    assert built == {name for name in written if not name.startswith("csrc/tests/")}


# --- what is shipped -------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A copy of the project with the leavings of a build in place, as a developer's has."""
    copy = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in ("csrc", "mnet_kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "CMakeLists.txt", "Makefile"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").touch()
    (copy / "mnet_kernels" / "_C.left.so").touch()
    (copy / "mnet_kernels" / "_build.json").write_text("{}")
    return copy


def build(tree, kind, **environment):
    """Runs setuptools' build backend in the tree, as pip does without isolation; returns the archive's path."""
    script = f"import setuptools.build_meta as b; print(b.build_{kind}('dist'))"
    env = os.environ | {"MNET_NO_CUDA": "1"} | environment
    done = subprocess.run([sys.executable, "-c", script], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist" / done.stdout.splitlines()[-1]


def test_sdist(tree):
    with tarfile.open(build(tree, "sdist")) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "LICENSE", "tests/conftest.py"):
        assert name in names
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    sources |= {str(p.relative_to(ROOT)) for p in (ROOT / "mnet_kernels").rglob("*.py")}
    assert {name for name in sources if "__pycache__" not in name} <= names
    assert not [name for name in names if name.endswith((".so", "_build.json", ".pyc"))]


def test_pure_wheel(tree):
    wheel = build(tree, "wheel", MNET_NO_EXT="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        written = json.loads(archive.read("mnet_kernels/_build.json"))
    assert (written["extension"], written["reason"]) == (False, "MNET_NO_EXT=1")
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "mnet_kernels").rglob("*.py")} <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith(("csrc", "tests"))]


def test_compiled_wheel(setup, tree):
    """The extension and _build.json travel together; a rebuild takes nothing over.  A module of two lines stands in."""
    if setup.find_compiler(os.environ) is None:
        pytest.skip("no C++ compiler")
    pytest.importorskip("pybind11")
    shutil.rmtree(tree / "csrc")
    (tree / "csrc").mkdir()
    (tree / "csrc" / "module.cpp").write_text("#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, m) {}\n")
    wheel = build(tree, "wheel")
    assert f"-cp3{sys.version_info.minor}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        written = json.loads(archive.read("mnet_kernels/_build.json"))
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
    assert (written["extension"], written["cuda"], written["reason"]) == (True, False, "MNET_NO_CUDA=1")
    assert len(libraries) == 1 and libraries[0].startswith("mnet_kernels/_C.cpython-")
    (tree / "csrc" / "module.cpp").write_text("#error the compiler's own message\n")
    with pytest.raises(AssertionError, match="the compiler's own message"):  # never a silent pure-Python package
        build(tree, "wheel")
    (tree / "mnet_kernels" / "lazy.py").unlink()
    with zipfile.ZipFile(build(tree, "wheel", MNET_NO_EXT="1")) as archive:
        assert not [n for n in archive.namelist() if n.endswith((".so", "lazy.py"))]


# --- what is imported ------------------------------------------------------------------------------------------------

ONLY_TORCH = """
import sys
blocked = {blocked!r}
sys.modules.update(dict.fromkeys(blocked))  # None: importing it fails, and looking for it finds nothing
import torch
import mnet_kernels
assert "torch._dynamo" not in sys.modules  # two seconds that only those who compile should wait
net = mnet_kernels.FusedMobileNetV2(num_classes=3, width_mult=0.25)
net(torch.randn(2, 3, 32, 32)).sum().backward()
assert all(p.grad is not None for p in net.parameters())
assert not [name for name, module in sys.modules.items() if module and name.split(".")[0] in blocked]
print("trained a step")
"""


def test_only_torch_is_needed():
    blocked = {"torchvision", "timm", "sklearn", "tqdm", "matplotlib", "PIL", "triton", "rich", "pybind11", "scipy"}
    done = subprocess.run(
        [sys.executable, "-c", ONLY_TORCH.format(blocked=blocked)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "trained a step", done.stderr


def test_constant_results_are_marked_as_torch_does():
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked) == vars(choice.decide)
