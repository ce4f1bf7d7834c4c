"""Measure: every block under two providers, interleaved; the work that each must do; what this machine can do."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..bench import BenchError, card, compare, environment, memory, providers
from ..bench.subjects import Setting
from ..choice import default_fused
from ..cost import cost
from ..nn import SqueezeExcite
from . import steps
from .data import Entry, Profile, Side

# of an inference pass, and of a training step's forward, input gradient and weight gradient
PASSES = {"forward": 1, "train": 3}


class Options(NamedTuple):
    """How a profile is taken; ``direction`` is ``train`` (forward and backward) or ``forward`` (in eval mode)."""

    setting: Setting
    baseline: providers.Provider
    fused: providers.Provider
    seconds: float = 2.0
    rounds: int = 100
    now: Callable = time.perf_counter_ns  # the CPU's clock

    @property
    def direction(self):
        return "train" if self.setting.training else "forward"


def options(device, batch, amp="off", training=True, baseline=providers.BASELINE, fused=None, **bounds):
    """The :class:`Options` of names: of providers as in ``mnet_kernels.bench`` (fused: the best that runs here).

    Raises:
        BenchError: unknown providers, or such as do not run here, or twice the same.
    """
    device = torch.device(device)
    if fused is None:
        fused = f"{default_fused(device, Setting(device, batch, amp).storage)}/{providers.AUTO}"
    sides = [providers.parse([name], device)[0] for name in (baseline, fused)]
    if sides[0].name == sides[1].name:
        raise BenchError(f"{sides[0].name} against itself: name another with --backend or --baseline")
    return Options(Setting(device, batch, amp, training), *sides, **bounds)


def collect(target, placed, options, machine=None, progress=None):
    """Profile subjects; returns a :class:`Profile`.

    Args:
        target: how the subjects are called together, for the title.
        placed: of :func:`subject.find`.
        options: of :func:`options`.
        machine: rates of this machine as :func:`rates` gives them; measured if None.
        progress: called with the name of each subject before its turn.
    """
    setting = options.setting
    torch.backends.cudnn.benchmark = True
    header = environment.header(setting.device)
    # Before and after, the higher of the two: a shared machine changes its speed within minutes.
    before = machine or rates(setting, options.now)
    entries = []
    for subject, paths in placed:
        if progress:
            progress(subject.name)
        entries.append(_entry(subject, list(paths), options))
    machine = machine or highest(before, rates(setting, options.now))
    peak = card.peaks(machine, setting.amp)
    for entry, found in entries:
        for side in entry.sides:
            side.floor_ms = 1e3 * found.floor(side.scheme, peak)
    header["load"] = [header["load"], environment.load()]
    settings = {
        "target": target,
        "direction": options.direction,
        "batch": setting.batch,
        "dtype": str(setting.storage).removeprefix("torch."),
        "amp": setting.amp,
        "device": str(setting.device),
        "unfused": options.baseline.name,
        "fused": options.fused.name,
        "seconds": options.seconds,
        "clock": "wall" if options.now is time.perf_counter_ns else "thread",
    }
    return Profile(header, settings, machine, [entry for entry, _ in entries])


def rates(setting, now=time.perf_counter_ns):
    """The rates of the machine that a setting's floors are taken at."""
    names = ("fp32", "tf32") if setting.amp == "off" and torch.backends.cuda.matmul.allow_tf32 else ("fp32",)
    found = card.rates(setting.device, 0.5, names=names if setting.amp == "off" else (setting.amp,), now=now)
    peak = card.peaks(found, setting.amp)
    return {**found, "matrix_flops_per_s": peak.tensor}


def highest(one, other):
    """Of two answers of :func:`rates` the higher of every rate."""
    if isinstance(one, dict):
        return {name: highest(value, other[name]) for name, value in one.items()}
    return max(one, other) if isinstance(one, (int, float)) else one


def scheme(provider):
    """The scheme of the cost model that a provider's kernels follow."""
    if provider.backend != "native":
        # what automatic mode mixes was measured on the CPU; elsewhere it is chain
        return "chain" if provider.mode == providers.AUTO and provider.backend != "cpu" else provider.mode
    return "eager" if provider.compile is None else "compile"


def work(subject, setting, schemes):
    """(the cost model's account of a subject, FLOPs of its convolutions)."""
    training = setting.training
    try:
        found = cost(subject.module, subject.shape, setting.batch, setting.storage, schemes, training)
    except ValueError as exc:
        raise BenchError(f"{subject.name}: {exc}") from exc
    madds = PASSES["train" if training else "forward"] * found.madds
    if training and subject.level == "model":
        madds -= found.layers[0].madds  # images have no gradient
    return found, 2 * madds * setting.batch


def _entry(subject, paths, options):
    """(its :class:`Entry`, the cost model's account: floors wait for the machine's rates)."""
    setting, direction = options.setting, options.direction
    sides = {"unfused": options.baseline, "fused": options.fused}
    found, flops = work(subject, setting, sorted({scheme(p) for p in sides.values()}))
    prepared = compare.prepare(subject, [options.fused], setting, [direction], baseline=options.baseline)
    rows = compare.measure(
        subject, prepared, setting, direction, baseline=options.baseline.name, keep_samples=True,
        seconds=options.seconds, max_rounds=options.rounds, now=options.now,
    )  # fmt: skip
    rows = {row["provider"]: row for row in rows}
    made, errors = {}, {}
    for side, provider in sides.items():
        row = rows[provider.name]
        if "error" in row:
            errors[side] = row["error"]
            made[side] = None
            continue
        made[side] = _side(provider, row, prepared[provider.name].calls[direction], found, flops, options, subject)
    row = rows[options.fused.name]
    interval = [row["speedup"], row["speedup_low"], row["speedup_high"]] if "verdict" in row else None
    entry = Entry(
        subject.name, subject.level, paths, made["unfused"], made["fused"], interval, row.get("noise"),
        row.get("verdict"), errors,
    )  # fmt: skip
    return entry, found


def _side(provider, row, call, found, flops, options, subject):
    setting, name = options.setting, scheme(provider)
    excited = any(isinstance(module, SqueezeExcite) for module in subject.module.modules())
    step = steps.record(call, setting.device, steps.EXCITE[subject.level] if excited else frozenset())
    hidden = provider.compile is not None and setting.device.type == "cpu"
    peak_bytes = memory.peak_bytes(call, setting.device) if setting.device.type == "cuda" else step.peak_bytes
    return Side(
        provider=provider.name,
        median_ms=row["median_ms"],
        q20_ms=row["q20_ms"],
        q80_ms=row["q80_ms"],
        samples_ms=row["samples_ms"],
        scheme=name,
        bytes=found.bytes(name),
        flops=flops,
        floor_ms=0.0,
        saved_bytes=row.get("saved_bytes"),
        peak_bytes=peak_bytes,
        ops=None if hidden else step.kernels,
        parts=step.parts(row["median_ms"]),
        memory=step.memory,
        calls=step.calls if subject.level == "block" else [],
        convolutions=row.get("convolutions"),
    )
