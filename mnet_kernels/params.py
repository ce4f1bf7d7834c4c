"""The parameters of a block as the functional API takes them: plain tuples, so that every layer can pass them on."""

from typing import NamedTuple

import torch


class BatchNormParams(NamedTuple):
    """One batch norm's parameters, buffers and settings, with ``nn.BatchNorm2d``'s meaning and defaults.

    ``weight``, ``bias``, ``running_mean``, ``running_var``: [C] or None.  ``training`` uses the batch's statistics and
    updates the running ones, which needs no buffers (``track_running_stats=False``); without ``training`` the running
    statistics are used, or the batch's where there are none.  ``momentum=None`` is a cumulative average, which needs
    ``num_batches_tracked``.  ``group``: a torch.distributed process group over whose batches together the statistics
    are taken, as nn.SyncBatchNorm does; None is this process's batch alone.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    group: object = None

    @classmethod
    def of(cls, module):
        """Take everything from an ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm``."""
        mean, var, batches = (_of(module, module._buffers, name) for name in _STATISTICS)
        if module.training and not module.track_running_stats:
            mean = var = batches = None
        return cls(
            _of(module, module._parameters, "weight"), _of(module, module._parameters, "bias"), mean, var, batches,
            module.training, module.momentum, module.eps, _group(module),
        )  # fmt: skip

    @property
    def batch_stats(self):
        """Whether the statistics are the batch's own."""
        return self.training or self.running_mean is None

    @property
    def updates(self):
        """Whether a forward changes the running statistics."""
        return self.training and self.running_mean is not None


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _of(module, tensors, name):
    """A module's parameter or buffer, past nn.Module's look-up where it is among ``tensors``: that one takes longer."""
    return tensors[name] if name in tensors else getattr(module, name)


def _group(module):
    """The group that a batch norm takes its statistics over, if it is more than this process."""
    if not (isinstance(module, torch.nn.SyncBatchNorm) and module.training):
        return None
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if module.process_group is None else module.process_group
    return group if dist.get_world_size(group) > 1 else None


class ConvBNAct(NamedTuple):
    """A convolution without bias, its batch norm and activation."""

    kind: str  # "pointwise", "depthwise" or "dense" (the stem)
    weight: torch.Tensor
    bn: BatchNormParams
    activation: str
    stride: int = 1


class InvertedResidualParams(NamedTuple):
    """One block of ``functional.inverted_residual_sequence``."""

    layers: tuple[ConvBNAct, ...]  # [expand,] depthwise, project
    residual: bool = False  # add x; needs stride 1 and as many output as input channels
    squeeze_excite: "SqueezeExciteParams | None" = None  # before the project layer


class SqueezeExciteParams(NamedTuple):
    """Squeeze-excite's two 1x1 convolutions, [R, C, 1, 1], [R], [C, R, 1, 1], [C], whose biases may be None; what
    follows the first of them ("relu", "relu6", "hardswish" or "silu") and the second ("hardsigmoid" or "sigmoid")."""

    reduce_weight: torch.Tensor
    reduce_bias: torch.Tensor | None
    expand_weight: torch.Tensor
    expand_bias: torch.Tensor | None
    activation: str = "relu"
    gate: str = "hardsigmoid"

    @property
    def tensors(self):
        """The four tensors, in order."""
        return self[:4]
