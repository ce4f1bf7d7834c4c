"""``python -m mnet_kernels.train``: train a fused MobileNet, test it, and classify images with it."""

import shlex
import sys
from pathlib import Path

import torch

from .training import TrainingError
from .training.options import build_evaluate_parser, build_parser, build_predict_parser, parse

__all__ = ["build_parser", "main"]


def _device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch sees no CUDA device; use --device cpu")
    return name


def _config(args):
    from .training import distributed
    from .training.config import Config, implementation

    device = _device(args.device)
    settled = {
        "device": device,
        "implementation": implementation(args.backend, args.mode, device, args.amp),
        "processes": distributed.planned(),
    }
    return Config(**settled, **{n: getattr(args, n) for n in Config.__dataclass_fields__ if n not in settled})


def _run(args, argv):
    from .training import compare, data, distributed, run
    from .training.progress import Progress

    if args.resume and args.overwrite:
        raise TrainingError("--resume and --overwrite exclude each other")
    if args.compare and args.resume:
        raise TrainingError("--compare cannot resume: run it again, or resume one of its two runs by its own --out")
    if args.compare_backend and not args.compare:
        raise TrainingError("--compare-backend needs --compare")
    if args.compare and distributed.launched():
        raise TrainingError("--compare starts its own processes: run it without torchrun")
    if args.out is None:
        args.out = f"runs/{args.model}-{data.short_name(args.data)}"
    if args.threads:
        torch.set_num_threads(args.threads)
    config = _config(args)
    if args.compare:
        try:
            return compare.run(config, args)
        except KeyboardInterrupt:
            print("\ncomparison interrupted", file=sys.stderr)
            return 130
    try:
        with distributed.joined(config.device):
            progress = Progress(enabled=not args.no_progress, silent=distributed.rank() > 0)
            options = {name: getattr(args, name) for name in ("resume", "overwrite", "workers", "tensorboard")}
            summary = run.run(config, args.out, progress, **options)
            progress.line(
                f"final test accuracy {100 * summary['test_accuracy']:.2f} % after {summary['epochs']} epochs "
                f"(best {100 * summary['best_test_accuracy']:.2f} % in epoch {summary['best_epoch']}), "
                f"{summary['images_per_s']:.1f} images/s, {summary['seconds']:.0f} s; results in {args.out}"
            )
    except KeyboardInterrupt:
        if not (Path(args.out) / "last.pt").exists():
            print("\ninterrupted before the first epoch was finished: nothing was saved", file=sys.stderr)
            return 130
        again = [a for a in argv if a not in ("--resume", "--overwrite")]
        program = ["torchrun", "--nproc-per-node", str(config.processes)] if distributed.launched() else ["python"]
        command = shlex.join([*program, "-m", "mnet_kernels.train", *again, "--resume"])
        print(f"\ninterrupted; go on after the last finished epoch with: {command}", file=sys.stderr)
        return 130
    return 0


def _use(command, argv):
    """Run ``evaluate`` or ``predict``."""
    from .training import predict

    args = (build_evaluate_parser if command == "evaluate" else build_predict_parser)().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = _device(args.device)
    lines = predict.evaluate(args) if command == "evaluate" else predict.predict(args)
    print("\n".join(lines))
    return 0


def main(argv=None):
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv and argv[0] in ("evaluate", "predict"):
            return _use(argv[0], argv[1:])
        return _run(parse(argv), argv)
    except TrainingError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
