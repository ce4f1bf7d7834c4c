"""MobileNetV3 against torchvision's: values, gradients, statistics, keys, initialisation, idioms."""

import itertools
import logging

import pytest
import torch
from networks import PATHS, compare, native_calls, paths, takes_raw_stem, twins, written

import mnet_kernels as mk
from mnet_kernels.models.v3 import configuration
from mnet_kernels.nn import FusedInvertedResidual

models = pytest.importorskip("torchvision.models")
sizes = pytest.mark.parametrize("arch", ["large", "small"])


def theirs(arch, **kwargs):
    return getattr(models, f"mobilenet_v3_{arch}")(**kwargs)


def fused(arch, **kwargs):
    return getattr(mk, f"fused_mobilenet_v3_{arch}")(**kwargs)


def pair(arch, **kwargs):
    kwargs = {"num_classes": 5, "dropout": 0.0, "width_mult": 0.35, **kwargs}
    return twins(theirs(arch, **kwargs), fused(arch, **kwargs))


def blocks(model):
    return [b for b in model.features if isinstance(b, FusedInvertedResidual)]


def assert_path(model, counts, mode):
    """Every block and the stem ran as one, the expanded tensor of algebraic mode never existed, nothing ran native."""
    count = len(blocks(model))
    expanding = sum(b.block[0][0].groups == 1 for b in blocks(model))
    assert native_calls(counts) == 0
    assert written(counts) == counts["mnet_ref::normalize_backward"] == count + 1 - takes_raw_stem(model)
    assert counts["mnet_ref::stem"] == counts["mnet_ref::stem_backward"] == 1
    assert counts["mnet_ref::expand_depthwise"] == (expanding if mode == "algebraic" else 0)
    assert counts["mnet_ref::depthwise"] == count - counts["mnet_ref::expand_depthwise"]
    excited = sum(len(b.block) == 3 + (b.block[0][0].groups == 1) for b in blocks(model))
    assert counts["mnet_ref::squeeze"] == excited + 1  # and the head


@paths
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@sizes
def test_equals_torchvision(arch, backend, mode, training):
    want, got = pair(arch)
    counts = compare(want, got, backend, mode, (47, 40), training=training)
    if backend == "native":
        convs = {f"native::{op}": 1 for op in ("stem_conv_bn_act", "pointwise_conv_bn_act_pool")}
        assert counts == {"native::inverted_residual": len(blocks(got))} | convs
    else:
        assert_path(got, counts, mode)


@pytest.mark.parametrize(("backend", "mode"), PATHS[1:], ids=["chain", "algebraic"])
@pytest.mark.parametrize("reduced_tail", [False, True])
@sizes
def test_dilated(arch, reduced_tail, backend, mode, caplog):
    """The dilated blocks run their layers one by one (their convolutions fused where that is possible), said once."""
    want, got = pair(arch, dilated=True, reduced_tail=reduced_tail)
    with caplog.at_level(logging.WARNING, "mnet_kernels"):
        counts = compare(want, got, backend, mode, (47, 40))
    said = [r.getMessage() for r in caplog.records if "dilated" in r.getMessage()]
    assert sorted(message.split()[0] for message in said) == ["FusedDepthwiseConvBNAct", "FusedInvertedResidual"]
    # expand and project of the three blocks, and what stands before them
    assert written(counts) == len(blocks(got)) - 3 + 2 * 3 + 1 - takes_raw_stem(got)


@pytest.mark.parametrize(("width", "dilated", "reduced_tail"), [*itertools.product((1.0, 0.35, 1.25), (0, 1), (0, 1))])
@sizes
def test_same_seed_same_weights(arch, width, dilated, reduced_tail):
    kwargs = {"width_mult": width, "dilated": bool(dilated), "reduced_tail": bool(reduced_tail), "num_classes": 3}
    states = []
    for make in (theirs, fused):
        torch.manual_seed(11)
        states.append(make(arch, **kwargs).state_dict())
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def parameters(arch, **kwargs):
    return sum(p.numel() for p in fused(arch, **kwargs).parameters())


TORCHVISION = {
    "large": {1.25: 8164744, 1.0: 5483032, 0.75: 3377576, 0.5: 1734576, 0.35: 997064},
    "small": {1.25: 3644912, 1.0: 2542856, 0.75: 1653920, 0.5: 917264, 0.35: 558744},
}
PAPER = {
    "large": {1.25: 8256296, 1.0: 5483032, 0.75: 3993528, 0.5: 2689520, 0.35: 2131832},
    "small": {1.25: 3645960, 1.0: 2542856, 0.75: 2041872, 0.5: 1592704, 0.35: 1358288},
}


@pytest.mark.parametrize(("rule", "table"), [("torchvision", TORCHVISION), ("paper", PAPER)])
@sizes
def test_parameters_of_both_width_rules(arch, rule, table):
    assert {w: parameters(arch, width_mult=w, width_rule=rule) for w in table[arch]} == table[arch]


def test_batch_norm_settings():
    norms = [m for m in fused("small").modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


def test_torchvision_configuration_serves():
    rows, last = models.mobilenetv3._mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.5)
    model = mk.FusedMobileNetV3(rows, last, num_classes=4)
    reference = models.MobileNetV3(rows, last, num_classes=4)
    model.load_state_dict(reference.state_dict())
    assert [*model.state_dict()] == [*reference.state_dict()]


def test_torchvision_block_serves():
    model = mk.FusedMobileNetV3(*configuration("small", 0.35)[::2], block=models.mobilenetv3.InvertedResidual)
    assert not blocks(model) and model(torch.randn(2, 3, 32, 32)).shape == (2, 1000)


def test_bad_arguments():
    with pytest.raises(ValueError, match="should not be empty"):
        mk.FusedMobileNetV3([], 8)
    with pytest.raises(TypeError, match=r"InvertedResidualConfig, got \(1, 2\) without input_channels"):
        mk.FusedMobileNetV3([(1, 2)], 8)
    with pytest.raises(ValueError, match="width_rule must be one of torchvision, paper, got 'tf'"):
        fused("large", width_rule="tf")
    with pytest.raises(ValueError, match="arch must be one of large, small"):
        configuration("tiny")
    with pytest.raises(ValueError, match="layout must be one of v2, v3"):
        FusedInvertedResidual(4, 4, 1, 2, layout="v4")


def test_weights(tmp_path):
    state = theirs("small", num_classes=3).state_dict()
    torch.save({"model": state}, tmp_path / "small.pt")
    for weights in (state, tmp_path / "small.pt", str(tmp_path / "small.pt")):
        model = fused("small", weights=weights, num_classes=3)
        assert torch.equal(model.classifier[3].weight, state["classifier.3.weight"])
    with pytest.raises(ValueError, match=r"does not fit FusedMobileNetV3\(num_classes=3, width_mult=0.5\)"):
        fused("small", weights=state, num_classes=3, width_mult=0.5)
    with pytest.raises(ValueError, match="expected one of DEFAULT, IMAGENET1K_V1"):
        fused("small", weights="IMAGENET22K")
    with pytest.raises(ValueError, match="MobileNet_V3_Small_Weights member"):
        fused("small", weights=models.MobileNet_V3_Large_Weights.DEFAULT)
    with pytest.raises(ValueError, match="1000 classes but num_classes=3"):
        fused("large", weights="DEFAULT", num_classes=3)


def test_torchvision_weights(monkeypatch):
    state = theirs("large").state_dict()
    monkeypatch.setattr(models.MobileNet_V3_Large_Weights, "get_state_dict", lambda self, **kwargs: state)
    for weights in ("DEFAULT", "MobileNet_V3_Large_Weights.IMAGENET1K_V1", models.MobileNet_V3_Large_Weights.DEFAULT):
        model = fused("large", weights=weights)
        assert torch.equal(model.features[4].block[2].fc1.weight, state["features.4.block.2.fc1.weight"])


def test_new_head():
    model = fused("small", width_mult=0.35, num_classes=9)
    model.classifier[3] = torch.nn.Linear(model.classifier[3].in_features, 2)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 2)


def test_part_of_the_features():
    want, got = pair("small")
    x = torch.randn(2, 3, 40, 33, dtype=torch.float64)
    with mk.backend("reference"), mk.count_stages() as counts:
        out = got.features[:5](x)
    torch.testing.assert_close(out, want.features[:5](x), rtol=1e-10, atol=1e-12)
    assert written(counts) == 5 - takes_raw_stem(got)


def test_feature_extractor():
    extract = pytest.importorskip("torchvision.models.feature_extraction").create_feature_extractor
    nodes = {"features.3": "early", "features.12": "late"}
    want, got = (extract(model, nodes) for model in pair("small"))
    x = torch.randn(2, 3, 40, 33, dtype=torch.float64)
    for accelerated in (False, True):
        if accelerated:
            mk.accelerate(got)
        with mk.backend("reference"), mk.count_stages() as counts:
            found = got(x)
        # squeeze-excite is no module there, so that rows end before it
        assert native_calls(counts) == 0 and counts["mnet_ref::depthwise"] == 11 * accelerated
        for name, value in want(x).items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("backend", "mode"), PATHS[1:], ids=["chain", "algebraic"])
@sizes
def test_accelerate(arch, backend, mode):
    kwargs = {"num_classes": 5, "dropout": 0.0, "width_mult": 0.35}
    original, model = twins(theirs(arch, **kwargs), theirs(arch, **kwargs))
    was = [type(m) for m in model.modules()]
    count = len(model.features)
    report = mk.accelerate(model)
    assert len(report.replaced) == count and not report.kept and not report.plain
    assert list(model.state_dict()) == list(original.state_dict())
    counts = compare(original, model, backend, mode, (40, 33))
    ours = fused(arch, **kwargs).double()
    assert counts == compare(original, twins(original, ours)[1], backend, mode, (40, 33)), "as this package's own model"
    assert native_calls(counts) == 0 and written(counts) == count - 1 - takes_raw_stem(model)
    assert (counts["mnet_ref::expand_depthwise"] > 0) == (mode == "algebraic")
    names = mk.restore(model)
    assert len(names) == len(report.replaced) + len(report.joined)
    assert [type(m) for m in model.modules()] == was


def test_a_replaced_gate_runs_native(caplog):
    want, got = pair("small")
    for model in (want, got):
        model.features[4].block[2].activation = torch.nn.GELU()
    with caplog.at_level(logging.WARNING, "mnet_kernels"):
        compare(want, got, "reference", "chain", (32, 32))
    assert "squeeze-excite activation is GELU" in caplog.text


def test_hooks_on_the_project_layer_are_called(caplog):
    _, got = pair("small")
    seen = []
    got.features[2].block[2].register_forward_hook(lambda *args: seen.append(1))
    with mk.backend("reference"), caplog.at_level(logging.WARNING, "mnet_kernels"):
        got(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert seen and "FusedPointwiseConvBNAct has hooks" in caplog.text


def test_stem_stride():
    assert fused("small", width_mult=0.35, stem_stride=1).features(torch.randn(2, 3, 32, 32)).shape[-2:] == (2, 2)
