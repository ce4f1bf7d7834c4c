"""Peak memory of a training step on the CPU, each provider in a fresh process.

    python bench/peak_memory.py [--model v2] [--batch 64] [--amp off bf16] [--providers eager cpu/auto] [--json FILE]

Printed: by how much the peak of resident memory (VmHWM) grew from the built model to the end of the second step, and
the bytes saved for backward (saved_tensors_hooks, parameters left out).  Linux only.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from mnet_kernels.bench import environment, memory, providers, shapes
from mnet_kernels.bench.subjects import Setting


def peak_resident():
    """The process's peak of resident memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(model, batch, amp, provider):
    """One row; to be called in a process that has done nothing else."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    (subject,) = shapes.models([model], 1.0, 224)
    workload = subject.prepare(*providers.parse([provider], device), Setting(device, batch, amp))
    before = peak_resident()
    for _ in range(2):
        workload.calls["train"]()
    peak = peak_resident() - before
    saved = memory.saved_bytes(workload.forward_for_saving, workload.parameters)
    return {"model": model, "batch": batch, "amp": amp, "provider": provider, "peak_bytes": peak, "saved_bytes": saved}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="v2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--amp", nargs="+", default=["off", "bf16"])
    parser.add_argument("--providers", nargs="+", default=["eager", "cpu/auto"])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.model, args.batch, args.amp[0], args.providers[0])))
        return
    rows = []
    for amp in args.amp:
        for provider in args.providers:
            one = ["--row", "--model", args.model, "--batch", str(args.batch), "--amp", amp, "--providers", provider]
            done = subprocess.run([sys.executable, __file__, *one], check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            base = next(row for row in rows if row["amp"] == amp)
            peak, saved = rows[-1]["peak_bytes"], rows[-1]["saved_bytes"]
            print(
                f"{args.model} batch {args.batch} amp {amp} {provider}: peak +{peak / 1e6:.0f} MB "
                f"({peak / base['peak_bytes']:.2f}), saved {saved / 1e6:.0f} MB ({saved / base['saved_bytes']:.2f})"
            )
    if args.json:
        header = environment.header(torch.device("cpu")) | {"threads": 1}
        Path(args.json).write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
