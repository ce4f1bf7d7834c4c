"""A run from its configuration to its files: directory, resuming, checkpoints, metrics."""

import dataclasses
import shutil
from pathlib import Path

import torch

import mnet_kernels

from . import TrainingError, checkpoint, data, distributed, metrics, require
from .config import use_backend
from .engine import Trainer


def _resume(trainer, path):
    state = checkpoint.load(path)
    checkpoint.check_config(path, state["config"], dataclasses.asdict(trainer.config))
    try:
        trainer.restore(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as exc:
        reason = str(exc).partition("\n")[0]
        raise TrainingError(f"{path} does not fit this version of the program: {reason}") from exc


def _claim(out, overwrite):
    """Make the directory ready for a new run; an unfinished run in it is kept unless ``overwrite`` says otherwise."""
    last = out / "last.pt"
    if last.exists() and not overwrite:
        state = checkpoint.load(last)
        if state["epoch"] < state["config"]["epochs"]:
            raise TrainingError(
                f"{out} holds an unfinished run (epoch {state['epoch']} of {state['config']['epochs']}): go on with "
                "--resume, replace it with --overwrite, or choose another --out"
            )
    for name in ("last.pt", "best.pt", "metrics.jsonl", "curves.png"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)


def _summary(trainer, memory_at_start):
    history = trainer.history
    final, best = history[-1], trainer.best()
    return {
        "event": "summary",
        "epochs": trainer.epoch,
        "test_accuracy": final["test_accuracy"],
        "test_loss": final["test_loss"],
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "images_per_s": metrics.typical_rate(history),
        "seconds": sum(r["train_seconds"] + r["test_seconds"] for r in history),
        "peak_memory_bytes": metrics.peak_memory(trainer.device),
        "start_memory_bytes": memory_at_start,
    }


def run(config, out, progress, resume=False, overwrite=False, workers=0, tensorboard=False):
    """Train as ``config`` says, write into the directory ``out``, and return the summary record."""
    out = Path(out)
    if tensorboard:
        require("tensorboard", "--tensorboard")
    dataset = data.load(config.data, config.limit_train, workers)
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with use_backend(config.backend, config.mode):
        trainer = Trainer(config, dataset)
        try:
            if resume:
                _resume(trainer, out / "last.pt")
            elif distributed.rank() == 0:
                out.mkdir(parents=True, exist_ok=True)
                _claim(out, overwrite)
        except OSError as exc:
            raise TrainingError(f"cannot use {out} for the results: {exc.strerror or exc}") from exc
        distributed.barrier()
        return _train(trainer, out, progress, tensorboard)


def _header(trainer):
    dataset = trainer.batches.data
    return {
        "event": "header",
        "config": dataclasses.asdict(trainer.config),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "train_images": dataset.train_count,
        "test_images": dataset.test_count,
        "split": dataset.split,
        "device": metrics.device_name(trainer.device),
        "build_info": mnet_kernels.build_info(),
        **metrics.environment(),
    }


def _announce(trainer, header, progress):
    config = trainer.config
    progress.line(
        f"training {config.model} (width {config.width:g}, {header['parameters'] / 1e6:.2f} M parameters) on "
        f"{config.data} ({header['train_images']} images, {header['test_images']} test) at {config.res} px, "
        f"{config.device}, {config.implementation}, amp {config.amp}, seed {config.seed}"
    )
    if data.kind(config.data) == "folder":
        progress.line(f"split: {header['split']}")
    size = trainer.batches.batch_size
    if config.processes * config.accumulate > 1:
        progress.line(
            f"a step: {config.processes} processes x {config.accumulate} accumulated x {size} images = "
            f"{config.processes * config.accumulate * size}; batch statistics over {size}"
        )
    if trainer.epoch:
        progress.line(f"resumed after epoch {trainer.epoch} of {config.epochs}")


class _Files:
    """What a run writes after each epoch and at its end; process 0 alone has one."""

    def __init__(self, trainer, out, header, tensorboard):
        self.trainer, self.out = trainer, out
        records = [header, *trainer.history]
        if trainer.epoch:
            records.append({"event": "resume", "epoch": trainer.epoch})
        self.log = metrics.MetricsFile(out / "metrics.jsonl", records)
        self.board = metrics.TensorBoard(out / "tensorboard", trainer.epoch) if tensorboard else None

    def epoch(self, record, state):
        # The best weights first: an interrupt between the two files then costs nothing, as the epoch is done again.
        if self.trainer.best() is record:
            best = {key: state[key] for key in checkpoint.MODEL_KEYS} | {"model": self.trainer.result.state_dict()}
            checkpoint.save(self.out / "best.pt", {**best, "test_accuracy": record["test_accuracy"]})
        checkpoint.save(self.out / "last.pt", state)
        self.log.append(record)
        if self.board:
            self.board.append(record)

    def finish(self, summary, progress):
        self.log.append(summary)
        config = self.trainer.config
        runs = {config.implementation: self.trainer.history}
        problem = metrics.plot(self.out / "curves.png", runs, data.describe(config))
        if problem:
            progress.line(problem)


def _train(trainer, out, progress, tensorboard):
    config = trainer.config
    header = _header(trainer)
    _announce(trainer, header, progress)
    files = _Files(trainer, out, header, tensorboard) if distributed.rank() == 0 else None
    memory_at_start = metrics.peak_memory(trainer.device)
    while trainer.epoch < config.epochs:
        record = trainer.run_epoch(progress)
        state = trainer.state()
        if files:
            files.epoch(record, state)
        progress.line(
            f"epoch {trainer.epoch:3d}/{config.epochs}  loss {record['train_loss']:.4f}  "
            f"test accuracy {100 * record['test_accuracy']:6.2f} %  {record['images_per_s']:7.1f} images/s"
        )
    summary = _summary(trainer, memory_at_start)
    if files:
        files.finish(summary, progress)
    return summary
