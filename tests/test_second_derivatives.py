"""Derivatives of derivatives of the fused ops, however they are asked for, equal to torch's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from blocks import Case, Inputs, assert_same, fused_modes, upstream_of
from torch import nn

import mnet_kernels as mk
from mnet_kernels import BatchNormParams, SqueezeExciteParams, autograd, functional, stages
from mnet_kernels.backends import native
from mnet_kernels.functional import ConvBNAct, InvertedResidualParams

SMALL = {"n": 2, "c": 3, "e": 4, "o": 2, "h": 4, "w": 3}
OPS = [
    Case("depthwise_conv_bn_act", activation="silu", **SMALL),
    Case("pointwise_conv_bn_act", activation="hardswish", **SMALL),
    Case("pointwise_conv_bn_act_pool", activation="silu", **SMALL),
    Case("stem_conv_bn_act", stride=2, activation="silu", **SMALL),
    Case("separable_conv", 5, 2, "hardswish", **SMALL),
    Case(kernel=5, stride=2, activation="relu6", **SMALL),
    Case(activation="silu", residual=True, excite=True, **SMALL),
    Case(activation="hardswish", expand=False, excite=True, **SMALL),
]
PAIRS = [(case, mode) for case in OPS for _, mode in fused_modes(case)]


def batch_norm(x, bn):
    """What nn.BatchNorm2d computes, in ops that torch can differentiate any number of times."""
    if bn.batch_stats:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        mean, var = bn.running_mean, bn.running_var
    mean, rstd = mean.view(1, -1, 1, 1), (var + bn.eps).rsqrt().view(1, -1, 1, 1)
    return (x - mean) * rstd * bn.weight.view(1, -1, 1, 1) + bn.bias.view(1, -1, 1, 1)


@pytest.fixture
def plain(monkeypatch):
    """Backend native of ops that have all derivatives: torch's batch norm has two, its hardsigmoid one."""
    monkeypatch.setattr("mnet_kernels.backends.native.batch_norm", batch_norm)
    monkeypatch.setitem(native.GATES, "hardsigmoid", lambda u: F.relu6(u + 3) / 6)


def derivatives(inputs, backend, mode=None, orders=3):
    """Derivatives by every leaf that requires them: first, second, third, of sums of squares of those before."""
    leaves, found = {name: t for name, t in inputs.leaves.items() if t.requires_grad}, {}
    with mk.backend(backend, mode):
        value = (inputs.call() * upstream_of(inputs.call())).sum()
    for order in range(1, orders + 1):
        grads = torch.autograd.grad(value, leaves.values(), create_graph=True, materialize_grads=True)
        found |= {f"{name}, order {order}": g.detach() for name, g in zip(leaves, grads, strict=True)}
        # about one in size, so that the tolerance is relative at every order
        value = sum(g.square().sum() for g in grads)
        value = value / value.detach()
    return found


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("case", "mode"), PAIRS, ids=str)
def test_three_orders(case, mode, training, plain):
    inputs = Inputs(case)
    for bn in inputs.bns:
        bn.train(training)
    assert_same(derivatives(inputs, "reference", mode), derivatives(inputs, "native", None), 1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("case", "mode"), PAIRS, ids=str)
def test_gradgradcheck(case, mode, training):
    inputs = Inputs(case._replace(activation="silu", n=2, c=2, e=2, o=2, h=3, w=2))
    for bn in inputs.bns:
        bn.train(training)
    with mk.backend("reference", mode):
        leaves = tuple(inputs.leaves.values())
        assert torch.autograd.gradgradcheck(lambda *values: inputs.call(values), leaves, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("mode", ["chain", "algebraic"])
def test_a_graph_costs_no_step_of_the_running_statistics(mode):
    inputs = Inputs(Case(excite=True, activation="silu"))
    before = [bn.running_mean.clone() for bn in inputs.bns]
    with mk.backend("reference", mode):
        out = inputs.call()
        after = [bn.running_mean.clone() for bn in inputs.bns]
        (first,) = torch.autograd.grad(out.square().sum(), inputs.x, create_graph=True)
        first.square().sum().backward()
    for bn, old, new in zip(inputs.bns, before, after, strict=True):
        assert bn.num_batches_tracked == 1 and not torch.equal(new, old) and torch.equal(bn.running_mean, new)


@pytest.mark.parametrize("names", [("x", "weight1", "gamma2"), ("weight0", "gamma0", "beta0"), ("excite0", "excite3")])
@pytest.mark.parametrize("mode", ["chain", "algebraic"])
def test_frozen_leaves(mode, names, plain):
    inputs = Inputs(OPS[-2])
    for name in names:
        inputs.leaves[name].requires_grad_(False)
    assert_same(derivatives(inputs, "reference", mode), derivatives(inputs, "native"), 1e-9)


def test_a_leaf_that_another_was_made_of():
    """The derivative by x is x's own, not that through a weight that is a function of it."""
    inputs = Inputs(Case("pointwise_conv_bn_act", activation="silu", **SMALL))

    def second(backend):
        x = inputs.x.detach().requires_grad_()
        weight = x.mean((0, 2, 3)).repeat(2).view(2, 3, 1, 1) * inputs.weights[0].detach()
        with mk.backend(backend):
            out = functional.pointwise_conv_bn_act(x, weight, BatchNormParams.of(inputs.bns[0]), activation="silu")
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return {"first": first.detach(), "second": torch.autograd.grad(first.square().sum(), x)[0]}

    assert_same(second("reference"), second("native"))


def test_no_gamma_no_beta():
    inputs = Inputs(Case(activation="silu"))
    inputs.bns = [nn.BatchNorm2d(bn.num_features, affine=False).double() for bn in inputs.bns]
    for mode in ("chain", "algebraic"):
        assert_same(derivatives(inputs, "reference", mode, 2), derivatives(inputs, "native", None, 2), 1e-9)


class Sequence(nn.Module):
    """A stem, two blocks and a pooled head over the functional ops: raw maps between the autograd nodes."""

    def __init__(self, kind, activation="silu"):
        super().__init__()
        self.kind, self.activation = kind, activation
        shapes = [(4, 3, 3, 3), (4, 1, 3, 3), (5, 4, 1, 1), (7, 5, 1, 1), (7, 1, 5, 5), (5, 7, 1, 1), (6, 5, 1, 1)]
        if kind == "separable":
            shapes[3:6] = [(5, 1, 3, 3), (5, 5, 1, 1)]
        # scaled to about unit outputs, so that derivatives of every order are of sizes that compare
        self.weights = nn.ParameterList([torch.randn(s) / torch.Size(s)[1:].numel() ** 0.5 for s in shapes])
        self.norms = nn.ModuleList([nn.BatchNorm2d(s[0], eps=1e-2) for s in shapes])
        self.excite = nn.ParameterList([torch.randn(s) / 3 for s in ((3, 7, 1, 1), (3,), (7, 3, 1, 1), (7,))])

    def layer(self, i, kind, stride=1, activation=None):
        bn = BatchNormParams.of(self.norms[i])
        return ConvBNAct(kind, self.weights[i], bn, activation or self.activation, stride)

    def forward(self, x):
        stem = self.layer(0, "dense", 2)
        first = self.layer(1, "depthwise"), self.layer(2, "pointwise")
        if self.kind == "separable":
            second = self.layer(3, "depthwise", 2), self.layer(4, "pointwise")
            x = functional.separable_sequence(x, [first, second], stem=stem)
        else:
            se = SqueezeExciteParams(*self.excite, gate="sigmoid")
            first = first[0], first[1]._replace(activation="identity")
            expand, depthwise = self.layer(3, "pointwise"), self.layer(4, "depthwise")
            second = expand, depthwise, self.layer(5, "pointwise", activation="identity")
            blocks = [InvertedResidualParams(first), InvertedResidualParams(second, True, se)]
            x = functional.inverted_residual_sequence(x, blocks, stem=stem)
        i = len(self.weights) - 1
        return functional.pointwise_conv_bn_act_pool(
            x, self.weights[i], BatchNormParams.of(self.norms[i]), activation=self.activation
        )


def sequence(kind, training=True, dtype=torch.float64):
    model = Sequence(kind).to(dtype).train(training)
    x = torch.randn(3, 3, 8, 6, dtype=dtype)
    return model, x


def on(backend, mode, function, model, *args):
    """``function`` of a copy of the model on a backend; its result with the copy's buffers."""
    model = copy.deepcopy(model)
    with mk.backend(backend, mode):
        found = function(model, *args)
    return found | dict(model.named_buffers())


def named(model, grads):
    return dict(zip((name for name, _ in model.named_parameters()), grads, strict=True))


def penalty_by_grad(model, x):
    x = x.clone().requires_grad_()
    loss = model(x).square().mean()
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    total = loss + 10 * g.square().sum()
    return named(model, torch.autograd.grad(total, list(model.parameters()), materialize_grads=True))


def penalty_by_backward(model, x):
    x = x.clone().requires_grad_()
    loss = model(x).square().mean()
    loss.backward(create_graph=True)
    first = {f"first {name}": p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    x.grad.square().sum().backward()
    grads = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():  # or parameter, gradient and graph would keep each other alive
        p.grad = None
    return first | grads


def hessian_vector_product(model, x):
    v = torch.ones_like(x)
    value, product = torch.autograd.functional.hvp(lambda x: model(x).square().mean(), x, v)
    return {"value": value, "product": product}


def maml(model, x):
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x).square().mean(), parameters.values(), create_graph=True, allow_unused=True)
    moved = {n: p if g is None else p - 0.1 * g for (n, p), g in zip(parameters.items(), grads, strict=True)}
    outer = torch.func.functional_call(model, moved, (x.flip(0),)).square().mean()
    return named(model, torch.autograd.grad(outer, list(parameters.values()), materialize_grads=True))


USES = [penalty_by_grad, penalty_by_backward, hessian_vector_product, maml]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("kind", "mode"), [("separable", "chain"), ("inverted", "chain"), ("inverted", "algebraic")])
@pytest.mark.parametrize("use", USES)
def test_uses_over_raw_maps(use, kind, mode, training):
    model, x = sequence(kind, training)
    assert_same(on("reference", mode, use, model, x), on("native", None, use, model, x), 1e-9)


@pytest.mark.parametrize("kind", ["separable", "inverted"])
def test_compiled_kernels(kind):
    """On the backend that automatic choice takes: float32, as accurate as torch's own float32."""
    model, x = sequence(kind, dtype=torch.float32)
    got = on("auto", "chain", penalty_by_grad, model, x)
    want = on("native", None, penalty_by_grad, model.double(), x.double())
    native = on("native", None, penalty_by_grad, model.float(), x)
    for name in want:
        size = want[name].double().norm() + 1e-3
        error, own = ((t[name].double() - want[name]).norm() / size for t in (got, native))
        assert error <= 10 * own + 1e-5, (name, error, own)


def test_under_autocast(plain):
    """The recomputed node is in the autocast dtype, its gradients in the parameters' own, as accurate as torch's."""
    inputs = Inputs(Case(activation="silu", excite=True, n=4, h=12, w=12), torch.float32)
    leaves = inputs.leaves

    def second(backend, mode=None, autocast=True):
        with mk.backend(backend, mode), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = inputs.call()
        first = torch.autograd.grad(out.float().square().mean(), leaves.values(), create_graph=True)
        assert [g.dtype for g in first] == [torch.float32] * len(leaves)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves.values())

    exact, own = second("native", autocast=False), second("native")
    for backend, mode in fused_modes(inputs.case, compiled=True):
        for name, got, want, native_ in zip(leaves, second(backend, mode), exact, own, strict=True):
            assert got.dtype == torch.float32
            error, allowed = ((t - want).norm() / want.norm() for t in (got, native_))
            assert error <= 2 * allowed + 2**-8, (backend, mode, name, error, allowed)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(("kind", "mode"), [("separable", "chain"), ("inverted", "chain"), ("inverted", "algebraic")])
def test_batched_gradients(kind, mode, create_graph):
    model, x = sequence(kind)

    def batched(model, x):
        x = x.clone().requires_grad_()
        out = model(x)
        rows = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
        leaves = [x, *(p for i, p in enumerate(model.parameters()) if i < len(model.weights))]
        options = {"is_grads_batched": True, "create_graph": create_graph}
        return {str(i): g.detach() for i, g in enumerate(torch.autograd.grad(out, leaves, rows, **options))}

    assert_same(on("reference", mode, batched, model, x), on("native", None, batched, model, x))


def test_vmap_over_the_backward():
    model, x = sequence("separable")

    def rows(model, x):
        x = x.clone().requires_grad_()
        out = model(x)
        basis = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
        pull = torch.func.vmap(lambda row: torch.autograd.grad(out, x, row, retain_graph=True)[0])
        return {"rows": pull(basis)}

    assert_same(on("reference", "chain", rows, model, x), on("native", None, rows, model, x))


def test_checkpointed():
    """The inputs come through saved-tensor hooks, as recomputed, with their graph."""
    model, x = sequence("separable")

    def checkpointed(model, x):
        x = x.clone().requires_grad_()
        loss = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().mean()
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        return named(model, torch.autograd.grad(g.square().sum(), list(model.parameters()), materialize_grads=True))

    model.eval()  # a checkpoint's second forward moves running statistics again, on every backend
    assert_same(on("reference", "chain", checkpointed, model, x), on("native", None, checkpointed, model, x))


@pytest.mark.parametrize("name", ["x", "weight0", "gamma1", "beta2"])
def test_changed_in_place(name):
    """What was changed since the forward is refused, as by torch, not silently used."""
    inputs = Inputs(Case(activation="silu"))
    with mk.backend("reference", "chain"):
        x = inputs.x.clone(memory_format=torch.channels_last)  # as the block takes it, or a copy is saved
        leaves = [x if n == "x" else t for n, t in inputs.leaves.items()]
        out = inputs.call(leaves)
        with torch.no_grad():
            dict(zip(inputs.leaves, leaves, strict=True))[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), inputs.x, create_graph=True)


def test_running_statistics_may_move():
    """Evaluation in between two forwards: the first one's derivatives are at the statistics that it used."""
    inputs = Inputs(Case(activation="silu"))

    def second(backend, moved):
        for bn in inputs.bns:
            bn.eval()
        with mk.backend(backend, "chain"):
            out = inputs.call()
        before = [bn.running_mean.clone() for bn in inputs.bns]
        if moved:
            for bn in inputs.bns:
                bn.running_mean.mul_(2)
        (first,) = torch.autograd.grad(out.square().sum(), inputs.x, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), inputs.weights[0])
        for bn, old in zip(inputs.bns, before, strict=True):
            bn.running_mean.copy_(old)
        return {"second": found}

    assert_same(second("reference", True), second("native", False))


def test_several_processes_are_refused():
    rows = (autograd.Layer("pointwise", 1, 0, 1e-5, True, object()),)
    block = autograd.Block("reference", "chain", rows, False, None)
    with pytest.raises(RuntimeError, match="use nn.BatchNorm2d"):
        autograd.native_backward.gradients(block, (None,), None, (), [], (), [], ())


def test_a_plain_backward_stays_fused():
    """Nothing but a request for a graph, a batch or a transform takes the stages from a backward."""
    inputs = Inputs(Case())
    with mk.backend("reference", "chain"), stages.count_stages() as counts:
        inputs.call().sum().backward()
    assert counts["mnet_ref::pointwise_backward"] == 2 and counts["mnet_ref::depthwise_backward"] == 1
    with mk.backend("reference", "chain"), stages.count_stages() as counts:
        torch.autograd.grad(inputs.call().sum(), inputs.x, create_graph=True)
    assert not any(name.endswith("_backward") for name in counts)
