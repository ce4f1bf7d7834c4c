"""Training and evaluating epoch by epoch: one run in memory."""

import contextlib
import dataclasses
import random
import time

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from . import TrainingError, augment, distributed
from .config import AMP_DTYPES, build_model
from .optim import build_ema, build_optimizer, learning_rate

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
        self.model = build_model(config.model, len(dataset.classes), config.width, config.stem_stride)
        self.model.to(device=self.device, memory_format=layout)
        self.batches = dataset.batches(config, self.device, self.generator)
        self.mix = augment.mixer(config.mixup, config.cutmix, len(dataset.classes), self.generator)
        self.optimizer = build_optimizer(self.model, config)
        self.ema = build_ema(self.model, config.ema)
        self.parallel = DistributedDataParallel(self.model) if distributed.count() > 1 else None
        self.network = self._compiled(self.parallel or self.model)  # what training calls
        # The same weights in every process; from here on each draws its own dropout.
        if distributed.rank():
            torch.manual_seed(config.seed + distributed.rank())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps
        self.history = []  # one record per finished epoch

    def _compiled(self, network):
        name = self.config.compile
        if name == "off":
            return network
        known = torch._dynamo.list_backends(exclude_tags=())
        if name not in known:
            raise TrainingError(f"--compile {name}: torch.compile has no such backend; it has {', '.join(known)}")
        return torch.compile(network, backend=name)

    def _forward(self, images):
        try:
            with self._autocast():
                return self.network(images)
        except RuntimeError as exc:
            if self.config.compile != "off" and isinstance(exc, torch._dynamo.exc.TorchDynamoException):
                reason = str(exc).partition("\n")[0]
                raise TrainingError(f"--compile {self.config.compile} failed: {reason}; leave --compile out") from exc
            raise

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
        """Raise for the first loss in ``losses[start:stop]`` (one per batch of the epoch) that is NaN or infinite."""
        bad = (~torch.isfinite(losses[start:stop])).nonzero()
        if len(bad):
            batch = start + int(bad[0])
            step = batch // self.config.accumulate
            lr = learning_rate(self.config, self.epoch * self.batches.steps + step, self.batches.steps)
            raise self._diverged(f"the loss became {losses[batch].item()}", step, lr)

    def _update(self):
        """One step of the optimiser with the gradients gathered so far."""
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1

    def train_epoch(self, progress):
        """Train one epoch; returns mean loss, seconds and images/s (waiting for the device included)."""
        self.model.train()
        accumulate = self.config.accumulate
        count = self.batches.steps * accumulate
        losses = torch.zeros(count, device=self.device)
        stride = CUDA_CHECK_STEPS if self.device.type == "cuda" else 1
        checked = 0
        self._synchronize()
        start = time.perf_counter()
        for i, batch in enumerate(progress.steps(self.batches.train(), count, f"epoch {self.epoch + 1}")):
            images, labels = self.mix(*batch)
            last = (i + 1) % accumulate == 0
            if i % accumulate == 0:
                lr = learning_rate(self.config, self.step, self.batches.steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self.optimizer.zero_grad(set_to_none=True)
            # The processes exchange gradients once a step.
            with contextlib.nullcontext() if last or self.parallel is None else self.parallel.no_sync():
                logits = self._forward(images)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
                losses[i] = loss.detach()
                if (i + 1) % stride == 0 or i + 1 == count:
                    self._check_losses(losses, checked, i + 1)
                    checked = i + 1
                self.scaler.scale(loss / accumulate).backward()
            if last:
                self._update()
        self._synchronize()
        seconds = time.perf_counter() - start
        return {
            "lr": lr,
            "train_loss": distributed.total(losses.mean()).item() / distributed.count(),
            "train_seconds": seconds,
            "images_per_s": count * self.batches.batch_size * distributed.count() / seconds,
        }

    @property
    def result(self):
        """The model that a run delivers: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema.module

    @torch.no_grad()
    def score(self, model):
        """Loss (without smoothing), and right answers and images of each class, over the whole test set."""
        model.eval()
        distributed.share(model.buffers())
        classes = len(self.batches.data.classes)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right, count = torch.zeros(2, classes, dtype=torch.int64, device=self.device)
        for images, labels in self.batches.test():
            with self._autocast():
                logits = model(images).float()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            right += torch.bincount(labels[logits.argmax(1) == labels], minlength=classes)
            count += torch.bincount(labels, minlength=classes)
        right, count = distributed.total(right), distributed.total(count)
        return distributed.total(loss).item() / count.sum().item(), right, count

    def evaluate(self):
        """Loss and accuracy on the test set, with the running statistics; with averaged weights both are given."""
        start = time.perf_counter()
        record = {}
        for prefix, model in (("", self.result), *([("raw_", self.model)] if self.ema is not None else [])):
            loss, right, count = self.score(model)
            record |= {f"{prefix}test_loss": loss, f"{prefix}test_accuracy": right.sum().item() / count.sum().item()}
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
        """Everything that the next epoch depends on, as tensors and plain values; called in every process."""
        own = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,  # with the configuration, the whole state of the schedule
            "rng": {"data": self.generator.get_state(), "processes": distributed.gather(own)},
            "history": self.history,
            "config": dataclasses.asdict(self.config),
            "inputs": self.batches.data.inputs(),
        }

    def restore(self, state):
        """Go back to what :meth:`state` described."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], list(state["history"])
        self.generator.set_state(state["rng"]["data"])
        own = state["rng"]["processes"][distributed.rank()]
        random.setstate(own["python"])
        torch.set_rng_state(own["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], self.device)
