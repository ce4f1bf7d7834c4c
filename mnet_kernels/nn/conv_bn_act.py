"""Convolution, batch norm and activation as one module, laid out as torchvision's Conv2dNormActivation."""

from torch import nn

from .. import functional
from . import fusable
from .base import FusedModule


class FusedConvBNAct(FusedModule, nn.Sequential):
    """nn.Sequential(conv, batch norm[, activation]) whose forward runs fused: state_dict keys ``0.*`` and ``1.*``."""

    kind = None

    def __init__(self, *modules, backend=None, mode=None):
        super().__init__(*modules)
        self.backend, self.mode = backend, mode
        self.out_channels = self[0].out_channels

    def _parts(self):
        parts = tuple(self._modules.values())
        return parts if len(parts) == 3 else (*parts, None)

    def why_native(self):
        if len(self._modules) not in (2, 3):
            return f"it has {len(self._modules)} children instead of convolution, batch norm, activation"
        return fusable.conv_bn_act(*self._parts(), self.kind, self.kind)

    def layer(self):
        """The layer's parameters, for the functional API."""
        return fusable.layer(*self._parts(), self.kind)

    def run_native(self, x):
        return nn.Sequential.forward(self, x)


def _modules(conv, norm_layer, activation_layer):
    modules = [conv, (norm_layer or nn.BatchNorm2d)(conv.out_channels)]
    if activation_layer is not None:
        modules.append(activation_layer(inplace=True))
    return modules


class FusedDepthwiseConvBNAct(FusedConvBNAct):
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

    kind = "depthwise"

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
        super().__init__(*_modules(conv, norm_layer, activation_layer), backend=backend, mode=mode)

    def run_fused(self, x):
        _, weight, bn, activation, stride = self.layer()
        return functional.depthwise_conv_bn_act(
            x, weight, bn, stride=stride, activation=activation, backend=self.backend, mode=self.mode
        )


class FusedPointwiseConvBNAct(FusedConvBNAct):
    """act(BN(1x1 convolution of x)), [N, C, H, W] -> [N, O, H, W].

    Args:
        in_channels, out_channels: C, O.
        norm_layer, activation_layer, backend, mode: as for :class:`FusedDepthwiseConvBNAct`.
    """

    kind = "pointwise"

    def __init__(
        self, in_channels, out_channels, norm_layer=None, activation_layer=nn.ReLU6, *, backend=None, mode=None
    ):
        conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        super().__init__(*_modules(conv, norm_layer, activation_layer), backend=backend, mode=mode)

    def run_fused(self, x):
        return self._run(functional.pointwise_conv_bn_act, x)

    def run_pooled(self, x):
        """Mean over H and W of what ``run_fused`` gives, [N, O], which is not written."""
        return self._run(functional.pointwise_conv_bn_act_pool, x)

    def _run(self, op, x):
        _, weight, bn, activation, _ = self.layer()
        return op(x, weight, bn, activation=activation, backend=self.backend, mode=self.mode)


class FusedPointwiseConvBNActPool(FusedPointwiseConvBNAct):
    """Mean over H and W of act(BN(1x1 convolution of x)), [N, C, H, W] -> [N, O]: what stands before a classifier.

    Arguments and state_dict keys are those of :class:`FusedPointwiseConvBNAct`; its output is never written.
    """

    def run_native(self, x):
        return nn.functional.adaptive_avg_pool2d(super().run_native(x), 1).flatten(1)

    def run_fused(self, x):
        return self.run_pooled(x)
