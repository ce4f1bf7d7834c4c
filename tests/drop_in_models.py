"""Small models of every family that accelerate knows, and fresh modules to put into them.

Blocks take and give C channels wherever the family allows it, so that they can be taken out, put in and exchanged.
"""

from collections import OrderedDict

import torch
from timm.models import _efficientnet_blocks as timm_blocks
from torch import nn
from torchvision.models import mobilenet_v2, mobilenetv3
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.misc import Conv2dNormActivation

C, SIZE, CLASSES = 8, 16, 3


class Row(nn.Sequential):
    """A user's own row of layers: a Sequential by another name, with something of its own to print."""

    def extra_repr(self):
        return "a row"


class Shortcut(InvertedResidual):
    """A user's own block on top of torchvision's."""


class Scaled(InvertedResidual):
    """A user's own block whose forward is not torchvision's."""

    def forward(self, x):
        return 0.5 * super().forward(x)


class LoRA(nn.Conv2d):
    """A convolution with something added."""

    def forward(self, x):
        return 1.5 * super().forward(x)


class Holder(nn.Module):
    """A user's own model: it holds Sequentials and calls them."""

    def __init__(self):
        super().__init__()
        self.stem = Row(*conv_bn_act(3, C, 3, 2))
        self.body = nn.Sequential(Shortcut(C, C, 1, 2), Row(*separable(C, C)), Scaled(C, C, 1, 2), separable(C, C, 2))
        self.head = nn.Linear(C, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.body[0](x)
        for block in self.body[1:]:
            x = block(x)
        return self.head(x.mean((2, 3)))


def conv_bn_act(i, o, kernel=1, stride=1, groups=1, act=nn.ReLU6, bias=False):
    """A layer, as a list of modules."""
    layers = [nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=bias), nn.BatchNorm2d(o)]
    return layers if act is None else [*layers, act()]


def separable(i, o, stride=1):
    """A depthwise separable row, as one flat Sequential."""
    return nn.Sequential(*conv_bn_act(i, i, 3, stride, i), *conv_bn_act(i, o))


def _v2():
    rows = [[1, 32, 1, 1], [3, 32, 1, 1], [2, 32, 2, 2]]
    model = mobilenet_v2(num_classes=CLASSES, width_mult=0.25, inverted_residual_setting=rows, dropout=0.0)
    # torchvision's last layer has 1280 channels whatever the width
    model.features[-1] = Conv2dNormActivation(C, 16, kernel_size=1, activation_layer=nn.ReLU6)
    model.classifier[1] = nn.Linear(16, CLASSES)
    return model


def _v3():
    def row(kernel, expanded, excite, act, stride):
        return mobilenetv3.InvertedResidualConfig(C, kernel, expanded, C, excite, act, stride, 1, 1.0)

    rows = [row(3, C, False, "RE", 1), row(3, 16, True, "HS", 1), row(5, 16, True, "RE", 2), row(3, 24, False, "HS", 1)]
    return mobilenetv3.MobileNetV3(rows, 16, num_classes=CLASSES, dropout=0.0)


def _timm():
    blocks = nn.Sequential(
        timm_blocks.DepthwiseSeparableConv(C, C, act_layer=nn.ReLU6),
        timm_blocks.InvertedResidual(C, C, exp_ratio=2.0, act_layer=nn.SiLU, drop_path_rate=0.3),
        timm_blocks.InvertedResidual(C, C, stride=2, exp_ratio=2.0, se_layer=timm_blocks.SqueezeExcite),
        timm_blocks.ConvBnAct(C, C, 1),
    )
    stem = timm_blocks.ConvBnAct(3, C, 3, stride=2)
    return nn.Sequential(OrderedDict(stem=stem, blocks=blocks, **_head(C)))


def _flat():
    """Rows of layers in one Sequential, without containers between."""
    layers = [*conv_bn_act(3, C, 3, 2), *separable(C, C), *conv_bn_act(C, 16, act=nn.Hardswish)]
    layers += [*conv_bn_act(16, 16, 5, 2, 16, nn.Hardswish), *conv_bn_act(16, C, act=None)]
    return nn.Sequential(*layers, *_head(C).values())


def _wrapped():
    return nn.Sequential(OrderedDict(body=_flat()[:-3], **_head(C)))


def _nested():
    """Rows in Sequentials in Sequentials, layer by layer and block by block."""
    layer = [nn.Sequential(*conv_bn_act(C, C, 3, 1, C)), nn.Sequential(*conv_bn_act(C, C))]
    blocks = [nn.Sequential(*layer), separable(C, C, 2), nn.Sequential(*conv_bn_act(C, C, 3, act=nn.ReLU))]
    body = nn.Sequential(*blocks, Row(*conv_bn_act(C, C, bias=True)))
    return nn.Sequential(OrderedDict(stem=nn.Sequential(*conv_bn_act(3, C, 3, 2)), body=body, **_head(C)))


def _head(channels):
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(channels, CLASSES)}


FAMILIES = {
    "v2": _v2, "v3": _v3, "timm": _timm, "flat": _flat, "wrapped": _wrapped, "nested": _nested, "holder": Holder,
}  # fmt: skip


def build(family, seed, dtype=torch.float64):
    """A model of a family, its parameters and statistics drawn from a seed.

    Of an even seed its activations are smooth: in low precision no mask can turn round, and gradients can be judged.
    """
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    if seed % 2 == 0:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid)):
                    setattr(parent, name, nn.Sigmoid() if isinstance(child, nn.Hardsigmoid) else nn.SiLU())
    return randomise(model.to(dtype))


def randomise(module):
    """Draw parameters and statistics so that no gradient vanishes and no batch norm is the identity.

    As networks.randomise, but for any module on its own, and with biases away from the activations' kinks.
    """
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                m.weight.normal_(std=m.weight[0].numel() ** -0.5)
                if m.bias is not None:
                    m.bias.uniform_(0.25, 0.75)
            elif isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, FrozenBatchNorm2d)):
                if m.weight is not None:
                    m.weight.uniform_(0.5, 1.5)
                    m.bias.normal_(0.5, 0.5)
                if getattr(m, "running_mean", None) is not None:
                    m.running_mean.normal_(std=0.3)
                    m.running_var.uniform_(0.5, 1.5)
                if getattr(m, "num_batches_tracked", None) is not None:
                    m.num_batches_tracked.fill_(7)
    return module


# ---- what may stand in a module's place -----------------------------------------------------------------------------

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Identity, nn.Sigmoid, lambda: nn.ReLU6(inplace=True),
    lambda: nn.ReLU(inplace=True),
)  # fmt: skip
BLOCKS = (
    lambda: InvertedResidual(C, C, 1, 2),
    lambda: InvertedResidual(C, C, 1, 1),
    lambda: Shortcut(C, C, 1, 2),
    lambda: Scaled(C, C, 1, 2),
    lambda: separable(C, C),
    lambda: Row(*separable(C, C)),
    lambda: nn.Sequential(*conv_bn_act(C, C)),
    lambda: timm_blocks.InvertedResidual(C, C, exp_ratio=2.0, se_layer=timm_blocks.SqueezeExcite),
    lambda: timm_blocks.DepthwiseSeparableConv(C, C),
    nn.Identity,
)


def norms(bn):
    """Makers of what may stand in a batch norm's place."""
    n = bn.num_features
    return (
        lambda: nn.BatchNorm2d(n),
        lambda: nn.BatchNorm2d(n, eps=1e-2, momentum=0.3),
        lambda: nn.BatchNorm2d(n, affine=False),
        lambda: nn.BatchNorm2d(n, track_running_stats=False),
        lambda: nn.GroupNorm(1, n),
        lambda: FrozenBatchNorm2d(n),
        nn.Identity,
    )


def convolutions(conv):
    """Makers of what may stand in a convolution's place: mostly what fits."""
    i, o, k, s, g = conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride, conv.groups

    def make(cls=nn.Conv2d, kernel=k, stride=s, groups=g, bias=False, padding=None, **options):
        padding = kernel // 2 if padding is None else padding
        return lambda: cls(i, o, kernel, stride, padding, groups=groups, bias=bias, **options)

    other = {1: 3, 3: 5}.get(k, 3)
    return (
        make(), make(), make(bias=True), make(kernel=other), make(groups=1), make(LoRA), make(stride=1),
        make(stride=(2, 1)), make(padding_mode="reflect"), make(dilation=2, padding=2 * (k // 2)),
    )  # fmt: skip
