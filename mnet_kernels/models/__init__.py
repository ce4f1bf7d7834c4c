"""Models of fused blocks: drop-ins for torchvision's constructors."""

from .v2 import FusedMobileNetV2, fused_mobilenet_v2

__all__ = ["FusedMobileNetV2", "fused_mobilenet_v2"]
