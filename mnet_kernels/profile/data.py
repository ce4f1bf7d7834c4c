"""What was collected, as plain dataclasses, and the JSON they are saved as."""

import dataclasses
import json
from pathlib import Path

from ..bench import BenchError

KIND, FORMAT = "mnet_kernels.profile", 1
SIDES = ("unfused", "fused")


@dataclasses.dataclass
class Side:
    """One provider's way of running a block or model.

    bytes and flops are counted, not measured: what the kernels of its scheme move at least, and the arithmetic of the
    convolutions (2 a multiply-add; the same for both sides).  floor_ms is the sum over its kernels of the larger of
    bytes by this machine's copy bandwidth and matrix operations by its matrix rate.
    """

    provider: str
    median_ms: float
    q20_ms: float
    q80_ms: float
    samples_ms: list  # one a round, paired with the other side's
    scheme: str  # of mnet_kernels.cost
    bytes: int
    flops: int
    floor_ms: float
    saved_bytes: int | None  # for backward; None in eval mode
    peak_bytes: int  # the most allocated above what there was before the step
    ops: int | None  # kernels on a card, dispatched ops on the CPU; None where generated code hides them
    parts: dict  # part -> milliseconds of the median; together the median
    memory: list  # [milliseconds of the step, bytes alive above the start]
    calls: list  # of :class:`Call`, in order; empty for a whole model
    convolutions: dict | None  # which of torch's implementations the convolutions were given to

    @property
    def gbytes_per_s(self):
        return self.bytes / self.median_ms * 1e-6

    @property
    def gflops_per_s(self):
        return self.flops / self.median_ms * 1e-6

    @property
    def intensity(self):
        """FLOPs a byte."""
        return self.flops / self.bytes

    @property
    def share(self):
        """Of the machine's floor for this scheme: 1 would be as fast as memory and matrix units allow."""
        return self.floor_ms / self.median_ms


@dataclasses.dataclass
class Call:
    """One op of a step."""

    name: str
    shape: str
    part: str
    ms: float


@dataclasses.dataclass
class Entry:
    """A block or a whole model, both sides; a side that failed is None, and ``errors`` says why."""

    name: str
    level: str  # block or model
    paths: list  # where in the model
    unfused: Side | None
    fused: Side | None
    speedup: list | None  # unfused time / fused time: median, low, high
    noise: float | None
    verdict: str | None
    errors: dict

    @property
    def sides(self):
        return [side for side in (self.unfused, self.fused) if side is not None]


@dataclasses.dataclass
class Profile:
    """Everything: header (machine, versions), settings, the machine's measured rates, and the entries."""

    header: dict
    settings: dict
    machine: dict
    entries: list

    @property
    def blocks(self):
        return [entry for entry in self.entries if entry.level == "block"]

    @property
    def model(self):
        return next((entry for entry in self.entries if entry.level == "model"), None)

    def as_dict(self):
        """Plain values for JSON."""
        return {"kind": KIND, "format": FORMAT, **dataclasses.asdict(self)}


def _side(found):
    if found is None:
        return None
    return Side(**{**found, "calls": [Call(**call) for call in found["calls"]]})


def from_dict(found):
    """A :class:`Profile` from :meth:`Profile.as_dict`'s values.

    Raises:
        ValueError: these are not such values, or of another format.
    """
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ValueError("this is no profile")
    if found.get("format") != FORMAT:
        raise ValueError(f"it has format {found.get('format')}, and this version reads {FORMAT}: profile anew")
    try:
        entries = [Entry(**{**e, **{side: _side(e[side]) for side in SIDES}}) for e in found["entries"]]
        return Profile(found["header"], found["settings"], found["machine"], entries)
    except (KeyError, TypeError) as exc:
        raise ValueError(f"it is damaged: {exc}") from exc


def load(path):
    """Read a saved profile.

    Raises:
        BenchError: the file cannot be read, or is no profile.
    """
    try:
        return from_dict(json.loads(Path(path).read_text()))
    except OSError as exc:
        raise BenchError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise BenchError(f"cannot use {path}: {exc}; expected a file written with --json") from exc
