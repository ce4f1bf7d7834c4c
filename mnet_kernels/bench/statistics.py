"""Quantiles, bootstrap intervals of paired ratios, and when a difference is more than noise."""

from typing import NamedTuple

import torch

LEVEL = 0.95
RESAMPLES = 4000


class Interval(NamedTuple):
    """A median with its confidence interval."""

    median: float
    low: float
    high: float


def _median(values):
    return values.quantile(0.5, dim=-1)


def quantiles(samples, at=(0.2, 0.5, 0.8)):
    """Quantiles of a list of numbers (20, 50 and 80 % by default)."""
    values = torch.tensor(samples, dtype=torch.float64)
    return [values.quantile(q).item() for q in at]


def ratio(base, other, *, level=LEVEL, resamples=RESAMPLES, seed=0):
    """How many times faster ``other`` is than ``base``: the median over rounds of base / other, and its interval.

    The two lists are paired by round, so what disturbs a whole round cancels.  The interval is the percentile
    bootstrap's over rounds; its randomness is seeded, so that the same samples give the same interval.

    Raises:
        ValueError: the lists differ in length or are empty.
    """
    if len(base) != len(other) or not base:
        raise ValueError(f"ratio needs two lists of one sample a round, got {len(base)} and {len(other)} samples")
    pairs = torch.tensor(base, dtype=torch.float64) / torch.tensor(other, dtype=torch.float64)
    draws = torch.randint(len(base), (resamples, len(base)), generator=torch.Generator().manual_seed(seed))
    medians = _median(pairs[draws])
    low, high = (medians.quantile(q).item() for q in ((1 - level) / 2, (1 + level) / 2))
    return Interval(_median(pairs).item(), low, high)


def noise_floor(base, again):
    """Relative difference that the same thing measured twice can show: the A/A ratio's farther bound from 1."""
    interval = ratio(base, again)
    return max(abs(interval.low - 1), abs(interval.high - 1))


def verdict(interval, noise):
    """``faster``, ``slower``, or ``within noise`` when the interval reaches into 1 +- noise."""
    if interval.low > 1 + noise:
        return "faster"
    if interval.high < 1 / (1 + noise):
        return "slower"
    return "within noise"
