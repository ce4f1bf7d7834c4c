"""``python -m mnet_kernels.tune``: the Triton backend's configurations, measured on this card and kept for it."""

import argparse
import sys
from pathlib import Path

import torch

from . import backends
from .backends.triton import configs, measured
from .bench import BenchError, tune_problems, tuning

NO_GPU = 3  # exit code, as of bench/gpu.sh
CAPABILITIES = sorted({key[3] for key in configs.TABLE} - {(0, 0)})
DESCRIPTION = """\
Time the Triton kernels' configurations on this card, and keep those that are faster than the
package's table.  Nothing is tuned while a network runs: the file is read once a process."""
EPILOG = """\
A candidate has one block side halved or doubled, 4 or 8 warps, or other stages; it is taken
where it is faster by more than the table's row differs from itself and its results keep to the
rule of the tests.  Running it again searches on around what was found.

The file lies in MNET_TUNE_DIR, else in mnet_kernels/tune below XDG_CACHE_HOME or ~/.cache.
It serves this card, triton and version of the kernels only; MNET_TUNE=0 leaves it out.

examples:
  python -m mnet_kernels.tune
  python -m mnet_kernels.tune --kernels pointwise pointwise_dgrad --dtypes bf16
  python -m mnet_kernels.tune --list
"""


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mnet_kernels.tune", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    names = ", ".join(tuning.KERNELS)
    add("--kernels", nargs="+", choices=tuning.KERNELS, default=tuning.KERNELS, metavar="NAME", help=f"from {names}")
    dtypes = "fp32, bf16, fp16 (default: fp32 bf16; a row serves both 16-bit dtypes)"
    add("--dtypes", nargs="+", choices=tuning.DTYPES, default=["fp32", "bf16"], metavar="NAME", help=f"from {dtypes}")
    add("--batch", type=int, default=64, metavar="N", help="images (default: 64)")
    add("--seconds", type=float, default=2.0, metavar="S", help="of timed rounds, twice a row (default: 2)")
    add("--out", type=Path, metavar="FILE", help="write there, where nothing looks for it, instead of in the cache")
    add("--list", action="store_true", help="show the rows in force and where each comes from, and stop")
    add("--dry-run", action="store_true", help="show the layers and candidates, time and write nothing")
    return parser


def _cards():
    """(name, capability) of the cards here; without any, of the table's."""
    if not torch.cuda.is_available():
        return [(None, capability) for capability in CAPABILITIES]
    every = range(torch.cuda.device_count())
    return list(dict.fromkeys(backends.triton.card(i) for i in every))


def _plan(args, keys):
    """Show what would be timed, without a card for the newest in the table."""
    card, capability = _cards()[-1]
    known = tune_problems.layers()
    for key in keys:
        row = configs.lookup(*key, capability, card)
        print("\n" + " ".join(map(str, key)) + f" bytes: {tuning.text(row)}")
        for layer in tune_problems.of_class(*key[:2], known):
            print(f"  on {args.batch}x{layer.channels}x{layer.height}x{layer.width} {layer}")
        for config in tuning.neighbours(*key[:2], row):
            print(f"  try {tuning.text(config)}")


def run(args):
    """Do what the command line asks; returns the exit code."""
    if args.batch < 1 or not args.seconds > 0:
        raise BenchError(f"--batch {args.batch} --seconds {args.seconds:g}: expected positive numbers")
    if args.list:
        print(tuning.in_force(_cards()))
        print(f"\nmeasured rows are read from {measured.directory()}" + ("" if measured.wanted() else ": MNET_TUNE=0"))
        return 0
    dtypes = [tuning.DTYPES[name] for name in dict.fromkeys(args.dtypes)]
    keys = tuning.table_keys(args.kernels, {dtype.itemsize for dtype in dtypes})
    if args.dry_run:
        _plan(args, keys)
        return 0
    if not torch.cuda.is_available():
        print(f"error: no CUDA card here (torch {torch.__version__} sees none): nothing was timed", file=sys.stderr)
        return NO_GPU
    device = torch.device("cuda", torch.cuda.current_device())
    why = backends.why_unavailable("triton", device)
    if why:
        raise BenchError(f"backend 'triton': {why}")
    card, capability = backends.triton.card(device)
    file = args.out or measured.path(card)
    known, outcomes = tune_problems.layers(), {}
    for key in keys:
        layers = tune_problems.of_class(*key[:2], known)
        same_size = [dtype for dtype in dtypes if dtype.itemsize == key[2]]
        options = {"batch": args.batch, "seconds": args.seconds}
        outcomes[key] = tuning.tune(key, layers, device, card, capability, same_size, **options)
        # written row by row: a search that is interrupted keeps what it found
        count = tuning.write(file, {key: outcomes[key]}, card, capability)
        print(tuning.table({key: outcomes[key]}).splitlines()[-1], file=sys.stderr, flush=True)
    print(f"{card}, torch {torch.__version__}, triton {measured.triton_version()}, batch {args.batch}\n")
    print(tuning.table(outcomes))
    print(f"\n{count} rows in {file}")
    return 0


def main(argv=None):
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
