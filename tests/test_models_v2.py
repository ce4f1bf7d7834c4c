"""FusedMobileNetV2 against torchvision's mobilenet_v2: weights both ways, and every number of a training step."""

import copy
import pickle
from functools import partial

import pytest
import torch
from blocks import FUSED, assert_same
from networks import takes_raw_stem, written
from torch import nn
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2
from torchvision.models.feature_extraction import create_feature_extractor

import mnet_kernels as mk
from mnet_kernels import FusedMobileNetV2, fused_mobilenet_v2

PATHS = (("native", None), *FUSED)
NARROW = {"width_mult": 0.25, "num_classes": 7}


def twins(dtype=torch.float64, **kwargs):
    """torchvision's model and ours with the same weights, gammas and betas made uneven."""
    kwargs = {"dropout": 0.0, **kwargs}
    torchs = mobilenet_v2(**kwargs).to(dtype)
    with torch.no_grad():
        for m in torchs.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0.3, 0.3)
                if m.running_mean is not None:
                    m.running_mean.normal_()
                    m.running_var.uniform_(0.5, 1.5)
    ours = FusedMobileNetV2(**kwargs).to(dtype)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def training_step(model, x, labels):
    """Everything a step yields, by name; the model's buffers are put back."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad()
    out = model(x)
    loss = nn.functional.cross_entropy(out, labels)
    loss.backward()
    result = {"out": out.detach(), "loss": loss.detach()}
    result |= {f"d_{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    result |= {n: b.clone() for n, b in model.named_buffers()}
    model.load_state_dict(before)
    return result


def batch(n=3, size=64, classes=7, dtype=torch.float64):
    return torch.randn(n, 3, size, size, dtype=dtype), torch.randint(classes, (n,))


def compare(torchs, ours, paths=PATHS, size=64):
    x, labels = batch(size=size)
    want = training_step(torchs, x, labels)
    for backend, mode in paths:
        with mk.backend(backend, mode), mk.count_stages() as counts:
            got = training_step(ours, x, labels)
        assert_same(got, want)
        assert_path(ours, counts, backend, mode)
    return want


def assert_path(model, counts, backend, mode):
    """The stem, 17 inverted residuals and the head ran on the path that was asked for, forward and backward."""
    if backend == "native":
        assert counts["native::stem_conv_bn_act"] == counts["native::pointwise_conv_bn_act_pool"] == 1
        assert counts["native::inverted_residual"] == 17
        assert not any(k.startswith("mnet_") for k in counts)
        return
    assert not any(k.startswith("native::") for k in counts)
    algebraic = 16 if mode == "algebraic" else 0  # the first block has no expand layer
    assert counts["mnet_ref::expand_depthwise"] == algebraic
    assert counts["mnet_ref::depthwise"] == 17 - algebraic and counts["mnet_ref::stem"] == 1
    assert written(counts) == 18 - takes_raw_stem(model) and counts["mnet_ref::squeeze"] == 1


def test_whole_network():
    """The real thing once: width 1, 1000 classes."""
    torchs, ours = twins()
    want = compare(torchs, ours)
    assert len([n for n in want if n.startswith("d_")]) == 158  # 52 convolutions and batch norms, the classifier


@pytest.mark.parametrize(
    "norm_layer",
    [partial(nn.BatchNorm2d, momentum=None), partial(nn.BatchNorm2d, track_running_stats=False), nn.BatchNorm2d],
    ids=["cumulative", "untracked", "plain"],
)
def test_norm_layers(norm_layer):
    compare(*twins(**NARROW, norm_layer=norm_layer))


def test_eval():
    torchs, ours = twins(**NARROW)
    compare(torchs.eval(), ours.eval())


@pytest.mark.parametrize("odd", [(33, 47), (32, 32)])
def test_odd_sizes(odd):
    torchs, ours = twins(**NARROW)
    x, labels = torch.randn(4, 3, *odd, dtype=torch.float64), torch.randint(7, (4,))
    want = training_step(torchs, x, labels)
    for backend, mode in FUSED:
        with mk.backend(backend, mode):
            assert_same(training_step(ours, x, labels), want, 1e-9)


@pytest.mark.parametrize("frozen", range(4))
def test_any_mix_of_frozen_batch_norms_and_weights(frozen):
    torchs, ours = twins(**NARROW)
    names = [n for n, m in torchs.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for name in names:
        off = bool(torch.rand(()) < 0.5)
        for model in (torchs, ours):
            model.get_submodule(name).train(not off)
    for name, parameter in torchs.named_parameters():
        keep = bool(torch.rand(()) < 0.5)
        parameter.requires_grad_(keep)
        ours.get_parameter(name).requires_grad_(keep)
    torchs.classifier[1].weight.requires_grad_()
    ours.classifier[1].weight.requires_grad_()
    compare(torchs, ours)


def test_same_seed_same_weights():
    torch.manual_seed(3)
    torchs = mobilenet_v2(width_mult=0.5)
    torch.manual_seed(3)
    ours = FusedMobileNetV2(width_mult=0.5)
    assert list(torchs.state_dict()) == list(ours.state_dict())
    for name, value in torchs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_classes": 3},
        {"width_mult": 1.4},
        {"width_mult": 0.35, "round_nearest": 4},
        {"inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2]]},
        {"norm_layer": partial(nn.GroupNorm, 4)},
        {"dropout": 0.7},
    ],
    ids=str,
)
def test_arguments(kwargs):
    torchs, ours = mobilenet_v2(**kwargs), fused_mobilenet_v2(**kwargs)
    ours.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    shapes = {n: v.shape for n, v in torchs.state_dict().items()}
    assert shapes == {n: v.shape for n, v in ours.state_dict().items()}
    assert ours.classifier[0].p == torchs.classifier[0].p and ours.last_channel == torchs.last_channel


def test_other_norms_run_unfused_and_say_so(caplog):
    torchs, ours = twins(torch.float32, **NARROW, norm_layer=partial(nn.GroupNorm, 4))
    with mk.backend("reference"), mk.count_stages() as counts:
        torch.testing.assert_close(ours(torch.ones(2, 3, 32, 32)), torchs(torch.ones(2, 3, 32, 32)))
    assert not any(k.startswith("mnet_") for k in counts)
    assert [r.message for r in caplog.records if "GroupNorm" in r.message]


@pytest.mark.parametrize("setting", [[], [[1, 16, 1]]])
def test_bad_setting(setting):
    with pytest.raises(ValueError, match="inverted_residual_setting"):
        FusedMobileNetV2(inverted_residual_setting=setting)


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline_weights(monkeypatch):
    """torchvision's enum with its download replaced by a state_dict of the right shapes."""
    state = mobilenet_v2().state_dict()
    monkeypatch.setattr(MobileNet_V2_Weights, "get_state_dict", lambda self, *args, **kwargs: state)
    return state


@pytest.mark.parametrize("how", ["member", "name", "full name", "path", "state_dict", "checkpoint"])
def test_weights(how, offline_weights, tmp_path):
    torch.save(offline_weights, tmp_path / "w.pth")
    torch.save({"model": offline_weights, "epoch": 3}, tmp_path / "c.pt")
    given = {
        "member": MobileNet_V2_Weights.IMAGENET1K_V2,
        "name": "DEFAULT",
        "full name": "MobileNet_V2_Weights.IMAGENET1K_V1",
        "path": tmp_path / "w.pth",
        "checkpoint": str(tmp_path / "c.pt"),
        "state_dict": offline_weights,
    }[how]
    model = fused_mobilenet_v2(weights=given, progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, offline_weights[name])


def test_bad_weights(offline_weights, tmp_path):
    with pytest.raises(ValueError, match="unknown weights 'IMAGENET'.*IMAGENET1K_V1"):
        fused_mobilenet_v2(weights="IMAGENET")
    with pytest.raises(ValueError, match="1000 classes but num_classes=10.*classifier"):
        fused_mobilenet_v2(weights="DEFAULT", num_classes=10)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        fused_mobilenet_v2(weights=tmp_path / "missing.pth")
    (tmp_path / "damaged.pth").write_bytes(b"PK not really")
    with pytest.raises(ValueError, match="damaged"):
        fused_mobilenet_v2(weights=tmp_path / "damaged.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state_dict"):
        fused_mobilenet_v2(weights=tmp_path / "list.pth")
    with pytest.raises(ValueError, match="does not fit FusedMobileNetV2.*width_mult=0.5"):
        fused_mobilenet_v2(weights=offline_weights, width_mult=0.5)
    with pytest.raises(ValueError, match="must be a MobileNet_V2_Weights"):
        fused_mobilenet_v2(weights=3)


# ---- torchvision's idioms ------------------------------------------------------------------------------------------


def test_swapping_the_classifier():
    torchs, ours = twins(**NARROW)
    head = nn.Linear(torchs.last_channel, 5).double()
    torchs.classifier[1] = head
    ours.classifier[1] = copy.deepcopy(head)
    x, labels = batch(classes=5, size=64)  # at 32 the last maps are 1x1: batch norm is ill-conditioned
    with mk.backend("reference"):
        assert_same(training_step(ours, x, labels), training_step(torchs, x, labels))


@pytest.mark.parametrize("n", [1, 2, 7, 19])
def test_slices_of_the_features(n):
    torchs, ours = twins(**NARROW)
    x, _ = batch(size=64)  # the last maps' statistics are of more than a value an image
    with mk.backend("reference"), torch.no_grad():
        torch.testing.assert_close(ours.features[:n](x), torchs.features[:n](x), rtol=1e-9, atol=1e-9)


def test_feature_extractor():
    torchs, ours = twins(**NARROW)
    nodes = {"features.3": "low", "features.18": "high"}
    extractors = [create_feature_extractor(m, nodes) for m in (torchs, ours)]
    x, _ = batch(size=64)
    want, got = (e(x) for e in extractors)
    assert extractors[1].state_dict().keys() == extractors[0].state_dict().keys()
    mk.accelerate(extractors[1])
    with mk.backend("reference"), mk.count_stages() as counts:
        again = extractors[1](x)
    assert counts["mnet_ref::depthwise"] == 17, "the extractor must run the blocks fused"
    for name in nodes.values():
        torch.testing.assert_close(again[name], want[name], rtol=1e-9, atol=1e-9)
    mk.restore(extractors[1])
    for name in nodes.values():
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(duplicate):
    _, ours = twins(torch.float32, **NARROW)
    other = duplicate(ours)
    x = torch.randn(2, 3, 32, 32)
    with mk.backend("reference"):
        want = ours.eval()(x)
        with torch.no_grad():
            for p in ours.parameters():
                p.zero_()
        torch.testing.assert_close(other.eval()(x), want)


def test_activation_checkpointing():
    """Recomputed blocks give the same gradients, and the running statistics move twice, as torch's do."""
    torchs, ours = twins(**NARROW)
    x, labels = batch()

    def step(model):
        middle = torch.utils.checkpoint.checkpoint(model.features[:9], x, use_reentrant=False)
        out = model.classifier(model.features[9:](middle).mean((2, 3)))
        nn.functional.cross_entropy(out, labels).backward()
        result = {n: p.grad for n, p in model.named_parameters()}
        return result | dict(model.named_buffers())

    with mk.backend("reference", "chain"):
        assert_same(step(ours), step(torchs))


def test_pinned_modules_keep_their_backend():
    model = FusedMobileNetV2(**NARROW, backend="reference", mode="algebraic").double()
    x, _ = batch(size=32)
    with mk.count_stages() as counts:
        model(x)
    assert counts["mnet_ref::expand_depthwise"] == 16


@pytest.mark.parametrize("mode", ["chain", "algebraic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, mode):
    """Under autocast parameters, statistics and gradients stay in float32, and the loss is near torch's."""
    torchs, ours = twins(torch.float32, **NARROW)
    x, labels = batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        want = training_step(torchs, x, labels)
        with mk.backend("reference", mode), mk.count_stages() as counts:
            got = training_step(ours, x, labels)
    assert written(counts) == 18 and counts["mnet_ref::squeeze"] == 1
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == want[name].dtype, name
        assert torch.isfinite(value).all(), name
    assert abs(got["loss"] - want["loss"]) < 0.1 * want["loss"]


def test_deterministic():
    """Bitwise equal runs under deterministic algorithms."""
    _, ours = twins(torch.float32, **NARROW)
    x, labels = batch(dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        for mode in ("chain", "algebraic"):
            with mk.backend("reference", mode):
                first, second = training_step(ours, x, labels), training_step(ours, x, labels)
            for name, value in first.items():
                assert torch.equal(value, second[name]), name
    finally:
        torch.use_deterministic_algorithms(False)
