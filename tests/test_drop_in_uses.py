"""Uses of a model that an accelerated one must serve as the plain one does, each by itself.

test_drop_in_program.py mixes them.
"""

import copy
import importlib
import warnings
from functools import partial

import pytest
import torch
from drop_in_compare import same_objects, same_structure, same_tensors
from drop_in_models import build, separable
from drop_in_probes import step
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping, quantize_fx
from torchvision.models import mobilenet_v2, mobilenet_v3_small
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import mnet_kernels as mk


def pair(family="v2"):
    """(a plain model, the same accelerated), in float64."""
    plain, ours = build(family, 1), build(family, 1)
    assert mk.accelerate(ours).replaced
    return plain, ours


def assert_same(plain, ours, x=None):
    """All that can be read off both, and a step of both."""
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64) if x is None else x
    same_structure(plain, ours)
    with mk.backend("reference"):
        got, want = (step(model, x.clone().requires_grad_()) for model in (ours, plain))
    same_tensors(got, want, "a step")
    same_structure(plain, ours)


def row():
    """A Sequential inside a model, and the same accelerated; its input."""
    torch.manual_seed(3)
    plain = nn.ModuleDict({"row": separable(8, 8)}).double()
    ours = copy.deepcopy(plain)
    mk.accelerate(ours)
    return plain["row"], ours["row"], torch.randn(4, 8, 9, 9, dtype=torch.float64)


# ---- a Sequential is a list of modules ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [slice(0, 3), slice(3, None), slice(1, -1), slice(None)], ids=str)
def test_slices(part):
    plain, ours, x = row()
    assert_same(plain[part], ours[part], x)


SEQUENTIAL_EDITS = {
    "del": lambda s: s.__delitem__(5),
    "del and append": lambda s: (s.__delitem__(5), s.append(nn.Tanh())),
    "pop": lambda s: [s.pop(-1) for _ in range(3)],
    "append": lambda s: s.append(nn.Tanh()),
    "insert": lambda s: s.insert(3, nn.Tanh()),
    "extend": lambda s: s.extend([nn.Tanh(), nn.Identity()]),
    "assignment": lambda s: s.__setitem__(2, nn.Tanh()),
}


@pytest.mark.parametrize("edit", SEQUENTIAL_EDITS.values(), ids=SEQUENTIAL_EDITS)
def test_edits_of_a_sequential(edit):
    """They are seen at once, and restore keeps them."""
    plain, ours, x = row()
    for each in (plain, ours):
        edit(each)
    assert_same(plain, ours, x)
    assert len(ours) == len(plain)
    mk.restore(ours)
    same_objects(plain, ours)
    assert_same(plain, ours, x)


# ---- a block is the user's own object -------------------------------------------------------------------------------


def give_state(model):
    block = model.features[3]
    block.alpha = nn.Parameter(torch.ones(2, dtype=torch.float64))
    block.register_buffer("mask", torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_blocks_own_state(before):
    """Parameters and buffers given to a block before accelerate or after: in the state dict, moved, kept by restore."""
    plain, ours = build("v2", 1), build("v2", 1)
    if before:
        give_state(ours)
    mk.accelerate(ours)
    give_state(plain)
    if not before:
        give_state(ours)
    assert_same(plain, ours)
    assert "features.3.alpha" in ours.state_dict() and "features.3.mask" in ours.state_dict()
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    assert ours.float().features[3].alpha.dtype == ours.features[3].mask.dtype == torch.float32
    mk.restore(ours)
    same_structure(plain.float(), ours)


def test_attributes_set_later_are_seen():
    plain, ours = pair()
    assert plain.features[2].use_res_connect
    for model in (plain, ours):
        model.features[2].use_res_connect = False
        model.features[3].conv[1][0].stride = (1, 1)
        model.features[1].conv[0][1].eps = 0.5
    assert_same(plain, ours)
    mk.restore(ours)
    assert_same(plain, ours)


def test_restore_gives_the_edited_model():
    plain, ours = pair()
    for model in (plain, ours):
        torch.manual_seed(4)
        model.features[2].conv[0][2] = nn.Hardswish()
        model.features[3].conv[1][1] = nn.GroupNorm(1, model.features[3].conv[1][1].num_features)
        model.features[4].note = "mine"
        model.features.insert(3, nn.Dropout(0.0))
        model.features[1].eval()
    plain.double(), ours.double()
    mk.restore(ours)
    same_objects(plain, ours)
    assert_same(plain, ours)


def test_references_taken_before_stay_the_models():
    """An optimizer's, a hook's, a training loop's: accelerate and restore exchange no object."""
    model = build("v2", 1)
    before = list(model.modules())
    mk.accelerate(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))
    mk.restore(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


# ---- how much is accelerated ----------------------------------------------------------------------------------------


def test_twice():
    plain, ours = pair()
    assert not mk.accelerate(ours).replaced
    assert_same(plain, ours)
    mk.restore(ours)
    same_objects(plain, ours)


def test_a_part():
    plain, ours = build("v2", 1), build("v2", 1)
    mk.accelerate(ours.features)
    assert_same(plain, ours)
    mk.restore(ours)
    same_objects(plain, ours)


def test_a_part_is_restored():
    plain, ours = pair()
    mk.restore(ours.features[2])
    same_objects(plain.features[2], ours.features[2])
    assert_same(plain, ours)
    mk.restore(ours)
    same_objects(plain, ours)


def test_a_model_that_is_itself_a_block():
    plain = build("v2", 1).features[2]
    ours = copy.deepcopy(plain)
    mk.accelerate(ours)
    x = torch.randn(4, 8, 8, 8, dtype=torch.float64)
    with mk.backend("reference"), mk.count_stages() as counts:
        copy.deepcopy(ours)(x)
    assert counts, "nothing ran fused"
    assert_same(plain, ours, x)
    mk.restore(ours)
    same_objects(plain, ours)


def test_one_block_in_two_places():
    plain, ours = build("v2", 1), build("v2", 1)
    for model in (plain, ours):
        model.features.insert(3, model.features[2])
    mk.accelerate(ours)
    assert ours.features[2] is ours.features[3]
    assert_same(plain, ours)
    mk.restore(ours)
    same_objects(plain, ours)


# ---- replicas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["accelerated", "Fused"])
def test_a_replica_on_another_device(kind, monkeypatch):
    """nn.DataParallel's replica computes with its own weights; the meta device stands for a second card."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(
        module, "_broadcast_coalesced_reshape", lambda ts, ds, detach=False: [[t.to(d) for t in ts] for d in ds]
    )
    model = build("v2", 1) if kind == "accelerated" else mk.FusedMobileNetV2(num_classes=3).double()
    if kind == "accelerated":
        mk.accelerate(model)
    copied = module.replicate(model.eval(), ["cpu", "meta"])[1]
    out = copied(torch.empty(2, 3, 32, 32, dtype=torch.float64, device="meta"))
    assert out.device.type == "meta" and out.shape == (2, 3)


# ---- what looks inside ----------------------------------------------------------------------------------------------


def accelerated(make):
    model = make()
    mk.accelerate(model)
    return model


SMALL = {"width_mult": 0.25, "inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]}
V2, V3 = partial(mobilenet_v2, **SMALL), partial(mobilenet_v3_small, width_mult=0.25)
NETS = {
    "accelerated V2": (V2, lambda: accelerated(V2)),
    "FusedMobileNetV2": (V2, partial(mk.FusedMobileNetV2, **SMALL)),
    "accelerated V3": (V3, lambda: accelerated(V3)),
    "FusedMobileNetV3": (V3, partial(mk.fused_mobilenet_v3_small, width_mult=0.25)),
}
nets = pytest.mark.parametrize(("plain", "ours"), NETS.values(), ids=NETS)


@nets
def test_feature_extraction(plain, ours):
    """Nodes within blocks have the plain model's names, and give the plain model's values."""
    plain, ours = plain().eval(), ours().eval()
    ours.load_state_dict(plain.state_dict())
    names, found = (get_graph_node_names(model)[1] for model in (plain, ours))
    if type(ours).__module__.startswith("mnet_kernels.models"):
        # torchvision's tracer does not go into its own layers, but into those of others: a name there has several nodes
        assert all(n in found or any(m.startswith(f"{n}.") for m in found) for n in names if n.startswith("features."))
    else:
        assert found == names
    nodes = [n for n in names if n.startswith("features.3.")]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        got, want = (create_feature_extractor(model, nodes)(x) for model in (ours, plain))
    assert len(nodes) >= 4
    for name in nodes:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def quantized(model):
    return sum("quantized" in type(m).__module__ and "Conv" in type(m).__name__ for m in model.modules())


def eager(model, x):
    """Without fx: the layers' classes are what is found."""
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare(model.eval())
    prepared(x)
    return torch.ao.quantization.convert(prepared)


def eager_qat(model, x):
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare_qat(model.train())
    prepared(x).sum().backward()
    return torch.ao.quantization.convert(prepared.eval())


def graph(model, x):
    prepared = quantize_fx.prepare_fx(model.eval(), get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    return quantize_fx.convert_fx(prepared)


def graph_qat(model, x):
    prepared = quantize_fx.prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x).sum().backward()
    return quantize_fx.convert_fx(prepared.eval())


@pytest.mark.parametrize("how", [eager, eager_qat, graph, graph_qat])
@pytest.mark.parametrize("name", ["accelerated V2", "FusedMobileNetV2"])
def test_quantization(name, how):
    """As many convolutions are quantized as in the plain model."""
    plain, ours = NETS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.randn(2, 3, 64, 64)
        want = quantized(how(plain(), x))
        assert want == 13
        assert quantized(how(ours(), x)) == want
