"""The pool of the CPU kernels' maps, as torch sees it; its own tests are csrc/tests/map_pool_cpu.cpp."""

import gc
import io
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import mnet_kernels
from mnet_kernels import backends
from mnet_kernels.nn import FusedInvertedResidual

pytestmark = pytest.mark.skipif(
    not backends.implemented("cpu") or not sys.platform.startswith("linux"), reason="no extension, or no pool"
)
SHAPE = (2, 24, 64, 64)
BYTES = 2 * 24 * 64 * 64 * 4


@pytest.fixture(autouse=True)
def settled():
    gc.collect()


def a_map(x=None):
    """A new map that a CPU stage wrote, as large as what it read."""
    if x is None:
        x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    y, _ = torch.ops.mnet_cpu.depthwise(x, torch.randn(24, 1, 3, 3), None, 0, 1, False)
    return y


def in_use():
    return mnet_kernels.cpu_memory()["in_use"]


def test_maps_come_from_the_pool_and_go_back():
    before = in_use()
    y = a_map()
    assert in_use() - before == -(-BYTES // 65536) * 65536
    again = y[0]  # shares the storage
    del y
    assert in_use() > before
    del again
    assert in_use() == before
    kept = mnet_kernels.cpu_memory()["kept"]
    assert kept >= BYTES and mnet_kernels.empty_cache() == kept


def test_the_peak():
    before = in_use()
    mnet_kernels.reset_peak_cpu_memory()
    assert mnet_kernels.cpu_memory()["peak"] == before
    held = [a_map(), a_map()]
    both = in_use()
    del held[0]
    assert mnet_kernels.cpu_memory()["peak"] == both > in_use() > before
    mnet_kernels.reset_peak_cpu_memory()
    assert mnet_kernels.cpu_memory()["peak"] == in_use()


def profiled(call, path):
    """[(bytes, total allocated)] of what torch's memory profiler was told during a call, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    found.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    return [(e["args"]["Bytes"], e["args"]["Total Allocated"]) for e in sorted(events, key=lambda e: e["ts"])]


def test_torchs_profiler_is_told(tmp_path):
    """Each map's bytes when it comes and when it goes, in the same books as torch's own tensors."""
    own, x = 3 << 20, torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)

    def call():
        held = [torch.empty(own, dtype=torch.uint8), a_map(x)]
        del held[0]
        held.append(a_map(x))

    told = profiled(call, tmp_path / "trace.json")
    sizes = [size for size, _ in told]
    assert sizes.count(BYTES) == sizes.count(-BYTES) == 2 and sizes.count(own) == sizes.count(-own) == 1
    assert sum(sizes) == 0
    for (_, before), (size, total) in zip(told, told[1:], strict=False):
        assert total == before + size


def test_torchs_profiler_and_maps_of_before(tmp_path):
    """As of torch's own tensors, it is not told that one of before it goes, nor what goes on an unwatched thread."""
    before, held = in_use(), [a_map()]
    assert profiled(held.clear, tmp_path / "trace.json") == [] and in_use() == before

    def call():
        held.append(a_map())
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()

    sizes = [size for size, _ in profiled(call, tmp_path / "trace.json")]
    assert sizes.count(BYTES) - sizes.count(-BYTES) == 1 and in_use() == before


def test_what_torch_does_with_a_map():
    before = in_use()
    y = a_map()
    expected = y.clone()
    assert torch.equal(torch.from_numpy(y.numpy()), expected)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)
    assert torch.equal(y.clone().share_memory_(), expected)
    y.add_(1)
    assert torch.equal(y, expected + 1)
    del y
    assert in_use() == before


def test_resized():
    before = in_use()
    y = a_map()
    expected = y.clone()
    y.resize_(4, *SHAPE[1:], memory_format=torch.channels_last)  # a larger block of the same pool
    assert torch.equal(y[:2], expected) and in_use() - before >= 2 * BYTES
    y.resize_(0)
    y.untyped_storage().resize_(0)
    assert in_use() == before


def test_freed_on_another_thread():
    before = in_use()
    held = [a_map()]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert in_use() == before


def test_steps_do_not_grow():
    block = FusedInvertedResidual(24, 24, stride=1, expand_ratio=6)
    x = torch.randn(SHAPE)

    def step():
        with mnet_kernels.backend("cpu"):
            block(x).sum().backward()

    step()
    before = mnet_kernels.cpu_memory()
    for _ in range(20):
        step()
    assert mnet_kernels.cpu_memory() == before


@pytest.mark.parametrize("without", ({"MNET_CPU_POOL": "0"}, {"LIMIT": "1"}), ids=("refused", "no address space"))
def test_without_a_pool(without):
    """Refused by the user, or no addresses for it: malloc's memory, the same numbers."""
    program = """
import os, torch
import mnet_kernels
if os.environ.get("LIMIT"):
    import resource
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
x = torch.randn(2, 24, 64, 64).contiguous(memory_format=torch.channels_last)
weight = torch.zeros(24, 1, 3, 3)
weight[:, :, 1, 1] = 1
y, _ = torch.ops.mnet_cpu.depthwise(x, weight, None, 0, 1, False)
assert torch.equal(x, y)
mnet_kernels.reset_peak_cpu_memory()
assert mnet_kernels.cpu_memory() == {"in_use": 0, "peak": 0, "kept": 0}, mnet_kernels.cpu_memory()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | without, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
