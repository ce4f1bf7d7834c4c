"""Squeeze-excite, laid out as torchvision's SqueezeExcitation (keys ``fc1.*``, ``fc2.*``)."""

from torch import nn


class SqueezeExcite(nn.Module):
    """x * hardsigmoid(fc2(relu(fc1(mean of x over H and W)))), [N, C, H, W] -> [N, C, H, W].

    Alone it runs its children; inside :class:`FusedInvertedResidual` it is part of the fused block.

    Args:
        input_channels: C.
        squeeze_channels: R, the width between.
    """

    def __init__(self, input_channels, squeeze_channels):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = nn.ReLU()
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x):
        q = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(q)) * x
