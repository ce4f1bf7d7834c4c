"""MobileNetV1 (Howard et al. 2017, table 1), with the state_dict keys of timm's ``mobilenetv1_100``."""

import math

from torch import nn

from ..graph.swap import fuses
from ..nn import FusedSeparable, FusedSequential
from .common import make_divisible
from .weights import load_weights

STEM_CHANNELS = 32
# output channels c, repeats n, stride s of the first
SEPARABLE_SETTING = (
    (64, 1, 1),
    (128, 2, 2),
    (256, 2, 2),
    (512, 6, 2),
    (1024, 2, 2),
)


class MobileNetV1(nn.Module):
    """Stem, blocks, their mean over H and W, a classifier."""

    def forward(self, x):
        x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.classifier(self.dropout(x))


@fuses(MobileNetV1)
class FusedMobileNetV1(MobileNetV1):
    """MobileNetV1 of fused blocks: depthwise, batch norm, ReLU6, pointwise, batch norm, ReLU6.

    Input [N, 3, H, W], output [N, num_classes]; any H and W from 32 up are sensible.  Fused, the last batch norm
    and ReLU6 of the stem and of a block are applied by the next block's read and never written.

    Args:
        num_classes: outputs of the classifier.
        width_mult: the paper's alpha, scales every layer's channels (to multiples of 8, as timm).
        separable_setting: rows (c, n, s); None is the paper's table 1.
        norm_layer: makes a norm from a channel count; None is nn.BatchNorm2d (others run unfused).
        dropout: before the classifier.
        stem_stride: 2, or 1 for small images.
        backend, mode: pin every block's choice (see ``mnet_kernels.backend``); None leaves it open.

    Raises:
        ValueError: separable_setting is empty or not rows of three.
    """

    def __init__(
        self,
        num_classes=1000,
        width_mult=1.0,
        separable_setting=None,
        norm_layer=None,
        dropout=0.0,
        *,
        stem_stride=2,
        backend=None,
        mode=None,
    ):
        super().__init__()
        setting = SEPARABLE_SETTING if separable_setting is None else separable_setting
        if len(setting) == 0 or any(len(row) != 3 for row in setting):
            raise ValueError(f"separable_setting must be non-empty rows (c, n, s), got {separable_setting}")
        norm_layer = norm_layer or nn.BatchNorm2d

        channels = make_divisible(STEM_CHANNELS * width_mult, 8)
        self.conv_stem = nn.Conv2d(3, channels, 3, stem_stride, 1, bias=False)
        self.bn1 = norm_layer(channels)
        self.act1 = nn.ReLU6(inplace=True)
        stages = []
        for c, n, s in setting:
            out = make_divisible(c * width_mult, 8)
            blocks = []
            for i in range(n):
                stride = s if i == 0 else 1
                blocks.append(FusedSeparable(channels, out, stride, norm_layer=norm_layer, backend=backend, mode=mode))
                channels = out
            stages.append(FusedSequential(*blocks))
        self.blocks = FusedSequential(*stages)
        self.dropout = nn.Dropout(p=dropout)
        self.classifier = nn.Linear(channels, num_classes)
        self.backend, self.mode = backend, mode
        _initialise(self)


def _initialise(model):
    """timm's initialisation (TensorFlow's): the fan out of a depthwise layer is that of one channel."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            nn.init.normal_(m.weight, 0, math.sqrt(2 / fan_out))
        elif isinstance(m, nn.Linear):
            bound = 1 / math.sqrt(m.out_features)
            nn.init.uniform_(m.weight, -bound, bound)
            nn.init.zeros_(m.bias)


def fused_mobilenet_v1(*, weights=None, **kwargs):
    """FusedMobileNetV1, with weights if given.

    Args:
        weights: a path to a saved state_dict, or a state_dict, such as
            ``timm.create_model("mobilenetv1_100", pretrained=True).state_dict()``.
        kwargs: of :class:`FusedMobileNetV1`.

    Raises:
        ValueError: the weights do not fit the model, or are no weights.
        FileNotFoundError: no such file.
    """
    return load_weights(FusedMobileNetV1, weights, False, kwargs, None)
