"""Models of fused blocks: drop-ins for torchvision's constructors (V2, V3) and timm's (V1)."""

from .v1 import FusedMobileNetV1, fused_mobilenet_v1
from .v2 import FusedMobileNetV2, fused_mobilenet_v2
from .v3 import FusedMobileNetV3, fused_mobilenet_v3_large, fused_mobilenet_v3_small

# name on a command line -> constructor
MODELS = {
    "v1": fused_mobilenet_v1,
    "v2": fused_mobilenet_v2,
    "v3-large": fused_mobilenet_v3_large,
    "v3-small": fused_mobilenet_v3_small,
}

__all__ = [
    "MODELS",
    "FusedMobileNetV1",
    "FusedMobileNetV2",
    "FusedMobileNetV3",
    "fused_mobilenet_v1",
    "fused_mobilenet_v2",
    "fused_mobilenet_v3_large",
    "fused_mobilenet_v3_small",
]
