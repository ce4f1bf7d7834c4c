"""The compiled CPU stem: against the reference for every flag and memory layout, and the properties promised: any size,
any capability, any number of threads.  (test_gpu.py has the pass rule, csrc/tests/stem_cpu.cpp the kernels alone.)"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from kinks import clear_table
from precision import Judge
from torch.library import opcheck

import mnet_kernels as mk
from mnet_kernels import backends, schema
from mnet_kernels.stages import reference

if not backends.has_stem("cpu"):
    pytest.skip("the extension is not built", allow_module_level=True)

CPU, DTYPES = torch.ops.mnet_cpu, (torch.float32, torch.bfloat16, torch.float16)
# n, c, e, h, w: tails of every kind, one position, several tiles, chunks and panels
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 32, 17, 22),
    (3, 3, 16, 64, 130),
    (1, 8, 70, 9, 5),
    (2, 4, 7, 1, 40),
    (5, 2, 33, 31, 1),
]
ACTS = range(len(schema.ACTIVATIONS))
LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[:, :, :, : x.shape[3]],
    "gaps": lambda x: torch.stack([x, x], 4)[..., 0],
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one image": lambda x: x[:1].expand(x.shape),
}


def map_(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def operands(size, dtype, stride):
    """x, weight and the upstream but for its activation."""
    n, c, e, h, w = size
    out = n, e, *(schema.depthwise_size(side, stride) for side in (h, w))
    y_bn = torch.cat([torch.randn(3, e), torch.rand(2, e) + 0.5])
    x, weight = torch.randn(n, c, h, w).to(dtype), (torch.randn(e, c, 3, 3) / (9 * c) ** 0.5).to(dtype)
    gy, y = map_(*out, dtype=dtype), map_(*out, dtype=dtype)
    # Up to 22,050 values a channel: what float32 errs by, not the default margin.
    return x, weight, (gy, y, clear_table(y_bn, y, margin=2e-6), 0.1 * torch.randn(2, e))


def compare(ours, want, dtype):
    """The same shapes, strides and dtypes, values but for rounding."""
    for a, b in zip(ours, want, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        if a.numel():
            distance = (a.double() - b.double()).norm() / b.double().norm().clamp(min=0.1)
            assert distance <= max(2 * torch.finfo(dtype).eps, 1e-5), distance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_call_agrees_with_the_reference(size, stride, dtype):
    x, weight, up = operands(size, dtype, stride)
    for moments in (True, False):
        args = x, weight, stride, moments
        compare(CPU.stem(*args), reference.stem(*args), dtype)
    for act, *needs in itertools.product(ACTS, (True, False), (True, False)):
        args = *up, act, x, stride, *needs
        compare(CPU.stem_backward(*args), reference.stem_backward(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_image_does_not_change_a_bit(layout, dtype):
    x, weight, up = operands((2, 3, 20, 13, 37), dtype, 2)
    if layout == "one image":
        x = x[:1].repeat(2, 1, 1, 1)
    as_laid_out = LAYOUTS[layout](x)
    assert torch.equal(as_laid_out, x)
    assert all(map(torch.equal, CPU.stem(as_laid_out, weight, 2, True), CPU.stem(x, weight, 2, True)))
    ours, want = (CPU.stem_backward(*up, 2, image, 2, True, True) for image in (as_laid_out, x))
    assert all(map(torch.equal, ours, want))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_errors_of_large_sums_against_float64(stride, dtype):
    """The pass rule where a channel has 10^4 positions: moments and weight gradient."""
    judge = Judge(dtype)
    for _ in range(3):
        x, weight, up = operands((3, 3, 32, 75, 98), dtype, stride)
        x = x + 0.5
        y, moments = CPU.stem(x, weight, stride, True)
        dy, dw = CPU.stem_backward(*up, 2, x, stride, True, True)
        ours = (y, moments, dy, dw)
        wide = [t.double() for t in up]
        want = (
            *reference.stem(x.double(), weight.double(), stride, True),
            *reference.stem_backward(*wide, 2, x.double(), stride, True, True),
        )
        out = torch.nn.functional.conv2d(x, weight, None, stride, 1)
        low = torch.stack([out.float().mean((0, 2, 3)), out.float().var((0, 2, 3), correction=0)])
        plain = want[2].to(dtype)
        grad = torch.nn.grad.conv2d_weight(x, weight.shape, plain, stride, 1)
        for name, a, b, ref in zip(("y", "moments", "dy", "dw"), ours, (out, low, plain, grad), want, strict=True):
            judge.add(name, a, b, ref)
    judge.verdict()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_of_constant_and_distant_channels(dtype):
    """A constant channel has variance exactly 0; mean/std = 300 costs no digits."""
    x = torch.randn(4, 3, 17, 19)
    x[:, 1] += 300
    x[:, 2] = 7.3
    x, weight = x.to(dtype), torch.zeros(3, 3, 3, 3, dtype=dtype)
    weight[range(3), range(3), 1, 1] = 1
    y, moments = CPU.stem(x, weight, 1, True)
    assert torch.equal(y, x)
    assert moments[0, 2] == x[0, 2, 0, 0] and moments[1, 2] == 0
    want = torch.stack([y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)])
    torch.testing.assert_close(moments.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_goes_where_it_goes_in_torch(value, dtype):
    x, weight, up = operands((2, 3, 19, 16, 17), dtype, 2)
    x[1, 2, 7, 4] = value
    y, moments = CPU.stem(x, weight, 2, True)
    want, _ = reference.stem(x, weight, 2, True)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    assert not moments.isfinite().all()
    up[0][0, 7, 1, 1] = value
    args = *up, 0, x, 2, True, True
    for ours, ref in zip(CPU.stem_backward(*args), reference.stem_backward(*args), strict=True):
        assert torch.equal(ours.isfinite(), ref.isfinite())


def test_empty_batch():
    x, weight, up = operands((0, 3, 9, 4, 4), torch.float32, 2)
    y, moments = CPU.stem(x, weight, 2, True)
    assert y.shape == (0, 9, 2, 2) and torch.equal(moments, torch.zeros(2, 9))
    dy, dw = CPU.stem_backward(*up, 2, x, 2, True, True)
    assert dy.shape == y.shape and torch.equal(dw, torch.zeros(9, 3, 3, 3))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    x, weight, up = operands((4, 3, 40, 63, 61), dtype, 2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((*CPU.stem(x, weight, 2, True), *CPU.stem_backward(*up, 2, x, 2, True, True)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_weight_of_any_strides():
    x, weight, _ = operands((2, 3, 20, 9, 9), torch.float32, 2)
    turned = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert turned.stride() != weight.stride()
    assert all(map(torch.equal, CPU.stem(x, weight, 2, True), CPU.stem(x, turned, 2, True)))


def test_opcheck():
    for dtype in DTYPES:
        x, weight, up = operands((2, 3, 9, 6, 5), dtype, 2)
        for layout in (x, LAYOUTS["channels_last"](x), LAYOUTS["gaps"](x)):
            for op, args in (
                (CPU.stem, (layout, weight, 2, True)),
                (CPU.stem, (layout, weight, 1, False)),
                (CPU.stem_backward, (*up, 2, layout, 2, True, True)),
                (CPU.stem_backward, (*up, 2, layout, 2, False, False)),
            ):
                opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


BAD = {
    "expected float32, bfloat16 or float16": lambda x, w: (x.double(), w.double(), 2, True),
    "1 to 8 channels": lambda x, w: (torch.randn(2, 9, 6, 6), w, 2, True),
    r"expected \[E, 3, 3, 3\]": lambda x, w: (x, w[:, :2], 2, True),
    "cast it": lambda x, w: (x, w.bfloat16(), 2, True),
    "stride is 3, expected 1 or 2": lambda x, w: (x, w, 3, True),
    r"expected \[N, C, H, W\]": lambda x, w: (x[0], w, 2, True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    x, weight, _ = operands((2, 3, 9, 6, 5), torch.float32, 2)
    with pytest.raises(RuntimeError, match=message):
        CPU.stem(*BAD[message](x, weight))


def test_bad_upstream_is_refused():
    x, _, (grad, y, y_bn, coef) = operands((2, 3, 9, 6, 5), torch.float32, 2)
    with pytest.raises(RuntimeError, match="grad has shape"):
        CPU.stem_backward(grad[..., :1], y, y_bn, coef, 0, x, 2, True, True)
    with pytest.raises(RuntimeError, match="an index from 0 to 4"):
        CPU.stem_backward(grad, y, y_bn, coef, 5, x, 2, True, True)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_the_module_reads_the_image_as_it_lies(layout, monkeypatch):
    """No copy of the image in another layout is made."""
    module, x = mk.nn.FusedStemConvBNAct(3, 16), LAYOUTS[layout](torch.randn(2, 3, 20, 20))
    seen, table = [], mk.stages.stage("cpu")
    stem = table.stem
    monkeypatch.setattr(table, "stem", lambda *args: seen.append(args[0].data_ptr()) or stem(*args))
    with mk.backend("cpu"):
        module(x)
    assert seen == [x.data_ptr()]


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_weaker_capabilities(capability):
    """The kernels that this machine would not choose: the comparisons above, in a process of its own."""
    environment = os.environ | {"MNET_CPU_CAPABILITY": capability}
    tests = "reference or float64 or constant or finite or threads or layout"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"({tests}) and not capabilities"]
    done = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
