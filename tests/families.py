"""Whole families of torchvision's and timm's models with depthwise or 1x1 convolutions, small enough for tests.

``SUITE`` holds one small member a family.  ``MNET_TEST_FAMILIES=all`` adds ``LONG``: their larger members and the
families further off (tests/test_families.py takes about half an hour of two cores with it).
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
import torchvision
from blocks import upstream_of
from networks import randomise
from torch import nn
from torchvision.models import quantization
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

CLASSES = 40  # errors of a few outputs scatter too much to be judged
NORMS = (nn.modules.batchnorm._BatchNorm,)


class Family(NamedTuple):
    """``make()`` gives the model."""

    make: Callable
    size: int = 64  # of its images
    fused: bool | None = True  # fused kernels must run; False: it must be left alone; None: either


class HeadsOfMaps(nn.Module):
    """A detector up to its boxes: non-maximum suppression makes a jump of every rounding error."""

    def __init__(self, detector):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x):
        return self.head(list(self.backbone(x).values()))


def _torchvision(name, **options):
    return lambda: getattr(torchvision.models, name)(**{"num_classes": CLASSES} | options)


def _segmentation(name):
    build = getattr(torchvision.models.segmentation, name)
    return lambda: build(weights=None, weights_backbone=None, num_classes=3)


def _deeplab():
    """Without its dropout of maps, whose mask follows the order of memory: another one in channels_last."""
    model = _segmentation("deeplabv3_mobilenet_v3_large")()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


def _quantizable(name):
    """Not quantised: the float model that quantisation-aware training starts from."""
    return lambda: getattr(quantization, name)(weights=None, quantize=False, num_classes=CLASSES)


def _timm(name, **options):
    if not options.get("features_only"):
        options = {"num_classes": CLASSES} | options
    return lambda: timm.create_model(name, **options)


def _efficientnet_v2():
    """Two stages of each kind of block, narrow."""
    stages = [FusedMBConvConfig(expand_ratio, 3, stride, *channels, 2) for expand_ratio, stride, channels in
              ((1, 1, (16, 16)), (4, 2, (16, 24)))]  # fmt: skip
    stages += [MBConvConfig(4, 3, 2, 24, 32, 2), MBConvConfig(6, 3, 1, 32, 40, 2)]
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
    return EfficientNet(stages, dropout=0.2, num_classes=CLASSES, norm_layer=norm, last_channel=64)


def _ssdlite():
    return HeadsOfMaps(ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3))


SUITE = {
    "tv-mobilenet_v2": Family(_torchvision("mobilenet_v2", width_mult=0.35)),
    "tv-mobilenet_v3_small": Family(_torchvision("mobilenet_v3_small")),
    "tv-mobilenet_v3_large": Family(_torchvision("mobilenet_v3_large", reduced_tail=True)),
    "tv-mobilenet_v3_large-dilated": Family(_torchvision("mobilenet_v3_large", dilated=True, reduced_tail=True)),
    "tv-mnasnet0_5": Family(_torchvision("mnasnet0_5")),
    "tv-efficientnet_b0": Family(_torchvision("efficientnet_b0")),
    "tv-efficientnet_v2": Family(_efficientnet_v2),
    "tv-shufflenet_v2_x0_5": Family(_torchvision("shufflenet_v2_x0_5")),
    "tv-regnet_y_400mf": Family(_torchvision("regnet_y_400mf")),
    "tv-lraspp": Family(_segmentation("lraspp_mobilenet_v3_large")),
    "tv-ssdlite": Family(_ssdlite, size=96),
    "tv-quantizable_v2": Family(_quantizable("mobilenet_v2"), fused=None),
    "tv-quantizable_v3": Family(_quantizable("mobilenet_v3_large"), fused=None),
    "timm-mobilenetv1": Family(_timm("mobilenetv1_100")),
    "timm-mobilenetv2": Family(_timm("mobilenetv2_050")),
    "timm-mobilenetv2-features": Family(_timm("mobilenetv2_035", features_only=True)),
    "timm-mobilenetv2-features-expansion": Family(
        # hooks on the expand layers of some of its blocks
        _timm("mobilenetv2_035", features_only=True, feature_location="expansion")
    ),
    "timm-mobilenetv3": Family(_timm("mobilenetv3_small_050")),
    "timm-mobilenetv3-features": Family(_timm("mobilenetv3_small_050", features_only=True)),
    "timm-mobilenetv3-dilated": Family(_timm("mobilenetv3_small_050", features_only=True, output_stride=8)),
    "timm-mobilenetv4": Family(_timm("mobilenetv4_conv_small_035")),
    "timm-mnasnet": Family(_timm("mnasnet_small")),
    "timm-semnasnet": Family(_timm("semnasnet_050")),
    "timm-efficientnet": Family(_timm("test_efficientnet")),
    "timm-efficientnet_lite": Family(_timm("efficientnet_lite0"), size=48),
    "timm-tf_efficientnet": Family(_timm("tf_efficientnet_b0"), size=33),  # an odd size: "same" padding is one-sided
    "timm-tf_mobilenetv3": Family(_timm("tf_mobilenetv3_small_minimal_100"), size=47),
    "timm-fbnetc": Family(_timm("fbnetc_100"), size=48),
    "timm-fbnetv3": Family(_timm("fbnetv3_b"), size=48),
    "timm-hardcorenas": Family(_timm("hardcorenas_a"), size=48),
    "timm-lcnet": Family(_timm("lcnet_035")),
    "timm-tinynet": Family(_timm("tinynet_e")),
    "timm-mixnet": Family(_timm("mixnet_s"), size=48, fused=None),
    "timm-ghostnet": Family(_timm("ghostnet_050"), size=48, fused=None),
    "timm-rexnet": Family(_timm("rexnet_100"), size=48, fused=None),
    "timm-mobilevit": Family(_timm("mobilevit_xxs"), fused=None),
    "timm-mobilevitv2": Family(_timm("mobilevitv2_050"), fused=None),
    "timm-efficientvit": Family(_timm("efficientvit_b0"), fused=None),
    "timm-repvit": Family(_timm("repvit_m0_9"), size=48, fused=None),
    "timm-mobileone": Family(_timm("mobileone_s0"), size=48, fused=None),
    "timm-edgenext": Family(_timm("edgenext_xx_small"), fused=False),
    "timm-convnext": Family(_timm("convnext_atto"), size=48, fused=False),
}

_LONG_TORCHVISION = ("mobilenet_v2", "mobilenet_v3_large", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "efficientnet_b1",
                     "efficientnet_b2", "efficientnet_v2_s", "shufflenet_v2_x1_0", "shufflenet_v2_x2_0")  # fmt: skip
_EITHER_TORCHVISION = ("regnet_x_400mf", "regnet_y_800mf", "googlenet", "densenet121", "resnet50", "squeezenet1_1")
_LONG_TIMM = """
    mobilenetv1_125 mobilenetv2_100 mobilenetv2_110d mobilenetv3_large_100 mobilenetv3_rw mobilenetv3_small_100
    mobilenetv4_conv_small mobilenetv4_conv_medium mobilenet_edgetpu_v2_xs mnasnet_100 semnasnet_100
    spnasnet_100 efficientnet_b0 efficientnet_b1_pruned efficientnet_lite1 efficientnet_es efficientnetv2_rw_t
    tf_efficientnet_b1 tf_efficientnet_lite0 tf_efficientnetv2_b0 tf_mobilenetv3_small_075
    tf_mobilenetv3_large_minimal_100 tf_efficientnet_es lcnet_100 tinynet_d tinynet_a hardcorenas_f
"""
_EITHER_TIMM = """
    efficientnet_b0_gn efficientnet_b0_g8_gn tf_efficientnet_cc_b0_4e mobilenetv4_conv_aa_medium
    mobilenetv4_conv_blur_medium mobilenetv4_hybrid_medium_075 mixnet_m tf_mixnet_s ghostnet_100 ghostnetv2_100
    ghostnetv3_050 rexnetr_100 mobilevit_xs mobilevitv2_075 efficientvit_b1 efficientvit_l1
    repvit_m1 mobileone_s1 mobileone_s4 fastvit_t8 starnet_s050 repghostnet_050 shvit_s1 swiftformer_xs
    xception41p regnetx_002 regnety_002 regnetz_005
    resnet50d test_byobnet test_resnet test_efficientnet_gn test_efficientnet_ln lcnetv2_small convnext_nano
"""
_ONE_SIZE = ("efficientformer_l1", "efficientformerv2_s0", "levit_conv_128s")  # their attention has biases by place
_FEATURES = """
    mobilenetv1_100 mobilenetv4_conv_small mnasnet_small efficientnet_b0 tf_efficientnet_b0 fbnetc_100 lcnet_050
    hardcorenas_a tinynet_e mixnet_s ghostnet_050 rexnet_100 mobilevit_xxs mobilevitv2_050 efficientvit_b0
    repvit_m0_9 mobileone_s0 edgenext_xx_small regnety_002 test_byobnet
"""

LONG = {
    **{f"tv-{name}": Family(_torchvision(name)) for name in _LONG_TORCHVISION},
    # GoogLeNet's auxiliary heads take maps of one size only
    **{
        f"tv-{name}": Family(_torchvision(name, **{"aux_logits": False} if name == "googlenet" else {}), fused=None)
        for name in _EITHER_TORCHVISION
    },
    "tv-deeplabv3": Family(_deeplab),
    "tv-quantizable_shufflenet": Family(_quantizable("shufflenet_v2_x0_5"), fused=None),
    **{f"timm-{name}": Family(_timm(name)) for name in _LONG_TIMM.split()},
    **{f"timm-{name}": Family(_timm(name), fused=None) for name in _EITHER_TIMM.split()},
    **{f"timm-{name}": Family(_timm(name), size=224, fused=None) for name in _ONE_SIZE},
    "timm-efficientvit_m0": Family(_timm("efficientvit_m0"), size=128, fused=None),
    **{f"timm-{name}-features": Family(_timm(name, features_only=True), fused=None) for name in _FEATURES.split()},
}

FAMILIES = SUITE | (LONG if os.environ.get("MNET_TEST_FAMILIES") == "all" else {})


def images(name, batch=3):
    """Some of the family's size, not quite square."""
    size = FAMILIES[name].size
    return torch.randn(batch, 3, size, size - 1 if size % 2 else size, dtype=torch.float64)


def settle(model, x):
    """Statistics of its own maps instead of random ones: in eval mode a deep model's maps then keep their size, and its
    rounding errors theirs."""
    norms = [m for m in model.modules() if is_norm(m)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.eval()


def build(name):
    """The family's model in float64 with random weights and the statistics that go with them."""
    model = FAMILIES[name].make().double()
    randomise(model)
    return settle(model, images(name))


def leaves(out):
    """The tensors of what a model gives: a tensor, or dictionaries and sequences of them."""
    if isinstance(out, torch.Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else ()
    return [t for value in values for t in leaves(value)]


def outputs(model, x):
    """{name: tensor} of what a model gives; anything random in it draws the same at every call."""
    torch.manual_seed(11)
    found = {f"out{i}": t for i, t in enumerate(leaves(model(x)))}
    assert found, "the model gives nothing"
    return found


def step(model, x):
    """Forward and backward: {name: tensor} of every output, gradient and buffer (what has no gradient is left out)."""
    x = x.clone().requires_grad_()
    outs = outputs(model, x)
    named = {"x": x, **dict(model.named_parameters())}
    upstreams = [upstream_of(t).to(t.dtype) for t in outs.values()]
    grads = torch.autograd.grad(list(outs.values()), list(named.values()), upstreams, allow_unused=True)
    result = {k: t.detach() for k, t in outs.items()}
    result |= {f"d_{k}": g for k, g in zip(named, grads, strict=True) if g is not None}
    return result | {k: b.clone() for k, b in model.named_buffers()}


def is_norm(module):
    """Whether it is a batch norm (timm's holds an activation as well)."""
    return isinstance(module, NORMS)
