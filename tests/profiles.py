"""Profiles for the tests: two blocks and a model, quickly."""

import torch

from mnet_kernels.profile import collect, subject

CPU = torch.device("cpu")
MACHINE = {"copy_bytes_per_s": 1e10, "matrix_flops": {"fp32": 5e10, "bf16": 5e10}, "matrix_flops_per_s": 5e10}
BLOCK = "8-24-8@10,k5,hardswish,se"
QUICK = {"seconds": 0.02, "rounds": 5}


def options(**changes):
    return collect.options(**({"device": CPU, "batch": 2, "fused": "reference/chain", **QUICK} | changes))


def collected():
    """A profile of two blocks and a model."""
    torch.manual_seed(0)
    placed = subject.find("v1", width=0.25, resolution=32)
    chosen = [subject.Placed(subject.block(BLOCK)), next(p for p in placed if len(p.paths) > 1), placed[-1]]
    return collect.collect("MobileNet V1", chosen, options(), machine=MACHINE)
