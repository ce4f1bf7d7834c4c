"""MobileNetV1's depthwise separable block."""

from torch import nn

from .. import functional
from . import fusable
from .base import FusedModule
from .conv_bn_act import FusedConvBNAct, FusedDepthwiseConvBNAct, FusedPointwiseConvBNAct


class FusedSeparable(FusedModule, nn.Module):
    """act(BN(pointwise(act(BN(depthwise(x)))))), [N, C, H, W] -> [N, O, ceil(H / stride), ceil(W / stride)].

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
        self.depthwise = FusedDepthwiseConvBNAct(in_channels, kernel_size, stride, norm_layer, activation_layer)
        self.pointwise = FusedPointwiseConvBNAct(in_channels, out_channels, norm_layer, activation_layer)
        self.backend, self.mode = backend, mode

    def why_native(self):
        for name in ("depthwise", "pointwise"):
            child = self._modules[name]
            why = fusable.container(child, name, FusedConvBNAct.forward) or child.why_native()
            if why:
                return why
        if self.depthwise.layer().activation != self.pointwise.layer().activation:
            return "its two activations differ"
        return None

    def run_native(self, x):
        return self.pointwise(self.depthwise(x))

    def run_fused(self, x):
        depthwise, pointwise = self.depthwise.layer(), self.pointwise.layer()
        return functional.separable_conv(
            x, depthwise.weight, depthwise.bn, pointwise.weight, pointwise.bn,
            stride=depthwise.stride, activation=depthwise.activation, backend=self.backend, mode=self.mode,
        )  # fmt: skip
