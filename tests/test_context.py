"""Transforms, tracers and subclasses over the public ops: they see torch's own ops, whatever backend is asked for."""

import warnings

import pytest
import torch
from blocks import Case, Inputs, assert_same, fused_modes
from torch.autograd import forward_ad

import mnet_kernels as mk
from mnet_kernels import context, log, stages

SMALL = {"n": 2, "c": 3, "e": 4, "o": 2, "h": 4, "w": 3}
CASES = [
    Case("depthwise_conv_bn_act", activation="silu", **SMALL),
    Case("pointwise_conv_bn_act", activation="hardswish", **SMALL),
    Case("pointwise_conv_bn_act_pool", activation="silu", **SMALL),
    Case("stem_conv_bn_act", stride=2, activation="silu", **SMALL),
    Case("separable_conv", 5, 2, "hardswish", **SMALL),
    Case(activation="silu", residual=True, excite=True, **SMALL),
]


class Subclass(torch.Tensor):
    """A tensor type of the user's."""


def evaluated(case):
    inputs = Inputs(case)
    for bn in inputs.bns:
        bn.eval()
    return inputs


def of_x(inputs):
    rest = list(inputs.leaves.values())[1:]
    return lambda x: inputs.call([x, *rest])


def gradient(inputs):
    return torch.func.grad(lambda x: of_x(inputs)(x).square().sum())(inputs.x.detach())


def gradient_of_parameters(inputs):
    leaves = [t.detach() for t in inputs.leaves.values()]
    return torch.func.grad(lambda leaves: inputs.call(leaves).square().sum())(leaves)[1]


def per_sample(inputs):
    leaves = [t.detach() for t in inputs.leaves.values()]

    def loss(weight, x):
        return inputs.call([x[None], weight, *leaves[2:]]).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(leaves[1], leaves[0])


def batched(inputs):
    return torch.func.vmap(of_x(inputs))(torch.stack([inputs.x, inputs.x.flip(3)]).detach())


def forward_mode(inputs):
    return torch.func.jvp(of_x(inputs), (inputs.x.detach(),), (torch.ones_like(inputs.x),))[1]


def reverse_jacobian(inputs):
    return torch.func.jacrev(of_x(inputs))(inputs.x.detach())


def forward_jacobian(inputs):
    return torch.func.jacfwd(of_x(inputs))(inputs.x.detach())


def dual(inputs):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(inputs.x.detach(), torch.ones_like(inputs.x))
        return forward_ad.unpack_dual(of_x(inputs)(x)).tangent


def vectorized_jacobian(inputs):
    options = {"vectorize": True, "strategy": "forward-mode"}
    return torch.autograd.functional.jacobian(of_x(inputs), inputs.x.detach(), **options)


USES = [
    gradient, gradient_of_parameters, per_sample, batched, forward_mode, reverse_jacobian, forward_jacobian, dual,
    vectorized_jacobian,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("use", USES)
def test_transforms_equal_native(use, case):
    inputs = evaluated(case)
    with mk.backend("native"):
        want = use(inputs)
    for backend, mode in fused_modes(case):
        with mk.backend(backend, mode), stages.count_stages() as counts:
            got = use(inputs)
        assert_same({"out": got.detach()}, {"out": want.detach()})
        assert set(counts) == {f"native::{case.op}"}


def test_a_transform_is_said_once(caplog):
    log.forget()
    inputs = evaluated(CASES[1])
    with mk.backend("reference"):
        gradient(inputs)
        gradient(inputs)
    said = [record.message for record in caplog.records if "torch.func" in record.message]
    assert said == [
        "running native torch ops on cpu: a torch.func transform is active, and the fused ops have no rules for those"
    ]


def test_traced():
    inputs = evaluated(CASES[-1]._replace(excite=False))
    with warnings.catch_warnings(), mk.backend("reference"):
        warnings.simplefilter("ignore")
        for t in inputs.leaves.values():
            t.requires_grad_(False)  # a trace takes no leaves as constants
        traced = torch.jit.trace(of_x(inputs), inputs.x)
        x = torch.randn_like(inputs.x)
        assert torch.allclose(traced(x), of_x(inputs)(x))
    assert "mnet_ref::" not in str(traced.graph) and "aten::_convolution" in str(traced.graph)


@pytest.mark.parametrize("which", ["x", "weight0", "gamma1", "excite2"])
def test_a_subclass_is_native(which):
    inputs = evaluated(CASES[-1])
    leaves = [t.detach().as_subclass(Subclass) if n == which else t for n, t in inputs.leaves.items()]
    with mk.backend("reference"), stages.count_stages() as counts:
        out = inputs.call(leaves)
    assert isinstance(out, Subclass) and set(counts) == {"native::inverted_residual"}


def test_plain_tensors_are_no_reason():
    x = torch.zeros(2)
    assert context.why_native(x) is None and context.why_native(torch.nn.Parameter(x)) is None
    with torch.device("meta"):
        assert context.why_native(torch.zeros(2)) is None
    with torch._subclasses.FakeTensorMode() as mode:
        assert context.why_native(mode.from_tensor(x)) is None
    assert context.why_native_type(None) is None


def test_legacy_vmap_is_a_reason():
    seen = []

    def look(x):
        seen.append(context.why_native(x))
        return x

    torch._vmap_internals._vmap(look)(torch.zeros(2, 3))
    assert len(seen) == 1 and "vmap" in seen[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_stay_fused(dynamic):
    """The question is traced away: one graph, which holds the stages."""
    inputs, seen = Inputs(CASES[1]), []

    def remember(graph, _):
        seen.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    with mk.backend("reference"):
        torch.compile(lambda x: of_x(inputs)(x), fullgraph=True, dynamic=dynamic, backend=remember)(inputs.x.detach())
    assert len(seen) == 1 and "mnet_ref" in seen[0]


def test_compiled_transforms_are_native():
    inputs = evaluated(CASES[1])
    torch._dynamo.reset()
    with mk.backend("reference"):
        got = torch.compile(torch.func.vmap(of_x(inputs)), backend="eager")(torch.stack([inputs.x, inputs.x]).detach())
    assert_same({"out": got[1].detach()}, {"out": of_x(inputs)(inputs.x).detach()})
