"""A row of modules whose neighbouring blocks run as one."""

from torch import nn

from ..graph.swap import fuses


@fuses(nn.Sequential)
class FusedSequential(nn.Sequential):
    """nn.Sequential that runs neighbouring fused blocks as one op, across sequences of this class nested in it too.

    What a block hands to the next is then not written: the stem's and a separable block's last batch norm and
    activation are applied by the next block's read, and a block in algebraic mode has the statistics of its input from
    the block that wrote it.  A child that may not be fused, is of another class or has hooks is called as it is, after
    everything before it and before everything after it.

    ``backend`` and ``mode`` pin the choice of layers that are its own children (``mnet_kernels.backend``); the fused
    modules among them have their own.
    """

    backend = mode = None
