"""What a call costs the host before any arithmetic: one block of every kind, so small that little else is left.

On a card a block cannot be faster than the host can enqueue it, and at batch 1 to 8 this is what bounds a network.  The
time is the CPU time of the calling thread: on a card what it takes to enqueue, on the CPU the whole call, of which the
arithmetic on these maps is a small part.
"""

from torch import nn

from ..nn import FusedDepthwiseConvBNAct, FusedInvertedResidual, FusedPointwiseConvBNAct, FusedSeparable
from .subjects import Block

BATCHES = (1, 2, 4, 8)
CHANNELS, SIZE = 8, 4


class HostBlock(Block):
    """A block on a tiny map; timed by the CPU's clock on every device."""

    level = "host"


def blocks(names=None, width=1.0, resolution=224):
    """One block of every kind; the arguments are those of the other levels, and change nothing."""
    kinds = {
        "depthwise layer": FusedDepthwiseConvBNAct(CHANNELS, 3),
        "pointwise layer": FusedPointwiseConvBNAct(CHANNELS, CHANNELS),
        "separable (2 layers)": FusedSeparable(CHANNELS, CHANNELS),
        "inverted residual (3 layers)": FusedInvertedResidual(CHANNELS, CHANNELS, 1, 2),
        "inverted residual with squeeze-excite": FusedInvertedResidual(
            CHANNELS, CHANNELS, 1, 2, kernel_size=5, activation_layer=nn.Hardswish, squeeze_channels=CHANNELS
        ),
    }
    return [HostBlock(name, module, (CHANNELS, SIZE, SIZE)) for name, module in kinds.items()]
