"""What is measured: blocks and whole models (single stages: stage_subjects.py; the list of shapes: shapes.py).

A subject prepares a :class:`Workload` for a provider and a :class:`Setting`.  Everything a workload's calls touch is
allocated once: every call reads and writes the same tensors, so that it may be captured in a CUDA graph.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..training.config import AMP_DTYPES
from . import providers

CLASSES = 1000


class Setting(NamedTuple):
    """How everything runs: device, images a batch, mixed precision (a key of ``AMP_DTYPES``), training or eval mode."""

    device: torch.device
    batch: int
    amp: str = "off"
    training: bool = True

    @property
    def storage(self):
        """Dtype of the activations."""
        return AMP_DTYPES[self.amp] or torch.float32

    def autocast(self):
        if self.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AMP_DTYPES[self.amp])


@dataclass
class Workload:
    """Calls without arguments, by direction; ``forward_for_saving`` builds a graph and returns the output."""

    calls: dict[str, Callable]
    forward_for_saving: Callable | None = None
    parameters: list = field(default_factory=list)


def _input(shape, setting, provider, dtype, generator):
    x = torch.randn(setting.batch, *shape, generator=generator).to(setting.device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if provider.channels_last else x


@dataclass(frozen=True)
class Block:
    """One block of a model; ``forward`` is without autograd, ``train`` forward and backward."""

    name: str
    module: torch.nn.Module = field(compare=False)
    shape: tuple

    level = "block"
    directions = ("forward", "train")

    def runs_on(self, provider):
        return True

    def prepare(self, provider, setting):
        generator = torch.Generator().manual_seed(0)
        module = providers.fit(self.module, provider, setting.device, setting.training)
        # in a network under autocast the block before hands on its output in the autocast dtype
        x = _input(self.shape, setting, provider, setting.storage, generator).requires_grad_()
        leaves = [x, *module.parameters()]

        def output():
            with setting.autocast():
                return module(x)

        with torch.no_grad():
            out = output()
        upstream = torch.empty_like(out).copy_(torch.randn(out.shape, generator=generator))

        def forward():
            with torch.no_grad():
                output()

        def train():
            torch.autograd.grad(output(), leaves, upstream)

        return Workload({"forward": forward, "train": train}, output, leaves[1:])


@dataclass(frozen=True)
class Model:
    """A whole model; ``forward`` is without autograd, ``train`` a step: loss, backward, SGD with momentum."""

    name: str
    module: torch.nn.Module = field(compare=False)
    shape: tuple

    level = "model"
    directions = ("forward", "train")

    def runs_on(self, provider):
        return True

    def prepare(self, provider, setting):
        generator = torch.Generator().manual_seed(0)
        module = providers.fit(self.module, provider, setting.device, setting.training)
        images = _input(self.shape, setting, provider, torch.float32, generator)
        labels = torch.randint(CLASSES, (setting.batch,), generator=generator).to(setting.device)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)

        def loss():
            with setting.autocast():
                logits = module(images)
            return F.cross_entropy(logits.float(), labels)

        def forward():
            with torch.no_grad():
                loss()

        def train():
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # at the end: a step's memory does not begin with the last one's

        return Workload({"forward": forward, "train": train}, loss, list(module.parameters()))
