"""The inverted residual of MobileNetV2 and V3, laid out as torchvision's two InvertedResidual classes."""

from torch import nn

from .. import functional
from ..params import InvertedResidualParams
from . import fusable
from .base import FusedModule
from .conv_bn_act import FusedConvBNAct, FusedDepthwiseConvBNAct, FusedPointwiseConvBNAct, FusedStemConvBNAct
from .squeeze_excite import SqueezeExcite

_BODIES = {"v2": "conv", "v3": "block"}  # layout -> name of the child that holds the layers


class FusedInvertedResidual(FusedModule, nn.Module):
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
        self._set(_BODIES[layout], nn.Sequential(*layers), stride, stride == 1 and inp == oup, oup, backend, mode)

    def _set(self, body, layers, stride, use_res_connect, out_channels, backend, mode):
        self._body = body
        self.add_module(body, layers)
        self.stride = stride
        self.use_res_connect = use_res_connect
        self.out_channels = out_channels
        self._is_cn = stride > 1  # torchvision's mark of the blocks before which the resolution changes
        self.backend, self.mode = backend, mode

    def _roles(self):
        """(expand container or None, depthwise container, squeeze-excite or None, project, batch norm)."""
        children = list(self._modules[self._body]._modules.values())
        if children and isinstance(children[-1], nn.Sequential):
            children[-1:] = children[-1]._modules.values()
        expand = children.pop(0) if len(children) > 1 and isinstance(children[1], nn.Sequential) else None
        se = children.pop(1) if len(children) == 4 else None
        return (expand, children[0], se, *children[1:]) if len(children) == 3 else None

    def why_native(self):
        body = self._modules[self._body]
        why = fusable.container(body, self._body, nn.Sequential.forward)
        if not why and len(body) and isinstance(body[-1], nn.Sequential):
            why = fusable.container(body[-1], "project", FusedConvBNAct.forward)
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
        out = self._modules[self._body](x)
        return x + out if self.use_res_connect else out

    def params(self):
        """The block's parameters, for the functional API."""
        expand, depthwise, se, project, bn = self._roles()
        layers = () if expand is None else (fusable.layer(*_parts(expand), "pointwise"),)
        layers += (fusable.layer(*_parts(depthwise), "depthwise"), fusable.layer(project, bn, None, "pointwise"))
        excite = None if se is None else fusable.squeeze_excite_params(se)
        return InvertedResidualParams(layers, self.use_res_connect, excite)

    def run_fused(self, x):
        return _run_sequence([self], x)


def run_blocks(modules, x):
    """Call modules one after another, neighbouring :class:`FusedInvertedResidual` blocks as one op.

    So a block in algebraic mode has the statistics of its input from the block that wrote it, and a block without an
    expand layer reads the raw output of the stem before it.  A block that may not be fused or that somebody may want to
    see (hooks, a replaced forward, compiled by itself) is called as it is; what it gives, and whatever was done to it,
    has its statistics gathered anew.
    """
    run, stem = [], None
    for block, follower in zip(modules, (*modules[1:], None), strict=True):
        joins = _joins(block)
        if run and not (joins and (block.backend, block.mode) == (run[0].backend, run[0].mode)):
            x, run, stem = _run_sequence(run, x, stem), [], None
        if joins:
            run.append(block)
        elif _gives_raw(block, follower):
            stem = block
        else:
            x = block(x)
    return _run_sequence(run, x, stem) if run else x


def _joins(block):
    return type(block) is FusedInvertedResidual and _is_unseen(block)


def _is_unseen(module):
    return module._compiled_call_impl is None and not (fusable.untouched(module, "") or module.why_native())


def _gives_raw(stem, block):
    """Whether the block after a stem may read its raw output."""
    if type(stem) is not FusedStemConvBNAct or not _is_unseen(stem) or not _joins(block):
        return False
    reads_raw = block._roles()[0] is None and not block.use_res_connect
    return reads_raw and (stem.backend, stem.mode) == (block.backend, block.mode)


def _run_sequence(blocks, x, stem=None):
    params = [block.params() for block in blocks]
    layer = None if stem is None else stem.layer()
    return functional.inverted_residual_sequence(x, params, stem=layer, backend=blocks[0].backend, mode=blocks[0].mode)


def _parts(child):
    parts = tuple(child._modules.values())
    return parts if len(parts) == 3 else (*parts, None)


def _activation(child):
    act = _parts(child)[2]
    return None if act is None else type(act)
