"""Peak memory of a training step on the CPU, each provider in a fresh process.

    python bench/peak_memory.py [--model v2] [--res 224] [--batch 64] [--amp off bf16] [--providers eager cpu/auto]
                                [--json FILE]

Printed: by how much the peak of resident memory (VmHWM) grew from the built model to the end of the second step, how
far it is above what the process holds between steps (the optimizer's state and code that was loaded are left out, and
what malloc and the CPU kernels keep is given back first), what the profiler says of that (profile.steps: what was
allocated above a step's start), and the bytes saved for backward (saved_tensors_hooks, parameters left out).

What the process has above what was allocated is mostly holes in malloc's heap.  With MALLOC_MMAP_THRESHOLD_=131072 in
the environment freed tensors go back to the system at once, and there are none.  Linux only.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch

import mnet_kernels
from mnet_kernels.bench import environment, memory, providers, shapes
from mnet_kernels.bench.subjects import Setting
from mnet_kernels.profile import steps


def resident(name):
    """The process's resident memory in bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def held():
    """Resident bytes after the allocators have given back what is free."""
    mnet_kernels.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return resident("VmRSS")


def measure(model, res, batch, amp, provider):
    """One row; to be called in a process that has done nothing else."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    (subject,) = shapes.models([model], 1.0, res)
    workload = subject.prepare(*providers.parse([provider], device), Setting(device, batch, amp))
    before = resident("VmHWM")
    for _ in range(2):
        workload.calls["train"]()
    peak = resident("VmHWM")
    step = peak - held()
    profiled = steps.record(workload.calls["train"], device).peak_bytes
    saved = memory.saved_bytes(workload.forward_for_saving, workload.parameters)
    return {
        "model": model, "res": res, "batch": batch, "amp": amp, "provider": provider, "peak_bytes": peak - before,
        "step_bytes": step, "profiled_bytes": profiled, "saved_bytes": saved,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="v2")
    parser.add_argument("--res", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--amp", nargs="+", default=["off", "bf16"])
    parser.add_argument("--providers", nargs="+", default=["eager", "cpu/auto"])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.model, args.res, args.batch, args.amp[0], args.providers[0])))
        return
    rows = []
    for amp in args.amp:
        for provider in args.providers:
            one = ["--row", "--model", args.model, "--res", str(args.res), "--batch", str(args.batch)]
            one += ["--amp", amp, "--providers", provider]
            done = subprocess.run([sys.executable, __file__, *one], check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            base = next(row for row in rows if row["amp"] == amp)
            words = {"peak_bytes": "peak +", "step_bytes": "above what is held ", "profiled_bytes": "profiled ",
                     "saved_bytes": "saved "}  # fmt: skip
            found = [f"{words[k]}{rows[-1][k] / 1e6:.0f} MB ({rows[-1][k] / base[k]:.2f})" for k in words]
            print(f"{args.model} batch {args.batch} amp {amp} {provider}: {', '.join(found)}")
    if args.json:
        header = environment.header(torch.device("cpu")) | {"threads": 1}
        Path(args.json).write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
