"""Low precision by the pass rule: our error against float64 is at most twice torch's own in that dtype + 1 ulp."""

import pytest
import torch
from blocks import Case, Inputs, fused_modes, step, upstream_of
from precision import assert_close, cosine

SIZES = {"n": 4, "c": 12, "e": 40, "o": 16, "h": 14, "w": 13}
CASES = [
    Case("depthwise_conv_bn_act", **SIZES),
    Case("depthwise_conv_bn_act", kernel=5, stride=2, activation="hardswish", **SIZES),
    Case("pointwise_conv_bn_act", **SIZES),
    Case("separable_conv", stride=2, **SIZES),
    Case(residual=True, **SIZES),
    Case(stride=2, kernel=5, activation="hardswish", **SIZES),
    Case(excite=True, activation="hardswish", kernel=5, **SIZES),
]


def rounded(case, dtype):
    """The same inputs in float64 and float32, both exactly representable in ``dtype``."""
    exact = Inputs(case)
    with torch.no_grad():
        for leaf in exact.leaves.values():
            leaf.copy_(leaf.to(dtype))
        for bn in exact.bns:
            for buffer in bn.buffers():
                buffer.copy_(buffer.float())
    low = Inputs(case, torch.float32)
    with torch.no_grad():
        for a, b in zip(low.leaves.values(), exact.leaves.values(), strict=True):
            a.copy_(b)
        for a, b in zip(low.bns, exact.bns, strict=True):
            a.load_state_dict(b.state_dict())
    return exact, low


def offset(case, dtype):
    """x with mean/std about 30, where the ordinary path loses most."""
    exact, low = rounded(case, dtype)
    with torch.no_grad():
        shift = 30 * torch.sign(torch.randn(case.c, 1, 1, dtype=torch.float64))
        exact.x.add_(shift).copy_(exact.x.to(dtype))
        low.x.copy_(exact.x)
    return exact, low


def judge(exact, low, dtype, autocast):
    """Compare every result of every mode by the pass rule, and the gradients' directions."""
    upstream = upstream_of(exact.call().detach())
    want = step(exact, "native", upstream=upstream)
    torchs = step(low, "native", autocast=autocast, upstream=upstream)
    for backend, mode in fused_modes(exact.case):
        ours = step(low, backend, mode, autocast=autocast, upstream=upstream)
        for name, ref in want.items():
            if name.startswith("num_batches"):
                assert torch.equal(ours[name], ref)
                continue
            assert_close(f"{mode} {name}", ours[name], torchs[name], ref, dtype)
            if name.startswith("d_"):
                assert ours[name].abs().max() > 0
                floor = 1 - 2 * (1 - cosine(torchs[name], ref)) - torch.finfo(dtype).eps
                assert cosine(ours[name], ref) >= floor, f"{mode} {name}"
        assert ours["out"].dtype == torchs["out"].dtype == dtype


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case):
    judge(*rounded(case, torch.float32), torch.float32, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast(case, dtype):
    judge(*rounded(case, dtype), dtype, dtype)


@pytest.mark.parametrize("case", CASES[3:], ids=str)
def test_large_means(case):
    judge(*offset(case, torch.bfloat16), torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_eval_under_autocast(case):
    exact, low = rounded(case, torch.bfloat16)
    for bn in (*exact.bns, *low.bns):
        bn.eval()
    judge(exact, low, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tensors_without_autocast(dtype):
    """x and weights already in the storage dtype, batch norms in float32 as users keep them."""
    exact, low = rounded(CASES[4], dtype)
    upstream = upstream_of(exact.call().detach())
    want = step(exact, "native", upstream=upstream)
    low.x = low.x.detach().to(dtype).requires_grad_()
    low.weights = [w.detach().to(dtype).requires_grad_() for w in low.weights]
    torchs = step(low, "native", upstream=upstream)
    for backend, mode in fused_modes(low.case):
        ours = step(low, backend, mode, upstream=upstream)
        for name, ref in want.items():
            if not name.startswith("num_batches"):
                assert ours[name].dtype == torchs[name].dtype, name
                assert_close(f"{mode} {name}", ours[name], torchs[name], ref, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["chain", "algebraic"])
def test_dtypes_under_autocast(mode, dtype):
    """Parameters' gradients and statistics stay float32; the activations are in the autocast dtype."""
    inputs = Inputs(Case(excite=True), torch.float32)
    got = step(inputs, "reference", mode, autocast=dtype)
    assert got["out"].dtype == dtype
    assert {v.dtype for k, v in got.items() if k.startswith(("d_", "running"))} == {torch.float32}
