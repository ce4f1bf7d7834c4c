"""Blocks, a row of them and a small network of the CUDA backend without a card (cuda_on_host.py)."""

import re

import pytest
import test_gram_hand_over as rows
import test_precision
import torch
from blocks import Case, Inputs, step, upstream_of
from cuda_on_host import DTYPES, backend_of_the_cpu, load_library, pytestmark  # noqa: F401
from kinks import clear_model
from precision import Judge, errors
from test_ctest import ROOT
from test_models_v2 import NARROW, training_step, twins
from torch.utils._python_dispatch import TorchDispatchMode

import mnet_kernels as mk

BLOCKS = [
    Case("depthwise_conv_bn_act", kernel=5, stride=2, activation="hardswish", n=2, c=21, h=15, w=11),
    Case("pointwise_conv_bn_act", n=1, c=17, o=9, h=13, w=7),
    Case("pointwise_conv_bn_act_pool", activation="hardswish", n=3, c=17, o=21, h=5, w=7),
    Case("stem_conv_bn_act", stride=2, n=3, c=3, o=21, h=19, w=23),
    Case("stem_conv_bn_act", stride=1, activation="hardswish", n=2, c=4, o=40, h=9, w=18),
    Case("separable_conv", stride=2, n=2, c=24, o=40, h=14, w=14),
    Case(residual=True, n=2, c=16, e=40, h=14, w=14),
    Case(residual=True, excite=True, activation="silu", n=2, c=13, e=37, h=9, w=9),
    Case(stride=2, kernel=5, activation="hardswish", n=3, c=13, e=37, o=21, h=17, w=9),
    Case(stride=2, excite=True, kernel=5, activation="relu", n=2, c=16, e=40, o=24, h=14, w=14),
]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_block(case, dtype, monkeypatch):
    """Output, every gradient and running statistics against native float64, by the pass rule (the cosine is in it)."""
    monkeypatch.setattr(test_precision, "fused_modes", lambda *args, **kwargs: [("cuda", "chain")])
    storage = dtype or torch.float32
    test_precision.judge(lambda: test_precision.rounded(case, storage), storage, dtype)


def frozen(*both):
    for inputs in both:
        for bn in inputs.bns:
            bn.eval()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_block_in_eval_mode(case, dtype, monkeypatch):
    """The same with running statistics: output and every gradient."""
    monkeypatch.setattr(test_precision, "fused_modes", lambda *args, **kwargs: [("cuda", "chain")])
    storage = dtype or torch.float32
    test_precision.judge(lambda: test_precision.rounded(case, storage), storage, dtype, frozen)


class Calls(TorchDispatchMode):
    """Whether each convolution stage was asked for moments."""

    sees_stages = True

    def __init__(self):
        super().__init__()
        self.moments = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mnet_cuda" and func._schema.arguments[-1].name == "moments":
            self.moments.setdefault(func._opname, []).append(args[-1])
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mode", ["chain", "algebraic"])
def test_moments_are_of_training_alone(mode, training):
    """Eval mode runs the same kernels with batch norm folded into scale and shift, and their moments off."""
    inputs = Inputs(Case(residual=True, excite=True), torch.float32)
    if not training:
        frozen(inputs)
    with torch.no_grad(), mk.backend("cuda", mode), Calls() as calls:
        inputs.call()
    first = {"pointwise": [training] * 2, "depthwise": [training]}
    if mode == "algebraic":
        first = {"expand_depthwise": [training], "pointwise": [training]}
    assert calls.moments == first


def test_launchers_call_nothing_that_a_capture_forbids():
    """Of CUDA's runtime they use only what may be called while a CUDA graph is captured: no allocation, copy or wait.

    What is above them reads no value of a tensor, or torch.compile could not make one graph of it (the next test).
    """
    allowed = {"cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetLastError"}
    sources = [p for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in (".cu", ".cuh", ".cpp", ".h")]
    text = "\n".join(re.sub(r"//.*", "", p.read_text()) for p in sources)
    assert set(re.findall(r"\b(cuda[A-Z]\w+)\s*\(", text)) == allowed
    assert not re.search(r"\.item\(|\.cpu\(|at::_local_scalar|synchronize", text)


@pytest.mark.parametrize("case", BLOCKS[::2], ids=str)
def test_one_graph(case):
    """torch.compile, forward and backward in one graph each, to the bit what runs without it."""
    inputs = Inputs(case, torch.float32)
    upstream = upstream_of(inputs.call())
    torch._dynamo.reset()
    results = []
    with mk.backend("cuda", "chain"):
        for call in (inputs.call, torch.compile(inputs.call, fullgraph=True, backend="aot_eager")):
            for bn in inputs.bns:
                bn.reset_running_stats()
            out = call()
            grads = torch.autograd.grad(out, list(inputs.leaves.values()), upstream.to(out.dtype))
            results.append([out.detach(), *grads, *(b.clone() for bn in inputs.bns for b in bn.buffers())])
    assert all(map(torch.equal, *results))


def test_block_runs_its_own_stages():
    inputs = Inputs(Case(residual=True, excite=True), torch.float32)
    with mk.count_stages() as counts:
        step(inputs, "cuda", "chain")
    assert counts and {label.split("::")[0] for label in counts} == {"mnet_cuda"}


EXPANDING = [case for case in BLOCKS if case.op == "inverted_residual"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", EXPANDING, ids=str)
def test_forward_in_algebraic_mode(case, training, dtype):
    """Without gradients, with running and with batch statistics, which move."""
    verdict = Judge(dtype)
    for _ in range(5):
        exact, low = test_precision.rounded(case, dtype)
        for inputs in (exact, low):
            for bn in inputs.bns:
                bn.train(training)
        outcomes = []
        for inputs, path in ((exact, ("native", None)), (low, ("native", None)), (low, ("cuda", "algebraic"))):
            states = [{k: v.clone() for k, v in bn.state_dict().items()} for bn in inputs.bns]
            autocast = torch.autocast("cpu", dtype, enabled=inputs is low and dtype != torch.float32)
            with torch.no_grad(), mk.backend(*path), mk.count_stages() as counts, autocast:
                out = inputs.call()
            outcomes.append(
                {
                    "out": out,
                    **{f"{i}.{k}": b.clone() for i, bn in enumerate(inputs.bns) for k, b in bn.named_buffers()},
                }
            )
            for bn, state in zip(inputs.bns, states, strict=True):
                bn.load_state_dict(state)
        assert counts["mnet_cuda::expand_depthwise"] == 1 and {k.split("::")[0] for k in counts} == {"mnet_cuda"}
        want, torchs, ours = outcomes
        for key, ref in want.items():
            if key.endswith("tracked"):
                assert torch.equal(ours[key], ref)
            else:
                verdict.add(key, ours[key], torchs[key], ref)
    verdict.verdict()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_hands_on_its_grams(dtype):
    """Each block's output and running statistics as of blocks called one by one, to the bit."""
    x = torch.randn(2, 4, 9, 7)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32), mk.backend("cuda", "algebraic"):
        blocks = rows.row()
        got, counts = rows.results(blocks, rows.in_a_row, x)
        want, others = rows.results(blocks, rows.one_by_one, x)
    assert all(map(torch.equal, got, want))
    assert counts["mnet_cuda::normalize_gram"] == others["mnet_cuda::gram"] == 3
    assert counts["mnet_cuda::gram"] == others["mnet_cuda::normalize_gram"] == 0


def test_a_training_step_in_algebraic_mode_is_chain(caplog):
    inputs = Inputs(Case(residual=True), torch.float32)
    with mk.count_stages() as counts:
        step(inputs, "cuda", "algebraic")
    assert counts["mnet_cuda::depthwise"] == 1 and {label.split("::")[0] for label in counts} == {"mnet_cuda"}
    assert "mode 'chain'" in caplog.text and "without gradients" in caplog.text


def test_training_step():
    """A narrow V2 at 32x32 against native float64: every gradient by its cosine, and by the pass rule all results of a
    kind together (of a single one of its layers, in a network so small, the rounding errors of both paths scatter)."""
    verdict = Judge(torch.float32)
    for _ in range(3):
        exact, model = twins(**NARROW)
        x, labels = torch.randn(8, 3, 32, 32), torch.randint(NARROW["num_classes"], (8,))
        clear_model(exact, x.double())
        low = type(model)(**NARROW, dropout=0.0)
        low.load_state_dict(exact.state_dict())
        exact.load_state_dict(low.state_dict())  # rounded to float32
        want = training_step(exact, x.double(), labels)
        with mk.backend("native"):
            torchs = training_step(low, x, labels)
        with mk.backend("cuda", "chain"), mk.count_stages() as counts:
            ours = training_step(low, x, labels)
        assert {label.split("::")[0] for label in counts} == {"mnet_cuda"}
        assert counts["mnet_cuda::depthwise_backward"] == 17 and counts["mnet_cuda::stem_backward"] == 1
        for name, ref in want.items():
            if name.endswith("num_batches_tracked"):
                assert torch.equal(ours[name], ref)
                continue
            if ref.abs().max() < 1e-8:  # a batch norm further on takes the shift out again: both are rounding errors
                assert name.endswith(".bias") and ours[name].abs().max() < 1e-4, name
                continue
            relative, _, cosine = errors(ours[name], ref)
            assert relative < 1e-3 and cosine < 1e-6, name
            if name != "loss":
                gradient = name.removeprefix("d_") != name
                verdict.add(f"{'d_' * gradient}{name.split('.')[-1]}", ours[name], torchs[name], ref)
    verdict.verdict()
