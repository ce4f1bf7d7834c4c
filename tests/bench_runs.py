"""What the tests of measuring share."""

import torch

from mnet_kernels.bench import shapes
from mnet_kernels.bench.subjects import Setting

CPU = torch.device("cpu")
SMALL = {"width": 0.25, "resolution": 32}
SETTING = Setting(CPU, 2)
QUICK = {"seconds": 0.02, "min_rounds": 3, "max_rounds": 5, "warmup": 1}


def samples(median, rounds=60, spread=0.05):
    """Log-normal times around a median, with rare outliers as a shared machine has them."""
    noise = torch.randn(rounds, dtype=torch.float64) * spread
    outliers = (torch.rand(rounds) < 0.05) * torch.rand(rounds) * 2
    return (median * (noise + outliers).exp()).tolist()


def small_block():
    return next(b for b in shapes.blocks(["v2"], **SMALL) if b.name.endswith("+x") and " pw" in b.name[4:14])
