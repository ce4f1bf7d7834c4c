"""The compiled CPU stages, one call at a time: against the reference in float64 by the pass rule (at most twice torch's
own error in the same dtype, plus one ulp), against the reference in the same dtype, and what must hold exactly."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch_stages
from kinks import clear_table
from precision import Judge
from torch.library import opcheck

from mnet_kernels import backends, schema
from mnet_kernels.schema import ACTIVATIONS, depthwise_size
from mnet_kernels.stages import reference

STAGES = (
    "depthwise", "depthwise_backward", "normalize", "normalize_backward", "squeeze", "finalize", "finalize_backward",
    "update_running_stats",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTS = range(len(ACTIVATIONS))
DRAWS = 5

pytestmark = pytest.mark.skipif(not backends.implemented("cpu"), reason="the extension is not built")


def ours(name):
    return getattr(torch.ops.mnet_cpu, name)


def maps(dtype, *shape, mean=0.0):
    return (torch.randn(*shape) + mean).to(dtype).contiguous(memory_format=torch.channels_last)


def widened(args):
    """The same arguments in float64."""
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def bn_table(c):
    """scale of both signs, shift, mean, rstd, variance."""
    table = torch.randn(5, c)
    table[3:].abs_()
    return table


class Layer:
    """Random arguments of a depthwise stage and of its backward."""

    def __init__(
        self, dtype, n=2, c=24, h=9, w=13, k=3, stride=1, act=2, y_act=0, bn=True, gated=False, residual=False
    ):
        self.k, self.stride, self.act, self.y_act = k, stride, act if bn else 0, y_act
        oh, ow = depthwise_size(h, stride), depthwise_size(w, stride)
        self.x, self.y, self.grad = maps(dtype, n, c, h, w), maps(dtype, n, c, oh, ow), maps(dtype, n, c, oh, ow)
        self.weight = torch.randn(c, 1, k, k).to(dtype)
        self.bn = clear_table(bn_table(c), self.x) if bn else None
        self.y_bn, self.coef = clear_table(bn_table(c), self.y), torch.randn(2, c)
        self.gate, self.offset = (torch.rand(n, c), torch.randn(n, c)) if gated else (None, None)
        self.residual = maps(dtype, n, c, h, w) if residual else None

    def forward(self, moments=True):
        return self.x, self.weight, self.bn, self.act, self.stride, moments

    def backward(self, needs_dx=True, needs_dw=True):
        return (
            self.grad, self.y, self.y_bn, self.coef, self.y_act, self.gate, self.offset,
            self.x, self.weight, self.bn, self.act, self.stride, self.residual, needs_dx, needs_dw,
        )  # fmt: skip


def judge(name, make, dtype):
    """The pass rule over every result of a stage, medians over several draws."""
    low = getattr(torch_stages, name)
    verdict = Judge(dtype)
    for _ in range(DRAWS):
        args = make()
        got, torchs = ours(name)(*args), low(*args)
        want = getattr(torch.ops.mnet_ref, name)(*widened(args))
        rows = (got, torchs, want) if isinstance(got, tuple) else ((got,), (torchs,), (want,))
        for i, (a, b, c) in enumerate(zip(*rows, strict=True)):
            if a.numel():
                verdict.add(f"{name} result {i}", a, b, c)
    verdict.verdict()


def same_as_reference(name, args, dtype):
    """As close to the reference as two orders of summation and single flips of a rounding allow."""
    got, want = ours(name)(*args), getattr(torch.ops.mnet_ref, name)(*args)
    rows = zip(got, want, strict=True) if isinstance(got, tuple) else ((got, want),)
    limit = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for i, (a, b) in enumerate(rows):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), f"{name} result {i}"
        if b.numel():
            # the inputs are of order one: a much smaller result is a difference of terms of that size
            error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=0.1)
            assert error <= limit, f"{name} result {i}: {error:.1e}"


def test_all_are_compiled():
    assert set(STAGES) <= backends.implemented("cpu")


# ---- the pass rule --------------------------------------------------------------------------------------------------

DEPTHWISE = [
    *(dict(k=k, stride=s, act=a) for k in (3, 5) for s in (1, 2) for a in ACTS),
    dict(bn=False, k=5), dict(n=1, c=13, h=21, w=6), dict(n=3, c=40, h=35, w=37, stride=2),
]  # fmt: skip


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_depthwise_precision(case, dtype):
    judge("depthwise", lambda: Layer(dtype, **case).forward(), dtype)


BACKWARD = [
    *(dict(k=k, stride=s, act=a, y_act=(a + s) % 4) for k in (3, 5) for s in (1, 2) for a in ACTS),
    dict(bn=False, residual=True), dict(bn=False, residual=True, k=5, y_act=3), dict(bn=False, stride=2),
    dict(gated=True, y_act=3, act=3, k=5), dict(gated=True, y_act=1, act=1, stride=2),
    dict(n=1, c=13, h=21, w=6), dict(n=3, c=40, h=35, w=37, stride=2, y_act=2),
]  # fmt: skip


@pytest.mark.parametrize("case", BACKWARD, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_depthwise_backward_precision(case, dtype):
    judge("depthwise_backward", lambda: Layer(dtype, **case).backward(), dtype)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 24, 11, 9), (1, 13, 40, 33)], ids=str)
def test_normalize_precision(shape, dtype, act):
    c = shape[1]
    judge("normalize", lambda: (maps(dtype, *shape), bn_table(c), act, None), dtype)
    judge("normalize", lambda: (maps(dtype, *shape), bn_table(c), act, maps(dtype, *shape)), dtype)
    judge("normalize_backward", lambda: (maps(dtype, *shape), maps(dtype, *shape), bn_table(c), act), dtype)
    judge("squeeze", lambda: (maps(dtype, *shape), bn_table(c), act), dtype)


# ---- the reference in the same dtype, over every flag ---------------------------------------------------------------

SIZES = [(1, 1, 1, 1), (2, 5, 1, 7), (1, 37, 9, 1), (2, 8, 2, 2), (3, 16, 5, 33), (2, 70, 34, 67), (1, 530, 3, 4)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_depthwise_as_reference(size, dtype):
    n, c, h, w = size
    for k, stride, act, bn, moments in itertools.product((3, 5), (1, 2), ACTS, (True, False), (True, False)):
        layer = Layer(dtype, n, c, h, w, k, stride, act, bn=bn)
        same_as_reference("depthwise", layer.forward(moments), dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_depthwise_backward_as_reference(size, dtype):
    n, c, h, w = size
    flags = itertools.product((3, 5), (1, 2), ACTS, ("bn", "plain", "residual"), (False, True))
    for i, (k, stride, act, how, gated) in enumerate(flags):
        layer = Layer(dtype, n, c, h, w, k, stride, act, i % 4, how == "bn", gated, how == "residual")
        for needs in ((True, True), (True, False), (False, True), (False, False)):
            same_as_reference("depthwise_backward", layer.backward(*needs), dtype)


@pytest.mark.parametrize("alone", ["gate", "offset"])
def test_gate_and_offset_are_independent(alone):
    layer = Layer(torch.float32, gated=True, y_act=3)
    setattr(layer, alone, None)
    same_as_reference("depthwise_backward", layer.backward(), torch.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize_as_reference(size, dtype):
    y = maps(dtype, *size)
    bn = clear_table(bn_table(size[1]), y)
    for act in ACTS:
        for residual in (None, maps(dtype, *size)):
            same_as_reference("normalize", (y, bn, act, residual), dtype)
        same_as_reference("normalize_backward", (maps(dtype, *size), y, bn, act), dtype)
        same_as_reference("squeeze", (y, bn, act), dtype)


@pytest.mark.parametrize("weight", ["transposed", "expanded"])
def test_weight_strides(weight):
    layer = Layer(torch.float32, c=12)
    if weight == "transposed":
        layer.weight = torch.randn(3, 3, 1, 12).permute(3, 2, 0, 1)
    else:
        layer.weight = torch.randn(12, 1, 1, 1).expand(12, 1, 3, 3)
    same_as_reference("depthwise", layer.forward(), torch.float32)
    got = ours("depthwise_backward")(*layer.backward())
    want = reference.depthwise_backward(*layer.backward())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- what must hold exactly -----------------------------------------------------------------------------------------

KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINKS)
def test_derivatives_exactly_at_kinks(name, dtype):
    """Values at a kink: the masks are torch's own backward, bit for bit."""
    act, c, kinks = ACTIVATIONS.index(name), 11, torch.tensor(KINKS[name])
    u = kinks.repeat(c * 12)[: c * 12].view(1, c, 3, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    bn = torch.stack([torch.ones(c), *[torch.zeros(c)] * 2, *[torch.ones(c)] * 2])
    grad = maps(dtype, 1, c, 3, 4)
    want = torch_stages._act_backward(grad.float(), u.float(), act)
    torch.testing.assert_close(ours("normalize_backward")(grad, u, bn, act)[0], want.sum((0, 2, 3)))
    # a centre tap of 1 and an identity upstream hand grad through to x's mask
    weight = torch.zeros(c, 1, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = 1
    coef = torch.zeros(2, c)
    gx, sums, _ = ours("depthwise_backward")(grad, u, bn, coef, 0, None, None, u, weight, bn, act, 1, None, True, True)
    assert torch.equal(gx, want.to(dtype))
    # the same kink on the upstream's side
    gx, _, _ = ours("depthwise_backward")(grad, u, bn, coef, act, None, None, u, weight, None, 0, 1, None, True, True)
    assert torch.equal(gx, want.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, 55.5, -3008.0])
def test_constant_channels(dtype, value):
    x = torch.full((3, 9, 17, 23), value, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(9, 1, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = 1
    y, moments = ours("depthwise")(x, weight, None, 0, 1, True)
    assert torch.equal(y, x) and (moments[0] == value).all() and (moments[1] == 0).all()
    bn = ours("finalize")(moments, None, None, 1e-5, x.numel() // 9)
    assert torch.isfinite(bn).all()
    grad = maps(dtype, *x.shape)
    sums = ours("normalize_backward")(grad, x, bn, 0)
    assert (sums[1] == 0).all()
    torch.testing.assert_close(sums[0].double(), grad.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_means(dtype):
    """sum g (y - mean) is formed from y - mean: nothing is lost at mean/std = 1000."""
    y = maps(dtype, 4, 16, 20, 20, mean=1000.0)
    bn = bn_table(16)
    bn[2] = y.float().mean((0, 2, 3))
    grad = maps(dtype, *y.shape)
    args = (grad, y, bn, 0)
    want = reference.normalize_backward(*widened(args))
    torch.testing.assert_close(ours("normalize_backward")(*args).double(), want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_nan_and_infinity(bad, dtype, act):
    """What is not finite in the reference is not finite here, in the same places and of the same kind."""

    def alike(a, b):
        return torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(torch.isinf(a), torch.isinf(b))

    c = 19
    x, bn = maps(dtype, 2, c, 9, 10), bn_table(c)
    x[1, 3, 4, 5] = x[0, 17, 4, 4] = bad
    assert alike(ours("normalize")(x, bn, act, None), reference.normalize(x, bn, act, None))
    assert alike(ours("squeeze")(x, bn, act), reference.squeeze(x, bn, act))
    grad = maps(dtype, 2, c, 9, 10)
    assert alike(ours("normalize_backward")(grad, x, bn, act), reference.normalize_backward(grad, x, bn, act))
    weight = torch.randn(c, 1, 3, 3).to(dtype)
    assert alike(*(f(x, weight, bn, act, 1, False)[0] for f in (ours("depthwise"), reference.depthwise)))
    layer = Layer(dtype, c=c, h=9, w=10, act=act)
    for name in ("x", "grad", "y"):
        layer.x, layer.grad, layer.y = (maps(dtype, 2, c, 9, 10) for _ in range(3))
        getattr(layer, name)[1, 3, 4, 5] = getattr(layer, name)[0, 17, 4, 4] = bad
        got, want = ours("depthwise_backward")(*layer.backward()), reference.depthwise_backward(*layer.backward())
        assert all(alike(a, b) for a, b in zip(got, want, strict=True)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_independent_of_threads(dtype):
    """One thread and two give the same bits, in maps of many units."""
    layer = Layer(dtype, 4, 48, 56, 57, 3, 1, 2, 2)
    wide = Layer(dtype, 1, 600, 14, 14, 5, 2, 3, 3, gated=True)
    bn, before = bn_table(48), torch.get_num_threads()

    def everything():
        yield from (t for row in (layer, wide) for t in ours("depthwise")(*row.forward()))
        yield from (t for row in (layer, wide) for t in ours("depthwise_backward")(*row.backward()))
        yield ours("normalize")(layer.x, bn, 2, layer.grad)
        yield ours("normalize_backward")(layer.grad, layer.x, bn, 2)
        yield ours("squeeze")(layer.x, bn, 3)

    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(list(everything()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- dispatch, errors, weaker processors ----------------------------------------------------------------------------


def calls(dtype=torch.float32):
    """Arguments for every compiled stage here."""
    bn, x = bn_table(5), maps(dtype, 2, 5, 7, 6)
    gated = Layer(dtype, 2, 5, 7, 6, 5, 2, 3, 3, gated=True)
    plain = Layer(dtype, 2, 5, 7, 6, bn=False, residual=True)
    row = torch.rand(5)
    return {
        "depthwise": [gated.forward(), plain.forward(False)],
        "depthwise_backward": [gated.backward(), plain.backward(), gated.backward(False), gated.backward(True, False)],
        "normalize": [(x, bn, 2, None), (x, bn, 0, x.clone())],
        "normalize_backward": [(x, x.clone(), bn, 3)],
        "squeeze": [(x, bn, 3)],
        "finalize": [(torch.rand(2, 5), row, row.clone(), 1e-5, 84), (torch.rand(2, 5), None, None, 1e-5, 84)],
        "finalize_backward": [(torch.rand(2, 5), bn, 84, True), (torch.rand(2, 5), bn, 84, False)],
        "update_running_stats": [
            (torch.rand(5), torch.rand(5), torch.tensor(3), row, row.clone(), None),
            (torch.rand(5), torch.rand(5), None, row, row.clone(), 0.1),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(name, dtype):
    for args in calls(dtype)[name]:
        utils = ("test_schema", "test_faketensor")
        assert set(opcheck(ours(name).default, args, test_utils=utils).values()) == {"SUCCESS"}


def test_empty_batch():
    layer = Layer(torch.float32, n=0, c=6)
    gx, sums, dw = ours("depthwise_backward")(*layer.backward())
    assert gx.shape == layer.x.shape and (sums == 0).all() and (dw == 0).all()
    assert (ours("normalize_backward")(layer.x, layer.x.clone(), layer.bn, 2) == 0).all()
    assert ours("normalize")(layer.x, layer.bn, 2, None).shape == layer.x.shape
    assert ours("squeeze")(layer.x, layer.bn, 2).shape == (3, 0, 6)


def test_errors():
    """What was given, what is expected, what to do."""
    x, bn, row = maps(torch.float32, 2, 5, 7, 6), bn_table(5), torch.rand(5)
    layer = Layer(torch.float32, 2, 5, 7, 6)

    def backward(**changes):
        for field, value in changes.items():
            setattr(layer, field, value)
        return ours("depthwise_backward")(*layer.backward())

    wrong = [
        (lambda: ours("normalize")(x.contiguous(), bn, 2, None), r"channels_last memory; call y.contiguous\("),
        (lambda: ours("normalize")(x.double(), bn, 2, None), "float64 runs on the reference"),
        (lambda: ours("normalize")(x, bn[:4], 2, None), r"bn has shape \[4, 5\], expected \[5, 5\]"),
        (lambda: ours("normalize")(x, bn, 5, None), "act is 5, expected an index from 0 to 4"),
        (lambda: ours("normalize")(x, bn, 2, x[:1]), r"residual has shape \[1, 5, 7, 6\], expected \[2, 5, 7, 6\]"),
        (lambda: ours("normalize")(x, bn, 2, x.half()), "residual has dtype Half, expected y's Float"),
        (lambda: ours("normalize_backward")(x, x.clone(), bn.half(), 2), "bn has dtype Half, expected float32"),
        (lambda: ours("squeeze")(x[0], bn, 2), r"expected \[N, C, H, W\]"),
        (lambda: ours("finalize")(torch.rand(3, 5), None, None, 0.1, 2), r"expected \[2, C\]"),
        (lambda: ours("finalize")(torch.rand(2, 5), row[:3], None, 0.1, 2), r"gamma has shape \[3\], expected \[5\]"),
        (lambda: ours("finalize_backward")(torch.rand(2, 5).double(), bn, 2, True), "sums has dtype Double"),
        (lambda: ours("update_running_stats")(row.clone(), row.clone(), None, row, row, None), "needs num_batches"),
        (lambda: ours("update_running_stats")(row.long(), row.clone(), None, row, row, 0.1), "of a floating dtype"),
        (lambda: backward(residual=x.clone()), "got bn and residual, expected one of them"),
        (lambda: backward(residual=None, stride=3), "stride is 3, expected 1 or 2"),
        (lambda: backward(stride=2), r"grad has shape \[2, 5, 7, 6\], expected \[2, 5, 4, 3\] to go with x"),
        (lambda: backward(stride=1, gate=torch.rand(2, 4)), r"gate has shape \[2, 4\], expected \[2, 5\]"),
        (lambda: backward(gate=None, weight=torch.rand(5, 1, 7, 7)), "k 3 or 5"),
    ]  # fmt: skip
    for call, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("capability", ["default", "avx2"])
@pytest.mark.skipif("MNET_CPU_CAPABILITY" in os.environ, reason="already runs at a chosen capability")
def test_weaker_processors(capability):
    """The kernels of weaker instruction sets pass the same tests (the choice is made once a process)."""
    from mnet_kernels import build_info

    if build_info()["extension"]["cpu_capability"].lower() == capability:
        pytest.skip("that is this processor's own")
    chosen = "as_reference or kinks or constant or infinity or backward_precision"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        __file__,
        "-k",
        chosen,
    ]
    environment = {**os.environ, "MNET_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_schema_names():
    assert set(STAGES) <= set(schema.NAMES)
