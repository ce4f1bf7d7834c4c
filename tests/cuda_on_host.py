"""The CUDA backend whole, without a card: its launchers for torch and its kernels, compiled for the CPU.

CMake builds csrc/cuda with its launches run by csrc/tests/cuda_host.h and c10's CUDA headers replaced
(csrc/tests/support/torch_on_host), as a library that registers the ops of ``mnet_cuda`` for CPU tensors.  So checks,
allocation, dispatch and kernels are the real ones, and the suites written for a card and for the CPU run on them.

A test module takes ``pytestmark`` and the fixtures ``load_library`` and ``backend_of_the_cpu`` from here.
"""

import ctypes
import fcntl
import shutil
import sys
from pathlib import Path

import pytest
import test_cpu_stages as elementwise
import test_cpu_stem as stems
import test_gpu as suite
import torch
from test_choice import ALGEBRAIC_FORWARD
from test_ctest import BUILD, COMPILERS, ROOT, run

from mnet_kernels import backends, choice, schema, stages
from mnet_kernels.backends import compiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake"),
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason=f"no C++ compiler: {', '.join(COMPILERS)}"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the library is linked as on Linux"),
]

STAGES = [
    name for name in schema.NAMES if name in backends.MODE_STAGES["chain"] | backends.STEM_STAGES | ALGEBRAIC_FORWARD
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD, REVERSE, RANDOM_THREADS, RANDOM_WARPS = range(4)  # the schedules of csrc/tests/launch_host.h
NO_IMAGE, LAUNCH_FAILURE = 209, 719  # cudaErrorNoKernelImageForDevice, cudaErrorLaunchFailure


@pytest.fixture(scope="module", name="library")
def load_library():
    """The library, loaded."""
    folder, torchs = BUILD / "torch", Path(torch.__file__).parent
    options = "-DMNET_PLAIN=OFF", "-DMNET_SANITIZE=OFF", "-DMNET_NVCC=OFF", f"-DMNET_TORCH={torchs}"
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "torch.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist's processes want the same folder at the same time
        configured = run("cmake", "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", *options)
        if "No CUDA headers" in configured:
            pytest.skip("no CUDA headers: neither a toolkit nor triton's")
        run("cmake", "--build", folder, "--parallel", 2)
    path = folder / "libmnet_cuda_on_host.so"
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


@pytest.fixture(autouse=True)
def backend_of_the_cpu(library, monkeypatch):
    """Backend ``cuda`` takes CPU tensors, in the package and in the suites."""
    monkeypatch.setitem(backends.DEVICES, "cuda", ("cpu",))
    monkeypatch.setitem(compiled._DISPATCH_KEYS, "mnet_cuda", "CPU")
    monkeypatch.setattr(compiled, "_extension", compiled._extension or object())
    monkeypatch.setitem(suite.HOME, "cuda", "cpu")
    monkeypatch.setattr(elementwise, "ours", lambda name: getattr(torch.ops.mnet_cuda, name))
    monkeypatch.setattr(stems, "CPU", torch.ops.mnet_cuda)
    # As on a card: torch's own error, which ours is held against, is float32's.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    choice._decide.cache_clear()
    stages.bind()
    library.mnet_host_schedule(RANDOM_WARPS)
    yield
    library.mnet_host_schedule(FORWARD)
    library.mnet_host_fail(-1, 0)
    library.mnet_host_capability(9, 0)
    monkeypatch.undo()
    choice._decide.cache_clear()
    stages.bind()
