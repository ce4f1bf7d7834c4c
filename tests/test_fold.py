"""Out again: folded copies for inference, torch.export and ONNX, with nothing of this package in them."""

import pytest
import torch
import torchvision
from networks import randomise
from torch import nn

import mnet_kernels as mk

timm = pytest.importorskip("timm")


def accelerated(model):
    mk.accelerate(model)
    return model


MODELS = {
    "v1": lambda: mk.FusedMobileNetV1(5, width_mult=0.25),
    "v2": lambda: mk.FusedMobileNetV2(5, width_mult=0.35),
    "v3": lambda: mk.fused_mobilenet_v3_small(num_classes=5),
    "torchvision-v2": lambda: accelerated(torchvision.models.mobilenet_v2(num_classes=5)),
    "torchvision-mnasnet": lambda: accelerated(torchvision.models.mnasnet0_5(num_classes=5)),
    "torchvision-efficientnet": lambda: accelerated(torchvision.models.efficientnet_b0(num_classes=5)),
    "timm-v1": lambda: accelerated(timm.create_model("mobilenetv1_100", num_classes=5)),
    "timm-v2": lambda: accelerated(timm.create_model("mobilenetv2_050", num_classes=5)),
    "timm-v3": lambda: accelerated(timm.create_model("mobilenetv3_small_050", num_classes=5)),
}
models = pytest.mark.parametrize("name", MODELS)


def made(name, dtype=torch.float64):
    model = MODELS[name]()
    randomise(model)
    return model.to(dtype)


@models
def test_folded(name):
    model = made(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    folded = mk.fold(model.train())
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert sum(isinstance(m, nn.Conv2d) for m in folded.modules()) == convolutions
    x = torch.randn(2, 3, 64, 47, dtype=torch.float64)
    with torch.no_grad(), mk.count_stages() as counts:
        got = folded(x)
    assert not counts and not folded.training
    with torch.no_grad():
        torch.testing.assert_close(got, model.eval()(x), rtol=1e-10, atol=1e-10)


def test_what_cannot_be_folded_stays():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(),
        nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid(),
    ).double()  # fmt: skip
    randomise(model[3:])
    folded = mk.fold(model)
    assert [type(m) for m in folded] == [
        nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.GroupNorm, nn.Conv2d, nn.Identity, nn.Sigmoid
    ]  # fmt: skip
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model.eval()(x))
    with pytest.raises(TypeError, match=r"fold needs an nn.Module, got Tensor"):
        mk.fold(x)


def ops(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("name", ["v1", "v3", "timm-v2"])
@pytest.mark.parametrize("fold", [False, True])
def test_exported_programs_hold_standard_ops(name, fold):
    model = made(name, torch.float32).eval()
    given = mk.fold(model) if fold else model
    x = torch.randn(3, 3, 64, 64)
    program = torch.export.export(given, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert all(op.startswith("aten.") or "sym" in op for op in ops(program)), ops(program)
    with torch.no_grad():
        for images in (x, torch.randn(5, 3, 64, 64)):
            torch.testing.assert_close(program.module()(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fold", [False, True])
def test_onnx(fold, tmp_path):
    """Under onnxruntime the same outputs; every node is of ONNX's own operator set."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import onnx

    model = made("v3", torch.float32).eval()
    given = mk.fold(model) if fold else model
    x, path = torch.randn(2, 3, 64, 64), tmp_path / "model.onnx"
    torch.onnx.export(given, (x,), path, dynamo=True, verbose=False)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-3, atol=1e-4)
