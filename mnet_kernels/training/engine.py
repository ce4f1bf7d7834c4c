"""Training and evaluating epoch by epoch: one run in memory."""

import dataclasses
import random
import time

import torch
import torch.nn.functional as F

from . import TrainingError, data
from .config import AMP_DTYPES, build_model
from .optim import learning_rate

# Looking at the loss makes a graphics card wait, so there it is done every so many steps (each step on the CPU).
CUDA_CHECK_STEPS = 16


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
