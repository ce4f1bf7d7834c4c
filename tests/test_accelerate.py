"""accelerate and restore on torchvision's mobilenet_v2; what a block may fuse, and what it must leave alone."""

import copy
import pickle

import pytest
import torch
from blocks import FUSED, assert_same
from test_models_v2 import batch, training_step
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import mobilenet_v2
from torchvision.ops import FrozenBatchNorm2d

import mnet_kernels as mk

# Few blocks and maps of at least 4x4: statistics over a handful of values would be ill-conditioned.
SHORT = {"inverted_residual_setting": [[1, 16, 1, 1], [6, 16, 2, 1], [6, 24, 2, 2]], "num_classes": 7}
BLOCKS = [f"features.{i}" for i in range(7)]


@pytest.fixture
def model():
    return mobilenet_v2(**SHORT, dropout=0.0).double()


def test_same_step_same_objects(model):
    x, labels = batch()
    original = copy.deepcopy(model)
    want = training_step(model, x, labels)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    report = mk.accelerate(model)
    assert [name for name, _, _ in report.replaced] == BLOCKS
    assert not report.kept
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert all(b is buffers[n] for n, b in model.named_buffers())
    for backend, mode in FUSED:
        with mk.backend(backend, mode), mk.count_stages() as counts:
            assert_same(training_step(model, x, labels), want)
        assert counts[f"mnet_ref::{'expand_depthwise' if mode == 'algebraic' else 'depthwise'}"] >= 4

    names = mk.restore(model)
    assert names == ["", "features", *BLOCKS]
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert all(p is parameters[n] for n, p in model.named_parameters())
    with mk.count_stages() as counts:
        assert_same(training_step(model, x, labels), want)
    assert not counts
    assert mk.restore(model) == []


def test_an_optimizer_made_before_goes_on(model):
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, reference)]
    mk.accelerate(model)
    x, labels = batch(size=32)
    for _ in range(3):
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            with mk.backend("reference"):
                nn.functional.cross_entropy(m(x), labels).backward()
            optimizer.step()
    assert_same(model.state_dict(), reference.state_dict(), 1e-8)


def test_train_and_eval_survive(model):
    model.features[3].eval()
    mk.accelerate(model)
    assert not model.features[3].training and model.features[4].training
    model.eval()
    mk.restore(model)
    assert not any(m.training for m in model.modules())


def test_twice_changes_nothing(model):
    mk.accelerate(model)
    blocks = list(model.features)
    again = mk.accelerate(model)
    assert again.replaced == [] and all(a is b for a, b in zip(blocks, model.features, strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_can_be_restored(model, duplicate):
    mk.accelerate(model)
    other = duplicate(model)
    assert len(mk.restore(other)) == 9  # the blocks, the features, the model
    assert not any(p is q for p, q in zip(model.parameters(), other.parameters(), strict=True))
    x, labels = batch(size=32)
    with mk.backend("reference"):
        assert_same(training_step(other, x, labels), training_step(model, x, labels))


def test_report_reads_well(model):
    text = str(mk.accelerate(model))
    assert "replaced 7 blocks, kept 0" in text
    assert "features.0: Conv2dNormActivation -> stem_conv_bn_act" in text
    assert "features.1: InvertedResidual -> inverted_residual" in text
    assert "features.6: Conv2dNormActivation -> pointwise_conv_bn_act" in text


def test_not_a_model():
    for function in (mk.accelerate, mk.restore):
        with pytest.raises(TypeError, match=rf"{function.__name__} needs an nn.Module, got Tensor"):
            function(torch.zeros(1))
    with pytest.raises(ValueError, match="backend must be one of .*'fast'"):
        mk.accelerate(nn.Identity(), backend="fast")
    with pytest.raises(ValueError, match="mode must be one of"):
        mk.accelerate(nn.Identity(), mode="fast")


def test_a_block_itself(model):
    block, x = model.features[3], torch.randn(4, 16, 9, 7, dtype=torch.float64)
    want = copy.deepcopy(block)(x)
    assert [row[0] for row in mk.accelerate(block).replaced] == [""]
    with mk.backend("reference"), mk.count_stages() as counts:
        torch.testing.assert_close(block(x), want)
    assert counts["mnet_ref::depthwise"] == 1 and model.features[3] is block
    assert mk.restore(block) == [""]


def test_a_part_first_and_one_block_in_two_places(model):
    block = copy.deepcopy(model.features[3])
    model.features.insert(3, block)
    model.features.insert(5, block)
    reference, x = copy.deepcopy(model), batch(size=32)
    assert [row[0] for row in mk.accelerate(model.features[3]).replaced] == [""]
    want = training_step(reference, *x)
    for _ in range(2):  # the part alone, then all
        with mk.backend("reference"):
            assert_same(training_step(copy.deepcopy(model), *x), want)
        mk.accelerate(model)
    assert model.features[3] is model.features[5] and len(mk.restore(model)) == 10
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]


# ---- what a block may fuse -----------------------------------------------------------------------------------------


class _LoRA(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 1.5


def _hook(block):
    block.conv[1][1].register_forward_hook(lambda module, args, out: out * 2)


def _backward_hook(block):
    block.conv[0][0].register_full_backward_hook(lambda module, gi, go: None)


def _pre_hook_on_block(block):
    block.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _parametrize(block):
    parametrizations.weight_norm(block.conv[2])


def _prune(block):
    prune.l1_unstructured(block.conv[0][0], "weight", 0.5)


def _replaced_forward(block):
    block.conv[3].forward = lambda x: x * 3


def _lora(block):
    old = block.conv[2]
    block.conv[2] = _LoRA(old.in_channels, old.out_channels, 1, bias=False).double()


def _bias(block):
    old = block.conv[2]
    block.conv[2] = nn.Conv2d(old.in_channels, old.out_channels, 1).double()


def _group_norm(block):
    block.conv[1][1] = nn.GroupNorm(1, block.conv[1][1].num_features).double()


def _frozen(block):
    block.conv[3] = FrozenBatchNorm2d(block.conv[3].num_features).double()


def _dilated(block):
    block.conv[1][0].dilation, block.conv[1][0].padding = (2, 2), (2, 2)


def _unpadded(block):
    conv = block.conv[1][0]
    conv.padding_mode = "reflect"


def _gelu(block):
    block.conv[0][2] = nn.GELU()


CHANGES = {
    _hook: "hooks",
    _backward_hook: "hooks",
    _pre_hook_on_block: "hooks",
    _parametrize: "ParametrizedConv2d",
    _prune: "hooks",
    _replaced_forward: "replaced forward",
    _lora: "_LoRA",
    _bias: "bias",
    _group_norm: "GroupNorm",
    _frozen: "FrozenBatchNorm2d",
    _dilated: "dilated",
    _unpadded: "reflect",
    _gelu: "GELU",
}


def _changeable(model):
    """A block with an expand layer, stride 1 and a residual."""
    block = model.features[3]
    assert block.use_res_connect
    return block


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_before(model, change):
    """A block changed before accelerate is kept, with the reason, and nothing of it is lost."""
    change(_changeable(model))
    x, labels = batch(size=32)
    want = training_step(model, x, labels)
    report = mk.accelerate(model)
    kept = [(n, CHANGES[change] in why) for n, _, why in report.kept]
    assert kept == ([] if change is _pre_hook_on_block else [("features.3", True)])
    assert all(name.startswith("features.3.") for name, _ in report.plain)
    with mk.backend("reference"):
        assert_same(training_step(model, x, labels), want)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_after(model, change, caplog):
    """A block changed afterwards runs its children, as torch would, and says so once."""
    x, labels = batch(size=32)
    twin = copy.deepcopy(model)
    mk.accelerate(model)
    torch.manual_seed(1)
    change(_changeable(model))
    torch.manual_seed(1)
    change(_changeable(twin))
    want = training_step(twin, x, labels)
    with mk.backend("reference"):
        for _ in range(2):
            assert_same(training_step(model, x, labels), want)
    if change is not _pre_hook_on_block:  # hooks on the fused block itself are run by nn.Module.__call__
        said = [r for r in caplog.records if "one by one" in r.message]
        assert len(said) == 1 and CHANGES[change] in said[0].message


def test_global_hooks_see_every_child(model):
    mk.accelerate(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        model(batch(size=32)[0])
    finally:
        handle.remove()
    assert seen.count(nn.BatchNorm2d) == 16


def test_shared_blocks_and_other_modules_are_left_alone():
    inner = mobilenet_v2(**SHORT).features[:4]
    model = nn.ModuleDict({"a": inner, "other": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())})
    report = mk.accelerate(model)
    assert [n for n, _, _ in report.replaced] == ["a.0", "a.1", "a.2", "a.3"]
    assert [type(m) for m in model["other"]] == [nn.Conv2d, nn.ReLU]
