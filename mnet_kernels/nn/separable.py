"""MobileNetV1's depthwise separable block."""

from torch import nn

from ..graph.swap import fuses


class Separable(nn.Module):
    """Depthwise and pointwise layer, each with batch norm and activation, one after the other."""

    def forward(self, x):
        x = self.act1(self.bn1(self.conv_dw(x)))
        return self.act2(self.bn2(self.conv_pw(x)))


@fuses(Separable)
class FusedSeparable(Separable):
    """act(BN(pointwise(act(BN(depthwise(x)))))), [N, C, H, W] -> [N, O, ceil(H / stride), ceil(W / stride)].

    Children ``conv_dw``, ``bn1``, ``act1``, ``conv_pw``, ``bn2``, ``act2``: the state_dict keys of timm's
    DepthwiseSeparableConv.

    Args:
        in_channels, out_channels: C, O.
        stride, kernel_size: of the depthwise layer.
        norm_layer, activation_layer, backend, mode: as for :class:`FusedDepthwiseConvBNAct`.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        stride=1,
        kernel_size=3,
        norm_layer=None,
        activation_layer=nn.ReLU6,
        *,
        backend=None,
        mode=None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        padding = kernel_size // 2
        self.conv_dw = nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=False)
        self.bn1 = norm_layer(in_channels)
        self.act1 = _activation(activation_layer)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = norm_layer(out_channels)
        self.act2 = _activation(activation_layer)
        self.backend, self.mode = backend, mode


def _activation(activation_layer):
    return nn.Identity() if activation_layer is None else activation_layer(inplace=True)
