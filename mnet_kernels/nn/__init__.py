"""Fused modules over the functional API; children and state_dict keys as in torchvision."""

from .conv_bn_act import (
    FusedDepthwiseConvBNAct,
    FusedPointwiseConvBNAct,
    FusedPointwiseConvBNActPool,
    FusedStemConvBNAct,
)
from .inverted_residual import FusedInvertedResidual
from .separable import FusedSeparable
from .sequential import FusedSequential
from .squeeze_excite import SqueezeExcite

__all__ = [
    "FusedDepthwiseConvBNAct",
    "FusedInvertedResidual",
    "FusedPointwiseConvBNAct",
    "FusedPointwiseConvBNActPool",
    "FusedSeparable",
    "FusedSequential",
    "FusedStemConvBNAct",
    "SqueezeExcite",
]
