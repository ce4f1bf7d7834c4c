"""The compiled CPU pointwise stages: against float64 by the pass rule, against the reference stage for every flag, and
the properties promised: any size, any capability, any number of threads."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from kinks import clear_table
from precision import Judge
from torch.library import opcheck

from mnet_kernels import backends, schema
from mnet_kernels.stages import reference

if "pointwise_backward" not in backends.implemented("cpu"):
    pytest.skip("the extension is not built", allow_module_level=True)

CPU, DTYPES = torch.ops.mnet_cpu, (torch.float32, torch.bfloat16, torch.float16)
# n, c, e, h, w: tails of every kind, one position, one channel, long depths, several chunks and column blocks
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 24, 144, 9, 7),
    (3, 13, 17, 5, 11),
    (5, 130, 37, 1, 1),
    (1, 600, 20, 7, 7),
    (2, 20, 570, 6, 6),
    (2, 9, 33, 40, 31),
]
BATCH_NORM_ACTS = list(range(len(schema.ACTIVATIONS)))


def map_(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def table(channels):
    """bn [5, C] with values as they occur: scale around 1, shift and mean around 0."""
    return torch.stack([torch.randn(channels) for _ in range(3)] + [torch.rand(channels) + 0.5] * 2)


def operands(size, dtype):
    n, c, e, h, w = size
    x, weight = map_(n, c, h, w, dtype=dtype), (torch.randn(e, c, 1, 1) / c**0.5).to(dtype)
    return x, weight, clear_table(table(c), x), torch.rand(n, c)


def upstream(size, dtype, act):
    n, _, e, h, w = size
    grad, y = (map_(n, e, h, w, dtype=dtype) for _ in range(2))
    return grad, y, clear_table(table(e), y), 0.1 * torch.randn(2, e), act, None


def pooled(size, dtype, act):
    """The upstream of a mean over H and W."""
    _, *rest, _ = upstream(size, dtype, act)
    return None, *rest, torch.randn(size[0], size[2])


def compare(ours, want, dtype):
    """Against the same stage of the reference: the same shapes, strides and dtypes, values but for rounding."""
    steps = 2 * torch.finfo(dtype).eps
    for a, b in zip(ours, want, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        if a.numel():
            # the inputs are of order one: a much smaller result is a difference of terms of that size
            distance = (a.double() - b.double()).norm() / b.double().norm().clamp(min=0.1)
            assert distance <= max(steps, 1e-5), distance


def forward_calls(size, dtype):
    x, weight, bn, gate = operands(size, dtype)
    for moments, g in itertools.product((True, False), (None, gate)):
        yield x, weight, None, 0, g, moments
        for act in BATCH_NORM_ACTS:
            yield x, weight, bn, act, g, moments


def backward_calls(size, dtype):
    x, weight, bn, gate = operands(size, dtype)
    for needs in itertools.product((True, False), repeat=3):
        for y_act, act in zip(BATCH_NORM_ACTS, reversed(BATCH_NORM_ACTS), strict=True):
            up = (pooled if (y_act + sum(needs)) % 2 else upstream)(size, dtype, y_act)
            for b, g in itertools.product((bn, None), (gate, None)):
                residual = map_(*x.shape, dtype=dtype) if b is None and g is None and y_act % 2 else None
                yield *up, x, weight, b, act if b is not None else 0, g, residual, *needs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_call_agrees_with_the_reference(size, dtype):
    for args in forward_calls(size, dtype):
        compare(CPU.pointwise(*args), reference.pointwise(*args), dtype)
    for args in backward_calls(size, dtype):
        compare(CPU.pointwise_backward(*args), reference.pointwise_backward(*args), dtype)


ACT = {"identity": lambda u: u, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}


def torchs(x, weight, bn, act, gate, grad, y, y_bn, coef, y_act, offset, dtype):
    """The stages by torch's own ops, every intermediate in ``dtype``: (y, moments, gx, sums, dw)."""

    def row(t, i):
        return t[i].to(dtype).view(1, -1, 1, 1)

    grad = offset[:, :, None, None].expand_as(y) if grad is None else grad
    x, weight, grad, y = (t.to(dtype) for t in (x, weight, grad, y))
    z, u = x, None
    if bn is not None:
        u = (x * row(bn, 0) + row(bn, 1)).requires_grad_()
        z = ACT[schema.ACTIVATIONS[act]](u)
    out = F.conv2d(z if gate is None else z * gate.to(dtype)[:, :, None, None], weight)
    up = (y * row(y_bn, 0) + row(y_bn, 1)).requires_grad_()
    (g,) = torch.autograd.grad(ACT[schema.ACTIVATIONS[y_act]](up), up, grad)
    dy = row(y_bn, 0) * g + row(coef, 0) * (y - row(y_bn, 2)) + row(coef, 1)
    operand = (z if gate is None else z * gate.to(dtype)[:, :, None, None]).detach().requires_grad_()
    w = weight.detach().requires_grad_()
    dz, dw = torch.autograd.grad(F.conv2d(operand, w), (operand, w), dy)
    gx = dz if bn is None or gate is not None else torch.autograd.grad(z, u, dz)[0]
    moments = torch.stack([out.mean((0, 2, 3)), out.var((0, 2, 3), correction=0)])
    sums = None
    if bn is not None and gate is None:
        sums = torch.stack([gx.sum((0, 2, 3)), (gx * (x - row(bn, 2))).sum((0, 2, 3))])
    return {"y": out, "moments": moments, "gx": gx, "sums": sums, "dw": dw}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", [None, *BATCH_NORM_ACTS])
def test_errors_against_float64(act, gated, dtype):
    """At most twice the error of torch's own ops in the same dtype, plus one ulp."""
    judge, size = Judge(dtype), (3, 26, 45, 13, 11)
    for make in (upstream, pooled) * 5:
        x, weight, bn, gate = operands(size, dtype)
        bn, gate = (None if act is None else bn), (gate if gated else None)
        up = make(size, dtype, 2)
        y, moments = CPU.pointwise(x, weight, bn, act or 0, gate, True)
        gx, sums, dw = CPU.pointwise_backward(*up, x, weight, bn, act or 0, gate, None, True, True, True)
        ours = {"y": y, "moments": moments, "gx": gx, "sums": sums, "dw": dw}
        rounded, want = (torchs(x, weight, bn, act or 0, gate, *up, dtype=d) for d in (dtype, torch.float64))
        for name, ref in want.items():
            if ref is not None:
                judge.add(f"{name}, {make.__name__}", ours[name], rounded[name], ref)
    judge.verdict()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_of_constant_and_distant_channels(dtype):
    """A constant channel has variance exactly 0; mean/std = 300 costs no digits."""
    x = torch.randn(4, 3, 17, 19)
    x[:, 1] += 300
    x[:, 2] = 7.3
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    y, moments = CPU.pointwise(x, torch.eye(3, dtype=dtype).view(3, 3, 1, 1), None, 0, None, True)
    assert torch.equal(y, x)
    assert moments[0, 2] == x[0, 2, 0, 0] and moments[1, 2] == 0
    want = torch.stack([y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)])
    torch.testing.assert_close(moments.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", BATCH_NORM_ACTS)
def test_what_is_not_finite_goes_where_it_goes_in_torch(act, value, dtype):
    x, weight, bn, _ = operands((2, 5, 19, 6, 7), dtype)
    x[1, 3, 2, 4] = value
    y, moments = CPU.pointwise(x, weight, bn, act, None, True)
    want, _ = reference.pointwise(x, weight, bn, act, None, True)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    assert torch.equal(moments.isfinite().all(0), want.isfinite().all(3).all(2).all(0))
    grad = map_(2, 19, 6, 7, dtype=dtype)
    grad[0, 7, 1, 1] = value
    up = grad, map_(2, 19, 6, 7, dtype=dtype), table(19), torch.randn(2, 19), 0, None
    args = *up, x, weight, bn, act, None, None
    for ours, ref in zip(
        CPU.pointwise_backward(*args, True, True, True),
        reference.pointwise_backward(*args, True, True, True),
        strict=True,
    ):
        assert torch.equal(ours.isfinite(), ref.isfinite())


def test_empty_batch():
    x, weight, bn, gate = operands((0, 5, 9, 4, 4), torch.float32)
    y, moments = CPU.pointwise(x, weight, bn, 2, None, True)
    assert y.shape == (0, 9, 4, 4) and torch.equal(moments, torch.zeros(2, 9))
    up = upstream((0, 5, 9, 4, 4), torch.float32, 2)
    gx, sums, dw = CPU.pointwise_backward(*up, x, weight, bn, 2, None, None, True, True, True)
    assert gx.shape == x.shape and torch.equal(sums, torch.zeros(2, 5)) and torch.equal(dw, torch.zeros(9, 5, 1, 1))
    assert CPU.pointwise_backward(*up, x, weight, bn, 2, gate, None, True, True, True)[1].shape == (3, 0, 5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    size = (4, 40, 150, 23, 21)
    x, weight, bn, gate = operands(size, dtype)
    up = upstream(size, dtype, 2)

    def everything():
        for g in (None, gate):
            yield from CPU.pointwise(x, weight, bn, 2, g, True)
            yield from CPU.pointwise_backward(*up, x, weight, bn, 2, g, None, True, True, True)

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(list(everything()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    n, c, e, h, w = size = (2, 6, 9, 5, 4)
    for dtype in DTYPES:
        x, weight, bn, gate = operands(size, dtype)
        up = upstream(size, dtype, 2)
        calls = [
            (CPU.pointwise, (x, weight, bn, 2, gate, True)),
            (CPU.pointwise, (x, weight, None, 0, None, False)),
            (CPU.pointwise_backward, (*up, x, weight, bn, 3, gate, None, True, True, True)),
            (CPU.pointwise_backward, (*up, x, weight, None, 0, None, map_(n, c, h, w, dtype=dtype), True, True, False)),
            (CPU.pointwise_backward, (*up, x, weight, bn, 3, None, None, False, True, False)),
            (CPU.pointwise_backward, (*up, x, weight, bn, 3, None, None, False, False, False)),
        ]
        for op, args in calls:
            opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_weight_of_any_strides():
    x, weight, bn, _ = operands((2, 12, 20, 5, 5), torch.float32)
    turned = weight.flatten(1).t().contiguous().t().view(20, 12, 1, 1)
    assert turned.stride()[:2] == (1, 20)
    assert all(
        map(torch.equal, CPU.pointwise(x, weight, bn, 1, None, True), CPU.pointwise(x, turned, bn, 1, None, True))
    )
    up = upstream((2, 12, 20, 5, 5), torch.float32, 0)
    rest = (bn, 1, None, None, True, True, True)
    pairs = zip(
        CPU.pointwise_backward(*up, x, weight, *rest), CPU.pointwise_backward(*up, x, turned, *rest), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


BAD = {
    "channels_last memory": lambda x, w, bn, g: (x.contiguous(), w, bn, 0, None, True),
    "expected float32, bfloat16 or float16": lambda x, w, bn, g: (x.double(), w.double(), None, 0, None, True),
    r"expected \[E, 6, 1, 1\]": lambda x, w, bn, g: (x, w[:, :5], bn, 0, None, True),
    "cast it": lambda x, w, bn, g: (x, w.bfloat16(), bn, 0, None, True),
    r"bn has shape \[5, 5\]": lambda x, w, bn, g: (x, w, bn[:, :5].contiguous(), 0, None, True),
    "without bn": lambda x, w, bn, g: (x, w, None, 2, None, True),
    "an index from 0 to 4": lambda x, w, bn, g: (x, w, bn, 5, None, True),
    r"gate has shape \[1, 6\]": lambda x, w, bn, g: (x, w, bn, 0, g[:1], True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    with pytest.raises(RuntimeError, match=message):
        CPU.pointwise(*BAD[message](*operands((2, 6, 9, 5, 4), torch.float32)))


def test_one_of_grad_and_offset():
    size = (2, 6, 9, 5, 4)
    x, weight, bn, _ = operands(size, torch.float32)
    (grad, *up, _), offset = upstream(size, torch.float32, 0), torch.randn(2, 9)
    for g, o, given in ((grad, offset, "both"), (None, None, "neither")):
        with pytest.raises(RuntimeError, match=f"got {given} of grad and offset, expected one"):
            CPU.pointwise_backward(g, *up, o, x, weight, bn, 2, None, None, True, True, True)
    with pytest.raises(RuntimeError, match=r"offset has shape \[1, 9\]"):
        CPU.pointwise_backward(None, *up, offset[:1], x, weight, bn, 2, None, None, True, True, True)


def test_residual_beside_a_batch_norm_is_refused():
    size = (2, 6, 9, 5, 4)
    x, weight, bn, _ = operands(size, torch.float32)
    with pytest.raises(RuntimeError, match="residual is given together with bn"):
        CPU.pointwise_backward(*upstream(size, torch.float32, 0), x, weight, bn, 2, None, x, True, True, True)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512bf16"])
def test_weaker_capabilities(capability):
    """The kernels that this machine would not choose: the comparisons above, in a process of its own."""
    environment = os.environ | {"MNET_CPU_CAPABILITY": capability}
    tests = "reference or float64 or constant or finite or threads"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"({tests}) and not capabilities"]
    done = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
