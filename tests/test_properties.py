"""Any block on any input: hypothesis draws shapes, layouts, dtypes, what needs a gradient, which batch norm is frozen.

MNET_EXAMPLES=20000 python -m pytest tests/test_properties.py --hypothesis-seed=0
"""

import os

import pytest
import torch
from blocks import ACTIVATIONS, POINTWISE, Case, Inputs, step
from precision import ulp

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, event, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mnet_kernels import backends  # noqa: E402

EXAMPLES = int(os.environ.get("MNET_EXAMPLES", 150))
SMOOTH = ("identity", "silu")  # no kink at which rounding decides about a gradient

small = st.integers(1, 20)


@st.composite
def cases(draw):
    op = draw(st.sampled_from(["depthwise_conv_bn_act", *POINTWISE, "separable_conv", "inverted_residual"]))
    block = op == "inverted_residual"
    stride = draw(st.sampled_from([1, 2]))
    return Case(
        op=op,
        kernel=draw(st.sampled_from([3, 5])),
        stride=stride,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        residual=block and stride == 1 and draw(st.booleans()),
        excite=block and draw(st.booleans()),
        expand=not block or draw(st.booleans()),
        n=draw(st.integers(0, 3)),
        c=draw(small), e=draw(small), o=draw(small), h=draw(small), w=draw(small),
    )  # fmt: skip


def rows(x):
    """As every second row of a taller tensor: neither contiguous nor dense."""
    padded = torch.empty(*x.shape[:2], 2 * x.shape[2], x.shape[3], dtype=x.dtype)
    return padded[:, :, ::2].copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows": rows,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels of more": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "one image": lambda x: x[:1].expand_as(x) if len(x) else x,
}


@st.composite
def problems(draw):
    """Leaves of a block in float64, laid out and frozen in some way."""
    case = draw(cases())
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    inputs = Inputs(case)
    inputs.x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](inputs.x.detach()).requires_grad_()
    for bn in inputs.bns:
        bn.train(draw(st.integers(0, 3)) > 0)
        bn.eps = draw(st.sampled_from([1e-3, 1e-1]))
    for leaf in inputs.leaves.values():
        leaf.requires_grad_(draw(st.integers(0, 4)) > 0)
    return inputs


def positions(inputs):
    """The fewest values a batch norm in training mode sees, None if none is in training mode."""
    case = inputs.case
    strided = -(-case.h // case.stride) * -(-case.w // case.stride)
    areas = {"inverted_residual": [case.h * case.w, strided, strided]} | dict.fromkeys(POINTWISE, [case.h * case.w])
    areas = areas.get(case.op, [strided] * 2)[-len(inputs.bns) :]
    return min((case.n * a for a, bn in zip(areas, inputs.bns, strict=True) if bn.training), default=None)


def outcome(inputs, backend, mode=None):
    try:
        return step(inputs, backend, mode), None
    except ValueError as exc:
        return None, str(exc)


def low(inputs):
    """The same leaves in float32."""
    found = Inputs(inputs.case, torch.float32)
    with torch.no_grad():
        found.x = inputs.x.detach().float()
        found.weights = [w.detach().float() for w in inputs.weights]
        found.excite = [t.detach().float() for t in inputs.excite]
        for mine, bn in zip(found.bns, inputs.bns, strict=True):
            mine.load_state_dict(bn.state_dict())
            mine.train(bn.training)
            mine.eps = bn.eps
        for mine, leaf in zip(found.leaves.values(), inputs.leaves.values(), strict=True):
            mine.requires_grad_(leaf.requires_grad)
    return found


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_any_block_is_torchs(inputs):
    """The composition of stages, in both modes, is torch's own ops and autograd, in float64."""
    fewest = positions(inputs)
    want, refused = outcome(inputs, "native")
    event("one value per channel" if fewest == 1 else "empty" if fewest == 0 else "values")
    assert (refused is not None) == (fewest == 1), refused
    modes = ["chain", "algebraic"] if inputs.case.op == "inverted_residual" and inputs.case.expand else ["chain"]
    for mode in modes:
        got, why = outcome(inputs, "reference", mode)
        assert why == refused
        if want is None:
            continue
        assert got.keys() == want.keys()
        for name in want:
            scale = max(1.0, want[name].abs().max().item()) if want[name].numel() else 1.0
            torch.testing.assert_close(
                got[name], want[name], rtol=0, atol=1e-8 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_the_kernels_err_no_more_than_torchs(inputs):
    """The device's own kernels in float32, wherever no mask can flip, against float64."""
    if not backends.whole("cpu", "chain"):
        pytest.skip("the extension has no CPU kernels here")
    fewest = positions(inputs)
    if inputs.case.activation not in SMOOTH or inputs.case.excite or fewest is not None and fewest < 2:
        event("not judged")
        return
    exact, single = step(inputs, "native"), low(inputs)
    torchs = step(single, "native")
    modes = ["chain"]
    if inputs.case.op == "inverted_residual" and inputs.case.expand and backends.whole("cpu", "algebraic"):
        modes.append("algebraic")
    for mode in modes:
        ours = step(single, "cpu", mode)
        for name, want in exact.items():
            if not want.numel() or name.startswith("num_batches"):
                continue
            error, other = (((v[name].double() - want).abs().max().item()) for v in (ours, torchs))
            # One draw of a few values: the largest rounding error of either path is a matter of luck up to a few units
            # at the largest value met on the way, which cancellation may leave far above the result.
            unit = ulp(torch.float32, max(1.0, want.abs().max().item()))
            assert error <= 4 * other + 64 * unit, f"{mode} {name}: {error:.2e}, torch's {other:.2e}, unit {unit:.2e}"
