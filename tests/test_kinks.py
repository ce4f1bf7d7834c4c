"""Exactly at kinks, with gamma 0 or negative, and for constant channels: the same gradients as torch's."""

import pytest
import torch
from blocks import POINTWISE, Case, Inputs, assert_same, fused_modes, step

BETAS = {"relu": (0.0, 1.0, -1.0), "relu6": (0.0, 6.0, 3.0, -1.0), "hardswish": (-3.0, 3.0, 0.0, 5.0)}


@pytest.mark.parametrize("op", ["depthwise_conv_bn_act", *POINTWISE, "separable_conv", "inverted_residual"])
@pytest.mark.parametrize("activation", BETAS)
def test_gradients_exactly_at_kinks(op, activation):
    """With gamma 0 the activation's argument is beta exactly, at every position."""
    inputs = Inputs(Case(op, activation=activation))
    with torch.no_grad():
        for bn in inputs.bns:
            bn.weight[::2] = 0
            values = torch.tensor(BETAS[activation], dtype=torch.float64)
            bn.bias.copy_(values.repeat(bn.num_features)[: bn.num_features])
    want = step(inputs, "native")
    for backend, mode in fused_modes(inputs.case):
        assert_same(step(inputs, backend, mode), want)


@pytest.mark.parametrize("gamma", ["zero", "negative", "mixed"])
@pytest.mark.parametrize("excite", [False, True])
def test_gamma(gamma, excite):
    inputs = Inputs(Case(activation="relu6", excite=excite, residual=True))
    with torch.no_grad():
        for bn in inputs.bns:
            if gamma == "zero":
                bn.weight.zero_()
            elif gamma == "negative":
                bn.weight.neg_()
            else:
                bn.weight[::3] = 0
                bn.weight[1::3].neg_()
    want = step(inputs, "native")
    for backend, mode in fused_modes(inputs.case):
        assert_same(step(inputs, backend, mode), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1.0, 55.5])
def test_constant_channels_have_variance_zero(dtype, value):
    """No NaN, no negative variance, and a mean that is exact."""
    inputs = Inputs(Case("depthwise_conv_bn_act"), dtype)
    with torch.no_grad():
        inputs.x.fill_(value)
        inputs.weights[0].zero_()
        inputs.weights[0][:, :, 1, 1] = 1  # the identity, so that the convolution's output is constant too
        inputs.bns[0].momentum = 1.0
    got = step(inputs, "reference", "chain")
    assert (got["running_var0"] == 0).all()
    assert (got["running_mean0"].double() == inputs.x[0, 0, 0, 0].double()).all()
    assert all(torch.isfinite(v).all() for v in got.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constant_input_in_algebraic_mode(dtype):
    """The covariance of a constant input is exactly zero whatever its mean, so that the expand layer's is too."""
    inputs = Inputs(Case(c=6), dtype)
    with torch.no_grad():
        inputs.x.copy_(torch.linspace(50, 60, 6).view(1, -1, 1, 1).expand_as(inputs.x))
        inputs.bns[0].momentum = 1.0
    got = step(inputs, "reference", "algebraic")
    assert (got["running_var0"] == 0).all()
    assert all(torch.isfinite(v).all() for v in got.values())
