"""The optimiser, the schedule of its learning rate, and the averaged weights."""

import math

import torch
from torch.optim import swa_utils

OPTIMIZERS = ("sgd", "sgd_nesterov", "rmsprop")  # torchvision's names
SCHEDULES = ("cosine", "step")


def build_optimizer(model, config):
    """SGD, or RMSprop with the constants of torchvision's MobileNetV3 recipe; no decay of batch norm and biases."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},  # batch norm and biases
    ]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, momentum=config.momentum, eps=0.0316, alpha=0.9)
    nesterov = config.optimizer == "sgd_nesterov" and config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


def build_ema(model, decay):
    """The moving average of weights and running statistics, or None for decay 0.

    The decay grows to ``decay`` over the first steps, (1 + n) / (10 + n) after n of them: else the average of a short
    run would still be that of its fresh weights.
    """
    if not decay:
        return None

    def update(averages, values, _):
        n = average.n_averaged.item()
        swa_utils.get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, values, n)

    average = swa_utils.AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    average.requires_grad_(False)
    return average


def learning_rate(config, step, steps_per_epoch):
    """Linear warm-up, then a half cosine down to 0, or a factor every ``lr_step`` epochs after the warm-up.

    ``step`` counts from 0 over the whole run: with the configuration it is the whole state of the schedule.
    """
    warmup = min(round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "step":
        return config.lr * config.lr_gamma ** ((step - warmup) // max(1, round(config.lr_step * steps_per_epoch)))
    done = (step - warmup) / (config.epochs * steps_per_epoch - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))
