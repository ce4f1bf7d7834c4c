"""``python -m mnet_kernels.train``: train a fused MobileNet on a real image set that needs no network."""

import argparse
import math
import shlex
import sys
from pathlib import Path

import torch

from .choice import BACKENDS, MODES
from .training import TrainingError

DESCRIPTION = """\
Train a fused MobileNet on real images that come with scikit-learn: 1797 scanned
handwritten digits, enlarged to --res pixels, every fifth one held out as test.
The defaults need about two minutes on two CPU cores."""

EPILOG = """\
files in --out:
  metrics.jsonl  one JSON object a line: header (settings, versions, backend), epochs, summary
  last.pt        checkpoint of the last finished epoch, for --resume
  best.pt        weights of the epoch with the best test accuracy
  curves.png     loss and test accuracy over the epochs (with matplotlib)

Ctrl-C stops a run; the same command with --resume goes on after the last finished
epoch.  On the CPU with the same number of threads that gives bit for bit the result of
an uninterrupted run; on CUDA up to the order in which its kernels add.

On Linux, plain torch loses up to a third of its CPU speed to returning freed memory to
the system; MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 in the
environment avoids that.  --compare gives both runs the same environment.

examples:
  python -m mnet_kernels.train
  python -m mnet_kernels.train --epochs 2 --width 0.25 --res 32
  python -m mnet_kernels.train --device cuda --amp bf16 --res 224 --compare
"""


def _number(kind, low, high=math.inf, low_ok=True):
    """An argparse type: a finite number of ``kind`` from low to high, low itself only with ``low_ok``."""

    def parse(text):
        value = kind(text)
        if not (value > low or (low_ok and value == low)) or value > high or not math.isfinite(value):
            bound = f"{'at least' if low_ok else 'above'} {low}" + ("" if high == math.inf else f", at most {high}")
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its message for text that is no number
    return parse


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line instead of the whole usage."""
        self.exit(2, f"error: {message} (--help lists the options)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to an option's help where it tells something."""

    def _get_help_string(self, action):
        plain = action.default in (None, False, argparse.SUPPRESS)
        return action.help if plain else f"{action.help} (default: %(default)s)"


def build_parser():
    """The command line."""
    from .models import MODELS
    from .training.config import AMP_DTYPES
    from .training.data import DATASETS

    parser = _Parser(
        prog="python -m mnet_kernels.train", usage="%(prog)s [options]", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=_HelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument_group("model and data").add_argument
    add("--model", choices=MODELS, default="v2", help="network")
    add("--data", choices=DATASETS, default="digits", help="data set")
    add("--width", type=_number(float, 0, low_ok=False), default=1.0, metavar="X", help="width multiplier")
    add("--stem-stride", type=int, choices=(1, 2), default=2, help="of the first convolution; 1 for small images")
    add("--res", type=_number(int, 8, 4096), default=64, metavar="PX", help="side of the images in pixels")
    add("--limit-train", type=_number(int, 2), metavar="N", help="use only the first N training images")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=_number(int, 1), default=12, metavar="N", help="epochs")
    add("--batch-size", type=_number(int, 2), default=32, metavar="N", help="images a step")
    add("--lr", type=_number(float, 0, low_ok=False), default=0.1, help="peak learning rate (SGD, cosine to 0)")
    add("--warmup-epochs", type=_number(float, 0), default=2.0, metavar="N", help="epochs of linear warm-up")
    add("--momentum", type=_number(float, 0, 1), default=0.9, help="Nesterov momentum; 0 is plain SGD")
    add("--weight-decay", type=_number(float, 0), default=1e-4, help="not applied to batch norm and biases")
    add("--label-smoothing", type=_number(float, 0, 1), default=0.1, help="label smoothing")
    add(
        "--clip-grad",
        type=_number(float, 0),
        default=1.0,
        metavar="X",
        help="largest norm of the gradient; 0 is no limit",
    )
    add("--seed", type=_number(int, 0, 2**31 - 1), default=0, help="seed of weights, order, augmentation, dropout")

    add = parser.add_argument_group("how it computes").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where there is one")
    add("--amp", choices=AMP_DTYPES, default="off", help="mixed precision (fp16 with loss scaling)")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="channels-last memory layout")
    add("--backend", choices=BACKENDS, default="auto", help="implementation of the blocks; native is plain torch")
    add("--mode", choices=MODES, default="auto", help="how a fused backend runs a block")
    add("--threads", type=_number(int, 1), metavar="N", help="CPU threads (default: torch's own choice)")

    add = parser.add_argument_group("results").add_argument
    add("--out", metavar="DIR", help="directory of the results (default: runs/MODEL-DATA)")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--overwrite", action="store_true", help="replace an unfinished run in --out (a finished one always is)")
    add("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")

    add = parser.add_argument_group("comparison").add_argument
    add("--compare", action="store_true",
        help="train twice from the same seed, fused and native, each in its own process, and print both")  # fmt: skip
    add("--compare-backend", choices=[b for b in BACKENDS if b not in ("auto", "native")],
        help="the fused backend to compare (default: --backend, or the best one there is for the device)")  # fmt: skip
    return parser


def _config(args):
    from .training.config import Config, implementation

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch sees no CUDA device; use --device cpu")
    settled = {"device": device, "implementation": implementation(args.backend, args.mode, device, args.amp)}
    return Config(**settled, **{n: getattr(args, n) for n in Config.__dataclass_fields__ if n not in settled})


def _run(args, argv):
    from .training import compare, run
    from .training.progress import Progress

    if args.resume and args.overwrite:
        raise TrainingError("--resume and --overwrite exclude each other")
    if args.compare and args.resume:
        raise TrainingError("--compare cannot resume: run it again, or resume one of its two runs by its own --out")
    if args.compare_backend and not args.compare:
        raise TrainingError("--compare-backend needs --compare")
    if args.out is None:
        args.out = f"runs/{args.model}-{args.data}"
    if args.threads:
        torch.set_num_threads(args.threads)
    config = _config(args)
    if args.compare:
        try:
            return compare.run(config, args)
        except KeyboardInterrupt:
            print("\ncomparison interrupted", file=sys.stderr)
            return 130
    progress = Progress(enabled=not args.no_progress)
    try:
        summary = run.run(config, args.out, progress, resume=args.resume, overwrite=args.overwrite)
    except KeyboardInterrupt:
        if not (Path(args.out) / "last.pt").exists():
            print("\ninterrupted before the first epoch was finished: nothing was saved", file=sys.stderr)
            return 130
        again = [a for a in argv if a not in ("--resume", "--overwrite")]
        command = shlex.join(["python", "-m", "mnet_kernels.train", *again, "--resume"])
        print(f"\ninterrupted; go on after the last finished epoch with: {command}", file=sys.stderr)
        return 130
    print(
        f"final test accuracy {100 * summary['test_accuracy']:.2f} % after {summary['epochs']} epochs "
        f"(best {100 * summary['best_test_accuracy']:.2f} % in epoch {summary['best_epoch']}), "
        f"{summary['images_per_s']:.1f} images/s, {summary['seconds']:.0f} s; results in {args.out}"
    )
    return 0


def main(argv=None):
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(build_parser().parse_args(argv), argv)
    except TrainingError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
