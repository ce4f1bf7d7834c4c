"""The settings of a run, and the model, backend and mode that they come to."""

import dataclasses

import torch

import mnet_kernels
from mnet_kernels import choice
from mnet_kernels.models import MODELS

from . import TrainingError

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the course of a run: two runs with equal configurations are the same run."""

    model: str
    data: str
    width: float
    stem_stride: int
    res: int
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    schedule: str
    lr_step: float  # epochs
    lr_gamma: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    mixup: float
    cutmix: float
    random_erase: float
    ema: float  # decay; 0 is none
    accumulate: int
    clip_grad: float
    warmup_epochs: float
    seed: int
    amp: str
    channels_last: bool
    compile: str  # off, or a backend of torch.compile
    backend: str
    mode: str
    limit_train: int | None
    device: str  # cpu or cuda
    implementation: str  # what backend and mode came to here: native, or backend/mode
    processes: int  # 1, or as torchrun started them


def build_model(name, num_classes, width, stem_stride=2):
    """A model of :data:`~mnet_kernels.models.MODELS` with fresh weights from torch's global generator."""
    return MODELS[name](num_classes=num_classes, width_mult=width, stem_stride=stem_stride)


def implementation(backend, mode, device, amp):
    """What a choice of backend and mode (``auto``: left to the environment and the package) comes to, in words."""
    dtype = AMP_DTYPES[amp] or torch.float32
    with use_backend(backend, mode):
        try:
            found, large = (choice.choose(torch.device(device), dtype, positions=p) for p in (0, choice.NEVER))
        except choice.BackendUnavailableError as exc:
            raise TrainingError(str(exc)) from exc
    if found.mode is None:
        return found.backend
    return f"{found.backend}/{found.mode if found.mode == large.mode else 'auto'}"


def use_backend(backend, mode):
    """The context of a choice on the command line, where ``auto`` does not overrule MNET_BACKEND and MNET_MODE."""
    return mnet_kernels.backend(*(None if name == "auto" else name for name in (backend, mode)))
