"""Data sets that need no network, their fixed split, and batches with resize, augmentation and normalisation.

The images of these sets stay at their source size in memory; resizing and augmentation run per batch, vectorised over
the batch, on the training device.  All randomness comes from one CPU generator whose state is part of the checkpoint,
so that a resumed run sees the same batches on every device.
"""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

from . import TrainingError, distributed, fashion, require
from .augment import Augment, random_affine, random_erase


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images [N, 1, H, W], float32 in [0, 1] or uint8, at source size, labels [N] int64, and how to treat them."""

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple  # their names
    mean: float
    std: float
    augment: Augment
    split: str  # the rule of the split, in words, for the metrics file

    @property
    def train_count(self):
        return len(self.train_labels)

    @property
    def test_count(self):
        return len(self.test_labels)

    def inputs(self):
        """How an image becomes the network's input, and the classes: what ``predict`` needs of the checkpoint."""
        return {"classes": list(self.classes), "grey": True, "mean": [self.mean], "std": [self.std]}

    def batches(self, config, device, generator):
        """The batches of a run with ``config``."""
        return Batches(
            self, config.res, config.batch_size, device, config.channels_last, generator, config.accumulate,
            config.random_erase,
        )  # fmt: skip


def load_digits():
    """Scanned handwritten digits (UCI optdigits, 1797 images 8x8) that come inside scikit-learn.

    Every fifth image by index is test (360), the others train (1437).  Neighbouring images come from the same writer,
    so both halves hold every writer: the accuracy says how well the network learns, not how it meets a new hand.
    """
    source = require("sklearn.datasets", "the data set 'digits'").load_digits()
    images = torch.from_numpy(source.images).to(torch.float32).div_(16.0)[:, None]  # pixels are counts 0..16
    labels = torch.from_numpy(source.target).to(torch.int64)
    test = torch.arange(len(labels)) % 5 == 0
    train_images = images[~test]
    return Dataset(
        name="digits",
        train_images=train_images,
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        classes=tuple("0123456789"),
        mean=train_images.mean().item(),
        std=train_images.std().item(),
        augment=Augment(degrees=10.0, scale=0.1, shift=0.08),  # no flips: a mirrored digit is another sign
        split="index % 5 == 0 is test",
    )


def load_fashion_mnist(path=None):
    """Fashion-MNIST (60000 training and 10000 test images) from the folder ``path``, or from Debian's package."""
    train_images, train_labels, test_images, test_labels = fashion.read(path)
    pixels = train_images.to(torch.float32).div_(255)
    return Dataset(
        name="fashion-mnist",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=fashion.CLASSES,
        mean=pixels.mean().item(),
        std=pixels.std().item(),
        augment=Augment(scale=0.1, shift=0.08, flip=True),
        split="the files t10k-* are test",
    )


DATASETS = {"digits": load_digits, "fashion-mnist": load_fashion_mnist}
# Settings of the command line that a data set starts from, where they differ from the general ones.
DEFAULTS = {
    "fashion-mnist": {
        "res": 28, "stem_stride": 1, "epochs": 20, "batch_size": 128, "warmup_epochs": 1.0, "weight_decay": 5e-4,
        "label_smoothing": 0.05, "random_erase": 0.25, "ema": 0.998,
    },
    "folder": {"res": 224},
}  # fmt: skip


def kind(spec):
    """Which sort of data ``--data`` names: ``digits``, ``fashion-mnist`` or ``folder``."""
    if spec.startswith("fashion-mnist:"):
        return "fashion-mnist"
    return spec if spec in DATASETS else "folder"


def short_name(spec):
    """A name for directories and titles."""
    return Path(spec).resolve().name if kind(spec) == "folder" else kind(spec)


def describe(config):
    """What a run trains, in words."""
    return f"MobileNet {config.model}, {short_name(config.data)}, {config.res} px, width {config.width:g}"


def load(spec, limit_train=None, workers=0):
    """Load what ``--data`` names: ``digits``, ``fashion-mnist``, ``fashion-mnist:PATH``, or an image folder.

    ``limit_train`` keeps the first N training images (of a folder: N spread evenly over its classes); ``workers``
    processes read a folder's images.
    """
    if kind(spec) == "folder":
        from . import folder

        return folder.load(spec, limit_train, workers)
    data = load_fashion_mnist(spec.partition(":")[2]) if ":" in spec else DATASETS[spec]()
    if limit_train is None:
        return data
    check_limit(spec, limit_train, data.train_count)
    return dataclasses.replace(
        data, train_images=data.train_images[:limit_train], train_labels=data.train_labels[:limit_train]
    )


def check_limit(spec, limit_train, count):
    if limit_train > count:
        raise TrainingError(f"--limit-train {limit_train}: {spec} has {count} training images")


def step_size(batch_size, accumulate, count):
    """Images of one batch of one process: ``batch_size``, or less where all training images are fewer."""
    processes = distributed.count()
    if accumulate * processes == 1:
        return min(batch_size, count)
    if count < batch_size * accumulate * processes:
        raise TrainingError(
            f"{count} training images are too few for one step of {batch_size} (--batch-size) x {accumulate} "
            f"(--accumulate) x {processes} processes: give a smaller --batch-size"
        )
    return batch_size


class Batches:
    """Batches of one data set on one device: ``(images [B, 3, res, res], labels [B])``."""

    def __init__(
        self, data, res, batch_size, device, channels_last, generator, accumulate=1, random_erase=0.0
    ):  # fmt: skip
        self.data = data
        self.res = res
        self.device = device
        self.generator = generator
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.accumulate = accumulate
        self.batch_size = step_size(batch_size, accumulate, data.train_count)
        self.random_erase = random_erase
        self._train = data.train_images.to(device), data.train_labels.to(device)
        self._test = data.test_images.to(device), data.test_labels.to(device)

    @property
    def steps(self):
        """Optimiser steps of one epoch: an incomplete last one is left out (batch norm would weigh it too much)."""
        return self.data.train_count // (self.batch_size * self.accumulate * distributed.count())

    def _finish(self, images, augment):
        if images.dtype == torch.uint8:
            images = images.to(torch.float32).div_(255)
        images = F.interpolate(images, size=(self.res, self.res), mode="bilinear", align_corners=False)
        if augment:
            images = random_affine(images, self.data.augment, self.generator)
        images = images.sub_(self.data.mean).div_(self.data.std)
        if augment and self.random_erase:
            images = random_erase(images, self.random_erase, self.generator)
        return images.expand(-1, 3, -1, -1).contiguous(memory_format=self.layout)

    def train(self):
        """One epoch in a new random order, augmented: ``steps * accumulate`` batches, this process's part of each."""
        images, labels = self._train
        order = torch.randperm(len(labels), generator=self.generator).to(self.device)
        for part in distributed.parts(order, self.steps * self.accumulate, self.batch_size):
            yield self._finish(images[part], augment=True), labels[part]

    def test(self):
        """The test images in order, as they are; of several processes each takes its share of the batches."""
        parts = (tensor.split(self.batch_size)[distributed.rank() :: distributed.count()] for tensor in self._test)
        for images, labels in zip(*parts, strict=True):
            yield self._finish(images, augment=False), labels
