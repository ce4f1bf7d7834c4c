"""MobileNetV2 (Sandler et al. 2018, table 2), a drop-in for ``torchvision.models.mobilenet_v2``."""

from functools import partial

from torch import nn

from ..graph.swap import fuses
from ..nn import FusedInvertedResidual, FusedPointwiseConvBNAct, FusedSequential, FusedStemConvBNAct
from .common import initialise, make_divisible
from .weights import load_weights

# expansion t, output channels c, repeats n, stride s of the first
INVERTED_RESIDUAL_SETTING = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """Features, their mean over H and W, a classifier."""

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(x.flatten(1))


@fuses(MobileNetV2)
class FusedMobileNetV2(MobileNetV2):
    """MobileNetV2 of fused blocks: torchvision's arguments, initialisation and state_dict keys.

    Input [N, 3, H, W], output [N, num_classes]; any H and W from 32 up are sensible.

    Args:
        num_classes: outputs of the classifier.
        width_mult: scales every layer's channels.
        inverted_residual_setting: rows (t, c, n, s); None is the paper's table 2.
        round_nearest: channels are multiples of this.
        block: module of one inverted residual, called as torchvision's; None is :class:`FusedInvertedResidual`.
        norm_layer: makes a norm from a channel count; None is nn.BatchNorm2d (others run unfused).
        dropout: before the classifier.
        stem_stride: 2, or 1 for small images.
        backend, mode: pin every block's choice (see ``mnet_kernels.backend``); None leaves it open.

    Raises:
        ValueError: inverted_residual_setting is empty or not rows of four.
    """

    def __init__(
        self,
        num_classes=1000,
        width_mult=1.0,
        inverted_residual_setting=None,
        round_nearest=8,
        block=None,
        norm_layer=None,
        dropout=0.2,
        *,
        stem_stride=2,
        backend=None,
        mode=None,
    ):
        super().__init__()
        setting = INVERTED_RESIDUAL_SETTING if inverted_residual_setting is None else inverted_residual_setting
        if len(setting) == 0 or any(len(row) != 4 for row in setting):
            raise ValueError(
                f"inverted_residual_setting should be non-empty or a 4-element list, got {inverted_residual_setting}"
            )
        block = block or partial(FusedInvertedResidual, backend=backend, mode=mode)
        norm_layer = norm_layer or nn.BatchNorm2d

        channels = make_divisible(32 * width_mult, round_nearest)
        self.last_channel = make_divisible(1280 * max(1.0, width_mult), round_nearest)
        features = [FusedStemConvBNAct(3, channels, stem_stride, norm_layer, backend=backend, mode=mode)]
        for t, c, n, s in setting:
            out = make_divisible(c * width_mult, round_nearest)
            for i in range(n):
                features.append(block(channels, out, s if i == 0 else 1, expand_ratio=t, norm_layer=norm_layer))
                channels = out
        features.append(FusedPointwiseConvBNAct(channels, self.last_channel, norm_layer, backend=backend, mode=mode))
        self.features = FusedSequential(*features)
        self.backend, self.mode = backend, mode
        self.classifier = nn.Sequential(nn.Dropout(p=dropout), nn.Linear(self.last_channel, num_classes))
        initialise(self)


def fused_mobilenet_v2(*, weights=None, progress=True, **kwargs):
    """FusedMobileNetV2, with weights if given: a drop-in for ``torchvision.models.mobilenet_v2``.

    Args:
        weights: a torchvision ``MobileNet_V2_Weights`` member or its name ("DEFAULT", "IMAGENET1K_V2"), a path to a
            saved state_dict, or a state_dict.
        progress: show the download's progress bar (torchvision weights).
        kwargs: of :class:`FusedMobileNetV2`.

    Raises:
        ValueError: the weights do not fit the model, or are unknown.
        FileNotFoundError, ImportError: no such file; torchvision is needed for its own weights.
    """
    return load_weights(FusedMobileNetV2, weights, progress, kwargs, "MobileNet_V2_Weights")
