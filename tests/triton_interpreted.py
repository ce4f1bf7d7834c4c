"""The Triton kernels in the interpreter: every stage against the reference, blocks against native.

Not collected by itself: test_triton.py runs it in a process of its own, because TRITON_INTERPRET=1 must be set before
triton is imported.  The table of configurations has small tiles for the interpreter, so that these sizes meet every
border, several tiles a program and several programs.
"""

import fast_interpreter  # noqa: F401
import pytest
import torch
from blocks import Case, Inputs, step, upstream_of
from precision import Judge
from test_stages import UTILS, sample
from torch.library import opcheck
from triton_calls import ACTS, CALLS, coefficients, map_, table

import mnet_kernels as mk
from mnet_kernels import backends, schema
from mnet_kernels.stages import reference

TRITON, REFERENCE = torch.ops.mnet_triton, torch.ops.mnet_ref
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {"n": 2, "c": 5, "e": 9, "h": 6, "w": 5}  # of the blocks
DRAWS = 2


def double(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else result


def torchs_sums(monkeypatch):
    """Make the reference sum as torch does in its own dtype (it sums in float64): the measure of the pass rule."""
    monkeypatch.setattr(reference, "_sum", lambda t: t.sum((0, 2, 3)))
    monkeypatch.setattr(reference, "_outer_sum", lambda a, b: torch.einsum("nihw,njhw->ij", a, b))

    def moments(y, wanted):
        v = reference._acc(y)
        return torch.stack([v.mean((0, 2, 3)), v.var((0, 2, 3), correction=0)]) if wanted else v.new_empty(0)

    monkeypatch.setattr(reference, "_moments", moments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_stage(name, dtype, monkeypatch):
    """Every call agrees with the reference but for rounding; over all calls the pass rule holds, against float64."""
    if name.startswith("finalize") and dtype != torch.float32:
        pytest.skip("tables are float32")
    calls = list(CALLS[name](dtype))
    ours, same, exact = (
        [tensors(getattr(op, name)(*prepare(args))) for args in calls]
        for op, prepare in ((TRITON, list), (REFERENCE, list), (REFERENCE, double))
    )
    torchs_sums(monkeypatch)
    torchs = [tensors(getattr(reference, name)(*args)) for args in calls]
    judge, limit = Judge(dtype), max(2 * torch.finfo(dtype).eps, 1e-5)
    for i, results in enumerate(zip(ours, same, torchs, exact, strict=True)):
        for k, (a, b, low, ref) in enumerate(zip(*results, strict=True)):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            if b.numel():
                distance = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
                assert distance <= limit, f"call {i} result {k}: {distance:.1e} from the reference"
                judge.add(f"result {k}", a, low, ref)
    judge.verdict()


def test_every_stage_but_those_of_algebraic_modes_backward_is_here():
    lacking = {"expand_depthwise_backward", "expand_finalize_backward", "expand_mix"}
    assert set(CALLS) | {"update_running_stats"} == set(schema.NAMES) - lacking
    assert backends.whole("triton", "chain") and set(backends.missing_stages("triton", "algebraic")) == lacking
    assert backends.has_stem("triton") and backends.hands_on_gram("triton")


@pytest.mark.parametrize("name", sorted(backends.implemented("triton")))
def test_opcheck(name):
    """Schema, fake (shapes and strides, symbolic ones too) and dispatch."""
    for args in sample()[name]:
        assert set(opcheck(getattr(TRITON, name).default, args, test_utils=UTILS).values()) == {"SUCCESS"}


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_running_stats(momentum):
    for c in (1, 300):
        args = torch.randn(c), torch.rand(c), torch.tensor(3), torch.randn(c), torch.rand(c)
        ours, ref = [a.clone() for a in args], [a.clone() for a in args]
        TRITON.update_running_stats(*ours, momentum)
        REFERENCE.update_running_stats(*ref, momentum)
        for a, b in zip(ours, ref, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_of_constant_and_distant_channels(dtype):
    """A constant channel has variance exactly 0; mean/std = 300 costs no digits."""
    x = torch.randn(4, 3, 9, 11)
    x[:, 1] += 300
    x[:, 2] = 7.3
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    identity = torch.zeros(3, 1, 3, 3, dtype=dtype)
    identity[:, :, 1, 1] = 1
    for y, moments in (
        TRITON.pointwise(x, torch.eye(3, dtype=dtype).view(3, 3, 1, 1), None, 0, None, True),
        TRITON.depthwise(x, identity, None, 0, 1, True),
    ):
        assert torch.equal(y, x)
        assert moments[0, 2] == x[0, 2, 0, 0] and moments[1, 2] == 0
        want = torch.stack([y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)])
        torch.testing.assert_close(moments.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_of_constant_and_distant_channels(dtype):
    """A constant channel's row and column are exactly 0; mean/std = 300 costs no digits, even where it changes."""
    x = torch.randn(6, 20, 5, 7)
    x[:, 1] += 300
    x[:, 2] = 7.3
    x[3:, 3] += 50
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    gram, exact = TRITON.gram(x), REFERENCE.gram(x.double())
    assert gram[20, 2] == x[0, 2, 0, 0] and (gram[2] == 0).all() and (gram[:20, 2] == 0).all()
    scale = exact[:20].diagonal().clamp(min=1e-12).sqrt()
    assert ((gram[:20] - exact[:20]).abs() <= 4e-6 * scale[:, None] * scale + 1e-12).all()
    torch.testing.assert_close(gram[20].double(), exact[20], rtol=1e-6, atol=1e-6)
    # the shift: a value of the storage dtype near the mean, where that is far from 0
    assert torch.equal(gram[21], torch.where(exact[21] != 0, gram[20].to(dtype).float(), 0.0)) and gram[21, 1] != 0
    out, given = TRITON.normalize_gram(x, torch.eye(5, 20) * 0 + torch.tensor([[1.0], [0], [0], [1], [1]]), 0, None)
    assert torch.equal(out, x) and torch.equal(given, gram)


def same_pattern(ours, ref):
    return all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(tensors(ours), tensors(ref), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", ACTS)
def test_what_is_not_finite_goes_where_it_goes_in_the_reference(act, value):
    n, c, e, h, w = 2, 5, 19, 6, 7
    x, weight, bn = map_(torch.float32, n, c, h, w), torch.randn(e, c, 1, 1), table(c)
    x[1, 3, 2, 4] = value
    args = x, weight, bn, act, None, True
    assert same_pattern(TRITON.pointwise(*args), REFERENCE.pointwise(*args))
    args = x, torch.randn(c, 1, 3, 3), bn, act, 1, True
    assert same_pattern(TRITON.depthwise(*args), REFERENCE.depthwise(*args))


@pytest.mark.parametrize("act", ACTS)
def test_kinks(act):
    """Exactly at a kink the derivative is torch's."""
    y = torch.tensor([-3.0, 0.0, 3.0, 6.0, -1.0, 1.0, 7.0]).view(1, 1, 1, 7)
    bn = torch.tensor([1.0, 0, 0, 1, 1]).view(5, 1)
    args = torch.ones_like(y), y, bn, act
    assert torch.equal(TRITON.normalize_backward(*args), REFERENCE.normalize_backward(*args))


def test_empty_batch():
    x, weight = map_(torch.float32, 0, 5, 4, 4), torch.randn(9, 5, 1, 1)
    y, moments = TRITON.pointwise(x, weight, table(5), 2, None, True)
    assert y.shape == (0, 9, 4, 4) and torch.equal(moments, torch.zeros(2, 9))
    y, moments = TRITON.depthwise(x, torch.randn(5, 1, 3, 3), table(5), 2, 2, True)
    assert y.shape == (0, 5, 2, 2) and torch.equal(moments, torch.zeros(2, 5))
    up = map_(torch.float32, 0, 9, 4, 4), map_(torch.float32, 0, 9, 4, 4), table(9), coefficients(9), 2, None
    gx, sums, dw = TRITON.pointwise_backward(*up, x, weight, table(5), 2, None, None, True, True, True)
    assert gx.shape == x.shape and torch.equal(sums, torch.zeros(2, 5)) and torch.equal(dw, torch.zeros(9, 5, 1, 1))


def test_empty_batch_of_the_other_stages():
    x, image = map_(torch.float32, 0, 5, 4, 4), torch.randn(0, 3, 7, 6)
    y, moments = TRITON.stem(image, torch.randn(9, 3, 3, 3), 2, True)
    assert y.shape == (0, 9, 4, 3) and torch.equal(moments, torch.zeros(2, 9))
    up = map_(torch.float32, 0, 9, 4, 3), map_(torch.float32, 0, 9, 4, 3), table(9), coefficients(9), 2
    dy, dw = TRITON.stem_backward(*up, image, 2, True, True)
    assert dy.shape == (0, 9, 4, 3) and torch.equal(dw, torch.zeros(9, 3, 3, 3))
    assert torch.equal(TRITON.gram(x), torch.zeros(7, 5))
    out, gram = TRITON.normalize_gram(x, table(5), 2, None)
    assert out.shape == x.shape and torch.equal(gram, torch.zeros(7, 5))
    args = x, torch.zeros(5), torch.randn(9, 5, 1, 1), table(9), 2, torch.randn(9, 1, 3, 3), 2, True
    y, moments = TRITON.expand_depthwise(*args)
    assert y.shape == (0, 9, 2, 2) and torch.equal(moments, torch.zeros(2, 9))


def test_the_same_bits_every_time():
    args = map_(torch.bfloat16, 3, 20, 9, 11), torch.randn(24, 20, 1, 1).bfloat16(), table(20), 3, None, True
    assert all(map(torch.equal, TRITON.pointwise(*args), TRITON.pointwise(*args)))


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
    operands = map_(torch.float32, 2, 6, 5, 4), torch.randn(9, 6, 1, 1), table(6), torch.rand(2, 6)
    with pytest.raises(RuntimeError, match=message):
        TRITON.pointwise(*BAD[message](*operands))


BAD_STEM = {
    "expected an image of 1 to 8 channels": lambda x, w: (torch.randn(1, 9, 4, 4), torch.randn(5, 9, 3, 3), 1, True),
    "H and W of at least 1": lambda x, w: (x[:, :, :0], w, 1, True),
    "stride is 3; expected 1 or 2": lambda x, w: (x, w, 3, True),
    r"expected \[5, 3, 3, 3\]": lambda x, w: (x, w[:, :, :2], 1, True),
    "weight is bfloat16": lambda x, w: (x, w.bfloat16(), 1, True),
    "expected float32, bfloat16 or float16 and 4": lambda x, w: (x[0], w, 1, True),
}


@pytest.mark.parametrize("message", BAD_STEM)
def test_a_bad_image_is_refused(message):
    with pytest.raises(RuntimeError, match=message):
        TRITON.stem(*BAD_STEM[message](torch.randn(2, 3, 6, 5), torch.randn(5, 3, 3, 3)))


def test_bad_expand_layers_are_refused():
    x, expand, weight = map_(torch.float32, 2, 6, 5, 4), torch.randn(9, 6, 1, 1), torch.randn(9, 1, 3, 3)
    with pytest.raises(RuntimeError, match=r"expand_weight has shape \[9, 5, 1, 1\]; expected \[9, 6, 1, 1\]"):
        TRITON.expand_depthwise(x, torch.zeros(6), expand[:, :5], table(9), 2, weight, 1, True)
    with pytest.raises(RuntimeError, match=r"shift has shape \[5\]"):
        TRITON.expand_depthwise(x, torch.zeros(5), expand, table(9), 2, weight, 1, True)
    with pytest.raises(RuntimeError, match=r"weight has shape \[8, 1, 3, 3\]; expected \[9, 1, k, k\]"):
        TRITON.expand_depthwise(x, torch.zeros(6), expand, table(9), 2, weight[:8], 1, True)
    with pytest.raises(RuntimeError, match=r"gram has shape \[7, 6\]; expected \[8, 6\]"):
        TRITON.expand_finalize(torch.randn(7, 6), expand, None, None, 1e-5, 40)
    with pytest.raises(RuntimeError, match=r"weight has shape \[9, 5, 1, 1\]"):
        TRITON.expand_finalize(torch.randn(8, 6), expand[:, :5], None, None, 1e-5, 40)


BLOCKS = [
    Case("stem_conv_bn_act", stride=2, **SIZES | {"c": 3}),
    Case("depthwise_conv_bn_act", kernel=5, stride=2, activation="hardswish", **SIZES),
    Case("pointwise_conv_bn_act", **SIZES),
    Case("pointwise_conv_bn_act_pool", **SIZES),
    Case("separable_conv", stride=2, activation="relu", **SIZES),
    Case(residual=True, **SIZES),
    Case(stride=2, kernel=5, excite=True, activation="hardswish", **SIZES),
    Case(residual=True, expand=False, excite=True, activation="relu", **SIZES),
]


def test_blocks():
    """Output, gradients and running statistics: each case close to the reference, all together by the pass rule."""
    judge = Judge(torch.float32)
    # squeeze-excite's few values scatter most: its blocks are drawn more often
    for case in BLOCKS * DRAWS + [case for case in BLOCKS if case.excite] * 6:
        low, exact = Inputs(case, torch.float32), Inputs(case)
        with mk.backend("native"):
            upstream = upstream_of(low.call())  # before the copy: it moves the running statistics
        with torch.no_grad():
            for a, b in zip(exact.leaves.values(), low.leaves.values(), strict=True):
                a.copy_(b)
            for a, b in zip(exact.bns, low.bns, strict=True):
                a.load_state_dict(b.state_dict())
        with mk.count_stages() as counts:
            ours = step(low, "triton", "chain", upstream=upstream)
        assert counts and {label.split("::")[0] for label in counts} == {"mnet_triton"}
        same = step(low, "reference", "chain", upstream=upstream)
        torchs, want = (step(i, "native", upstream=upstream) for i in (low, exact))
        for name, ref in want.items():
            distance = (ours[name].double() - same[name].double()).norm() / same[name].double().norm().clamp(min=1e-30)
            assert distance <= 1e-4, f"{case} {name}: {distance:.1e} from the reference"
            judge.add(name.rstrip("0123456789"), ours[name], torchs[name], ref)
    judge.verdict()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("excite", [False, True])
def test_algebraic_mode_without_gradients(training, excite):
    """The expanded tensor does not exist; output and running statistics are the reference's."""
    case = Case(residual=not excite, excite=excite, activation="hardswish", **SIZES)
    inputs, results = Inputs(case, torch.float32), []
    before = [{k: v.clone() for k, v in bn.state_dict().items()} for bn in inputs.bns]
    for backend in ("triton", "reference"):
        for bn, state in zip(inputs.bns, before, strict=True):
            bn.train(training).load_state_dict(state)
        with mk.backend(backend, "algebraic"), mk.count_stages() as counts, torch.no_grad():
            out = inputs.call()
        results.append([out, *(b.clone().float() for bn in inputs.bns for b in bn.buffers())])
        if backend == "triton":
            assert {label.split("::")[0] for label in counts} == {"mnet_triton"}
            assert counts["mnet_triton::expand_depthwise"] == 1 and counts["mnet_triton::gram"] == training
    for ours, same in zip(*results, strict=True):
        torch.testing.assert_close(ours, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("excite", [False, True])
def test_one_graph(excite):
    """torch.compile, forward and backward in one graph each: what runs without it."""
    inputs = Inputs(Case(residual=True, excite=excite, **SIZES | {"n": 1}), torch.float32)
    upstream = upstream_of(inputs.call()).float()
    torch._dynamo.reset()
    results = []
    with mk.backend("triton", "chain"):
        for call in (inputs.call, torch.compile(inputs.call, fullgraph=True, backend="aot_eager")):
            for bn in inputs.bns:
                bn.reset_running_stats()
            with mk.count_stages() as counts:
                out = call()
                grads = torch.autograd.grad(out, list(inputs.leaves.values()), upstream)
            results.append([out.detach(), *grads, *(b.clone() for bn in inputs.bns for b in bn.buffers())])
        assert not counts  # of the compiled call: the graph has the stages, none is called from Python
    for ours, same in zip(*results, strict=True):  # NumPy's products round by where their operands lie in memory
        torch.testing.assert_close(ours, same)
