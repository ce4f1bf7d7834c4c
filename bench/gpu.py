"""One phase of measurements on a card; see bench/gpu.sh, which calls this.

With ``--device cpu`` every phase runs the same code at tiny sizes: a rehearsal, not a measurement.
"""

import argparse
import sys

import commands
import measure
import torch
from session import NO_GPU, Session

from mnet_kernels.bench import BenchError, tiles
from mnet_kernels.models import MODELS

PHASES = {
    "build": commands.build,
    "test": commands.test,
    "sanitize": commands.sanitize,
    "tune": commands.tune,
    "stages": measure.stages,
    "blocks": measure.blocks,
    "models": measure.models,
}
# What is left at its default depends on the device.
DEFAULTS = {
    "cuda": {"batch": 256, "width": 1.0, "resolution": 224, "amp": "bf16", "seconds": 1.0},
    "cpu": {"batch": 2, "width": 0.25, "resolution": 32, "amp": "off", "seconds": 0.05},
}


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("phase", choices=PHASES)
    add("out", metavar="OUT_DIR", help="folder of the results; made if it is missing")
    add("--device", choices=DEFAULTS, default="cuda")
    add("--budget", type=float, default=490, metavar="S", help="seconds in which to stop by itself (default: 490)")
    add("--models", nargs="+", choices=MODELS, metavar="NAME", help="default: all")
    add("--providers", nargs="+", metavar="NAME", help="default: plain torch in all forms, and what fused can run")
    add("--only", metavar="TEXT", help="subjects whose name contains TEXT")
    add("--first", type=int, metavar="N", help="only the first N subjects")
    add("--batch", type=int, metavar="N", help="default: 256, on the CPU 2")
    add("--width", type=float, metavar="X", help="default: 1, on the CPU 0.25")
    add("--resolution", type=int, metavar="PX", help="default: 224, on the CPU 32")
    add("--amp", choices=("off", "bf16", "fp16"), help="default: bf16, on the CPU off")
    add("--seconds", type=float, metavar="S", help="of timed rounds a row group (default: 1, on the CPU 0.05)")
    spec = (
        "a row before those of the CUDA or Triton kernels' table (python -m mnet_kernels.bench --help; again for more)"
    )
    add("--tile", action="append", default=[], metavar="SPEC", help=spec)
    return parser


def main(argv=None):
    """Run one phase; returns the exit code."""
    args = build_parser().parse_args(argv)
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"{args.phase}: no CUDA card here (torch {torch.__version__} sees none): nothing was run")
        return NO_GPU
    try:
        if args.tile:
            tiles.override(args.tile)
    except BenchError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    session = Session(args)
    try:
        PHASES[args.phase](session)
    except BenchError as exc:
        session.fail(args.phase, exc)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
