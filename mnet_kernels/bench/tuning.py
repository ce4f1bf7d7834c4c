"""The search for Triton configurations on a card: candidates, the choice among them, the file they go to.

Around the row in force (:func:`neighbours`) every candidate that compiles and launches is timed beside the table's row,
interleaved in rounds, on layers of the row's shape class (tune_problems.py).  The fastest few that compute rightly are
timed again beside the table's row, which then runs twice: a candidate replaces it where it is faster by more than the
row differs from itself.
"""

import datetime
import functools
import statistics as averages
from typing import NamedTuple

import torch

from .._version import __version__
from ..backends.triton import configs, measured
from ..training import TrainingError
from ..training.checkpoint import write_atomic
from ..training.metrics import dumps
from . import BenchError, environment, statistics, timing, tune_problems

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS = tuple(dict.fromkeys(key[0] for key in configs.TABLE))
FINALISTS = 3
WARPS, STAGES = (4, 8), (1, 2, 3, 4)
LARGEST = 256  # block side of a candidate


class Outcome(NamedTuple):
    """What came of one row: the table's configuration and the one to use, with their medians, and how many were tried.

    ``failed`` did not compile or launch, ``wrong`` were fast and computed something else.
    """

    before: configs.Config
    after: configs.Config
    before_us: float
    after_us: float
    tried: int
    failed: int
    wrong: int


def table_keys(kernels=KERNELS, sizes=(2, 4)):
    """(kernel, shape class, bytes) of the table."""
    found = dict.fromkeys(key[:3] for key in configs.TABLE)
    return [key for key in found if key[0] in kernels and key[2] in sizes]


def neighbours(kernel, shape, row):
    """Candidates around a row: one block side halved, doubled or neither, with 4 or 8 warps; and other stages.

    Only kernels with a depth have stages: the others' loops are not pipelined.
    """
    found = []
    for name in ("rows", "columns", "depth"):
        for value in (getattr(row, name) // 2, getattr(row, name), getattr(row, name) * 2):
            found += [row._replace(**{name: value}, warps=warps) for warps in WARPS]
    if row.depth:
        found += [row._replace(stages=stages) for stages in STAGES]
    return [
        config
        for config in dict.fromkeys(found)
        if config != row and max(config[:3]) <= LARGEST and not configs.impossible(kernel, shape, config)
    ]


def choose(before, candidates, attempt, right, samples):
    """The configuration to use.

    Args:
        before: the table's row.
        candidates: configurations.
        attempt: runs a configuration once; raises where it does not compile or launch.
        right: whether a configuration's results are right.
        samples: {name: configuration} -> {name: microseconds, one a round}, interleaved.

    Returns:
        An :class:`Outcome`; its ``after`` is ``before`` where no candidate is faster by more than the noise.

    Raises:
        BenchError: the table's row does not run.
    """
    try:
        attempt(before)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise BenchError(f"the table's row, {text(before)}, does not run here: {error}") from error
    alive, failed, wrong, finalists = [], 0, 0, []
    for config in candidates:
        try:
            attempt(config)
        except Exception:  # triton's errors, ptxas' and the driver's have no common ancestor
            failed += 1
        else:
            alive.append(config)
    found = samples({"table": before} | dict(enumerate(alive)))
    medians = {name: averages.median(values) for name, values in found.items()}
    for i in sorted(range(len(alive)), key=medians.get):
        if medians[i] >= medians["table"] or len(finalists) == FINALISTS:
            break
        try:
            fine = right(alive[i])
        except Exception:
            failed += 1
            continue
        finalists += [alive[i]] * fine
        wrong += not fine
    found = samples({"table": before, "again": before} | dict(enumerate(finalists)))
    noise = statistics.noise_floor(found["table"], found["again"])
    after, base = before, averages.median(found["table"])
    best = base
    for i, config in enumerate(finalists):
        median = averages.median(found[i])
        if median < best and statistics.verdict(statistics.ratio(found["table"], found[i]), noise) == "faster":
            after, best = config, median
    return Outcome(before, after, base, best, len(candidates), failed, wrong)


class Bench:
    """What :func:`choose` asks, answered by running stages on a device."""

    def __init__(self, key, layers, device, dtypes, *, batch, seconds, bounds=None):
        """``bounds``: further arguments of :func:`timing.interleave`."""
        kernel = key[0]
        self.key, self.device, self.seconds, self.bounds = key, device, seconds, bounds or {}
        self._timed, self._judges = [], []
        for dtype in dtypes:
            timed = tune_problems.Draw(device, dtype, batch)
            self._timed += [call for layer in layers for call in tune_problems.calls(kernel, layer, timed)]
            images, checks = min(batch, tune_problems.CHECK_IMAGES), []
            for seed in range(tune_problems.DRAWS):
                new = tune_problems.Draw(device, dtype, images, seed + 1)
                checks += [call for layer in layers for call in tune_problems.calls(kernel, layer, new)]
            self._judges.append(tune_problems.Judge(dtype, checks))

    def run(self, config, stage, args):
        """One call with a configuration in force."""
        configs.override({self.key: config})
        try:
            return getattr(torch.ops.mnet_triton, stage)(*args)
        finally:
            configs.override({})

    def attempt(self, config):
        for stage, args in self._timed:
            self.run(config, stage, args)
        timing.synchronize(self.device)

    def right(self, config):
        return all(judge.right(functools.partial(self.run, config)) for judge in self._judges)

    def samples(self, wanted):
        """Every call is a sample of its own, on a card a replayed graph, free of the host's cost; a round's is their
        sum."""
        calls = {
            (name, i): functools.partial(self.run, config, stage, args)
            for name, config in wanted.items()
            for i, (stage, args) in enumerate(self._timed)
        }
        if self.device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            calls = {name: timing.capture(call, self.device, pool) for name, call in calls.items()}
        found = timing.interleave(calls, self.device, seconds=self.seconds, **self.bounds)
        count = range(len(self._timed))
        return {
            name: [1e3 * sum(parts) for parts in zip(*(found[name, i] for i in count), strict=True)] for name in wanted
        }


@torch.no_grad()
def tune(key, layers, device, card, capability, dtypes, **options):
    """The :class:`Outcome` of one row; ``options`` are those of :class:`Bench`.

    Raises:
        BenchError: the table's row does not run, or the card's memory is too small.
    """
    kernel, shape, size = key
    before = configs.lookup(*key, capability)
    start = configs.lookup(*key, capability, card)
    candidates = [c for c in [start, *neighbours(kernel, shape, start)] if c != before]
    try:
        bench = Bench(key, layers, device, dtypes, **options)
        return choose(before, candidates, bench.attempt, bench.right, bench.samples)
    except torch.cuda.OutOfMemoryError:
        raise BenchError(f"{kernel} {shape}: out of memory: take a smaller --batch than {options['batch']}") from None
    except BenchError as error:
        raise BenchError(f"{kernel} {shape}: {error}") from error


def row(key, outcome, card, capability):
    """A row of measured.py."""
    kernel, shape, size = key
    return {
        "kernel": kernel,
        "shape": shape,
        "bytes": size,
        "config": outcome.after._asdict(),
        "microseconds": round(outcome.after_us, 3),
        "table_microseconds": round(outcome.before_us, 3),
        "card": card,
        "capability": list(capability),
        "package": __version__,
        "commit": environment.commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def write(file, outcomes, card, capability):
    """Put what was measured in the place of a file's rows for the same keys; returns how many rows it has now.

    Where the table's row stays the file has none.  A file of another card, version or source is begun anew.

    Raises:
        BenchError: it cannot be written.
    """
    try:
        rows = {key: value[1] for key, value in configs.read(file, card, capability).items()}
    except ValueError:
        rows = {}
    for key, outcome in outcomes.items():
        rows.pop(key, None)
        if outcome.after != outcome.before:
            rows[key] = row(key, outcome, card, capability)
    document = measured.identity(card, capability) | {"rows": [rows[key] for key in sorted(rows)]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, (dumps(document, indent=1) + "\n").encode())
    except (OSError, TrainingError) as error:
        raise BenchError(f"cannot write {file}: {error}") from error
    configs.forget()
    return len(rows)


def text(config):
    """``rows x columns [x depth], warps [, stages]``"""
    blocks = "x".join(str(side) for side in config[:3] if side)
    return f"{blocks}, {config.warps} warps" + (f", stages {config.stages}" if config.depth else "")


def table(outcomes):
    """What was found, as a Markdown table."""
    lines = [
        "| kernel | class | bytes | table | chosen | table, us | chosen, us | ratio | tried, failed, wrong |",
        "|" + "---|" * 9,
    ]
    for key, found in outcomes.items():
        after = "the table's" if found.after == found.before else text(found.after)
        ratio = found.before_us / found.after_us
        times = f"{found.before_us:.1f} | {found.after_us:.1f} | {ratio:.2f}"
        counts = f"{found.tried}, {found.failed}, {found.wrong}"
        lines.append("| " + " | ".join((*map(str, key), text(found.before), after, times, counts)) + " |")
    return "\n".join(lines)


def in_force(cards):
    """The rows that serve cards, [(name or None, capability)], and where each comes from, as a Markdown table."""
    lines = ["| card | kernel | class | bytes | configuration | from |", "|" + "---|" * 6]
    for card, capability in cards:
        label = card or ("AMD" if capability == configs.AMD else "{}.{} and later".format(*capability))
        for key in table_keys():
            source = configs.origin(*key, capability, card)
            if isinstance(source, dict):
                source = "{card}, {commit}, {date}: {microseconds} us, the table's {table_microseconds}".format(
                    **{**source, "commit": source.get("commit") or source["package"]}
                )
            config = configs.lookup(*key, capability, card)
            lines.append("| " + " | ".join((label, *map(str, key), text(config), source)) + " |")
    return "\n".join(lines)
