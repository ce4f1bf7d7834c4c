"""gradcheck of every public op over the reference stages, in every mode."""

import pytest
import torch
from blocks import CASES, Case, Inputs, fused_modes

import mnet_kernels as mk

KINKS = {"identity": (), "relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0), "silu": ()}
SMALL = {"n": 2, "c": 2, "e": 3, "o": 2, "h": 4, "w": 3}


def pre_activations(inputs):
    """Every argument of an activation (and of the gate's) in the block, by torch's own ops."""
    case, z, found = inputs.case, inputs.x.detach(), []
    act = {"identity": lambda t: t, "relu": torch.relu, "relu6": torch.nn.functional.relu6}
    act |= {"hardswish": torch.nn.functional.hardswish, "silu": torch.nn.functional.silu}
    for i, (weight, bn) in enumerate(zip(inputs.weights, inputs.bns, strict=True)):
        last = i == len(inputs.weights) - 1
        if case.excite and last:
            w1, b1, w2, b2 = (t.detach() for t in inputs.excite)
            hidden = torch.nn.functional.conv2d(z.mean((2, 3), keepdim=True), w1, b1)
            argument = torch.nn.functional.conv2d(hidden.relu(), w2, b2)
            found += [(hidden, "relu"), (argument, "hardswish")]
            z = z * torch.nn.functional.hardsigmoid(argument)
        k = weight.shape[-1]
        depthwise = weight.shape[1] == 1 and (k > 1) and case.op != "stem_conv_bn_act"
        z = torch.nn.functional.conv2d(
            z, weight.detach(), None, case.stride if k > 1 else 1, k // 2, 1, weight.shape[0] if depthwise else 1
        )
        z = torch.nn.functional.batch_norm(z, None, None, bn.weight.detach(), bn.bias.detach(), True, 0.0, bn.eps)
        activation = "identity" if last and case.op == "inverted_residual" else case.activation
        found.append((z, activation))
        z = act[activation](z)
    return found


def away_from_kinks(case):
    """Inputs whose every pre-activation is at least 1e-3 from a kink (drawn anew until they are)."""
    for _ in range(1000):
        inputs = Inputs(case)
        gaps = [(u - kink).abs().min() for u, activation in pre_activations(inputs) for kink in KINKS[activation]]
        if all(gap > 1e-3 for gap in gaps):
            return inputs
    raise AssertionError("no inputs away from the kinks found")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case):
    inputs = away_from_kinks(case._replace(**SMALL))
    for backend, mode in fused_modes(case):
        with mk.backend(backend, mode):
            leaves = tuple(inputs.leaves.values())
            assert torch.autograd.gradcheck(lambda *values: inputs.call(values), leaves, fast_mode=True)


@pytest.mark.parametrize("excite", [False, True])
@pytest.mark.parametrize("mode", ["chain", "algebraic"])
def test_gradcheck_slow_mode(mode, excite):
    """The full Jacobian once per mode (fast mode checks a random projection of it)."""
    inputs = away_from_kinks(Case(excite=excite, residual=True, **SMALL))
    with mk.backend("reference", mode):
        assert torch.autograd.gradcheck(lambda *values: inputs.call(values), tuple(inputs.leaves.values()))


@pytest.mark.parametrize("mode", ["chain", "algebraic"])
def test_gradcheck_eval(mode):
    inputs = away_from_kinks(Case(**SMALL))
    for bn in inputs.bns:
        bn.eval()
    # eval statistics move the pre-activations: check the kinks of these by the step's size instead
    with mk.backend("reference", mode):
        inputs.case = inputs.case._replace(activation="identity")
        assert torch.autograd.gradcheck(lambda *values: inputs.call(values), tuple(inputs.leaves.values()))


def test_gradcheck_squeeze_excite():
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    w1 = torch.randn(3, 4, 1, 1, dtype=torch.float64) / 4
    w2 = torch.randn(4, 3, 1, 1, dtype=torch.float64) / 3
    leaves = [t.requires_grad_() for t in (w1, torch.rand(3).double() + 1, w2, torch.randn(4).double() / 4)]
    assert torch.autograd.gradcheck(mk.functional.squeeze_excite, (x, *leaves))
