"""Train fused and native from the same seed, each in a process of its own, and put the two side by side."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch

import mnet_kernels
from mnet_kernels import choice

from . import TrainingError, metrics
from .checkpoint import write_atomic
from .config import AMP_DTYPES, implementation
from .data import describe

# What a child's command line takes from the configuration; device is resolved already, implementation follows.
NOT_OPTIONS = ("implementation", "processes", "limit_train", "channels_last")
# Rows of the table: title, key of the summary, factor to the unit shown, digits.
ROWS = (
    ("test accuracy, %", "test_accuracy", 100, 2),
    ("train images/s", "images_per_s", 1, 1),
    ("seconds", "seconds", 1, 1),
    ("peak memory, MB", "peak_memory_bytes", 1e-6, 1),
    ("  of it during training", "training_memory_bytes", 1e-6, 1),
)

MEMORY = {
    "cpu": "Memory: the whole process, with Python and torch.",
    "cuda": "Memory: allocated by torch on the device.",
}


def fused_backend(config, wanted=None):
    """The backend to hold against native: the one asked for, else the best for the device, else the reference."""
    if wanted is None and config.backend not in ("auto", "native"):
        wanted = config.backend
    if wanted is None:
        wanted = choice.default_fused(config.device, AMP_DTYPES[config.amp] or torch.float32)
    return wanted


def command(config, backend, out, threads=None):
    """The command line (a list) of one of the two runs."""
    options = [sys.executable, "-m", "mnet_kernels.train", "--out", str(out), "--overwrite"]
    values = dataclasses.asdict(dataclasses.replace(config, backend=backend))
    for name, value in values.items():
        if name not in NOT_OPTIONS:
            options += ["--" + name.replace("_", "-"), str(value)]
    options.append("--channels-last" if config.channels_last else "--no-channels-last")
    if config.limit_train is not None:
        options += ["--limit-train", str(config.limit_train)]
    if threads:
        options += ["--threads", str(threads)]
    return options


def _run_child(options, no_progress):
    env = dict(os.environ)
    # The children must import this very package, however the parent came by it.
    roots = [str(Path(mnet_kernels.__file__).resolve().parents[1]), env.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    child = subprocess.Popen(options + ["--no-progress"] * no_progress, env=env)
    try:
        return child.wait()
    except KeyboardInterrupt:
        # A terminal interrupts the child as well; it is given time to say how to resume, and ended if it was not.
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        raise


def _train(config, backend, out, args):
    options = [*command(config, backend, out, args.threads), "--workers", str(args.workers)]
    code = _run_child(options + ["--tensorboard"] * args.tensorboard, args.no_progress)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise TrainingError(f"the run with backend {backend} in {out} failed (exit code {code}): see its message above")
    records = metrics.read_records(out / "metrics.jsonl")
    summary = dict(records[-1])
    del summary["event"]
    if summary["peak_memory_bytes"] is not None:
        summary["training_memory_bytes"] = summary["peak_memory_bytes"] - summary["start_memory_bytes"]
    return {"implementation": records[0]["config"]["implementation"], **summary}


def ratios(fused, native):
    """Fused over native for every figure of the table (accuracy: difference in percentage points)."""
    found = {}
    for _, key, _, _ in ROWS:
        a, b = fused.get(key), native.get(key)
        if key == "test_accuracy":
            found["test_accuracy_points"] = 100 * (a - b)
        else:
            found[key] = a / b if a is not None and b else None
    return found


def table(fused, native):
    """The comparison as lines of text."""
    ratio = ratios(fused, native)
    lines = [f"{'':25}{'native':>12}{fused['implementation']:>20}{'fused/native':>16}"]
    for title, key, factor, digits in ROWS:
        cells = ("-" if v is None else f"{v * factor:.{digits}f}" for v in (native.get(key), fused.get(key)))
        if key == "test_accuracy":
            last = f"{ratio['test_accuracy_points']:+.2f} points"
        else:
            last = "-" if ratio[key] is None else f"{ratio[key]:.2f} x"
        lines.append("{:25}{:>12}{:>20}{:>16}".format(title, *cells, last))
    return lines


def run(config, args):
    """Run both, print the table and write ``compare.json`` into ``--out``; returns the exit code."""
    out = Path(args.out)
    backend = fused_backend(config, args.compare_backend)
    if implementation(backend, config.mode, config.device, config.amp) == "native":
        raise TrainingError(
            f"backend {backend} comes to native here, so there is nothing to compare: unset MNET_BACKEND, or choose "
            "another --compare-backend"
        )
    print(f"comparing backend {backend} (mode {config.mode}) with native on {config.device}", flush=True)
    results = {}
    for role, name in (("native", "native"), ("fused", backend)):
        print(f"-- {role}: backend {name}", flush=True)
        results[role] = _train(config, name, out / role, args)
    found = {
        "device": metrics.read_records(out / "native" / "metrics.jsonl")[0]["device"],
        **results,
        "ratios": ratios(results["fused"], results["native"]),
    }
    path = out / "compare.json"
    write_atomic(path, (metrics.dumps(found, indent=2) + "\n").encode())
    runs = {}
    for role, result in results.items():
        records = metrics.read_records(out / role / "metrics.jsonl")
        runs[result["implementation"]] = [record for record in records if record["event"] == "epoch"]
    problem = metrics.plot(out / "curves.png", runs, f"{describe(config)}; {found['device']}")
    print()
    print("\n".join(table(results["fused"], results["native"])))
    print(f"\nimages/s: median over the epochs after the first. {MEMORY[config.device]} Written: {path}")
    if problem:
        print(problem)
    return 0
