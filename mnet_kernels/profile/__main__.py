"""``python -m mnet_kernels.profile``: what fusion saves in each block, on this machine."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from ..bench import BenchError, compare, providers, timing
from ..models import MODELS
from ..training import TrainingError
from ..training.checkpoint import write_atomic
from ..training.metrics import dumps
from . import collect, data, page, png, require, subject, terminal, trace

DTYPES = {"fp32": "off", "bf16": "bf16", "fp16": "fp16"}
DESCRIPTION = f"""\
Profile every block of a model, or one block, fused and unfused side by side: times (interleaved in
rounds), bytes that have to move, share of what this machine's memory and matrix units allow, bytes
kept for backward, peak memory, ops.

TARGET is a model ({", ".join(MODELS)}), a file saved with --json (shown again, nothing is measured), or
{subject.SYNTAX}."""
EPILOG = f"""\
The baseline is measured twice; a difference no larger than between those two is called noise.
bytes and FLOPs are counted (python -m mnet_kernels.cost), not measured.

examples:
  python -m mnet_kernels.profile v2 --batch 16 --threads 1 --html v2.html
  python -m mnet_kernels.profile {subject.EXAMPLE} --trace block.json.gz
  python -m mnet_kernels.profile v3-large --only 5s --device cuda --dtype bf16 --baseline compile
"""


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mnet_kernels.profile", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("target", metavar="TARGET", help="model, block or saved profile")
    add("--backend", metavar="NAME", help="the fused side: BACKEND or BACKEND/MODE (default: the best that runs here)")
    names = ", ".join(providers.NATIVE)
    add("--baseline", default=providers.BASELINE, metavar="NAME", help=f"the other side: {names}, BACKEND (eager)")
    add("--only", metavar="TEXT", help="of a model: only blocks whose name contains TEXT, and not the whole model")
    add("--width", type=float, default=1.0, metavar="X", help="of a model: width multiplier (default: 1)")
    add("--res", type=int, default=224, metavar="PX", help="of a model: side of the images (default: 224)")
    add("--batch", type=int, metavar="N", help="images (default: 8 on the CPU, 256 on a card)")
    add("--dtype", choices=DTYPES, default="fp32", help="storage; bf16 and fp16 by autocast (default: fp32)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--train", action="store_true", help="forward and backward (default)")
    kind.add_argument("--eval", action="store_true", help="inference: running statistics, no autograd")
    add("--seconds", type=float, default=2.0, metavar="S", help="of timed rounds a block (default: 2)")
    add("--rounds", type=int, default=100, metavar="N", help="at most (default: 100)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--clock", choices=timing.CLOCKS, default="wall", help="thread: one thread's CPU time, on a busy machine")
    add("--html", metavar="FILE", help="write one page with charts and every figure")
    add("--json", metavar="FILE", help="write every figure")
    add("--png", metavar="FILE", help="write one picture")
    add("--trace", metavar="FILE", help="write a timeline for ui.perfetto.dev (.gz: compressed)")
    return parser


def _check(args):
    """Refuse what would only fail after minutes of measuring."""
    for name in ("batch", "res", "rounds", "threads", "seconds", "width"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise BenchError(f"--{name} must be above 0, got {value:g}")
    if args.rounds < 5:
        raise BenchError(f"--rounds must be at least 5, got {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: torch sees no CUDA device; use --device cpu")
    require("rich", "the table")
    if args.png:
        require("matplotlib", "--png")
    for name in ("html", "json", "png", "trace"):
        path = getattr(args, name)
        if path:
            folder = Path(path).absolute().parent
            if Path(path).is_dir():
                raise BenchError(f"--{name} {path}: that is a folder; give a file")
            try:
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as exc:
                raise BenchError(f"--{name} {path}: cannot write into {folder}: {exc.strerror or exc}") from exc


def _measure(args):
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads:
        torch.set_num_threads(args.threads)
    placed = subject.find(args.target, args.width, args.res, args.only)
    batch = args.batch or (256 if device.type == "cuda" else 8)
    options = collect.options(
        device, batch, DTYPES[args.dtype], not args.eval, args.baseline, args.backend,
        seconds=args.seconds, rounds=args.rounds, now=timing.clock(args.clock, device),
    )  # fmt: skip
    target = args.target
    if target in MODELS:
        target = f"MobileNet {target.replace('v', 'V', 1)}, {args.res}x{args.res}" + f", width {args.width:g}" * (
            args.width != 1
        )
    count = iter(range(1, len(placed) + 1))

    def progress(name):
        print(f"[{next(count)}/{len(placed)}] {name}", file=sys.stderr, flush=True)

    found = collect.collect(target, placed, options, progress=progress)
    if args.trace:
        one, sides = placed[-1].subject, (options.baseline, options.fused)
        prepared = [compare.Prepared(one, p, options.setting, [options.direction]) for p in sides]
        trace.write(args.trace, [p for p in prepared if not p.error], options.direction, device)
    return found


def run(args):
    """Measure or load, show and write; returns the :class:`data.Profile`."""
    _check(args)
    if args.target.endswith(".json"):
        if args.trace:
            raise BenchError("--trace needs a model or a block: a saved profile holds no timeline")
        found = data.load(args.target)
    else:
        found = _measure(args)
    if args.json:
        write_atomic(args.json, (dumps(found.as_dict()) + "\n").encode())
    if args.html:
        write_atomic(args.html, page.render(found).encode())
    if args.png:
        write_atomic(args.png, png.render(found))
    terminal.show(found)
    written = [str(path) for path in (args.html, args.json, args.png, args.trace) if path]
    if written:
        print(f"written: {', '.join(written)}")
    return found


def main(argv=None):
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        found = run(args)
    except (BenchError, TrainingError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 1 if any(entry.errors for entry in found.entries) else 0


if __name__ == "__main__":
    sys.exit(main())
