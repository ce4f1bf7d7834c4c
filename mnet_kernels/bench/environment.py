"""What a result depends on: machine, card, driver, versions, source."""

import datetime
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

import torch

from .._version import __version__
from ..backends import triton
from ..backends.triton import configs
from ..training import metrics
from . import tiles

ROOT = Path(__file__).resolve().parents[2]
# What a figure depends on besides the machine.  Tests and documentation may change without measuring again.
SOURCES = ("mnet_kernels/**/*.py", "csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cuh", "csrc/**/*.cu", "setup.py")
# Rows under headers that differ in none of these may stand in one table.
IDENTITY = (
    "sources",
    "device",
    "driver",
    "torch",
    "cuda",
    "cudnn",
    "triton",
    "threads",
    "environ",
    "tiles",
    "triton_rows",
)


def _run(*command):
    """Output of a command, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit():
    """The git commit of the source tree, ``+changes`` if it differs from it; None outside a repository."""
    if not (ROOT / ".git").exists():
        return os.environ.get("MNET_COMMIT")
    head = _run("git", "rev-parse", "HEAD")
    return head and head + ("+changes" if _run("git", "status", "--porcelain") else "")


def sources():
    """A hash of the package's sources: names a version also where there is no git."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)}):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _triton():
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def triton_rows(device):
    """The Triton backend's configurations that are not its table's, as plain values; None where all are."""
    card = triton.card(device) if device.type == "cuda" else ()
    rows = {key: config for key, (config, _) in configs.of_card(*card).items()} if card else {}
    return [[*key, *config] for key, config in sorted((rows | configs.given()).items())] or None


def _card(device):
    """Driver and clocks of the card, where nvidia-smi is there to tell."""
    index = device.index or 0
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    line = _run("nvidia-smi", f"--id={index}", f"--query-gpu={fields}", "--format=csv,noheader")
    if not line:
        return {}
    values = dict(zip(fields.split(","), (v.strip() for v in line.split(",")), strict=False))
    return {"driver": values.pop("driver_version"), "clocks": values}


def load():
    """The machine's load average over the last minute; None where the system has none."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def header(device):
    """Everything a reader needs to place a figure, as plain values."""
    device = torch.device(device)
    found = {
        "package": __version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load": load(),
        "commit": commit(),
        "sources": sources(),
        "device": metrics.device_name(device),
        "driver": None,
        "clocks": None,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "triton": _triton(),
        **metrics.environment(),
        "tiles": tiles.given(),
        "triton_rows": triton_rows(device),
        "tf32": {"cudnn": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            **_card(device),
        }
    return found


def identity(header):
    """The part of a header that must be equal for two results to be comparable."""
    return {name: header.get(name) for name in IDENTITY}
