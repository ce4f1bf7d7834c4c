"""What a run leaves behind for reading: ``metrics.jsonl``, the curves as a PNG, versions and peak memory."""

import contextlib
import io
import itertools
import json
import math
import os
import platform
import statistics
import sys
from pathlib import Path

import torch

from . import EXTRA, TrainingError
from .checkpoint import write_atomic, write_error


def environment():
    """Versions and settings that can change a result or a timing."""
    names = [n for n in os.environ if n.startswith(("MALLOC_", "OMP_", "MKL_", "KMP_"))]
    names += [n for n in ("LD_PRELOAD",) if n in os.environ]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "environ": {name: os.environ[name] for name in sorted(names)},
    }


def device_name(device):
    """The name of the processor or graphics card behind a ``torch.device``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory(device):
    """Peak memory in bytes: allocated by torch on a CUDA device, resident for the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Counted from this program's start. ru_maxrss is not: it survives exec, so a child of a large process
        # inherits the parent's figure.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def typical_rate(history):
    """Median training images/s of the epochs after the first (which warms up), or of the only one."""
    rates = [record["images_per_s"] for record in history]
    return statistics.median(rates[1:] or rates)


def _plain(value):
    """JSON has no NaN or infinity: they become null; other foreign values become text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def dumps(value, **options):
    """Strict JSON of any value."""
    return json.dumps(_plain(value), allow_nan=False, **options)


class MetricsFile:
    """A JSON-lines file: a header, one object per epoch, a summary; each has a field ``event``."""

    def __init__(self, path, records):
        """Start the file anew with ``records``: those of a new run, or those that a resumed run already had."""
        self.path = Path(path)
        write_atomic(self.path, "".join(dumps(record) + "\n" for record in records).encode())

    def append(self, record):
        """Add one record; it is on its way to the disk when this returns."""
        text = (dumps(record) + "\n").encode()
        size = None
        try:
            with open(self.path, "ab") as file:
                size = file.tell()
                file.write(text)
        except OSError as exc:
            if size is not None:  # no half record is left behind
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            raise write_error(self.path, len(text), exc) from exc


class TensorBoard:
    """The same records for TensorBoard, as event files in a directory."""

    def __init__(self, directory, epoch):
        """Go on after ``epoch``: what an interrupted run wrote beyond it is not shown."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(directory), purge_step=epoch + 1)
        except OSError as exc:
            raise TrainingError(f"cannot write to {directory}: {exc.strerror or exc}") from exc

    def append(self, record):
        """Add the figures of one epoch."""
        for name, value in record.items():
            if name != "epoch" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()


def read_records(path):
    """All records of a metrics file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def plot(path, runs, title):
    """Draw the loss over the epochs, and the test accuracy: of one run over the epochs, of several over their time.

    Args:
        path: of the PNG.
        runs: name -> records of the epochs.
        title: above both.

    Returns:
        Why nothing was drawn, as text, or None.
    """
    try:
        # The object interface with its own canvas: needs no display and leaves the caller's pyplot backend alone.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    except ImportError:
        return f"matplotlib is not installed: no curves drawn ({EXTRA})"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for i, (name, history) in enumerate(runs.items()):
        epochs, color = [record["epoch"] for record in history], f"C{i}"
        for key, line in (("train_loss", "-"), ("test_loss", "--")):
            label = f"{name}, {key[:-5]}"
            left.plot(epochs, [record[key] for record in history], line, marker=".", color=color, label=label)
        minutes = [seconds / 60 for seconds in itertools.accumulate(record["train_seconds"] for record in history)]
        accuracy = [100 * record["test_accuracy"] for record in history]
        right.plot(minutes if len(runs) > 1 else epochs, accuracy, marker=".", color=color, label=name)
    left.set(xlabel="epoch", ylabel="cross-entropy loss", yscale="log")
    for axes in (left,) if len(runs) > 1 else (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(xlabel="minutes of training" if len(runs) > 1 else "epoch", ylabel="test accuracy, %")
    for formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        formatter(StrMethodFormatter("{x:g}"))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())
    return None
