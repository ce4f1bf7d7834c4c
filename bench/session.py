"""One call of a phase: its time, its parts, its results."""

import time
import traceback
from pathlib import Path

import torch
from results import Results

from mnet_kernels.bench import environment

DONE, FAILED, NO_GPU, UNFINISHED = 0, 1, 3, 4


class Session:
    """What the phases need: arguments, device, results on disk, a clock; ``part`` runs one thing and survives it."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.started = time.perf_counter()
        self.failed, self.unfinished = [], []
        header = environment.header(self.device) | {"phase": args.phase, "budget_s": args.budget}
        self.results = Results(Path(args.out) / f"{args.phase}.json", header, environment.identity(header))
        self.say(f"{args.phase} on {header['device']}, torch {header['torch']}, commit {header['commit']}")
        if self.results.aside:
            self.say(f"results of other sources, versions or another card were put aside: {self.results.aside}")

    def say(self, text):
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}", flush=True)

    def remaining(self):
        """Seconds left of the budget."""
        return self.args.budget - (time.perf_counter() - self.started)

    def time_for(self, name, seconds):
        """Whether ``seconds`` are left; if not, the part counts as unfinished."""
        if self.remaining() >= seconds:
            return True
        self.unfinished.append(name)
        return False

    def part(self, name, function):
        """Run one part; a failure is said and remembered, and does not stop the others."""
        try:
            return function()
        except Exception as exc:
            traceback.print_exc()
            self.fail(name, exc)
            return None

    def fail(self, name, reason):
        self.failed.append(name)
        self.say(f"FAILED {name}: {reason}")

    def finish(self):
        """Say how it went; returns the exit code."""
        self.say(f"{self.results.path}: {len(self.results.rows)} rows")
        if self.failed:
            self.say(f"failed: {', '.join(self.failed)}")
        if self.unfinished:
            self.say(f"out of time before: {self.unfinished[0]} (and after it); call again to go on")
        return FAILED if self.failed else UNFINISHED if self.unfinished else DONE
