"""Data sets that need no network, their fixed split, and batches with resize, augmentation and normalisation.

Images stay at their source size in memory; resizing and augmentation run per batch, vectorised over the batch, on the
training device.  All randomness comes from one CPU generator whose state is part of the checkpoint, so that a resumed
run sees the same batches on every device.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F

from . import TrainingError, require


@dataclasses.dataclass(frozen=True)
class Augment:
    """Limits of the random affine map of a training image; each image draws its own, uniformly."""

    degrees: float = 0.0  # rotation, +-
    scale: float = 0.0  # zoom factor 1 +- scale
    shift: float = 0.0  # translation as a fraction of the image side, +-


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images [N, 1 or 3, H, W] float32 in [0, 1] at source size, labels [N] int64, and how to treat them."""

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    num_classes: int
    mean: float
    std: float
    augment: Augment
    split: str  # the rule of the split, in words, for the metrics file


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
        num_classes=10,
        mean=train_images.mean().item(),
        std=train_images.std().item(),
        augment=Augment(degrees=10.0, scale=0.1, shift=0.08),  # no flips: a mirrored digit is another sign
        split="index % 5 == 0 is test",
    )


DATASETS = {"digits": load_digits}


def load(name, limit_train=None):
    """Load a data set of :data:`DATASETS`; ``limit_train`` keeps the first N training images."""
    data = DATASETS[name]()
    if limit_train is None:
        return data
    if limit_train > len(data.train_labels):
        raise TrainingError(f"--limit-train {limit_train}: {name} has {len(data.train_labels)} training images")
    return dataclasses.replace(
        data, train_images=data.train_images[:limit_train], train_labels=data.train_labels[:limit_train]
    )


def random_affine(images, augment, generator):
    """Rotate, zoom and shift each image [N, C, H, W] by its own draw; what comes into view is 0 (background)."""
    n = images.shape[0]
    draw = torch.rand(4, n, generator=generator).mul_(2).sub_(1).to(images.device)
    angle = draw[0] * math.radians(augment.degrees)
    zoom = 1 + draw[1] * augment.scale
    # affine_grid maps output to input coordinates in [-1, 1]: the side is 2 long, and zooming in divides.
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    shift = draw[2:] * (2 * augment.shift)
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class Batches:
    """Batches of one data set on one device: ``(images [B, 3, res, res], labels [B])``."""

    def __init__(self, data, res, batch_size, device, channels_last, generator):
        self.data = data
        self.res = res
        self.device = device
        self.generator = generator
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.batch_size = min(batch_size, len(data.train_labels))
        self._train = data.train_images.to(device), data.train_labels.to(device)
        self._test = data.test_images.to(device), data.test_labels.to(device)

    @property
    def steps(self):
        """Training steps of one epoch: an incomplete last batch is left out (batch norm would weigh it too much)."""
        return len(self.data.train_labels) // self.batch_size

    def _finish(self, images, augment):
        images = F.interpolate(images, size=(self.res, self.res), mode="bilinear", align_corners=False)
        if augment:
            images = random_affine(images, self.data.augment, self.generator)
        images = images.sub_(self.data.mean).div_(self.data.std)
        return images.expand(-1, 3, -1, -1).contiguous(memory_format=self.layout)

    def train(self):
        """One epoch in a new random order, augmented."""
        images, labels = self._train
        order = torch.randperm(len(labels), generator=self.generator).to(self.device)
        for step in range(self.steps):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield self._finish(images[index], augment=True), labels[index]

    def test(self):
        """The test images in order, as they are."""
        parts = (tensor.split(self.batch_size) for tensor in self._test)
        for images, labels in zip(*parts, strict=True):
            yield self._finish(images, augment=False), labels
