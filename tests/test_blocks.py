"""Every public op, in every mode, against torch's own ops in float64: output, every gradient, running statistics."""

import copy
import itertools

import pytest
import torch
from blocks import CASES, POINTWISE, Case, Inputs, assert_same, fused_modes, step
from networks import randomise

import mnet_kernels as mk
from mnet_kernels import log


def compare(inputs):
    want = step(inputs, "native")
    for backend, mode in fused_modes(inputs.case):
        with mk.count_stages() as counts:
            got = step(inputs, backend, mode)
        assert_same(got, want)
        assert_path(counts, inputs.case, mode)
    return want


def assert_path(counts, case, mode):
    """The stages that must have run, and no native op."""
    assert not any(name.startswith("native::") for name in counts), counts
    algebraic = mode == "algebraic"
    assert counts["mnet_ref::expand_depthwise"] == algebraic
    if case.op not in (*POINTWISE, "stem_conv_bn_act"):
        assert counts["mnet_ref::depthwise"] == (not algebraic)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(case):
    want = compare(Inputs(case))
    for name, value in want.items():
        # identity activations make the gradients of inner betas and gammas vanish; everything else must not
        if case.activation != "identity":
            assert value.abs().max() > 1e-6, f"{name} is zero: the test shows nothing"


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_eval(case):
    inputs = Inputs(case)
    for bn in inputs.bns:
        bn.eval()
    compare(inputs)


@pytest.mark.parametrize("frozen", list(itertools.product((False, True), repeat=3))[1:])
@pytest.mark.parametrize("excite", [False, True])
def test_any_mix_of_eval_batch_norms(frozen, excite):
    inputs = Inputs(Case(excite=excite, residual=True))
    for bn, off in zip(inputs.bns, frozen, strict=True):
        bn.train(not off)
    compare(inputs)


@pytest.mark.parametrize("excite", [False, True])
@pytest.mark.parametrize("last", ["gamma", "beta"])
def test_only_the_last_batch_norm_is_trained(last, excite):
    """The backward ends where nothing below needs a gradient."""
    inputs = Inputs(Case(excite=excite))
    for name, leaf in inputs.leaves.items():
        leaf.requires_grad_(name == f"{last}{len(inputs.bns) - 1}")
    want = step(inputs, "native")
    for backend, mode in fused_modes(inputs.case):
        assert_same(step(inputs, backend, mode), want)


@pytest.mark.parametrize("excite", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_frozen_parameters(seed, excite):
    torch.manual_seed(seed)
    inputs = Inputs(Case(excite=excite, stride=1 + seed % 2))
    names = list(inputs.leaves)
    for name, keep in zip(names, torch.rand(len(names)) < 0.35, strict=True):
        inputs.leaves[name].requires_grad_(bool(keep))
    for bn, off in zip(inputs.bns, torch.rand(3) < 0.3, strict=True):
        bn.train(not off)
    inputs.leaves[names[seed % len(names)]].requires_grad_()
    compare(inputs)


@pytest.mark.parametrize("op", ["depthwise_conv_bn_act", *POINTWISE, "separable_conv"])
@pytest.mark.parametrize("only", ["x", "weight0", "gamma0", "beta0"])
def test_only_one_gradient(op, only):
    inputs = Inputs(Case(op))
    for name, leaf in inputs.leaves.items():
        leaf.requires_grad_(name == only)
    compare(inputs)


def test_no_weight_gradient_is_computed_for_frozen_weights():
    """A frozen network's backward must not pay for weight gradients, nor an image's input gradient."""
    seen = {}
    table = mk.stages.stage("reference")
    for name in ("pointwise_backward", "depthwise_backward"):
        original = getattr(table, name)

        def spy(*args, name=name, original=original):
            seen.setdefault(name, []).append(args[-3:] if name == "pointwise_backward" else args[-2:])
            return original(*args)

        setattr(table, name, spy)
    try:
        inputs = Inputs(Case())
        for name, leaf in inputs.leaves.items():
            leaf.requires_grad_(name == "gamma0")
        step(inputs, "reference", "chain")
    finally:
        mk.stages.bind()
    assert seen == {"pointwise_backward": [(True, True, False)], "depthwise_backward": [(True, False)]}


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_momentum(momentum):
    inputs = Inputs(Case())
    for bn in inputs.bns:
        bn.momentum = momentum
        bn.num_batches_tracked.fill_(3)
    compare(inputs)


def test_cumulative_average_over_steps():
    """momentum=None over several steps equals nn.BatchNorm2d's own cumulative average."""
    results = []
    for backend in ("native", "reference"):
        torch.manual_seed(5)
        inputs = Inputs(Case("depthwise_conv_bn_act"))
        inputs.bns[0].momentum = None
        inputs.bns[0].reset_running_stats()
        for _ in range(3):
            inputs.x = torch.randn(inputs.x.shape, dtype=torch.float64)
            with mk.backend(backend), torch.no_grad():
                inputs.call()
        results.append(dict(inputs.bns[0].named_buffers()))
    assert results[0]["num_batches_tracked"] == 3
    assert_same(results[1], results[0])


def test_without_running_statistics():
    inputs = Inputs(Case())
    for training in (True, False):
        bns = [torch.nn.BatchNorm2d(bn.num_features, track_running_stats=False).double() for bn in inputs.bns]
        inputs.bns = [bn.train(training) for bn in bns]
        compare(inputs)


def test_tracking_switched_off_leaves_the_buffers_alone():
    inputs = Inputs(Case())
    for bn in inputs.bns:
        bn.track_running_stats = False
    want = compare(inputs)
    assert want["num_batches_tracked0"] == 0


def test_without_affine():
    inputs = Inputs(Case(excite=True))
    inputs.bns = [torch.nn.BatchNorm2d(bn.num_features, affine=False).double() for bn in inputs.bns]
    compare(inputs)


def test_gate_without_biases():
    inputs = Inputs(Case(excite=True))
    inputs.excite[1] = inputs.excite[3] = None
    grads = {}
    for backend, mode in (("native", None), ("reference", "chain"), ("reference", "algebraic")):
        with mk.backend(backend, mode):
            bns = [mk.BatchNormParams.of(bn) for bn in inputs.bns]
            w = inputs.weights
            se = mk.SqueezeExciteParams(*inputs.excite)
            out = mk.functional.inverted_residual(inputs.x, w[0], bns[0], w[1], bns[1], w[2], bns[2], squeeze_excite=se)
            found = torch.autograd.grad(out.square().sum(), [inputs.x, *w, inputs.excite[0], inputs.excite[2]])
            grads[mode] = dict(enumerate(found))
    assert_same(grads["chain"], grads[None])
    assert_same(grads["algebraic"], grads[None])


SHAPES = [(1, 1, 1, 2), (1, 1, 2, 1), (2, 1, 1, 1), (1, 8, 5, 5), (2, 3, 1, 9), (1, 17, 16, 3), (4, 2, 2, 2)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, kernel, stride):
    n, c, h, w = shape
    if n * ((h - 1) // stride + 1) * ((w - 1) // stride + 1) == 1:
        pytest.skip("one value per channel: refused, test_errors.py")
    for expand in (False, True):
        # batch norm over two nearly equal values is ill-conditioned; its own eps of 1e-3 keeps this in check
        compare(Inputs(Case(kernel=kernel, stride=stride, expand=expand, n=n, c=c, e=2 * c + 1, o=3, h=h, w=w)))


def _layouts(x):
    yield "nchw", x.detach().contiguous().requires_grad_()
    yield "channels_last", x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    wide = torch.randn(x.shape[0], 2 * x.shape[1], x.shape[2] + 2, x.shape[3] + 1, dtype=x.dtype)
    wide[:, ::2, 1:-1, :-1] = x.detach()
    yield "sliced", wide[:, ::2, 1:-1, :-1].requires_grad_()
    yield "transposed", x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    yield "expanded", x.detach()[:1].expand_as(x).clone()[:1].expand(x.shape).requires_grad_()


def test_layouts_of_the_input():
    inputs = Inputs(Case(residual=True))
    for name, x in _layouts(inputs.x):
        inputs.x = x
        want = compare(inputs)
        assert want["out"].shape == x.shape, name


def test_output_is_channels_last():
    inputs = Inputs(Case())
    with mk.backend("reference"):
        assert inputs.call().is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", ["inverted_residual", "pointwise_conv_bn_act_pool"])
@pytest.mark.parametrize("layout", ["nchw", "expanded", "transposed"])
def test_layouts_of_the_upstream_gradient(layout, op):
    inputs = Inputs(Case(op))
    shape = step(inputs, "native")["out"].shape
    upstream = torch.randn(shape, dtype=torch.float64)
    if layout == "expanded":
        upstream = torch.tensor(0.7, dtype=torch.float64).expand(shape)
    if layout == "transposed":
        upstream = upstream.transpose(0, 1).contiguous().transpose(0, 1)
    want = step(inputs, "native", upstream=upstream)
    for backend, mode in fused_modes(inputs.case):
        assert_same(step(inputs, backend, mode, upstream=upstream), want)


@pytest.mark.parametrize("case", [Case(), *map(Case, ("depthwise_conv_bn_act", *POINTWISE))], ids=str)
def test_empty_batch(case):
    inputs = Inputs(case._replace(n=0))
    want = step(inputs, "native")
    assert_same(step(inputs, "reference", "chain"), want)
    assert want["out"].shape[0] == 0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_pooled_output_may_be_changed_in_place(backend):
    """It is nobody's memory: not that of what is saved for backward."""
    inputs = Inputs(Case("pointwise_conv_bn_act_pool"))
    with mk.backend(backend):
        out = inputs.call()
        (want,) = torch.autograd.grad(out.sum(), inputs.x, retain_graph=True)
        (got,) = torch.autograd.grad(out.mul_(2).sum(), inputs.x)
    torch.testing.assert_close(got, 2 * want)


def test_the_pooled_map_is_never_written():
    inputs = Inputs(Case("pointwise_conv_bn_act_pool"))
    with mk.count_stages() as counts:
        step(inputs, "reference", "chain")
    stages = "pointwise", "finalize", "squeeze", "finalize_backward", "pointwise_backward", "update_running_stats"
    assert counts == {f"mnet_ref::{name}": 1 for name in stages}


@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (4, 1, 1, 1), (1, 17, 16, 3)], ids=str)
def test_shapes_of_the_pooled_layer(shape):
    n, c, h, w = shape
    want = compare(Inputs(Case("pointwise_conv_bn_act_pool", n=n, c=c, o=2 * c + 1, h=h, w=w)))
    assert want["out"].shape == (n, 2 * c + 1)


def test_stage_counter_nests():
    inputs = Inputs(Case())
    with mk.count_stages() as outer:
        step(inputs, "reference", "chain")
        with mk.count_stages() as inner:
            step(inputs, "native")
    assert inner == {"native::inverted_residual": 1}
    assert outer["native::inverted_residual"] == 1 and outer["mnet_ref::depthwise"] == 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("c, h, w", [(1, 9, 7), (3, 1, 6), (4, 2, 2), (2, 8, 1)])
def test_stem_of_any_image(stride, c, h, w):
    """Odd and tiny maps, one image, every memory layout; an image that needs no gradient."""
    for n in (1, 2):
        inputs = Inputs(Case("stem_conv_bn_act", stride=stride, n=n, c=c, h=h, w=w, activation="silu"))
        if n * h * w < 6:
            inputs.bns[0].eval()
        want = compare(inputs)
        dense = inputs.x.detach()
        sliced = torch.stack([dense, dense], -1)[..., 0]
        for x in (sliced, dense.to(memory_format=torch.channels_last)):
            inputs.x = x
            got = step(inputs, "reference")
            assert_same(got, {name: value for name, value in want.items() if name != "d_x"})


def test_stem_of_no_image():
    inputs = Inputs(Case("stem_conv_bn_act", n=0, c=3))
    inputs.bns[0].eval()
    with mk.backend("reference"):
        assert inputs.call().shape == (0, 6, 9, 7)


@pytest.mark.parametrize("stride", [1, 2])
def test_stem_that_the_next_block_reads_raw(stride):
    """The same as the stem and the block one after the other, and the stem's output is not normalised on its own."""
    stem = Inputs(Case("stem_conv_bn_act", stride=stride, c=3, o=5))
    block = Inputs(Case("separable_conv", c=5))
    leaves = [*stem.leaves.values(), *list(block.leaves.values())[1:]]
    bns = [*stem.bns, *block.bns]
    kinds, strides = ("dense", "depthwise", "pointwise"), (stride, 1, 1)

    def run(backend):
        before = [{k: v.clone() for k, v in bn.state_dict().items()} for bn in bns]
        rows = zip(kinds, [*stem.weights, *block.weights], bns, strides, strict=True)
        first, *pair = (mk.functional.ConvBNAct(k, w, mk.BatchNormParams.of(bn), "relu6", s) for k, w, bn, s in rows)
        with mk.backend(backend), mk.count_stages() as counts:
            out = mk.functional.separable_sequence(stem.x, [pair], stem=first)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        found = {"out": out.detach()} | {f"d{i}": g for i, g in enumerate(grads)}
        for i, (bn, old) in enumerate(zip(bns, before, strict=True)):
            found |= {f"{k}{i}": v.clone() for k, v in bn.named_buffers()}
            bn.load_state_dict(old)
        return found, counts

    want, _ = run("native")
    got, counts = run("reference")
    assert_same(got, want)
    assert counts["mnet_ref::normalize"] == 1 and counts["mnet_ref::stem"] == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", ["chain", "algebraic"])
@pytest.mark.parametrize("squeeze_channels", [None, 3])
def test_stem_that_an_inverted_residual_reads_raw(squeeze_channels, mode, training):
    """FusedSequential does so where the block has no expand layer and no residual: the same as one after the other."""
    stem = mk.nn.FusedStemConvBNAct(3, 6, 2, activation_layer=torch.nn.Hardswish)
    first = mk.nn.FusedInvertedResidual(6, 5, 2, 1, squeeze_channels=squeeze_channels)
    model = torch.nn.Sequential(stem, first, mk.nn.FusedInvertedResidual(5, 5, 1, 3)).double().train(training)
    randomise(model)
    state, x = copy.deepcopy(model.state_dict()), torch.randn(3, 3, 21, 18, dtype=torch.float64)
    leaves = list(model.parameters())

    def run(backend, call, raw):
        model.load_state_dict(state)
        with mk.backend(backend, mode), mk.count_stages() as counts:
            out = call(x)
        assert counts["mnet_ref::stem"] == (backend == "reference")
        written = counts["mnet_ref::normalize"] + counts["mnet_ref::normalize_gram"]
        assert written == (backend == "reference") * (3 - raw)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        named = dict(zip((name for name, _ in model.named_parameters()), grads, strict=True))
        return {"out": out.detach(), **named, **{k: v.clone() for k, v in model.named_buffers()}}

    want = run("native", model, False)
    assert all(g.abs().max() > 0 for g in want.values())
    assert_same(run("reference", mk.nn.FusedSequential(*model), True), want)
    for hooked in (stem, first):
        handle = hooked.register_forward_hook(lambda *_: None)
        assert_same(run("reference", mk.nn.FusedSequential(*model), False), want)
        handle.remove()
    first.backend = "reference"
    assert_same(run("reference", mk.nn.FusedSequential(*model), False), want)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_stem_that_is_left_to_torch(backend, monkeypatch, caplog):
    """Of its own accord in evaluation, on small maps and where x needs a gradient; on a backend without its stages,
    which is said."""
    module = mk.nn.FusedStemConvBNAct(3, 5, 1)
    mk.choice._decide.cache_clear()
    log.forget()
    if backend == "triton":
        monkeypatch.setattr(mk.backends, "implemented", lambda name: mk.backends.MODE_STAGES["chain"])
        monkeypatch.setattr(mk.backends, "why_unavailable", lambda name, device: None)
    for training, size, grad in ((True, 128, False), (False, 128, False), (True, 64, False), (True, 128, True)):
        x = torch.randn(1, 3, size, size, requires_grad=grad)
        with mk.backend(backend), mk.count_stages() as counts:
            out = module.train(training)(x)
        torch.testing.assert_close(out, torch.nn.Sequential.forward(module, x), rtol=1e-4, atol=1e-4)
        fused = (training, size, grad, backend) == (True, 128, False, "auto") and mk.backends.has_stem("cpu")
        assert (counts["native::stem_conv_bn_act"] == 0) == fused
    said = [r.message for r in caplog.records if "leaves the stem" in r.message]
    assert len(said) == (backend == "triton" or not mk.backends.has_stem("cpu"))
    mk.choice._decide.cache_clear()
