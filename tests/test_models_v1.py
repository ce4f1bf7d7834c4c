"""MobileNetV1 against timm's mobilenetv1_100, and its chain across block borders."""

import logging
import weakref

import pytest
import torch
from networks import assert_equal, compare, native_calls, paths, step, twins
from precision import errors

import mnet_kernels as mk
from mnet_kernels.models.v1 import SEPARABLE_SETTING
from mnet_kernels.nn import FusedSeparable, FusedSequential

timm = pytest.importorskip("timm")
BLOCKS = sum(n for _, n, _ in SEPARABLE_SETTING)


def timm_v1(width=0.25, classes=5):
    from timm.models.efficientnet import _gen_mobilenet_v1

    return _gen_mobilenet_v1("mobilenetv1_100", width, num_classes=classes)


def pair(width=0.25):
    return twins(timm_v1(width), mk.FusedMobileNetV1(5, width_mult=width))


@paths
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_timm(backend, mode, training):
    counts = compare(*pair(), backend, mode, (47, 40), training=training)
    if backend == "native":
        assert counts == {"native::separable_sequence": 1, "native::stem_conv_bn_act": 1}
    else:
        # one normalize for the whole chain: the stem's and the other blocks' outputs are never written
        assert native_calls(counts) == 0
        assert counts["mnet_ref::depthwise"] == counts["mnet_ref::pointwise"] == BLOCKS
        assert counts["mnet_ref::stem"] == counts["mnet_ref::stem_backward"] == 1
        assert counts["mnet_ref::normalize"] == counts["mnet_ref::normalize_backward"] == 1
        assert counts["mnet_ref::update_running_stats"] == (2 * BLOCKS + 1) * training


@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv1_125"])
def test_weights_go_both_ways(name):
    theirs = timm.create_model(name, pretrained=False)
    ours = mk.fused_mobilenet_v1(weights=theirs.state_dict(), width_mult=int(name[-3:]) / 100)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_parameters():
    for width, count in {1.0: 4231976, 0.75: 2585560, 0.5: 1331592, 0.25: 470072}.items():
        assert sum(p.numel() for p in mk.FusedMobileNetV1(width_mult=width).parameters()) == count


def test_constructor():
    model = mk.FusedMobileNetV1(7, 0.25, [(32, 1, 1), (64, 2, 2)], dropout=0.5, stem_stride=1)
    assert model.dropout.p == 0.5 and model.classifier.out_features == 7
    assert model.blocks(torch.randn(1, 8, 12, 12)).shape == (1, 16, 6, 6)
    assert model.conv_stem.stride == (1, 1)
    for bad in ([], [(32, 1)]):
        with pytest.raises(ValueError, match=r"rows \(c, n, s\)"):
            mk.FusedMobileNetV1(separable_setting=bad)
    with pytest.raises(ValueError, match="state_dict"):
        mk.fused_mobilenet_v1(weights="DEFAULT")


def sequence(**kwargs):
    stages = [FusedSequential(FusedSeparable(4, 6), FusedSeparable(6, 6, 2))]
    stages.append(FusedSequential(FusedSeparable(6, 10, kernel_size=5), FusedSeparable(10, 8, **kwargs)))
    model = torch.nn.Sequential(FusedSequential(*stages), torch.nn.Flatten(), torch.nn.Linear(8 * 12, 5))
    return twins(torch.nn.Sequential(model), torch.nn.Sequential(model))[1]


def run(model, backend):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(1)
    x, target = torch.randn(3, 4, 7, 5, dtype=torch.float64), torch.randint(5, (3,))
    with mk.backend(backend), mk.count_stages() as counts:
        result = step(model, x, target)
    model.load_state_dict(state)
    return result, counts


def check_sequence(model, normalizes):
    want, _ = run(model, "native")
    got, counts = run(model, "reference")
    assert_equal(got, want)
    assert counts["mnet_ref::normalize"] == normalizes


def test_sequence_runs_as_one():
    check_sequence(sequence(), 1)


@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.Hardswish])
def test_activations_may_differ(activation):
    model = sequence(activation_layer=activation)
    model[0][0][1][1].act2 = torch.nn.Identity()
    check_sequence(model, 1)


def test_hooks_on_a_block_see_its_output():
    model = sequence()
    seen = []
    model[0][0][0][1].register_forward_hook(lambda module, args, out: seen.append((args[0].detach(), out.detach())))
    check_sequence(model, 3)  # what is before, the block itself, what is after
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_hooks_on_a_stage_see_its_output():
    model = sequence()
    seen = []
    model[0][0][0].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    check_sequence(model, 2)
    torch.testing.assert_close(*seen, rtol=1e-10, atol=1e-12)


def test_a_block_that_may_not_be_fused_runs_alone(caplog):
    model = sequence()
    block = model[0][0][1][0]
    block.bn1 = torch.nn.GroupNorm(2, 6).double()
    with caplog.at_level(logging.WARNING, "mnet_kernels"):
        check_sequence(model, 3)  # its pointwise layer alone
    assert "depthwise batch norm is GroupNorm" in caplog.text


def test_any_module_may_stand_in_a_sequence():
    model = sequence()
    model[0][0].insert(1, torch.nn.Softplus().double())
    check_sequence(model, 2)


def test_blocks_of_another_backend_run_apart():
    model = sequence()
    model[0][0][0][1].backend = "native"
    with mk.count_stages() as counts:
        model[0][0](torch.randn(3, 4, 7, 5, dtype=torch.float64))
    assert counts["native::separable_sequence"] == 3
    model[0][0][0][0].backend = model[0][0][1][0].backend = "reference"
    with mk.count_stages() as counts:
        model[0][0](torch.randn(3, 4, 7, 5, dtype=torch.float64))
    assert counts["mnet_ref::normalize"] == 2 and counts["native::separable_sequence"] == 2


@pytest.mark.parametrize("trained", range(5))
def test_frozen_parts(trained):
    """Gradients stop where nothing needs them, wherever in the chain that is; frozen batch norms use their own."""
    model = sequence()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i >= 5 * trained)
    model[0][0][1][0].bn2.eval()
    model[0][0][0][1].bn2.eval()
    check_sequence(model, 1)


@pytest.mark.slow
def test_compiles_to_one_graph():
    model = sequence()
    want, _ = run(model, "reference")
    got, _ = run(torch.compile(model, backend="aot_eager", fullgraph=True), "reference")
    assert_equal({k.replace("_orig_mod.", ""): v for k, v in got.items()}, want)


def test_autocast():
    """Raw maps pass from block to block in the autocast dtype, their tables in float32."""
    model = sequence().float()
    x, target = torch.randn(3, 4, 7, 5), torch.randint(5, (3,))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = {}
    for backend in ("native", "reference"):
        model.load_state_dict(state)
        with mk.backend(backend), torch.autocast("cpu", torch.bfloat16):
            found[backend] = step(model, x, target)
    model.load_state_dict(state)
    want = step(model.double(), x.double(), target)
    for name in want:
        if name.startswith("d_") and name.endswith("weight"):
            ours, native = (errors(found[backend][name], want[name])[2] for backend in ("reference", "native"))
            assert ours < 2 * native + 0.01, name
            assert found["reference"][name].dtype == torch.float32


class Saved:
    """A saved tensor that can be watched."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_saved_maps_are_freed_block_by_block():
    """In the backward pass a block's maps are gone as soon as its own gradients are there."""
    model, maps, left = sequence(), [], []

    def pack(tensor):
        saved = Saved(tensor)
        if tensor.dim() == 4:
            maps.append(weakref.ref(saved))
        return saved

    with mk.backend("reference"), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = model(torch.randn(3, 4, 7, 5, dtype=torch.float64)).sum()
    for block in model.modules():
        if isinstance(block, FusedSeparable):
            block.conv_dw.weight.register_post_accumulate_grad_hook(
                lambda p: left.append(sum(ref() is not None for ref in maps))
            )
    loss.backward()
    assert len(left) == 4 and left[0] > left[1] > left[2] > left[3] == 0
