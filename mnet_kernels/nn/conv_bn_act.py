"""Convolution, batch norm and activation as one module, laid out as torchvision's Conv2dNormActivation: state_dict keys
``0.*`` and ``1.*``."""

from torch import nn

from ..graph.swap import fuses


class ConvBNActPool(nn.Sequential):
    """Mean over H and W of what its children compute one after another, [N, C, H, W] -> [N, O]."""

    def forward(self, x):
        for module in self:
            x = module(x)
        return nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)


def _modules(conv, norm_layer, activation_layer):
    modules = [conv, (norm_layer or nn.BatchNorm2d)(conv.out_channels)]
    if activation_layer is not None:
        modules.append(activation_layer(inplace=True))
    return modules


@fuses(nn.Sequential)
class FusedDepthwiseConvBNAct(nn.Sequential):
    """act(BN(depthwise(x))), [N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)].

    Args:
        channels: C.
        kernel_size: 3 or 5 to run fused (padding kernel_size // 2).
        stride: 1 or 2 to run fused.
        dilation: 1 to run fused (padding dilation * (kernel_size // 2)).
        norm_layer: makes the norm from C; fused if it is nn.BatchNorm2d.
        activation_layer: nn.ReLU, nn.ReLU6, nn.Hardswish or nn.SiLU to run fused; None for none.
        backend, mode: pin the choice of ``mnet_kernels.backend``.
    """

    def __init__(
        self,
        channels,
        kernel_size=3,
        stride=1,
        norm_layer=None,
        activation_layer=nn.ReLU6,
        *,
        dilation=1,
        backend=None,
        mode=None,
    ):
        padding = dilation * (kernel_size // 2)
        conv = nn.Conv2d(channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=False)
        super().__init__(*_modules(conv, norm_layer, activation_layer))
        self.out_channels, self.backend, self.mode = conv.out_channels, backend, mode


@fuses(nn.Sequential)
class FusedPointwiseConvBNAct(nn.Sequential):
    """act(BN(1x1 convolution of x)), [N, C, H, W] -> [N, O, H, W].

    Args:
        in_channels, out_channels: C, O.
        norm_layer, activation_layer, backend, mode: as for :class:`FusedDepthwiseConvBNAct`.
    """

    def __init__(
        self, in_channels, out_channels, norm_layer=None, activation_layer=nn.ReLU6, *, backend=None, mode=None
    ):
        conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        super().__init__(*_modules(conv, norm_layer, activation_layer))
        self.out_channels, self.backend, self.mode = conv.out_channels, backend, mode


@fuses(ConvBNActPool)
class FusedPointwiseConvBNActPool(FusedPointwiseConvBNAct, ConvBNActPool):
    """Mean over H and W of act(BN(1x1 convolution of x)), [N, C, H, W] -> [N, O]: what stands before a classifier.

    Arguments and state_dict keys are those of :class:`FusedPointwiseConvBNAct`; its output is never written.
    """


@fuses(nn.Sequential)
class FusedStemConvBNAct(nn.Sequential):
    """act(BN(dense 3x3 convolution of an image)), [N, C, H, W] -> [N, O, ceil(H / stride), ceil(W / stride)].

    Args:
        in_channels, out_channels: C, O; C 1 to 8 to run fused.
        stride: 1 or 2 to run fused.
        norm_layer, activation_layer, backend, mode: as for :class:`FusedDepthwiseConvBNAct`.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        stride=2,
        norm_layer=None,
        activation_layer=nn.ReLU6,
        *,
        backend=None,
        mode=None,
    ):
        conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        super().__init__(*_modules(conv, norm_layer, activation_layer))
        self.out_channels, self.backend, self.mode = conv.out_channels, backend, mode
