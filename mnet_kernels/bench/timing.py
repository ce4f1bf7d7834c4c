"""Time callables against each other: in rounds, each once a round, so that drift of the machine hits all alike."""

import contextlib
import gc
import time

import torch

from . import BenchError

# A sample on the CPU lasts at least this long, by repeating the call: far above the clock's own cost.
CPU_SAMPLE_SECONDS = 2e-3
# Written before every sample on a card, so that each starts from the same (cold) second-level cache.  It also keeps
# the card busy while the host enqueues the first kernels.
FLUSH_BYTES = 256 << 20


def synchronize(device):
    """Wait for everything enqueued on the device (nothing to wait for on the CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


CLOCKS = {"wall": time.perf_counter_ns, "thread": time.thread_time_ns}


def clock(name, device):
    """The CPU's clock by name: ``wall``, or ``thread``, the CPU time of the one thread that works.

    ``thread`` leaves out what other programs take of a busy machine, though not what they take of its caches.

    Raises:
        BenchError: more than one thread works, or a card does.
    """
    if name == "thread" and device.type != "cpu":
        raise BenchError(
            f"clock 'thread' is for the CPU; work on {device.type} is timed by the card itself: use 'wall'"
        )
    if name == "thread" and torch.get_num_threads() != 1:
        raise BenchError(
            f"clock 'thread' counts one thread's time, and torch has {torch.get_num_threads()}: --threads 1"
        )
    return CLOCKS[name]


_streams = {}


def stream(device):
    """The context in which everything measured on a card is prepared and run: one side stream of the device.

    Graphs cannot be captured on the default stream.  On the CPU it does nothing.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return torch.cuda.stream(_streams[device])


class Clock:
    """Milliseconds per call on one device; ``now`` (nanoseconds) is the CPU's clock."""

    def __init__(self, device, now=time.perf_counter_ns):
        self.device, self.now = torch.device(device), now
        self._flush = None
        if self.device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def sample(self, call, repeats=1):
        """One measurement: the mean of ``repeats`` calls in a row."""
        if self._flush is None:
            start = self.now()
            for _ in range(repeats):
                call()
            return (self.now() - start) * 1e-6 / repeats
        start, end = self._events
        self._flush.zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats

    def repeats(self, call):
        """How many calls make up a sample: enough for the clock on the CPU, one on a card (its cache is cold once)."""
        if self.device.type == "cuda":
            return 1
        return max(1, round(CPU_SAMPLE_SECONDS * 1e3 / max(self.sample(call), 1e-6)))


def interleave(calls, device, *, seconds=2.0, min_rounds=5, max_rounds=100, warmup=3, now=time.perf_counter_ns):
    """Time ``calls`` (name -> callable) in rounds; returns name -> list of milliseconds, one a round.

    A round times every callable once, forwards in even rounds and backwards in odd ones.  Rounds go on until
    ``seconds`` have passed (but at least ``min_rounds``) or ``max_rounds`` are done.

    Args:
        calls: callables without arguments, already called once: compilation and set-up are not timed.
        device: where they run.
        seconds: for the timed rounds.
        min_rounds, max_rounds: bounds on the rounds.
        warmup: untimed calls of each beforehand.
        now: the CPU's clock.  ``time.thread_time_ns`` for work of this one thread, on a machine that others use too.

    Raises:
        ValueError: no callables, or bounds that leave no round.
    """
    if not calls or not 1 <= min_rounds <= max_rounds:
        bounds = f"min_rounds {min_rounds}, max_rounds {max_rounds}"
        raise ValueError(f"need callables and 1 <= min_rounds <= max_rounds, got {len(calls)} callables, {bounds}")
    clock = Clock(device, now)
    for call in calls.values():
        for _ in range(warmup):
            call()
    synchronize(clock.device)
    repeats = {name: clock.repeats(call) for name, call in calls.items()}
    samples = {name: [] for name in calls}
    forwards = list(calls)
    collecting = gc.isenabled()
    gc.disable()  # a collection would land in one callable's sample
    try:
        stop = time.perf_counter() + seconds
        for i in range(max_rounds):
            if i >= min_rounds and time.perf_counter() > stop:
                break
            for name in forwards if i % 2 == 0 else reversed(forwards):
                samples[name].append(clock.sample(calls[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


def capture(call, device, pool=None):
    """Capture a callable into a CUDA graph; returns one that replays it.

    Graphs with one ``pool`` (``torch.cuda.graph_pool_handle()``) share their memory, results included.

    The callable must read and write the same tensors in every call, and must have run before; what it keeps of an
    autograd graph must come from :func:`stream`, because backward runs on the stream of its forward.
    """
    with stream(device):
        for _ in range(3):
            call()
        synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(device)):
            call()
    return graph.replay
