"""MobileNetV1's depthwise separable block, alone and in a row."""

from torch import nn

from .. import functional
from . import fusable
from .base import FusedModule


class FusedSeparable(FusedModule, nn.Module):
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

    def _parts(self):
        return (self.conv_dw, self.bn1, self.act1), (self.conv_pw, self.bn2, self.act2)

    def why_native(self):
        for kind, parts in zip(("depthwise", "pointwise"), self._parts(), strict=True):
            why = fusable.conv_bn_act(*parts, kind, kind)
            if why:
                return why
        return None

    def layers(self):
        """Both layers' parameters, for the functional API."""
        depthwise, pointwise = self._parts()
        return fusable.layer(*depthwise, "depthwise"), fusable.layer(*pointwise, "pointwise")

    def run_native(self, x):
        for parts in self._parts():
            for part in parts:
                x = part(x)
        return x

    def run_fused(self, x):
        return run_sequence([self], x)


def _activation(activation_layer):
    return nn.Identity() if activation_layer is None else activation_layer(inplace=True)


def run_sequence(blocks, x, stem=None):
    """Run fusable blocks of one choice of backend and mode, and the stem's layer before them."""
    layers = [block.layers() for block in blocks]
    return functional.separable_sequence(x, layers, stem=stem, backend=blocks[0].backend, mode=blocks[0].mode)


def _joins(block):
    return type(block) is FusedSeparable and not (fusable.untouched(block, "") or block.why_native())


class FusedSeparableSequence(nn.Sequential):
    """nn.Sequential that runs neighbouring :class:`FusedSeparable` blocks as one.

    A block's last batch norm and activation are then applied by the next block's read instead of being written out,
    across sequences of this class nested in it too.  A child that may not be fused, is of another class or has hooks
    is called as it is, after everything before it and before everything after it.
    """

    def takes_stem(self):
        """Whether its first block can read a stem's raw output (``forward``'s ``stem``)."""
        return not fusable.untouched(self, "") and _joins(next(self._blocks(), None))

    def forward(self, x, stem=None):
        """``stem``: the ConvBNAct before the blocks, of which x is then the input; only if :meth:`takes_stem`."""
        if fusable.is_traced(x) or fusable.global_hooks():
            return super().forward(x)
        run = []
        for block in self._blocks():
            joins = _joins(block)
            if run and not (joins and (block.backend, block.mode) == (run[0].backend, run[0].mode)):
                x, run, stem = run_sequence(run, x, stem), [], None
            if joins:
                run.append(block)
            else:
                x = block(x)
        return run_sequence(run, x, stem) if run else x

    def _blocks(self):
        for child in self._modules.values():
            if type(child) is FusedSeparableSequence and not fusable.untouched(child, ""):
                yield from child._blocks()
            else:
                yield child
