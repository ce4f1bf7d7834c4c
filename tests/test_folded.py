"""fold(model, fused=True): rows of folded layers on the CPU kernels, their weights packed once."""

import copy
import pickle

import pytest
import torch
from networks import randomise
from precision import Judge
from test_fold import made, models
from torch import nn

import mnet_kernels as mk
from mnet_kernels import backends
from mnet_kernels.graph import known, reading, swap
from mnet_kernels.nn.inverted_residual import InvertedResidual
from mnet_kernels.nn.squeeze_excite import SqueezeExcite

pytestmark = pytest.mark.skipif(
    backends.why_unavailable("cpu", torch.device("cpu")) is not None, reason="no compiled CPU kernels"
)

DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ACTIVATIONS = (nn.ReLU6, nn.ReLU, nn.Hardswish, nn.SiLU)


def rows(module):
    """The rows that run fused, and the kinds of their layers."""
    fused = [m for m in module.modules() if known.is_fused(m)]
    return [[layer.kind for layer in block.layers] for m in fused for block in reading.of(m).blocks]


def native_calls(counts):
    return {label for label in counts if not label.startswith("mnet_cpu::")}


@models
@dtypes
def test_networks(name, dtype):
    """Against the float64 copy by the pass rule, torch's error being that of the plain copy in the same dtype."""
    verdict = Judge(dtype)
    for _ in range(4):
        model = made(name)
        exact, plain, fused = mk.fold(model), mk.fold(model).to(dtype), mk.fold(model, fused=True).to(dtype)
        assert rows(fused) and not rows(plain)
        x = torch.randn(2, 3, 64, 47).to(dtype)
        with torch.no_grad():
            with mk.count_stages() as counts:
                ours = fused(x)
            assert counts and not native_calls(counts)
            verdict.add("out", ours, plain(x), exact(x.double()))
    verdict.verdict()


def block(kind, c, e, o, kernel=3, stride=1, act=nn.ReLU6, excite=False):
    """Folded layers of a row, in float64."""
    pad = kernel // 2
    depthwise = [nn.Conv2d(e, e, kernel, stride, pad, groups=e), act()]
    excited = [SqueezeExcite(e, 5)] if excite else []
    layers = {
        "dense": [nn.Conv2d(c, o, 3, stride, 1), act()],
        "depthwise": depthwise,
        "pointwise": [nn.Conv2d(c, o, 1), act()],
        "depthwise-pointwise": [*depthwise, *excited, nn.Conv2d(e, o, 1), act()],
        "inverted": [nn.Conv2d(c, e, 1), act(), *depthwise, *excited, nn.Conv2d(e, o, 1)],
        "dense-depthwise-pointwise": [nn.Conv2d(c, e, 3, 2, 1), act(), *depthwise, nn.Conv2d(e, o, 1)],
    }[kind]
    module = nn.Sequential(*layers).double().eval()
    randomise(module)
    if o == c and stride == 1 and kind == "inverted":
        body, module = module, InvertedResidual()
        module.conv, module.use_res_connect = body, True
    return module.eval()


# (kind, input channels, block's options)
ROWS = [
    ("dense", 3, dict(c=3, e=3, o=21, stride=2)),
    ("depthwise", 13, dict(c=13, e=13, o=13, stride=2)),
    ("pointwise", 17, dict(c=17, e=17, o=37)),
    ("depthwise-pointwise", 37, dict(c=37, e=37, o=70, kernel=5)),
    ("depthwise-pointwise", 40, dict(c=40, e=40, o=16, stride=2, excite=True)),
    ("inverted", 13, dict(c=13, e=75, o=13, kernel=5)),
    ("inverted", 16, dict(c=16, e=96, o=16, excite=True)),
    ("inverted", 24, dict(c=24, e=130, o=40, stride=2)),
    ("inverted", 1, dict(c=1, e=1, o=1)),
    ("dense-depthwise-pointwise", 4, dict(c=4, e=33, o=19)),
]


@dtypes
@pytest.mark.parametrize("size", [(2, 14, 14), (1, 9, 7), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows(case, size, dtype):
    """Every row, all activations, sizes with tails, inputs in NCHW, sliced and in channels_last, by the pass rule."""
    kind, channels, options = case
    n, h, w = size
    verdict = Judge(dtype)
    for draw in range(8):
        exact = block(kind, act=ACTIVATIONS[draw % 4], **options).to(dtype).double()  # its weights are of the dtype
        low = copy.deepcopy(exact).to(dtype)
        fused = mk.fold(low, fused=True)
        assert known.is_fused(fused)
        wide = torch.randn(n, channels, h, w + 2).to(dtype)
        x = wide[..., 1:-1] if draw % 2 else wide[..., 1:-1].contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), mk.count_stages() as counts:
            ours = fused(x)
        assert counts and not native_calls(counts)
        with torch.no_grad():
            ref = exact(x.double())
            verdict.add("out", ours, low(x), ref)
        assert ours.shape == ref.shape and ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)
    verdict.verdict()


def test_what_is_no_row():
    """Other orders and geometries stay plain, also within a Sequential, and give the same."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(),  # a dense 5x5
        nn.Conv2d(8, 8, 3, 1, 2, dilation=2, groups=8), nn.GELU(),
        nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 2, 1, groups=12), nn.ReLU(), nn.Conv2d(12, 6, 1),
        nn.Conv2d(6, 6, 1, bias=False), nn.Sigmoid(),
    )  # fmt: skip
    randomise(model)
    fused = mk.fold(model, fused=True)
    found = rows(fused)
    assert found == [["pointwise", "depthwise", "pointwise"]] and len(fused) == len(model)
    assert [type(m) for m in fused] == [type(m) for m in model]
    x = torch.randn(2, 3, 17, 17)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), mk.fold(model)(x))
    assert not rows(mk.fold(nn.Sequential(), fused=True)) and not rows(mk.fold(nn.Sequential(nn.ReLU()), fused=True))


def inverted(stride=1):
    return mk.fold(nn.Sequential(mk.nn.FusedInvertedResidual(8, 8, stride, 6)), fused=True)


def plainly(model, x):
    """What the plain copy gives."""
    model = copy.deepcopy(model)
    swap.unswap_all(model)
    return model(x)


@pytest.mark.parametrize("reason", ["empty", "float64", "gradient", "scope", "compile", "3d"])
def test_where_the_plain_layers_run(reason):
    fused = inverted()
    x = torch.randn(2, 8, 9, 9)
    call = fused
    if reason == "empty":
        x = x[:0]
    elif reason == "float64":
        x, fused = x.double(), fused.double()
    elif reason == "gradient":
        x.requires_grad_()
    elif reason == "3d":
        x = x[0]
    elif reason == "compile":
        torch._dynamo.reset()
        call = torch.compile(fused, fullgraph=True, backend="aot_eager")
    scope = mk.backend("native") if reason == "scope" else mk.backend()
    with scope, mk.count_stages() as counts:
        got = call(x)
    assert not any(label.startswith("mnet_cpu") for label in counts)
    torch.testing.assert_close(got, plainly(fused, x))
    if reason == "gradient":
        assert torch.autograd.grad(got.sum(), x)[0].abs().max() > 0


def test_autocast_and_its_own_snapshot():
    fused = inverted(stride=2)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad(), mk.count_stages() as counts:
        exact = fused(x)
        with torch.autocast("cpu", torch.bfloat16):
            low, plain = fused(x), plainly(fused, x)
    assert counts["mnet_cpu::folded_pointwise"] == 2
    assert low.dtype == torch.bfloat16 and exact.dtype == torch.float32
    error, theirs = ((t.float() - exact).norm() / exact.norm() for t in (low, plain))
    assert 0 < error < 2 * theirs


@models
def test_networks_under_autocast(name):
    """A squeeze-excite's gate stays float32; the pass rule as without autocast."""
    verdict = Judge(torch.bfloat16)
    for _ in range(4):
        model, x = made(name), torch.randn(2, 3, 64, 47)
        exact, plain, fused = mk.fold(model), mk.fold(model).float(), mk.fold(model, fused=True).float()
        with torch.no_grad():
            want = exact(x.double())
            with torch.autocast("cpu", torch.bfloat16), mk.count_stages() as counts:
                ours = fused(x)
                theirs = plain(x)
        assert counts and not native_calls(counts)
        verdict.add("out", ours, theirs, want)
    verdict.verdict()


def test_snapshots():
    """Taken once; anew after .to(), load_state_dict, a copy and a pickle."""
    fused, other = inverted(), inverted()
    randomise(other)
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        before, want = fused(x), other(x)
        with mk.count_stages() as counts:
            fused(x)
        assert counts["mnet_cpu::folded_pack"] == 0
        assert not torch.allclose(before, want)
        fused.load_state_dict(other.state_dict())
        assert torch.equal(fused(x), want)
        assert torch.equal(copy.deepcopy(fused)(x), want)
        restored = pickle.loads(pickle.dumps(fused))
        assert torch.equal(restored(x), want)
        low = fused.to(torch.bfloat16)(x.to(torch.bfloat16))
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), want, rtol=0.05, atol=0.1)


def test_exports_as_the_plain_copy():
    fused = inverted()
    x = torch.randn(2, 8, 9, 9)
    program = torch.export.export(fused, (x,))
    assert all("mnet" not in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), fused(x))
    traced = torch.jit.trace(fused, x)
    assert "mnet_cpu::" not in str(traced.inlined_graph)


def test_errors():
    ops, x, weight = torch.ops.mnet_cpu, torch.randn(1, 8, 4, 4), torch.randn(6, 8, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    packed, table = ops.folded_pack(weight, False), torch.zeros(5, 6)
    with pytest.raises(RuntimeError, match=r"folded_pack: weight has shape \[6, 8\], expected \[E, C, 1, 1\]"):
        ops.folded_pack(weight[..., 0, 0], False)
    with pytest.raises(RuntimeError, match=r"folded_pointwise: packed has .* expected .* folded_pack"):
        ops.folded_pointwise(x, weight, packed[1:], None, 0, None, table, 0, None)
    with pytest.raises(RuntimeError, match=r"out_act"):
        ops.folded_pointwise(x, weight, packed, None, 0, None, table, 9, None)
    with pytest.raises(RuntimeError, match=r"residual"):
        ops.folded_pointwise(x, weight, packed, None, 0, None, table, 0, x)
    with pytest.raises(RuntimeError, match=r"out_bn"):
        ops.folded_pointwise(x, weight, packed, None, 0, None, table[:, 1:], 0, None)
    with pytest.raises(RuntimeError, match=r"folded_expand_depthwise: packed"):
        ops.folded_expand_depthwise(x, torch.zeros(8), weight, packed[1:], table, 2, torch.randn(6, 1, 3, 3), 1)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"weight has shape \[48, 8, 1, 1\], expected \[E, 7, 1, 1\]"),
    ):
        inverted()(torch.randn(1, 7, 5, 5))


def test_values_that_are_no_numbers():
    """NaN and infinity come out as of the plain layers."""
    fused = inverted()
    x = torch.randn(1, 8, 6, 6)
    x[0, 0, 0, 0], x[0, 1, 5, 5] = float("nan"), float("inf")
    with torch.no_grad():
        got, want = fused(x), plainly(fused, x)
    assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any()
