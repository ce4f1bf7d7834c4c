"""Do fused kernels train as well as plain torch?  The same run from several seeds, under every provider, in pairs.

    python bench/curves.py --json bench/results/curves.json

Called again with the same FILE it goes on where it stopped, or with more --seeds.

Every provider starts from the same weights and sees the same batches; rounding alone differs, and training amplifies
it.  How much is chance shows in `native, nchw`: plain torch in another memory layout, whose rounding differs as well.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy import stats

from mnet_kernels.bench import environment
from mnet_kernels.training.metrics import read_records

# name: options of `python -m mnet_kernels.train`
PROVIDERS = {
    "native": ["--backend", "native"],
    "native, nchw": ["--backend", "native", "--no-channels-last"],
    "cpu/chain": ["--backend", "cpu", "--mode", "chain"],
    "cpu/algebraic": ["--backend", "cpu", "--mode", "algebraic"],
}
STEPS = 40  # of an epoch of 1280 images in batches of 32
FIGURES = {"train_loss": "loss, last 40 steps", "test_loss": "test loss", "test_accuracy": "test accuracy"}


def train(seed, amp, options, args):
    """The records of one run's epochs."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "mnet_kernels.train", "--data", "digits", "--model", args.model,
                   "--limit-train", str(32 * STEPS), "--batch-size", "32", "--epochs", str(args.steps // STEPS),
                   "--warmup-epochs", "1", "--seed", str(seed), "--amp", amp, "--threads", "1", "--no-progress",
                   "--out", out, *options]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [r for r in read_records(Path(out) / "metrics.jsonl") if r["event"] == "epoch"]


def paired(values, base):
    """(mean difference, half the width of its 95 % confidence interval by Student's t)."""
    difference = np.subtract(values, base)
    half = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)
    return float(difference.mean()), float(half)


def table(runs, amp):
    """Lines of Markdown: each provider's mean of each figure, and its paired difference to native."""
    lines = [f"| {amp} | " + " | ".join(FIGURES.values()) + " |", "|---" * (1 + len(FIGURES)) + "|"]
    for name in PROVIDERS:
        cells = []
        for key in FIGURES:
            values, base = ([run[-1][key] for run in runs[amp][who]] for who in (name, "native"))
            cell = f"{np.mean(values):.4f}"
            if name != "native":
                mean, half = paired(values, base)
                cell += f", {mean:+.4f} ± {half:.4f}"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def earlier(path, header, args):
    """The runs of an existing file of the same sources, machine and settings, whole seeds only; {} without one."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    for name, have, want in (
        ("sources or machine", environment.identity(found["header"]), environment.identity(header)),
        ("model and steps", [found["model"], found["steps"]], [args.model, args.steps]),
    ):
        if have != json.loads(json.dumps(want)):
            sys.exit(f"{path} has other {name}: {have}, here {want}; write to another file")
    return found["runs"]


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="v2")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each provider (default: 5)")
    parser.add_argument("--steps", type=int, default=200, help=f"a multiple of {STEPS} (default: 200)")
    parser.add_argument("--amp", nargs="+", default=["off", "bf16"])
    parser.add_argument("--json", metavar="FILE", required=True, help="write every run's epochs")
    args = parser.parse_args()
    if args.seeds < 2 or args.steps < STEPS or args.steps % STEPS:
        parser.error(f"--seeds must be at least 2, and --steps a multiple of {STEPS}")
    path, header = Path(args.json), environment.header("cpu")
    runs = earlier(path, header, args)
    for amp in args.amp:
        done = runs.setdefault(amp, {name: [] for name in PROVIDERS})
        for seed in range(min(map(len, done.values())), args.seeds):
            for name, options in PROVIDERS.items():
                runs[amp][name].append(train(seed, amp, options, args))
            document = {"header": header, "model": args.model, "steps": args.steps, "runs": runs}
            path.write_text(json.dumps(document, indent=1) + "\n")  # a run of hours keeps what it has
            print(f"amp {amp}, seed {seed} done", file=sys.stderr, flush=True)
    for amp in args.amp:
        print("\n".join(table(runs, amp)), end="\n\n")


if __name__ == "__main__":
    main()
