"""Bad input to the public ops and modules: a clear error that says what was given, what is expected and what to do."""

import pytest
import torch
from blocks import POINTWISE, Case, Inputs
from torch import nn

import mnet_kernels as mk
from mnet_kernels import BatchNormParams, SqueezeExciteParams, functional

OPS = ("depthwise_conv_bn_act", *POINTWISE, "separable_conv", "inverted_residual")


def fails(inputs, kind, *fragments):
    """The call raises ``kind`` and its message holds every fragment, on every path."""
    for backend in ("native", "reference"):
        with mk.backend(backend), pytest.raises(kind) as caught:
            inputs.call()
        for fragment in (inputs.case.op, *fragments):
            assert fragment in str(caught.value), str(caught.value)


@pytest.fixture(params=OPS)
def inputs(request):
    return Inputs(Case(request.param))


def test_x_is_no_tensor(inputs):
    inputs.x = [[1.0]]
    fails(inputs, TypeError, "x must be a torch.Tensor, got list")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_x_dtype(inputs, dtype):
    inputs.x = inputs.x.detach().to(dtype)
    fails(inputs, TypeError, "float32, bfloat16, float16 or float64", str(dtype), "x.to()")


def test_x_rank(inputs):
    inputs.x = inputs.x[0]
    fails(inputs, ValueError, "[N, C, H, W]", "unsqueeze(0)")
    inputs.x = inputs.x[None, None]
    fails(inputs, ValueError, "[N, C, H, W]")


def test_mixed_dtypes(inputs):
    inputs.x = inputs.x.detach().float()
    fails(inputs, TypeError, "weight is torch.float64 but x is torch.float32", "autocast")


def test_devices(inputs):
    inputs.weights[0] = inputs.weights[0].detach().to("meta")
    fails(inputs, ValueError, "weight is on meta but x is on cpu", "move the model and the input together")
    inputs = Inputs(inputs.case)
    inputs.bns[-1].to("meta")
    fails(inputs, ValueError, "batch norm weight is on meta")


def test_channels(inputs):
    inputs.x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    fails(inputs, ValueError, "weight must be [", "4, 1")


def test_batch_norm_size(inputs):
    inputs.bns[0] = nn.BatchNorm2d(99).double()
    fails(inputs, ValueError, "batch norm weight must be [", "got [99]")


def test_activation(inputs):
    inputs.case = inputs.case._replace(activation="gelu")
    fails(inputs, ValueError, "relu6", "'gelu'")


@pytest.mark.parametrize("stride", [0, 3, (1, 1)])
def test_stride(inputs, stride):
    if inputs.case.op in POINTWISE:
        pytest.skip("a pointwise convolution has no stride")
    inputs.case = inputs.case._replace(stride=stride)
    fails(inputs, ValueError, "stride must be 1 or 2")


@pytest.mark.parametrize("op", ["depthwise_conv_bn_act", "separable_conv"])
def test_weights_that_are_not_depthwise(op):
    inputs = Inputs(Case(op))
    c, good = inputs.case.c, inputs.weights[0]
    for shape, what in (((c, c, 3, 3), "one filter a channel"), ((2 * c, 1, 3, 3), "groups = channels")):
        inputs.weights[0] = torch.randn(shape, dtype=torch.float64)
        fails(inputs, ValueError, what, "torch.nn.functional.conv2d")
    for kernel in ((7, 7), (3, 5), (1, 1)):
        inputs.weights[0] = torch.randn(c, 1, *kernel, dtype=torch.float64)
        fails(inputs, ValueError, "3x3 or 5x5", f"{kernel[0]}x{kernel[1]}")
    inputs.weights[0] = good.to(torch.int64)
    fails(inputs, TypeError, "floating point")


def test_stem():
    inputs = Inputs(Case("stem_conv_bn_act", c=4))
    for stride in (0, 3, (1, 1)):
        inputs.case = inputs.case._replace(stride=stride)
        fails(inputs, ValueError, "stride must be 1 or 2")
    inputs.weights[0] = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    fails(inputs, ValueError, "dense weight must be [O, 4, 3, 3], got [6, 4, 5, 5]")
    inputs.x = torch.randn(2, 9, 6, 6, dtype=torch.float64)
    fails(inputs, ValueError, "at most 8 channels", "got 9", "torch.nn.functional.conv2d")
    depthwise = mk.functional.ConvBNAct(
        "depthwise", torch.randn(4, 1, 3, 3), BatchNormParams.of(nn.BatchNorm2d(4)), "relu6"
    )
    pointwise = depthwise._replace(kind="pointwise", weight=torch.randn(4, 4, 1, 1))
    with pytest.raises(ValueError, match="stem must be a ConvBNAct of kind 'dense' or None; got pointwise"):
        mk.functional.separable_sequence(torch.randn(2, 4, 6, 6), [(depthwise, pointwise)], stem=pointwise)


def test_a_row_of_blocks():
    bn = BatchNormParams.of(nn.BatchNorm2d(4))
    depthwise = mk.functional.ConvBNAct("depthwise", torch.randn(4, 1, 3, 3), bn, "relu6")
    pointwise = mk.functional.ConvBNAct("pointwise", torch.randn(4, 4, 1, 1), bn, "identity")
    good, x = mk.functional.InvertedResidualParams((depthwise, pointwise)), torch.randn(2, 4, 6, 6)
    widened = good._replace(layers=(pointwise._replace(activation="relu6"), depthwise, pointwise))
    run = mk.functional.inverted_residual_sequence
    with pytest.raises(ValueError, match="blocks is empty"):
        run(x, [])
    with pytest.raises(TypeError, match=r"blocks\[1\] must be an InvertedResidualParams, got tuple"):
        run(x, [good, (depthwise, pointwise)])
    with pytest.raises(ValueError, match=r"blocks\[0\].layers must be .* got \['pointwise', 'depthwise'\]"):
        run(x, [good._replace(layers=(pointwise, depthwise))])
    image, stem = torch.randn(2, 3, 6, 6), depthwise._replace(kind="dense", weight=torch.randn(4, 3, 3, 3))
    with pytest.raises(ValueError, match="stem must be a ConvBNAct of kind 'dense' or None; got pointwise"):
        run(image, [good], stem=pointwise)
    for block, found in ((good._replace(residual=True), "a residual"), (widened, "an expand layer")):
        with pytest.raises(ValueError, match=rf"blocks\[0\] has {found}, expected .* stem_conv_bn_act"):
            run(image, [block], stem=stem)
    with pytest.raises(ValueError, match="residual needs stride 1"):
        run(x, [good, good._replace(layers=(depthwise._replace(stride=2), pointwise), residual=True)])


def test_pointwise_weight():
    inputs = Inputs(Case("pointwise_conv_bn_act"))
    inputs.weights[0] = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    fails(inputs, ValueError, "pointwise weight must be [O, 5, 1, 1], got [6, 5, 3, 3]")


@pytest.mark.parametrize("op", OPS)
def test_one_value_per_channel_in_training(op):
    inputs = Inputs(Case(op, n=1, h=1, w=1))
    fails(inputs, ValueError, "expected more than 1 value per channel when training", "eval mode")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        nn.BatchNorm2d(2)(torch.ones(1, 2, 1, 1))  # as torch
    for bn in inputs.bns:
        bn.eval()
    assert torch.isfinite(inputs.call()).all()


def test_stride_2_can_leave_one_value():
    fails(Inputs(Case(n=1, h=2, w=1, stride=2)), ValueError, "more than 1 value per channel", "depthwise output")


def test_residual():
    fails(Inputs(Case(residual=True, stride=2)), ValueError, "residual needs stride 1", "residual=False")
    inputs = Inputs(Case())
    inputs.case = inputs.case._replace(residual=True)  # 5 channels in, 6 out
    fails(inputs, ValueError, "as many output as input channels")


def test_expand_layer_without_batch_norm():
    inputs = Inputs(Case())
    bn = BatchNormParams.of(inputs.bns[1])
    with pytest.raises(ValueError, match="go together"):
        functional.inverted_residual(inputs.x, inputs.weights[0], None, inputs.weights[1], bn, inputs.weights[2], bn)


def test_batch_norm_settings():
    inputs = Inputs(Case("depthwise_conv_bn_act"))
    bn = BatchNormParams.of(inputs.bns[0])
    x, w = inputs.x, inputs.weights[0]
    with pytest.raises(TypeError, match="BatchNormParams.of"):
        functional.depthwise_conv_bn_act(x, w, inputs.bns[0])
    with pytest.raises(ValueError, match="running_mean and running_var go together"):
        functional.depthwise_conv_bn_act(x, w, bn._replace(running_var=None))
    with pytest.raises(ValueError, match="momentum=None .* needs num_batches_tracked"):
        functional.depthwise_conv_bn_act(x, w, bn._replace(momentum=None, num_batches_tracked=None))


def test_squeeze_excite():
    x = torch.randn(2, 4, 3, 3)
    good = [torch.randn(2, 4, 1, 1), torch.randn(2), torch.randn(4, 2, 1, 1), torch.randn(4)]
    assert functional.squeeze_excite(x, *good).shape == x.shape
    for i, name in enumerate(SqueezeExciteParams._fields[:4]):
        bad = list(good)
        bad[i] = torch.randn(3, 3, 1, 1)
        with pytest.raises(ValueError, match=f"squeeze-excite {'reduce_weight' if i == 0 else name} must be"):
            functional.squeeze_excite(x, *bad)
    inputs = Inputs(Case(excite=True))
    for wrong in ({"activation": "gelu"}, {"gate": "relu"}):
        (what,) = wrong
        with pytest.raises(ValueError, match=f"squeeze-excite {what} must be one of .*, got '{wrong[what]}'"):
            functional.squeeze_excite(x, *good, **wrong)
    inputs.excite[0] = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    fails(inputs, ValueError, "squeeze-excite reduce_weight must be [3, 13, 1, 1], got [3, 2, 1, 1]")
    with pytest.raises(TypeError, match="SqueezeExciteParams"):
        functional.inverted_residual(inputs.x, *_layers(inputs), squeeze_excite=torch.zeros(1))


def _layers(inputs):
    pairs = zip(inputs.weights, inputs.bns, strict=True)
    return [t for weight, bn in pairs for t in (weight, BatchNormParams.of(bn))]


def test_module_stride():
    with pytest.raises(ValueError, match="stride should be 1 or 2 instead of 3"):
        mk.nn.FusedInvertedResidual(4, 4, 3, 6)
