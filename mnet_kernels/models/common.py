"""What the models share: the width rule's rounding, the initialisation."""

from torch import nn


def make_divisible(v, divisor, min_value=None):
    """Round to the nearest multiple of divisor, never below min_value (divisor) nor by more than 10 % down."""
    new = max(min_value or divisor, int(v + divisor / 2) // divisor * divisor)
    return new + divisor if new < 0.9 * v else new


def initialise(model):
    """torchvision's initialisation, in its order (so that one seed gives the same weights)."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.01)
            nn.init.zeros_(m.bias)
