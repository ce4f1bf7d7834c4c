"""The inverted residual of MobileNetV2 and V3, laid out as torchvision's two InvertedResidual classes."""

from torch import nn

from ..graph.swap import fuses
from .conv_bn_act import FusedDepthwiseConvBNAct, FusedPointwiseConvBNAct
from .squeeze_excite import SqueezeExcite

_BODIES = {"v2": "conv", "v3": "block"}  # layout -> name of the child that holds the layers


class InvertedResidual(nn.Module):
    """Runs its body, ``conv`` (layout "v2") or ``block`` (layout "v3"), and adds x where ``use_res_connect``."""

    def forward(self, x):
        out = self.conv(x) if hasattr(self, "conv") else self.block(x)
        return x + out if self.use_res_connect else out


@fuses(InvertedResidual)
class FusedInvertedResidual(InvertedResidual):
    """BN(project([SE] act(BN(depthwise(act(BN(expand(x)))))))) [+ x], [N, inp, H, W] -> [N, oup, H', W'].

    The state_dict keys are torchvision's.  Layout "v2": ``conv`` holds [expand,] depthwise, [squeeze-excite,] project,
    batch norm.  Layout "v3": ``block`` holds the same, project and batch norm in a container of their own.

    Args:
        inp, oup: input and output channels.
        stride: of the depthwise layer, 1 or 2; x is added where it is 1 and inp = oup.
        expand_ratio: the hidden width is round(inp * expand_ratio); 1 has no expand layer.
        norm_layer: makes a norm from a channel count; fused if it is nn.BatchNorm2d.
        kernel_size: of the depthwise layer, 3 or 5.
        activation_layer: nn.ReLU, nn.ReLU6, nn.Hardswish or nn.SiLU.
        squeeze_channels: width of squeeze-excite's hidden layer; None for no squeeze-excite.
        dilation: of the depthwise layer; a dilated block has stride 1 there (and no residual if stride is 2), and runs
            its layers one by one.
        layout: "v2" or "v3".
        backend, mode: pin the choice of ``mnet_kernels.backend``.

    Raises:
        ValueError: stride is neither 1 nor 2, or an unknown layout.
    """

    def __init__(
        self,
        inp,
        oup,
        stride,
        expand_ratio,
        norm_layer=None,
        *,
        kernel_size=3,
        activation_layer=nn.ReLU6,
        squeeze_channels=None,
        dilation=1,
        layout="v2",
        backend=None,
        mode=None,
    ):
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride should be 1 or 2 instead of {stride}")
        if layout not in _BODIES:
            raise ValueError(f"layout must be one of {', '.join(_BODIES)}, got {layout!r}")
        norm_layer = norm_layer or nn.BatchNorm2d
        hidden = int(round(inp * expand_ratio))
        layers = []
        if expand_ratio != 1:
            layers.append(FusedPointwiseConvBNAct(inp, hidden, norm_layer, activation_layer))
        depthwise_stride = stride if dilation == 1 else 1
        layers.append(
            FusedDepthwiseConvBNAct(
                hidden, kernel_size, depthwise_stride, norm_layer, activation_layer, dilation=dilation
            )
        )
        if squeeze_channels is not None:
            layers.append(SqueezeExcite(hidden, squeeze_channels))
        if layout == "v2":
            layers += [nn.Conv2d(hidden, oup, 1, bias=False), norm_layer(oup)]
        else:
            layers.append(FusedPointwiseConvBNAct(hidden, oup, norm_layer, None))
        self.add_module(_BODIES[layout], nn.Sequential(*layers))
        self.stride, self.out_channels = stride, oup
        self.use_res_connect = stride == 1 and inp == oup
        self._is_cn = stride > 1  # torchvision's mark of the blocks before which the resolution changes
        self.backend, self.mode = backend, mode
