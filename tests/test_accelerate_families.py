"""accelerate on whole families of torchvision's and timm's: the same outputs, gradients and statistics as before."""

import copy
import pickle

import pytest
import torch
import torchvision
from blocks import assert_same
from networks import assert_equal, compare, native_calls, randomise, step
from torch import nn

import mnet_kernels as mk

timm = pytest.importorskip("timm")

# (model, size of the images, blocks replaced, blocks kept)
TORCHVISION = {
    "mobilenet_v2": (64, 19, 0),
    "mobilenet_v3_large": (64, 17, 0),
    "mobilenet_v3_small": (64, 13, 0),
    "mnasnet0_5": (64, 17, 0),
    "efficientnet_b0": (64, 18, 0),
}
TIMM = {
    "mobilenetv1_100": (64, 14, 0),
    "mobilenetv2_100": (64, 18, 0),
    "mobilenetv3_large_100": (64, 17, 0),
    "mobilenetv3_small_100": (64, 13, 0),
    "mnasnet_100": (64, 18, 0),
    "efficientnet_b0": (64, 17, 0),
    "efficientnet_lite0": (64, 17, 0),
    "fbnetc_100": (64, 22, 0),
    "semnasnet_100": (64, 17, 0),
    "tf_mobilenetv3_small_075": (64, 12, 0),  # without its five convolutions with TensorFlow's padding
}


def build(library, name, drop=0.0):
    if library == "torchvision":
        options = {"stochastic_depth_prob": drop} if name.startswith("efficientnet") else {}
        model = getattr(torchvision.models, name)(num_classes=5, dropout=0.0, **options)
    else:
        model = timm.create_model(name, num_classes=5, drop_rate=0.0, drop_path_rate=drop)
    randomise(model)
    return model.double()


CASES = [("torchvision", name, *row) for name, row in TORCHVISION.items()]
CASES += [("timm", name, *row) for name, row in TIMM.items()]


@pytest.mark.parametrize(("library", "name", "size", "replaced", "kept"), CASES, ids=lambda v: str(v))
def test_the_same_model(library, name, size, replaced, kept):
    original = build(library, name)
    model = copy.deepcopy(original)
    was, keys = [type(m) for m in model.modules()], list(model.state_dict())
    parameters = dict(model.named_parameters())
    report = mk.accelerate(model)
    assert (len(report.replaced), len(report.kept)) == (replaced, kept), report
    assert list(model.state_dict()) == keys and all(p is parameters[n] for n, p in model.named_parameters())
    for training in (True, False):
        counts = compare(original, model, "reference", "chain", (size, size), training=training)
        assert native_calls(counts) == 0 and counts["mnet_ref::depthwise"] > 0
    assert len(mk.restore(model)) == len(report.replaced) + len(report.joined)
    assert [type(m) for m in model.modules()] == was


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_stochastic_depth(library):
    """The branch is dropped for the same images; in eval mode the residual is fused again."""
    original = build(library, "efficientnet_b0", drop=0.5)
    model = copy.deepcopy(original)
    mk.accelerate(model)
    x, target = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.randint(5, (4,))
    for training in (True, False):
        results = []
        for m in (original, model):
            torch.manual_seed(5)
            with mk.backend("reference"):
                results.append(step(m.train(training), x, target))
        assert_equal(results[1], results[0])


@pytest.mark.parametrize("name", ["mobileone_s0", "resnet18"])
def test_other_models_are_left_alone(name):
    model = timm.create_model(name)
    was = [type(m) for m in model.modules()]
    assert mk.accelerate(model).replaced == [] and [type(m) for m in model.modules()] == was


def conv_bn(i, o, k, groups=1, act=nn.ReLU6, stride=1):
    return [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), *([act()] if act else [])]


class Vendored(nn.Module):
    """A block of the user's own, which runs a Sequential."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return 2 * x + self.body(x)


NESTED = [nn.Sequential(*conv_bn(6, 18, 1)), nn.Sequential(*conv_bn(18, 18, 3, 18)), *conv_bn(18, 6, 1, act=None)]
FLAT = [*conv_bn(6, 18, 1), *conv_bn(18, 18, 5, 18), *conv_bn(18, 6, 1, act=None)]
MIXED = [*conv_bn(6, 18, 3), *conv_bn(18, 18, 3, 18, nn.ReLU), nn.Dropout(0.0), *conv_bn(18, 6, 1, act=nn.SiLU)]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (NESTED, "inverted_residual"),
        (FLAT, "inverted_residual"),
        ([*conv_bn(6, 6, 3, 6), *conv_bn(6, 6, 1)], "separable_conv"),
        (MIXED, "a Sequential that runs stem_conv_bn_act, depthwise_conv_bn_act, pointwise_conv_bn_act"),
    ],
    ids=["nested", "flat", "separable", "mixed"],
)
def test_sequences_by_their_structure(body, what):
    model = nn.Sequential(Vendored(nn.Sequential(*copy.deepcopy(body))), nn.Conv2d(6, 7, 1), nn.Flatten()).double()
    original = copy.deepcopy(model)
    assert [row[2] for row in mk.accelerate(model).replaced] == [what]
    x = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    outs = []
    for m in (original, model):
        m.zero_grad()
        with mk.backend("reference"):
            out = m(x)
        out.square().sum().backward()
        outs.append({"out": out.detach()} | {n: p.grad for n, p in m.named_parameters()})
    assert_same(outs[1], outs[0])


def test_a_child_put_in_later_counts():
    model = nn.Sequential(Vendored(nn.Sequential(*copy.deepcopy(FLAT)))).double()
    mk.accelerate(model)
    model[0].body.append(nn.Hardswish())  # after the project layer: no such op
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    want = nn.functional.hardswish(nn.Sequential(*list(model[0].body)[:8])(x))
    torch.testing.assert_close(model[0].body(x), want)


def test_timm_registers_fused_models():
    import mnet_kernels.timm as fused

    assert "fused_mobilenetv2_100" in timm.list_models("fused_*") and len(fused.register()) > 50
    model = timm.create_model("fused_mobilenetv3_small_050", num_classes=3)
    plain = timm.create_model("mobilenetv3_small_050", num_classes=3)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert len(mk.restore(model)) > 12 and model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("name", ["mobilenetv1_100", "efficientnet_b0"])
def test_compiled_whole(name):
    """They trace without a break, and a copy of them can be pickled."""
    original = build("timm", name)
    model = copy.deepcopy(original)
    mk.accelerate(model)
    model = pickle.loads(pickle.dumps(model))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, target = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.randint(5, (4,))
    want = step(original, x, target)
    with mk.backend("reference"):
        got = step(compiled, x, target)
    assert_equal({k.replace("_orig_mod.", ""): v for k, v in got.items()}, want)
