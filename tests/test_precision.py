"""Low precision by the pass rule: our error against float64 is at most twice torch's own in that dtype + 1 ulp."""

import pytest
import torch
from blocks import Case, Inputs, fused_modes, step, upstream_of
from precision import Judge

SIZES = {"n": 4, "c": 12, "e": 40, "o": 16, "h": 14, "w": 13}
CASES = [
    Case("depthwise_conv_bn_act", **SIZES),
    Case("depthwise_conv_bn_act", kernel=5, stride=2, activation="hardswish", **SIZES),
    Case("pointwise_conv_bn_act", **SIZES),
    Case("separable_conv", stride=2, **SIZES),
    Case(residual=True, **SIZES),
    Case(stride=2, kernel=5, activation="hardswish", **SIZES),
    Case(excite=True, activation="hardswish", kernel=5, **SIZES),
    Case("pointwise_conv_bn_act_pool", activation="hardswish", **SIZES),
]


def rounded(case, dtype, device="cpu"):
    """The same inputs in float64 and float32, both exactly representable in ``dtype``."""
    exact = Inputs(case, device=device)
    with torch.no_grad():
        for leaf in exact.leaves.values():
            leaf.copy_(leaf.to(dtype))
        for bn in exact.bns:
            for buffer in bn.buffers():
                buffer.copy_(buffer.float())
    low = Inputs(case, torch.float32, device)
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


DRAWS = 16


def judge(make, dtype, autocast, prepare=lambda exact, low: None):
    """Compare every result of every mode by the pass rule."""
    verdict = Judge(dtype)
    for _ in range(DRAWS):
        exact, low = make()
        prepare(exact, low)
        upstream = upstream_of(step(exact, "native")["out"])
        want = step(exact, "native", upstream=upstream)
        torchs = step(low, "native", autocast=autocast, upstream=upstream)
        for backend, mode in fused_modes(exact.case, compiled=True, device=exact.x.device.type):
            ours = step(low, backend, mode, autocast=autocast, upstream=upstream)
            assert ours["out"].dtype == dtype
            for name, ref in want.items():
                if name.startswith("num_batches"):
                    assert torch.equal(ours[name], ref)
                    continue
                verdict.add(f"{backend} {mode} {name}", ours[name], torchs[name], ref)
                if name.startswith("d_"):
                    assert ours[name].abs().max() > 0, name
                    assert ours[name].dtype == torchs[name].dtype, name
    verdict.verdict()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case):
    judge(lambda: rounded(case, torch.float32), torch.float32, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast(case, dtype):
    judge(lambda: rounded(case, dtype), dtype, dtype)


@pytest.mark.parametrize("case", CASES[3:], ids=str)
def test_large_means(case):
    judge(lambda: offset(case, torch.bfloat16), torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("case", [*CASES[:5], CASES[-1]], ids=str)
def test_eval_under_autocast(case):
    def evaluate(*both):
        for inputs in both:
            for bn in inputs.bns:
                bn.eval()

    judge(lambda: rounded(case, torch.bfloat16), torch.bfloat16, torch.bfloat16, evaluate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES[4:], ids=str)
def test_low_precision_tensors_without_autocast(case, dtype):
    """x and weights already in the storage dtype, batch norms in float32 as users keep them."""

    def convert(exact, low):
        low.x = low.x.detach().to(dtype).requires_grad_()
        low.weights = [w.detach().to(dtype).requires_grad_() for w in low.weights]
        low.excite = [t.detach().to(dtype).requires_grad_() for t in low.excite]

    judge(lambda: rounded(case, dtype), dtype, None, convert)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["chain", "algebraic"])
def test_dtypes_under_autocast(mode, dtype):
    """Parameters' gradients and statistics stay float32; the activations are in the autocast dtype."""
    inputs = Inputs(Case(excite=True), torch.float32)
    got = step(inputs, "reference", mode, autocast=dtype)
    assert got["out"].dtype == dtype
    assert {v.dtype for k, v in got.items() if k.startswith(("d_", "running"))} == {torch.float32}
