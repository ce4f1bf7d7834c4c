"""The training run: model, optimiser, schedule, epochs, resuming, and the files that it writes."""

import dataclasses
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import mnet_kernels
from mnet_kernels import choice
from mnet_kernels.models import MODELS

from . import TrainingError, checkpoint, data, metrics

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Looking at the loss makes a graphics card wait, so there it is done every so many steps (each step on the CPU).
CUDA_CHECK_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the course of a run: two runs with equal configurations are the same run."""

    model: str
    data: str
    width: float
    stem_stride: int
    res: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    clip_grad: float
    warmup_epochs: float
    seed: int
    amp: str
    channels_last: bool
    backend: str
    mode: str
    limit_train: int | None
    device: str  # cpu or cuda
    implementation: str  # what backend and mode came to here: native, or backend/mode


def build_model(name, num_classes, width, stem_stride=2):
    """A model of :data:`~mnet_kernels.models.MODELS` with fresh weights from torch's global generator."""
    return MODELS[name](num_classes=num_classes, width_mult=width, stem_stride=stem_stride)


def implementation(backend, mode, device, amp):
    """What a choice of backend and mode (``auto``: left to the environment and the package) comes to, in words."""
    with use_backend(backend, mode):
        try:
            found = choice.choose(torch.device(device), AMP_DTYPES[amp] or torch.float32, expands=True)
        except choice.BackendUnavailableError as exc:
            raise TrainingError(str(exc)) from exc
    return found.backend if found.mode is None else f"{found.backend}/{found.mode}"


def use_backend(backend, mode):
    """The context of a choice on the command line, where ``auto`` does not overrule MNET_BACKEND and MNET_MODE."""
    return mnet_kernels.backend(*(None if name == "auto" else name for name in (backend, mode)))


def learning_rate(config, step, steps_per_epoch):
    """Linear warm-up, then a half cosine down to 0; ``step`` counts from 0 over the whole run."""
    warmup = min(round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / (config.epochs * steps_per_epoch - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


class Trainer:
    """One run in memory: trains and evaluates epoch by epoch, and can be saved and restored between epochs."""

    def __init__(self, config, dataset):
        self.config = config
        self.device = torch.device(config.device)
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        # Order and augmentation have a generator of their own, so that they do not depend on how many numbers the
        # model draws.  Another seed, too: with the same one both would start from the same numbers.
        self.generator = torch.Generator().manual_seed(config.seed ^ 0x5EED)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = build_model(config.model, dataset.num_classes, config.width, config.stem_stride)
        self.model.to(device=self.device, memory_format=layout)
        self.batches = data.Batches(
            dataset, config.res, config.batch_size, self.device, config.channels_last, self.generator
        )
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},  # batch norm and biases
        ]
        self.optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps
        self.history = []  # one record per finished epoch

    def _autocast(self):
        dtype = AMP_DTYPES[self.config.amp]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _diverged(self, what, step, lr):
        amp = self.config.amp
        if self.scaler.is_enabled():
            amp += f", loss scale {self.scaler.get_scale():g}"
        advice = "try a smaller --lr" + ("" if amp == "off" else ", or --amp off")
        last = f"the checkpoint of epoch {self.epoch} is untouched" if self.epoch else "no checkpoint was written"
        return TrainingError(
            f"{what} in epoch {self.epoch + 1}, step {step + 1} of {self.batches.steps} "
            f"(lr {lr:.3g}, amp {amp}); {advice}; {last}"
        )

    def _check_losses(self, losses, start, stop):
        """Raise for the first loss in ``losses[start:stop]`` (one per step of the epoch) that is NaN or infinite."""
        bad = (~torch.isfinite(losses[start:stop])).nonzero()
        if len(bad):
            step = start + int(bad[0])
            lr = learning_rate(self.config, self.step - (stop - 1 - step), self.batches.steps)
            raise self._diverged(f"the loss became {losses[step].item()}", step, lr)

    def train_epoch(self, progress):
        """Train one epoch; returns mean loss, seconds and images/s (waiting for the device included)."""
        self.model.train()
        steps = self.batches.steps
        losses = torch.zeros(steps, device=self.device)
        stride = CUDA_CHECK_STEPS if self.device.type == "cuda" else 1
        checked = 0
        self._synchronize()
        start = time.perf_counter()
        for i, (images, labels) in enumerate(progress.steps(self.batches.train(), steps, f"epoch {self.epoch + 1}")):
            lr = learning_rate(self.config, self.step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            with self._autocast():
                logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
            losses[i] = loss.detach()
            if (i + 1) % stride == 0 or i + 1 == steps:
                self._check_losses(losses, checked, i + 1)
                checked = i + 1
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            if self.config.clip_grad:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.step += 1
        self._synchronize()
        seconds = time.perf_counter() - start
        return {
            "lr": lr,
            "train_loss": losses.mean().item(),
            "train_seconds": seconds,
            "images_per_s": steps * self.batches.batch_size / seconds,
        }

    @torch.no_grad()
    def evaluate(self):
        """Loss (without smoothing) and accuracy on the whole test set, with the running statistics."""
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        start = time.perf_counter()
        for images, labels in self.batches.test():
            with self._autocast():
                logits = self.model(images).float()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            right += (logits.argmax(1) == labels).sum()
        count = len(self.batches.data.test_labels)
        record = {"test_loss": loss.item() / count, "test_accuracy": right.item() / count}
        return {**record, "test_seconds": time.perf_counter() - start}

    def _check_weights(self):
        """Raise when the weights are not finite: the last step of an epoch can break them after a finite loss."""
        tensors = [t for t in self.model.state_dict().values() if t.is_floating_point()]
        if not torch.stack([t.isfinite().all() for t in tensors]).all():
            lr = learning_rate(self.config, self.step - 1, self.batches.steps)
            raise self._diverged("weights became NaN or infinite", self.batches.steps - 1, lr)

    def run_epoch(self, progress):
        """Train and evaluate one epoch and append its record to the history."""
        trained = self.train_epoch(progress)
        self._check_weights()
        record = {"event": "epoch", "epoch": self.epoch + 1, **trained, **self.evaluate()}
        self.epoch += 1
        self.history.append(record)
        return record

    def best(self):
        """The record with the highest test accuracy, the earliest of equals."""
        return max(self.history, key=lambda record: record["test_accuracy"])

    def state(self):
        """Everything that the next epoch depends on, as tensors and plain values."""
        rng = {"torch": torch.get_rng_state(), "python": random.getstate(), "data": self.generator.get_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,  # with the configuration, the whole state of the schedule
            "rng": rng,
            "history": self.history,
            "config": dataclasses.asdict(self.config),
        }

    def restore(self, state):
        """Go back to what :meth:`state` described."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], list(state["history"])
        rng = state["rng"]
        random.setstate(rng["python"])
        torch.set_rng_state(rng["torch"])
        self.generator.set_state(rng["data"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)


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


def run(config, out, progress, resume=False, overwrite=False):
    """Train as ``config`` says, write into the directory ``out``, and return the summary record."""
    out = Path(out)
    dataset = data.load(config.data, config.limit_train)
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with use_backend(config.backend, config.mode):
        trainer = Trainer(config, dataset)
        try:
            if resume:
                _resume(trainer, out / "last.pt")
            else:
                out.mkdir(parents=True, exist_ok=True)
                _claim(out, overwrite)
        except OSError as exc:
            raise TrainingError(f"cannot use {out} for the results: {exc.strerror or exc}") from exc
        return _train(trainer, out, progress)


def _train(trainer, out, progress):
    config = trainer.config
    header = {
        "event": "header",
        "config": dataclasses.asdict(config),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "train_images": len(trainer.batches.data.train_labels),
        "test_images": len(trainer.batches.data.test_labels),
        "split": trainer.batches.data.split,
        "device": metrics.device_name(trainer.device),
        "build_info": mnet_kernels.build_info(),
        **metrics.environment(),
    }
    progress.line(
        f"training {config.model} (width {config.width:g}, {header['parameters'] / 1e6:.2f} M parameters) on "
        f"{config.data} ({header['train_images']} images, {header['test_images']} test) at {config.res} px, "
        f"{config.device}, {config.implementation}, amp {config.amp}, seed {config.seed}"
    )
    records = [header, *trainer.history]
    if trainer.epoch:
        records.append({"event": "resume", "epoch": trainer.epoch})
        progress.line(f"resumed after epoch {trainer.epoch} of {config.epochs}")
    log = metrics.MetricsFile(out / "metrics.jsonl", records)
    memory_at_start = metrics.peak_memory(trainer.device)
    while trainer.epoch < config.epochs:
        record = trainer.run_epoch(progress)
        # The best weights first: an interrupt between the two files then costs nothing, as the epoch is done again.
        if trainer.best() is record:
            best = {"model": trainer.model.state_dict(), "epoch": trainer.epoch, "config": dataclasses.asdict(config)}
            checkpoint.save(out / "best.pt", {**best, "test_accuracy": record["test_accuracy"]})
        checkpoint.save(out / "last.pt", trainer.state())
        log.append(record)
        progress.line(
            f"epoch {trainer.epoch:3d}/{config.epochs}  loss {record['train_loss']:.4f}  "
            f"test accuracy {100 * record['test_accuracy']:6.2f} %  {record['images_per_s']:7.1f} images/s"
        )
    summary = _summary(trainer, memory_at_start)
    log.append(summary)
    title = f"MobileNet {config.model}, {config.data}, {config.res} px, width {config.width:g}"
    problem = metrics.plot(out / "curves.png", trainer.history, title)
    if problem:
        progress.line(problem)
    return summary
