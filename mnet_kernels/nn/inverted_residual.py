"""The inverted residual of MobileNetV2, laid out as torchvision's InvertedResidual."""

from torch import nn

from .. import functional
from . import fusable
from .base import FusedModule
from .conv_bn_act import FusedConvBNAct, FusedDepthwiseConvBNAct, FusedPointwiseConvBNAct
from .squeeze_excite import SqueezeExcite


class FusedInvertedResidual(FusedModule, nn.Module):
    """BN(project([SE] act(BN(depthwise(act(BN(expand(x)))))))) [+ x], [N, inp, H, W] -> [N, oup, H', W'].

    ``conv`` holds [expand,] depthwise, [squeeze-excite,] project, batch norm: torchvision's state_dict keys.

    Args:
        inp, oup: input and output channels.
        stride: of the depthwise layer, 1 or 2; x is added where it is 1 and inp = oup.
        expand_ratio: the hidden width is round(inp * expand_ratio); 1 has no expand layer.
        norm_layer: makes a norm from a channel count; fused if it is nn.BatchNorm2d.
        kernel_size: of the depthwise layer, 3 or 5.
        activation_layer: nn.ReLU, nn.ReLU6 or nn.Hardswish.
        squeeze_channels: width of squeeze-excite's hidden layer; None for no squeeze-excite.
        backend, mode: pin the choice of ``mnet_kernels.backend``.

    Raises:
        ValueError: stride is neither 1 nor 2.
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
        backend=None,
        mode=None,
    ):
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride should be 1 or 2 instead of {stride}")
        norm_layer = norm_layer or nn.BatchNorm2d
        hidden = int(round(inp * expand_ratio))
        layers = []
        if expand_ratio != 1:
            layers.append(FusedPointwiseConvBNAct(inp, hidden, norm_layer, activation_layer))
        layers.append(FusedDepthwiseConvBNAct(hidden, kernel_size, stride, norm_layer, activation_layer))
        if squeeze_channels is not None:
            layers.append(SqueezeExcite(hidden, squeeze_channels))
        layers += [nn.Conv2d(hidden, oup, 1, bias=False), norm_layer(oup)]
        self._set(nn.Sequential(*layers), stride, stride == 1 and inp == oup, oup, backend, mode)

    def _set(self, conv, stride, use_res_connect, out_channels, backend, mode):
        self.conv = conv
        self.stride = stride
        self.use_res_connect = use_res_connect
        self.out_channels = out_channels
        self._is_cn = stride > 1  # torchvision's mark of the blocks before which the resolution changes
        self.backend, self.mode = backend, mode

    @classmethod
    def of(cls, block, backend=None, mode=None):
        """Wrap torchvision's InvertedResidual, sharing its children."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set(block.conv, block.stride, block.use_res_connect, block.out_channels, backend, mode)
        return self.train(block.training)

    def _roles(self):
        """(expand container or None, depthwise container, squeeze-excite or None, project, batch norm)."""
        children = list(self.conv._modules.values())
        expand = children.pop(0) if len(children) > 1 and isinstance(children[1], nn.Sequential) else None
        se = children.pop(1) if len(children) == 4 else None
        return (expand, children[0], se, *children[1:]) if len(children) == 3 else None

    def why_native(self):
        why = fusable.container(self.conv, "conv", nn.Sequential.forward)
        if why:
            return why
        roles = self._roles()
        if roles is None:
            return "its children are not [expand,] depthwise, [squeeze-excite,] project, batch norm"
        expand, depthwise, se, project, bn = roles
        for child, kind, name in ((expand, "pointwise", "expand"), (depthwise, "depthwise", "depthwise")):
            if child is None:
                continue
            why = fusable.container(child, name, FusedConvBNAct.forward)
            if not why and len(child) not in (2, 3):
                why = f"{name} has {len(child)} children instead of convolution, batch norm, activation"
            why = why or fusable.conv_bn_act(*_parts(child), kind, name)
            if why:
                return why
        if expand is not None and _activation(expand) != _activation(depthwise):
            return "its two activations differ"
        if se is not None:
            why = fusable.squeeze_excite(se)
        return why or fusable.conv_bn_act(project, bn, None, "pointwise", "project")

    def run_native(self, x):
        out = self.conv(x)
        return x + out if self.use_res_connect else out

    def run_fused(self, x):
        expand, depthwise, se, project, bn = self._roles()
        expand = None if expand is None else fusable.layer(*_parts(expand), "pointwise")
        depthwise = fusable.layer(*_parts(depthwise), "depthwise")
        project = fusable.layer(project, bn, None, "pointwise")
        return functional.inverted_residual(
            x,
            None if expand is None else expand.weight,
            None if expand is None else expand.bn,
            depthwise.weight,
            depthwise.bn,
            project.weight,
            project.bn,
            stride=depthwise.stride,
            activation=depthwise.activation,
            residual=self.use_res_connect,
            squeeze_excite=None if se is None else fusable.squeeze_excite_params(se),
            backend=self.backend,
            mode=self.mode,
        )


def _parts(child):
    parts = tuple(child._modules.values())
    return parts if len(parts) == 3 else (*parts, None)


def _activation(child):
    act = _parts(child)[2]
    return None if act is None else type(act)
