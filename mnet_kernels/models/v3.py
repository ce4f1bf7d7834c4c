"""MobileNetV3 (Howard et al. 2019, tables 1 and 2), a drop-in for ``torchvision.models.mobilenet_v3_large`` and
``mobilenet_v3_small``."""

from functools import partial
from typing import NamedTuple

from torch import nn

from ..graph.swap import fuses
from ..nn import FusedInvertedResidual, FusedPointwiseConvBNAct, FusedSequential, FusedStemConvBNAct
from .common import initialise, make_divisible
from .weights import load_weights

STEM_CHANNELS = 16
# kernel k, expanded channels e, output channels c, squeeze-excite, activation, stride s
LARGE_SETTING = (
    (3, 16, 16, False, "RE", 1),
    (3, 64, 24, False, "RE", 2),
    (3, 72, 24, False, "RE", 1),
    (5, 72, 40, True, "RE", 2),
    (5, 120, 40, True, "RE", 1),
    (5, 120, 40, True, "RE", 1),
    (3, 240, 80, False, "HS", 2),
    (3, 200, 80, False, "HS", 1),
    (3, 184, 80, False, "HS", 1),
    (3, 184, 80, False, "HS", 1),
    (3, 480, 112, True, "HS", 1),
    (3, 672, 112, True, "HS", 1),
    (5, 672, 160, True, "HS", 2),
    (5, 960, 160, True, "HS", 1),
    (5, 960, 160, True, "HS", 1),
)
SMALL_SETTING = (
    (3, 16, 16, True, "RE", 2),
    (3, 72, 24, False, "RE", 2),
    (3, 88, 24, False, "RE", 1),
    (5, 96, 40, True, "HS", 2),
    (5, 240, 40, True, "HS", 1),
    (5, 240, 40, True, "HS", 1),
    (5, 120, 48, True, "HS", 1),
    (5, 144, 48, True, "HS", 1),
    (5, 288, 96, True, "HS", 2),
    (5, 576, 96, True, "HS", 1),
    (5, 576, 96, True, "HS", 1),
)
# rows, channels of the last convolution, channels of the layer before the classifier
SETTINGS = {"large": (LARGE_SETTING, 960, 1280), "small": (SMALL_SETTING, 576, 1024)}
TAIL = 3  # the last rows, which reduced_tail halves and dilated dilates
WIDTH_RULES = ("torchvision", "paper")


class InvertedResidualConfig(NamedTuple):
    """One block, its channels scaled already: the attributes of torchvision's InvertedResidualConfig."""

    input_channels: int
    kernel: int
    expanded_channels: int
    out_channels: int
    use_se: bool
    use_hs: bool
    stride: int
    dilation: int


def configuration(arch, width_mult=1.0, width_rule="torchvision", reduced_tail=False, dilated=False):
    """The blocks of a variant and the widths of its last two layers before the classifier's own.

    Args:
        arch: "large" or "small".
        width_mult: scales the channels.
        width_rule: "torchvision" scales every channel count alike.  "paper" scales a block's inputs and outputs and
            keeps its expansion ratio, and never narrows the layer before the classifier, as the paper's own
            implementation does; only this one gives the paper's figures at a width other than 1.
        reduced_tail: halve the channels of the last blocks.
        dilated: dilate the last blocks instead of striding them.

    Returns:
        (list of :class:`InvertedResidualConfig`, channels of the last convolution, width of the layer after it).

    Raises:
        ValueError: an unknown arch or width_rule.
    """
    if arch not in SETTINGS:
        raise ValueError(f"arch must be one of {', '.join(SETTINGS)}, got {arch!r}")
    if width_rule not in WIDTH_RULES:
        raise ValueError(f"width_rule must be one of {', '.join(WIDTH_RULES)}, got {width_rule!r}")
    rows, last_conv, last = SETTINGS[arch]
    tail_divisor, dilation = 2 if reduced_tail else 1, 2 if dilated else 1

    def scaled(channels):
        return make_divisible(channels * width_mult, 8)

    blocks, inp = [], STEM_CHANNELS
    for i, (kernel, expanded, out, use_se, activation, stride) in enumerate(rows):
        tail = i >= len(rows) - TAIL
        if tail:
            out //= tail_divisor
            # the first block of the tail still expands the input it is given
            expanded //= tail_divisor if i > len(rows) - TAIL else 1
        hidden = scaled(expanded)
        if width_rule == "paper":
            hidden = make_divisible(scaled(inp) * expanded / inp, 8)
        use_hs = activation == "HS"
        block_dilation = dilation if tail else 1
        blocks.append(
            InvertedResidualConfig(scaled(inp), kernel, hidden, scaled(out), use_se, use_hs, stride, block_dilation)
        )
        inp = out
    last //= tail_divisor
    if width_rule == "paper":
        return blocks, scaled(last_conv // tail_divisor), make_divisible(last * max(1.0, width_mult), 8)
    return blocks, 6 * blocks[-1].out_channels, scaled(last)


def inverted_residual(config, norm_layer, *, backend=None, mode=None):
    """One block of a configuration row, called as torchvision's InvertedResidual of V3."""
    return FusedInvertedResidual(
        config.input_channels,
        config.out_channels,
        config.stride,
        config.expanded_channels / config.input_channels,
        norm_layer,
        kernel_size=config.kernel,
        activation_layer=nn.Hardswish if config.use_hs else nn.ReLU,
        squeeze_channels=make_divisible(config.expanded_channels // 4, 8) if config.use_se else None,
        dilation=config.dilation,
        layout="v3",
        backend=backend,
        mode=mode,
    )


class MobileNetV3(nn.Module):
    """Features, their mean over H and W by ``avgpool``, a classifier."""

    def forward(self, x):
        x = self.avgpool(self.features(x))
        return self.classifier(x.flatten(1))


@fuses(MobileNetV3)
class FusedMobileNetV3(MobileNetV3):
    """MobileNetV3 of fused blocks: torchvision's arguments, initialisation and state_dict keys.

    Input [N, 3, H, W], output [N, num_classes]; any H and W from 32 up are sensible.  :func:`fused_mobilenet_v3_large`
    and :func:`fused_mobilenet_v3_small` give the paper's two configurations.

    Args:
        inverted_residual_setting: blocks as :class:`InvertedResidualConfig` (torchvision's serve as well).
        last_channel: width of the layer before the classifier.
        num_classes: outputs of the classifier.
        block: makes one inverted residual, called as torchvision's with (config, norm_layer); None is the fused one.
        norm_layer: makes a norm from a channel count; None is nn.BatchNorm2d with eps 1e-3 and momentum 0.01 (classes
            other than nn.BatchNorm2d run unfused).
        dropout: before the classifier's last layer.
        last_conv_channels: of the last convolution; None is torchvision's 6 * (channels of the last block).
        stem_stride: 2, or 1 for small images.
        backend, mode: pin every block's choice (see ``mnet_kernels.backend``); None leaves it open.

    Raises:
        ValueError: inverted_residual_setting is empty.
        TypeError: a row of it lacks an attribute of InvertedResidualConfig.
    """

    def __init__(
        self,
        inverted_residual_setting,
        last_channel,
        num_classes=1000,
        block=None,
        norm_layer=None,
        dropout=0.2,
        *,
        last_conv_channels=None,
        stem_stride=2,
        backend=None,
        mode=None,
    ):
        super().__init__()
        setting = list(inverted_residual_setting)
        if not setting:
            raise ValueError("The inverted_residual_setting should not be empty")
        for row in setting:
            missing = [name for name in InvertedResidualConfig._fields if not hasattr(row, name)]
            if missing:
                raise TypeError(
                    f"The inverted_residual_setting should be a list of InvertedResidualConfig, got {row!r} without "
                    f"{', '.join(missing)}"
                )
        block = block or partial(inverted_residual, backend=backend, mode=mode)
        norm_layer = norm_layer or partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)

        stem = FusedStemConvBNAct(
            3, setting[0].input_channels, stem_stride, norm_layer, nn.Hardswish, backend=backend, mode=mode
        )
        features = [stem]
        features += [block(row, norm_layer) for row in setting]
        channels = setting[-1].out_channels
        out = last_conv_channels or 6 * channels
        features.append(FusedPointwiseConvBNAct(channels, out, norm_layer, nn.Hardswish, backend=backend, mode=mode))
        self.features = FusedSequential(*features)
        self.backend, self.mode = backend, mode
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(out, last_channel),
            nn.Hardswish(inplace=True),
            nn.Dropout(p=dropout, inplace=True),
            nn.Linear(last_channel, num_classes),
        )
        initialise(self)


def _build(arch, width_mult=1.0, width_rule="torchvision", reduced_tail=False, dilated=False, **kwargs):
    setting, last_conv, last = configuration(arch, width_mult, width_rule, reduced_tail, dilated)
    return FusedMobileNetV3(setting, last, last_conv_channels=last_conv, **kwargs)


def fused_mobilenet_v3_large(*, weights=None, progress=True, **kwargs):
    """MobileNetV3-Large of fused blocks: a drop-in for ``torchvision.models.mobilenet_v3_large``.

    Args:
        weights: a torchvision ``MobileNet_V3_Large_Weights`` member or its name ("DEFAULT", "IMAGENET1K_V2"), a path
            to a saved state_dict, or a state_dict.
        progress: show the download's progress bar (torchvision weights).
        kwargs: of :func:`configuration` (width_mult, width_rule, reduced_tail, dilated) and of
            :class:`FusedMobileNetV3` (num_classes, dropout, ...).

    Raises:
        ValueError: the weights do not fit the model, or are unknown; an unknown width_rule.
        FileNotFoundError, ImportError: no such file; torchvision is needed for its own weights.
    """
    return load_weights(partial(_build, "large"), weights, progress, kwargs, "MobileNet_V3_Large_Weights")


def fused_mobilenet_v3_small(*, weights=None, progress=True, **kwargs):
    """MobileNetV3-Small of fused blocks: a drop-in for ``torchvision.models.mobilenet_v3_small``.

    As :func:`fused_mobilenet_v3_large`, with torchvision's ``MobileNet_V3_Small_Weights``.
    """
    return load_weights(partial(_build, "small"), weights, progress, kwargs, "MobileNet_V3_Small_Weights")
