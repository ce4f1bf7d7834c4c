"""The kernels' own tests (CMakeLists.txt), planted bugs included, through CMake and ctest."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build-ctest"  # kept: the next run compiles only what changed

COMPILERS = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]

pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake"),
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason=f"no C++ compiler: {', '.join(COMPILERS)}"),
]


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def ctest(folder, *options):
    """Configures, builds and runs the tests; (what CMake said, what ctest said)."""
    configured = run("cmake", "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", *options)
    run("cmake", "--build", folder, "--parallel", 2)
    return configured, run("ctest", "--test-dir", folder, "--parallel", 2, "--output-on-failure", "--no-tests=error")


def test_ctest():
    configured, tested = ctest(BUILD / "plain", "-DMNET_SANITIZE=OFF")
    plants = int(re.search(r"Planted bugs tested: (\d+)", configured)[1])
    assert plants > 0 and len(re.findall(r"_plant_\d+ \.+ +Passed", tested)) == plants, tested


@pytest.mark.slow
def test_sanitized():
    ctest(BUILD / "sanitized", "-DMNET_PLAIN=OFF", "-DMNET_NVCC=OFF")
