"""The optimiser and the schedule of its learning rate."""

import math


def learning_rate(config, step, steps_per_epoch):
    """Linear warm-up, then a half cosine down to 0; ``step`` counts from 0 over the whole run."""
    warmup = min(round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / (config.epochs * steps_per_epoch - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))
