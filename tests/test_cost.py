"""The cost model against the papers' figures, closed forms of small blocks, and itself."""

import json
import sys

import pytest
import torch
from torch import nn

from mnet_kernels import cost
from mnet_kernels.cost.__main__ import main
from mnet_kernels.models import MODELS
from mnet_kernels.nn import FusedInvertedResidual, FusedSeparable


def build(name, width=1.0, **kwargs):
    with torch.device("meta"):
        return MODELS[name](width_mult=width, **kwargs)


def madds(model, size, width=None):
    return sum(layer.madds for layer in cost.layers(model, (3, size, width or size)))


def parameters(model):
    return sum(layer.parameters for layer in cost.layers(model, (3, 64, 64)))


# Howard et al. 2017, tables 6 and 7: millions of multiply-adds
V1_PAPER = [(1.0, 224, 569), (0.75, 224, 325), (0.5, 224, 149), (0.25, 224, 41)]
V1_PAPER += [(1.0, 192, 418), (1.0, 160, 290), (1.0, 128, 186)]


@pytest.mark.parametrize(("width", "size", "millions"), V1_PAPER)
def test_v1_is_the_papers(width, size, millions):
    assert madds(build("v1", width), size) / 1e6 == pytest.approx(millions, rel=0.005)


# Sandler et al. 2018 as published with its checkpoints (tensorflow/models, slim): the exact number, rounded down
V2_PUBLISHED = {
    1.4: {224: 582},
    1.3: {224: 509},
    1.0: {224: 300, 192: 221, 160: 154, 128: 99, 96: 56},
    0.75: {224: 209, 192: 153, 160: 107, 128: 69, 96: 39},
    0.5: {224: 97, 192: 71, 160: 50, 128: 32, 96: 18},
    0.35: {224: 59, 192: 43, 160: 30, 128: 20, 96: 11},
}


@pytest.mark.parametrize("width", V2_PUBLISHED)
def test_v2_is_the_published(width):
    model = build("v2", width)
    assert {size: madds(model, size) // 10**6 for size in V2_PUBLISHED[width]} == V2_PUBLISHED[width]


# Howard et al. 2019, table 3, and the rows at width 0.75 published with its checkpoints
@pytest.mark.parametrize(
    ("name", "width", "millions"),
    [("v3-large", 1.0, 219), ("v3-small", 1.0, 56), ("v3-large", 0.75, 155), ("v3-small", 0.75, 44)],
)
def test_v3_is_the_papers(name, width, millions):
    assert madds(build(name, width, width_rule="paper"), 224) / 1e6 == pytest.approx(millions, rel=0.02)


def test_v3_width_rules_differ():
    """torchvision's rule misses the paper's figure at width 0.75; at 1 the rules are one."""
    assert madds(build("v3-large", 0.75), 224) / 1e6 == pytest.approx(140.03, abs=0.01)
    for name in ("v3-large", "v3-small"):
        assert madds(build(name), 224) == madds(build(name, width_rule="paper"), 224)


EXACT = [("v1", 568740352), ("v2", 300774272), ("v3-large", 216589760), ("v3-small", 56510400)]


@pytest.mark.parametrize(("name", "number"), EXACT)
def test_exact_numbers(name, number):
    assert madds(build(name), 224) == number


@pytest.mark.parametrize("width", [1.0, 0.75, 0.35])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_models(name, width):
    model = build(name, width)
    assert parameters(model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"), [("v1", 4231976), ("v2", 3504872), ("v3-large", 5483032), ("v3-small", 2542856)]
)
def test_parameters(name, count):
    assert parameters(build(name)) == count


def test_one_separable_layer():
    """The saving of one depthwise separable layer over a dense one (Howard et al. 2017, section 3.1)."""
    separable = cost.layers(FusedSeparable(64, 128), (64, 112, 112))
    dense = cost.layers(nn.Sequential(nn.Conv2d(64, 128, 3, padding=1, bias=False)), (64, 112, 112))
    assert [layer.kind for layer in (*separable, *dense)] == ["depthwise", "pointwise", "dense"]
    few, many = sum(layer.madds for layer in separable), dense[0].madds
    assert (few, many) == (109985792, 924844032)
    assert few / many == pytest.approx(1 / 128 + 1 / 9) and round(few / many, 4) == 0.1189


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (97, 64), (225, 224), (511, 512)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_resolution(name, size):
    """The resolution multiplier is the size of the input: any from 32 to 512, odd or not square."""
    model = build(name, num_classes=10)
    assert model.eval()(torch.empty(1, 3, *size, device="meta")).shape == (1, 10)
    assert madds(model, *size) > 0


N, STEP = 8, {"batch": 8, "dtype": torch.bfloat16}


def maps(kernels):
    """Elements of 2 bytes moved per phase, by kernels that touch feature maps."""
    return {phase: sum(k.bytes for k in kernels if k.phase == phase) / 2 for phase in ("forward", "backward")}


def separable_elements(i, d, o):
    """Map elements that a separable block moves: input i, depthwise output d, pointwise output o; no input gradient."""
    bn_act, bn_act_back = 3 + 2, 3 + 5
    eager = {
        "forward": (i + d) + (d + o) + bn_act * (d + o),
        "backward": (i + d) + 2 * (d + o) + bn_act_back * (d + o),
    }
    compiled = {"forward": (i + d) + (d + o) + 3 * (d + o), "backward": (i + d) + 2 * (d + o) + 5 * (d + o)}
    # sums of (grad, y); pointwise backward reads grad, y, d and writes its gradient; depthwise reads that, d and i
    chain = {"forward": (i + d) + (d + o) + 2 * o, "backward": 2 * o + (2 * o + 2 * d) + (2 * d + i)}
    return {"eager": eager, "compile": compiled, "chain": chain}


def test_bytes_of_a_separable_block():
    found = cost.cost(FusedSeparable(32, 48, 2), (32, 56, 56), schemes=("eager", "compile", "chain"), **STEP)
    want = separable_elements(N * 32 * 56 * 56, N * 32 * 28 * 28, N * 48 * 28 * 28)
    for scheme, phases in want.items():
        got = maps(found.kernels[scheme])
        for phase, elements in phases.items():
            # what is more: weights and tables of the channels
            assert elements <= got[phase] <= 1.01 * elements + 40000, (scheme, phase)
    # kept: input and both raw maps; eager keeps the batch norms' outputs and the depthwise activation as well
    i, d, o = N * 32 * 56 * 56, N * 32 * 28 * 28, N * 48 * 28 * 28
    assert 2 * (i + d + o) <= found.saved["chain"] <= 2.02 * (i + d + o)
    assert 2 * (i + 3 * d + 2 * o) <= found.saved["eager"] <= 2.02 * (i + 3 * d + 2 * o)


def test_algebraic_never_moves_the_expanded_map():
    block, channels, side = FusedInvertedResidual(24, 24, 1, 6), 24, 56
    found = cost.cost(block, (channels, side, side), schemes=("chain", "algebraic"), **STEP)
    c, e = (N * k * side * side for k in (channels, 6 * channels))
    # gram c, expand_depthwise c + e, pointwise e + c, normalize with the residual 3c
    got = maps(found.kernels["algebraic"])
    assert 6 * c + 2 * e <= got["forward"] <= 1.02 * (6 * c + 2 * e) + 40000
    # sums 2c, B1 2c + e, B2 (grad, y3, y2, x) 3c + e: the input needs no gradient here
    assert 7 * c + 2 * e <= got["backward"] <= 1.02 * (7 * c + 2 * e) + 120000
    assert found.saved["algebraic"] < 0.6 * found.saved["chain"]


def test_a_forced_native_backend_is_refused(monkeypatch):
    monkeypatch.setattr("mnet_kernels.choice._environment", ("native", "auto"))
    monkeypatch.setenv("MNET_BACKEND", "native")
    with pytest.raises(ValueError, match="chain cannot be traced while MNET_BACKEND=native"):
        cost.cost(FusedSeparable(3, 4), (3, 8, 8), schemes=("eager", "chain"), **STEP)


@pytest.fixture(scope="module")
def v2():
    return cost.cost(build("v2"))


def test_layers_add_up(v2):
    for scheme in cost.SCHEMES:
        assert sum(v2.bytes(scheme, i) for i in range(len(v2.layers))) == v2.bytes(scheme)
        assert sum(v2.floor(scheme, None, i) for i in range(len(v2.layers))) == pytest.approx(v2.floor(scheme))
        assert all(v2.bytes(scheme, i) > 0 for i in range(len(v2.layers)))


def test_arithmetic_is_the_layers(v2):
    """Forward matrix FLOPs are two a multiply-add of everything that is not depthwise; backward twice that, but for
    the image, which needs no gradient."""
    inner = [layer for layer in v2.layers if layer.kind != "depthwise"]
    want = 2 * v2.batch * sum(layer.madds for layer in inner)
    for scheme in ("eager", "chain"):
        flops = {p: sum(k.tensor for k in v2.kernels[scheme] if k.phase == p) for p in ("forward", "backward")}
        assert flops["forward"] == pytest.approx(want, rel=1e-12)
        assert flops["backward"] == pytest.approx(2 * want - 2 * v2.batch * inner[0].madds, rel=1e-12)


def test_schemes_in_order(v2):
    eager, compiled, chain, algebraic = (v2.floor(scheme) for scheme in cost.SCHEMES)
    assert eager > compiled > chain > algebraic
    assert v2.saved["eager"] > v2.saved["chain"] > v2.saved["algebraic"]


def test_auto_takes_each_block_in_the_mode_of_its_size(monkeypatch):
    asked = []
    monkeypatch.setattr(
        sys.modules["mnet_kernels.cost.trace"], "least_positions", lambda *key: asked.append(key) or 14 * 14
    )
    found = cost.cost(build("v3-small"), dtype=torch.float32, schemes=("chain", "algebraic", "auto"), batch=2)
    same = {
        i: tuple(found.bytes("auto", i) == found.bytes(mode, i) for mode in ("chain", "algebraic"))
        for i in range(len(found.layers))
        if found.bytes("chain", i) != found.bytes("algebraic", i)
    }
    large = {i: found.layers[i].in_shape[-1] >= 14 for i in same}
    # the depthwise layer carries the block's stages; its input is the block's, at stride 1 and 2
    assert {i: large[i] for i in same if found.layers[i].kind == "depthwise"} == {
        i: own == (False, True) for i, own in same.items() if found.layers[i].kind == "depthwise"
    }
    assert set(large.values()) == {True, False}
    assert found.saved["chain"] > found.saved["auto"] > found.saved["algebraic"]
    assert asked == [("cpu", torch.float32)]


def test_floors_follow_the_device(v2):
    wide = cost.Device(bandwidth=1e30, tensor=1e12, vector=1e30)
    assert v2.floor("eager", wide) == pytest.approx(sum(k.tensor for k in v2.kernels["eager"]) / 1e12)
    narrow = cost.Device(bandwidth=1e9, tensor=1e30, vector=1e30)
    assert v2.floor("chain", narrow) == pytest.approx(v2.bytes("chain") / 1e9)


def test_the_model_is_left_alone():
    model = MODELS["v2"](width_mult=0.35).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cost.cost(model, (3, 32, 32), batch=2, schemes=("chain",))
    assert not model.training and all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_models_can_be_counted():
    models = pytest.importorskip("torchvision.models")
    assert madds(models.mobilenet_v3_small(), 224) == madds(build("v3-small"), 224)


def test_errors():
    with pytest.raises(ValueError, match="schemes must be of eager, compile, chain, algebraic, auto, got fast"):
        cost.cost(build("v1"), schemes=("fast",))
    twice = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="0 is called more than once"):
        cost.layers(nn.Sequential(twice, twice), (3, 8, 8))
    unused = FusedSeparable(3, 4)
    unused.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="does not call spare"):
        cost.layers(unused, (3, 8, 8))
    with pytest.raises(ValueError, match="0 has parameters but stands before"):
        cost.layers(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), (3, 8, 8))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        cost.cost(build("v2"), (3, 32, 32), batch=1)


def test_table(capsys):
    assert main(["v1", "--width", "0.25", "--res", "128", "--batch", "4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "MobileNet v1, width 0.25, 128 px, a training step of 4, bf16"
    total = next(line for line in out if line.startswith("total"))
    assert total.split()[1:3] == ["470072", "13.570"]
    assert len(out) == 1 + 2 + 28 + 2 + 1 and out[-1].startswith("kept for backward, MB an image: eager ")


def test_json(capsys):
    assert main(["v3-small", "--width", "0.75", "--width-rule", "paper", "--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["parameters"] == 2041872 and found["total"]["madds"] == sum(
        layer["madds"] for layer in found["layers"]
    )
    assert set(found["total"]["schemes"]) == set(cost.SCHEMES)
    for scheme in cost.SCHEMES:
        assert found["total"]["schemes"][scheme]["bytes"] == sum(
            layer["schemes"][scheme]["bytes"] for layer in found["layers"]
        )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["v4"], "invalid choice: 'v4'"),
        (["v2", "--width", "0"], "0 is not above 0"),
        (["v2", "--res", "x"], "invalid int value"),
        (["v2", "--width-rule", "paper"], "--width-rule is for v3-large and v3-small"),
        (["v2", "--batch", "1", "--res", "32"], "more than 1 value per channel"),
    ],
)
def test_command_line_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
