"""``python -m mnet_kernels.bench``: plain torch against the fused backends, interleaved in one process."""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

from ..models import MODELS
from ..training.checkpoint import write_atomic
from ..training.config import AMP_DTYPES
from . import (
    BenchError,
    compare,
    environment,
    host,
    modes,
    providers,
    report,
    shapes,
    stage_subjects,
    table,
    tiles,
    timing,
)
from .subjects import Setting

DESCRIPTION = """\
Measure stages, blocks or whole models of this package's MobileNets: plain torch
(eager NCHW, eager channels_last, torch.compile) and every fused backend that is whole,
one after another in rounds, in one process.  host: what a call costs before any
arithmetic, on tiny maps.  report FILE...: saved results as tables and a chart
(python -m mnet_kernels.bench report --help)."""

EPILOG = """\
speed-up is over eager channels_last: the median over rounds, with the bootstrap interval.
The baseline is measured twice; a difference no larger than between those two is called
noise.  Compilation is not in the times; it is in "first call s".  The host's cost is the
CPU time of the calling thread; batch it alone bounds: compare block --batch 1 2 4 8.

examples:
  python -m mnet_kernels.bench block --only 56x56
  python -m mnet_kernels.bench block --backend cpu --batch 16 --threads 1 --direction train --write-modes
  python -m mnet_kernels.bench model --backend cpu --batch 16 --resolution 224
  python -m mnet_kernels.bench model --providers eager cpu/auto accelerate
  python -m mnet_kernels.bench model --eval --batch 1 16 --providers folded folded-compile cpu/auto cpu/folded
  python -m mnet_kernels.bench host --batch 1 8
  python -m mnet_kernels.bench stage --only depthwise --device cuda --batch 256 --amp bf16 --graph
"""

LEVELS = {"stage": stage_subjects.stages, "block": shapes.blocks, "model": shapes.models, "host": host.blocks}


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mnet_kernels.bench", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("level", choices=LEVELS, help="what to measure")
    add("--only", metavar="TEXT", help="subjects whose name contains TEXT (--list shows the names)")
    add("--list", action="store_true", help="show the subjects and stop")
    add("--models", nargs="+", choices=MODELS, metavar="NAME", help=f"from {', '.join(MODELS)} (default: all)")
    add("--width", type=float, default=1.0, metavar="X", help="width multiplier (default: 1)")
    add("--resolution", type=int, default=224, metavar="PX", help="side of the images (default: 224)")
    add(
        "--batch", type=int, nargs="+", metavar="N", help="images (default: 8 on the CPU, 256 on a card; host: 1 2 4 8)"
    )
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--eval", action="store_true", help="eval mode, forward alone: batch norm by its running statistics")
    add("--amp", choices=AMP_DTYPES, default="off", help="mixed precision; for stages, the storage dtype")
    add(
        "--providers",
        nargs="+",
        metavar="NAME",
        help=f"from {', '.join(providers.NATIVE)}, BACKEND, BACKEND/MODE",
    )
    add("--backend", action="append", default=[], metavar="NAME", help="measure this fused backend (with the others)")
    add("--direction", choices=("forward", "train", "backward"), action="append", help="default: all the subject has")
    add("--graph", action="store_true", help="on a card: also replay CUDA graphs of every provider")
    add("--seconds", type=float, default=3.0, metavar="S", help="of timed rounds a table (default: 3)")
    add("--rounds", type=int, default=200, metavar="N", help="at most (default: 200)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--clock", choices=timing.CLOCKS, default="wall", help="thread: one thread's CPU time, on a busy machine")
    add("--json", metavar="FILE", help="write header and rows there")
    spec = (
        "a row before those of the CUDA kernels' tile table, KERNEL:name=value,..., or of the Triton kernels', "
        "triton/KERNEL:CLASS:BYTES:name=value,... (again for more; python -m mnet_kernels.tune --list shows these)"
    )
    add("--tile", action="append", default=[], metavar="SPEC", help=spec)
    add("--list-tiles", action="store_true", help="show the CUDA kernels' tile table and stop")
    add("--write-modes", action="store_true", help="blocks: write the table that automatic mode goes by")
    help_ = "blocks on a card: write the table that the automatic choice of a backend goes by"
    add("--write-backends", action="store_true", help=help_)
    return parser


def _providers(args, device):
    """What was asked for, or plain torch in its usual forms and every fused backend that runs here."""
    native = [n for n in args.providers or ("nchw", "eager", "compile") if n in providers.NATIVE]
    fused = [n for n in args.providers or () if n not in providers.NATIVE] + args.backend
    if args.level == "stage":  # a stage needs only its own kernel, not a whole backend
        runnable, parse = stage_subjects.runnable, stage_subjects.parse
    else:
        runnable, parse = providers.runnable, providers.parse
    if fused or args.providers:
        found = parse(fused, device)
    else:
        found = runnable(device) + (providers.automatic(device) if args.level == "model" else [])
    return providers.parse(native, device) + found


def _device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def run(args):
    """Measure and print; returns the rows."""
    if args.tile:
        tiles.override(args.tile)
    if args.list_tiles:
        print(tiles.table())
        return []
    device = _device(args.device)
    if args.graph and (device.type != "cuda" or args.level == "host"):
        raise BenchError("--graph needs a CUDA device, and a level other than host: a graph has no host cost")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    subjects = LEVELS[args.level](args.models, args.width, args.resolution)
    subjects = [s for s in subjects if args.only is None or args.only in s.name]
    if args.list or not subjects:
        print("\n".join(s.name for s in subjects) or f"no {args.level} has {args.only!r} in its name (see --list)")
        return []
    usual = host.BATCHES if args.level == "host" else [256 if device.type == "cuda" else 8]
    now = timing.clock(args.clock, device)
    wanted = _providers(args, device)
    header, rows = environment.header(device) | {"clock": args.clock}, []
    print(f"{header['device']}, torch {header['torch']}, {header['threads']} threads, commit {header['commit']}")
    for name in ("modes", "backends"):
        if getattr(args, f"write_{name}") and args.level != "block":
            raise BenchError(f"--write-{name} needs blocks: python -m mnet_kernels.bench block --write-{name}")
    started = time.perf_counter()
    for subject, batch in itertools.product(subjects, args.batch or usual):
        setting = Setting(device, batch, args.amp, not args.eval)
        asked = args.direction or (["forward"] if args.eval else subject.directions)
        directions = [d for d in subject.directions if d in asked]
        prepared = compare.prepare(subject, wanted, setting, directions)
        for direction in directions:
            for launch in compare.LAUNCHES[: 1 + args.graph]:
                bounds = {"seconds": args.seconds, "max_rounds": args.rounds, "now": now}
                found = compare.measure(subject, prepared, setting, direction, launch, **bounds)
                print("\n" + table.table(found), flush=True)
                rows += found
                if args.json:
                    write_atomic(Path(args.json), table.document(header, rows).encode())
    if args.write_modes:
        modes.write(header, modes.rows(subjects, rows))
    if args.write_backends:
        modes.write_fastest(header, modes.fastest_rows(subjects, rows, header["device"]))
    print(f"\n{len(rows)} rows in {time.perf_counter() - started:.0f} s" + (f", in {args.json}" if args.json else ""))
    return rows


def main(argv=None):
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        return report.main(argv[1:])
    args = build_parser().parse_args(argv)
    try:
        rows = run(args)
    except BenchError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
