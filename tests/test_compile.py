"""torch.compile: whole training steps in one graph, equal to eager, with running statistics that move once."""

import pytest
import torch
from blocks import Case, Inputs, assert_same
from test_models_v2 import twins
from torch import nn

import mnet_kernels as mk
from mnet_kernels import backends

MODES = [("reference", "chain"), ("reference", "algebraic"), ("native", None)]
CASES = [
    Case("depthwise_conv_bn_act", stride=2),
    Case("pointwise_conv_bn_act"),
    Case("pointwise_conv_bn_act_pool"),
    Case("separable_conv", activation="hardswish"),
    Case(residual=True),
    Case(excite=True, activation="hardswish", kernel=5),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(inputs, function):
    for leaf in inputs.leaves.values():
        leaf.grad = None
    out = function()
    out.square().sum().backward()
    result = {"out": out.detach()} | {n: t.grad.clone() for n, t in inputs.leaves.items()}
    for i, bn in enumerate(inputs.bns):
        result |= {f"{n}{i}": b.clone() for n, b in bn.named_buffers()}
        bn.reset_running_stats()
    return result


@pytest.mark.parametrize("backend, mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ops(case, backend, mode):
    inputs = Inputs(case)
    for bn in inputs.bns:
        bn.reset_running_stats()
    with mk.backend(backend, mode):
        want = gradients(inputs, inputs.call)
        compiled = torch.compile(inputs.call, fullgraph=True, backend="aot_eager")
        assert_same(gradients(inputs, compiled), want)


@pytest.mark.parametrize("backend, mode", [*MODES, ("cpu", "chain"), ("cpu", "algebraic")])
def test_training_step(backend, mode):
    """V2: forward, loss and backward, twice, compiled and eager from the same weights."""
    if backend == "cpu" and not backends.whole(backend, mode):
        pytest.skip("the extension is not built")
    _, ours = twins(torch.float32, width_mult=0.1, num_classes=5)
    twin = mk.FusedMobileNetV2(width_mult=0.1, num_classes=5, dropout=0.0)
    twin.load_state_dict(ours.state_dict())
    x, labels = torch.randn(4, 3, 64, 64), torch.randint(5, (4,))

    def step(model):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        return loss.detach()

    with mk.backend(backend, mode):
        model = torch.compile(ours, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(step(model), step(twin))
    state, want = ours.state_dict(), twin.state_dict()
    assert state["features.1.conv.0.1.num_batches_tracked"] == 2
    for name in want:
        torch.testing.assert_close(state[name], want[name], rtol=1e-3, atol=1e-4, msg=name)
    for (name, p), q in zip(ours.named_parameters(), twin.parameters(), strict=True):
        scale = q.grad.abs().max().item()
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=2e-2 * scale + 1e-6, msg=name)


def test_changing_the_backend_recompiles():
    """Dynamo guards on what was asked for: a graph of one backend is never used for another."""
    inputs = Inputs(Case())
    graphs = []

    def remember(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(lambda: inputs.call().detach(), fullgraph=True, backend=remember)
    results = []
    for backend, mode in MODES:
        with torch.no_grad(), mk.backend(backend, mode):
            results.append(compiled())
            compiled()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    chain, algebraic, native = graphs
    assert "mnet_ref.depthwise.default" in chain and "mnet_ref.expand_depthwise.default" in algebraic
    assert not any(target.startswith("mnet_") for target in native)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "mode"), [("reference", None), ("cpu", "reduce-overhead")])
def test_inductor(backend, mode):
    """torch's own compiler once each way, one block, forward and backward (it needs a C++ compiler).

    On a CPU ``reduce-overhead`` is the default with another name; on a card it captures graphs (test_gpu.py).
    """
    if not backends.whole(backend, "chain"):
        pytest.skip("the extension is not built")
    inputs = Inputs(Case(residual=True), torch.float32)
    for bn in inputs.bns:
        bn.reset_running_stats()
    with mk.backend(backend, "chain"):
        want = gradients(inputs, inputs.call)
        got = gradients(inputs, torch.compile(inputs.call, fullgraph=True, mode=mode))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = Inputs(Case(), torch.float32)
    with mk.backend("reference", "chain"), torch.autocast("cpu", dtype):
        want = inputs.call()
        got = torch.compile(inputs.call, fullgraph=True, backend="aot_eager")()
    assert got.dtype == dtype
    torch.testing.assert_close(got, want)
