"""The command lines of training, evaluating and predicting."""

import argparse
import math
import os

from ..choice import BACKENDS, MODES

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

DESCRIPTION = """\
Train a fused MobileNet on real images.  Without options: 1797 scanned handwritten digits
that come with scikit-learn, enlarged to --res pixels, every fifth one held out as test;
about two minutes on two CPU cores.  Two further commands use what was trained:

  python -m mnet_kernels.train evaluate CHECKPOINT            accuracy, class by class
  python -m mnet_kernels.train predict CHECKPOINT IMAGE...    table of probabilities"""

EPILOG = """\
files in --out:
  metrics.jsonl  one JSON object a line: header (settings, versions, backend), epochs, summary
  last.pt        checkpoint of the last finished epoch, for --resume
  best.pt        weights (with --ema the averaged ones) of the epoch with the best test accuracy
  tensorboard/   the epochs for TensorBoard (with --tensorboard)
  curves.png     loss and test accuracy over the epochs (with matplotlib)
  --compare: these in native/ and fused/, compare.json, curves.png (accuracy over time)

Ctrl-C stops a run; the same command with --resume goes on after the last finished
epoch.  On the CPU with the same number of threads that gives bit for bit the result of
an uninterrupted run; on CUDA up to the order in which its kernels add.

On Linux, plain torch loses up to a third of its CPU speed to returning freed memory to
the system; MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 in the
environment avoids that.  --compare gives both runs the same environment.

examples:
  python -m mnet_kernels.train
  python -m mnet_kernels.train --epochs 2 --width 0.25 --res 32
  python -m mnet_kernels.train --data fashion-mnist
  python -m mnet_kernels.train --data PHOTOS --res 160 --mixup 0.2 --cutmix 1 --ema 0.999
  python -m mnet_kernels.train --device cuda --amp bf16 --res 224 --compare
  torchrun --nproc-per-node 2 -m mnet_kernels.train --data PHOTOS
torchvision's recipe of MobileNetV3 (weight decay 1e-5, 600 epochs of 8 x 128 images):
  python -m mnet_kernels.train --model v3-large --data IMAGENET --optimizer rmsprop --lr 0.064
    --schedule step --lr-step 2 --lr-gamma 0.973 --weight-decay 1e-5 --random-erase 0.2
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


def build_parser(spec="digits"):
    """The command line of a training run, with the defaults of the data set ``spec``."""
    from ..models import MODELS
    from .config import AMP_DTYPES
    from .data import DEFAULTS, kind
    from .optim import OPTIMIZERS, SCHEDULES

    parser = _Parser(
        prog="python -m mnet_kernels.train", usage="%(prog)s [options]", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=_HelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument_group("model and data").add_argument
    add("--model", choices=MODELS, default="v2", help="network")
    add("--data", default="digits", metavar="SET",
        help="digits; fashion-mnist (Debian's package dataset-fashion-mnist) or fashion-mnist:PATH (a folder of its "
        "four files); or a folder of images: train/CLASS/* with val/ or test/, or CLASS/*, every fifth image held out. "
        "The defaults shown here are those of the set given")  # fmt: skip
    add("--width", type=_number(float, 0, low_ok=False), default=1.0, metavar="X", help="width multiplier")
    add("--stem-stride", type=int, choices=(1, 2), default=2, help="of the first convolution; 1 for small images")
    add("--res", "--size", type=_number(int, 8, 4096), default=64, metavar="PX", help="side of the images in pixels")
    add("--limit-train", type=_number(int, 2), metavar="N", help="use only N training images")
    add("--workers", type=_number(int, 0), default=min(8, CORES), metavar="N", help="processes that read a folder")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=_number(int, 1), default=12, metavar="N", help="epochs")
    add("--batch-size", type=_number(int, 2), default=32, metavar="N", help="images of a batch, in each process")
    add("--accumulate", type=_number(int, 1), default=1, metavar="N", help="batches whose gradients make one step")
    add("--optimizer", choices=OPTIMIZERS, default="sgd_nesterov", help="rmsprop as in torchvision's recipes")
    add("--lr", type=_number(float, 0, low_ok=False), default=0.1, help="peak learning rate")
    add("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate: cosine to 0, or steps")
    add("--lr-step", type=_number(float, 0, low_ok=False), default=2.0, metavar="N", help="epochs of one step")
    add("--lr-gamma", type=_number(float, 0, 1, low_ok=False), default=0.973, metavar="X", help="factor of one step")
    add("--warmup-epochs", type=_number(float, 0), default=2.0, metavar="N", help="epochs of linear warm-up")
    add("--momentum", type=_number(float, 0, 1), default=0.9, help="momentum; 0 is none")
    add("--weight-decay", type=_number(float, 0), default=1e-4, help="not applied to batch norm and biases")
    add("--label-smoothing", type=_number(float, 0, 1), default=0.1, help="label smoothing")
    add("--mixup", type=_number(float, 0), default=0.0, metavar="ALPHA", help="mix whole images; 0 is off")
    add("--cutmix", type=_number(float, 0), default=0.0, metavar="ALPHA",
        help="mix by pasting boxes; 0 is off; with --mixup each batch takes one of the two")  # fmt: skip
    add("--random-erase", type=_number(float, 0, 1), default=0.0, metavar="P", help="probability of an erased box")
    add("--ema", type=_number(float, 0, 0.999999), default=0.0, metavar="DECAY",
        help="moving average of the weights, step by step; tested and saved instead of them; 0 is off")  # fmt: skip
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
    add("--compile", nargs="?", const="inductor", default="off", metavar="BACKEND",
        help="torch.compile the training step (BACKEND: inductor)")  # fmt: skip
    add("--threads", type=_number(int, 1), metavar="N", help="CPU threads (default: torch's own choice)")

    add = parser.add_argument_group("results").add_argument
    add("--out", metavar="DIR", help="directory of the results (default: runs/MODEL-DATA)")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--overwrite", action="store_true", help="replace an unfinished run in --out (a finished one always is)")
    add("--tensorboard", action="store_true", help="write the epochs for TensorBoard too")
    add("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")

    add = parser.add_argument_group("comparison").add_argument
    add("--compare", action="store_true",
        help="train twice from the same seed, fused and native, each in its own process, and print both")  # fmt: skip
    add("--compare-backend", choices=[b for b in BACKENDS if b not in ("auto", "native")],
        help="the fused backend to compare (default: --backend, or the best one there is for the device)")  # fmt: skip
    parser.set_defaults(**DEFAULTS.get(kind(spec), {}))
    return parser


def parse(argv):
    """The arguments of a training run: --data decides the defaults of the others."""
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default="digits")
    known, _ = first.parse_known_args(argv)
    return build_parser(known.data).parse_args(argv)


def _add_machine(add):
    """Options of the two commands that use a checkpoint."""
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where there is one")
    add("--backend", choices=BACKENDS, default="auto", help="implementation of the blocks; native is plain torch")
    add("--res", "--size", type=_number(int, 8, 4096), metavar="PX", help="side of the images (default: as trained)")
    add("--threads", type=_number(int, 1), metavar="N", help="CPU threads (default: torch's own choice)")


def build_evaluate_parser():
    """The command line of ``evaluate``."""
    parser = _Parser(
        prog="python -m mnet_kernels.train evaluate", formatter_class=_HelpFormatter, allow_abbrev=False,
        description="Test a checkpoint (best.pt or last.pt) and print its accuracy, class by class.",
    )  # fmt: skip
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    add("--data", metavar="SET", help="images of the same classes (default: as trained)")
    add("--batch-size", type=_number(int, 1), metavar="N", help="images of a batch (default: as trained)")
    add("--workers", type=_number(int, 0), default=min(8, CORES), metavar="N", help="processes that read a folder")
    _add_machine(add)
    return parser


def build_predict_parser():
    """The command line of ``predict``."""
    parser = _Parser(
        prog="python -m mnet_kernels.train predict", formatter_class=_HelpFormatter, allow_abbrev=False,
        description="Classify image files and print the most probable classes of each. Digits and Fashion-MNIST were "
        "trained on white shapes on black.",
    )  # fmt: skip
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    add("images", metavar="IMAGE", nargs="+", help="image files")
    add("--top", type=_number(int, 1), default=5, metavar="N", help="classes shown for each image")
    _add_machine(add)
    return parser
