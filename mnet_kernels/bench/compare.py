"""One subject under several providers, interleaved in one process: rows of plain values."""

import contextlib
import signal
import threading
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import BenchError, memory, providers, statistics, timing

AGAIN = " (again)"  # the baseline a second time: the noise floor
LAUNCHES = ("eager", "graph")


def key(subject, setting, direction, launch, provider):
    """What identifies a row within one header."""
    return {
        "level": subject.level,
        "subject": subject.name,
        "device": setting.device.type,
        "batch": setting.batch,
        "amp": setting.amp,
        "training": setting.training,
        "direction": direction,
        "launch": launch,
        "provider": provider,
    }


class _Convolutions(TorchDispatchMode):
    """Counts which of torch's implementations each convolution is given to."""

    sees_stages = True

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            name = str(torch._C._select_conv_backend(*args)).split(".")[-1]
            groups = "depthwise" if args[8] > 1 else f"{args[1].shape[-1]}x{args[1].shape[-1]}"
            label = f"{groups}: {name}"
            self.found[label] = self.found.get(label, 0) + 1
        return func(*args, **(kwargs or {}))


def convolutions(call):
    """The implementations torch chose for the convolutions of an eager call: label -> count."""
    with _Convolutions() as mode:
        call()
    return dict(sorted(mode.found.items()))


@contextlib.contextmanager
def deadline(seconds):
    """Raise TimeoutError in the block after ``seconds`` (main thread on Unix; elsewhere the block runs on)."""
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not usable or seconds is None:
        yield
        return

    def stop(*_):
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _error(exc):
    return f"{type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc).strip() else 'no message'}"


class Prepared:
    """One provider's workload of a subject, called once in every direction; ``error`` says why there is none."""

    def __init__(self, subject, provider, setting, directions, limit=None):
        self.provider, self.error, self.calls, self.facts = provider, {}, {}, {}
        start = time.perf_counter()
        try:
            with deadline(limit), timing.stream(setting.device):
                # The first call inside prepare may compile already: it counts.
                self.workload = subject.prepare(provider, setting)
                for direction in directions:
                    self._first(direction, setting, start)
                    start = time.perf_counter()
        except Exception as exc:
            for direction in directions:
                if direction not in self.calls:
                    self.error[direction] = _error(exc)

    def _first(self, direction, setting, start):
        call = self.workload.calls[direction]
        providers.assert_own_path(self.provider, call)
        timing.synchronize(setting.device)
        facts = {"first_call_s": time.perf_counter() - start}
        if self.provider.backend == "native" and self.provider.compile is None and direction != "backward":
            facts["convolutions"] = convolutions(call)
            others = [label for label in facts["convolutions"] if not label.endswith(": Cudnn")]
            if self.provider.name == "cudnn" and others:
                raise BenchError(f"torch gives these convolutions to others than cuDNN: {', '.join(others)}")
        if direction == "train" and self.workload.forward_for_saving is not None:
            facts["saved_bytes"] = memory.saved_bytes(self.workload.forward_for_saving, self.workload.parameters)
        facts["peak_bytes"] = memory.peak_bytes(call, setting.device)
        self.calls[direction], self.facts[direction] = call, facts


def prepare(subject, wanted, setting, directions, limit=None, baseline=providers.NATIVE[providers.BASELINE]):
    """Workloads of all providers, and of the baseline a second time.

    Args:
        wanted: providers; the baseline is added if it is missing, those without a kernel for the subject left out.
        limit: seconds that preparing one provider (compilation above all) may take.
        baseline: the provider that the others are held against.
    """
    torch._dynamo.reset()  # compiled code of earlier subjects counts towards Dynamo's recompile limit
    found = {name: Prepared(subject, baseline, setting, directions) for name in (baseline.name, baseline.name + AGAIN)}
    for provider in wanted:
        if provider.name not in found and subject.runs_on(provider):
            found[provider.name] = Prepared(subject, provider, setting, directions, limit)
    return found


def measure(
    subject, prepared, setting, direction, launch="eager", baseline=providers.BASELINE, keep_samples=False, **bounds
):
    """Time prepared providers against each other; returns one row each, errors included.

    Args:
        prepared: of :func:`prepare`, with the same baseline.
        direction: of the subject's.
        launch: ``eager``, or ``graph``: every call captured once in a CUDA graph and replayed.
        baseline: the name of the provider that the others are held against.
        keep_samples: put every sample into the rows too.
        bounds: of :func:`timing.interleave`.
    """
    calls, rows = {}, {}
    for name, one in prepared.items():
        rows[name] = row = key(subject, setting, direction, launch, name)
        if direction in one.error:
            row["error"] = one.error[direction]
            continue
        row |= one.facts[direction]
        try:
            call = one.calls[direction]
            calls[name] = call if launch == "eager" else timing.capture(call, setting.device)
        except Exception as exc:
            row["error"] = _error(exc)
    if not calls:
        return list(rows.values())
    clock = setting.device
    if subject.level == "host":
        clock, bounds = torch.device("cpu"), bounds | {"now": timing.CLOCKS["thread"]}
    with timing.stream(setting.device):
        samples = timing.interleave(calls, clock, **bounds)
    timing.synchronize(setting.device)
    if setting.device.type == "cpu":
        for name, faults in memory.page_faults(calls).items():
            rows[name]["page_faults"] = faults
    base, again = samples.get(baseline), samples.get(baseline + AGAIN)
    noise = statistics.noise_floor(base, again) if base and again else None
    for name, found in samples.items():
        low, median, high = statistics.quantiles(found)
        row = rows[name]
        if keep_samples:
            row["samples_ms"] = found
        row |= {"median_ms": median, "q20_ms": low, "q80_ms": high, "rounds": len(found)}
        if noise is not None and name != baseline:
            interval = statistics.ratio(base, found)
            row |= {"speedup": interval.median, "speedup_low": interval.low, "speedup_high": interval.high}
            row |= {"noise": noise, "verdict": statistics.verdict(interval, noise)}
    return list(rows.values())
