"""A folder of images, one folder a class, as for ImageNet: torchvision's datasets, transforms and torch's loader.

The order of an epoch and one seed for the random transforms of each image are drawn before the epoch, so the batches
do not depend on the number of reading processes.
"""

import dataclasses
from pathlib import Path

import torch

from . import TrainingError, distributed, require
from .augment import drawing_from
from .data import check_limit, step_size

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in torchvision's recipes
TEST_NAMES = ("val", "test")
SPLIT = "index % 5 == 0 within each class (in name order) is test"


def read_image(path, mode="RGB"):
    """The image file as a PIL image in ``mode``; what cannot be read is named."""
    image = require("PIL.Image", "reading images")
    try:
        with image.open(path) as file:
            return file.convert(mode)
    except FileNotFoundError as exc:
        raise TrainingError(f"there is no image {path}") from exc
    except Exception as exc:  # a damaged file shows as any of a dozen types
        raise TrainingError(f"cannot read the image {path}: {exc}; repair or remove it") from exc


def _scan(folder):
    """Classes and ``[(path, class index)]`` of one folder of class folders."""
    datasets = require("torchvision.datasets", "a folder of images")
    try:
        found = datasets.ImageFolder(folder)
    except FileNotFoundError as exc:  # no class folder, or an empty one, which the message names
        raise TrainingError(f"--data {folder}: {exc}; expected: one folder a class with images in it") from exc
    except OSError as exc:
        raise TrainingError(f"cannot read {folder}: {exc.strerror or exc}") from exc
    if len(found.classes) < 2:
        raise TrainingError(f"--data {folder}: only one class ({found.classes[0]}); expected two or more folders")
    return found.classes, found.samples


def _split(samples, classes, folder):
    """Every fifth image of each class is test."""
    train, test = [], []
    for index, name in enumerate(classes):
        own = [sample for sample in samples if sample[1] == index]
        if len(own) < 2:
            raise TrainingError(f"--data {folder}: class {name} has too few images (1): 2 or more are needed to split")
        test += own[::5]
        train += [sample for i, sample in enumerate(own) if i % 5]
    return train, test


@dataclasses.dataclass(frozen=True)
class Folder:
    """Paths and classes of the images; see :class:`~mnet_kernels.training.data.Dataset`."""

    name: str
    train: list
    test: list
    classes: tuple
    split: str
    workers: int

    @property
    def train_count(self):
        return len(self.train)

    @property
    def test_count(self):
        return len(self.test)

    def inputs(self):
        """How an image becomes the network's input, and the classes: what ``predict`` needs of the checkpoint."""
        return {"classes": list(self.classes), "grey": False, "mean": list(MEAN), "std": list(STD)}

    def batches(self, config, device, generator):
        """The batches of a run with ``config``."""
        return FolderBatches(self, config, device, generator)


def load(spec, limit_train=None, workers=0):
    """The images of the folder ``spec``: train/ with val/ or test/, else one set, of which every fifth is test."""
    root = Path(spec)
    if not root.is_dir():
        raise TrainingError(
            f"--data {spec}: there is no such folder; expected digits, fashion-mnist, fashion-mnist:PATH, or a folder "
            "of images (train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg)"
        )
    source = root / "train" if (root / "train").is_dir() else root
    classes, samples = _scan(source)
    held_out = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None) if source != root else None
    if held_out is None:
        train, test = _split(samples, classes, source)
    else:
        test_classes, test = _scan(held_out)
        if test_classes != classes:
            names = ", ".join(sorted(set(classes) ^ set(test_classes)))
            raise TrainingError(f"--data {spec}: train/ and {held_out.name}/ have different classes: {names}")
        train = samples
    if len(train) < 2:
        raise TrainingError(f"--data {spec}: too few images ({len(train)} to train on): 2 or more are needed")
    if limit_train is not None:
        check_limit(spec, limit_train, len(train))
        train = [train[i * len(train) // limit_train] for i in range(limit_train)]
    split = SPLIT if held_out is None else f"{held_out.name}/ is test"
    return Folder(root.resolve().name, train, test, tuple(classes), split, workers)


def eval_transform(res):
    """Shorter side to 8/7 of ``res``, the middle of it, normalised: torchvision's evaluation at 256 and 224."""
    v2 = require("torchvision.transforms.v2", "a folder of images")
    return v2.Compose([v2.Resize(round(res * 8 / 7)), v2.CenterCrop(res), *_to_input(v2)])


def _train_transform(res, random_erase):
    v2 = require("torchvision.transforms.v2", "a folder of images")
    steps = [v2.RandomResizedCrop(res), v2.RandomHorizontalFlip(), *_to_input(v2)]
    return v2.Compose(steps + [v2.RandomErasing(p=random_erase)] * (random_erase > 0))


def _to_input(v2):
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]


class _Items(torch.utils.data.Dataset):
    """Item ``(index, seed)``: the transformed image and its label, or the error: a worker's raise hides it."""

    def __init__(self, samples, transform):
        self.samples, self.transform = samples, transform

    def __getitem__(self, item):
        index, seed = item
        path, label = self.samples[index]
        try:
            with drawing_from(torch.Generator().manual_seed(seed)):
                return self.transform(read_image(path)), label
        except TrainingError as exc:
            return exc


def _collate(items):
    for item in items:
        if isinstance(item, TrainingError):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


class FolderBatches:
    """Batches of a :class:`Folder`; see :class:`~mnet_kernels.training.data.Batches`."""

    def __init__(self, data, config, device, generator):
        self.data = data
        self.device = device
        self.generator = generator
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.accumulate = config.accumulate
        self.batch_size = step_size(config.batch_size, config.accumulate, data.train_count)
        self._train = _Items(data.train, _train_transform(config.res, config.random_erase))
        self._test = _Items(data.test, eval_transform(config.res))

    @property
    def steps(self):
        """Optimiser steps of one epoch: an incomplete last one is left out (batch norm would weigh it too much)."""
        return self.data.train_count // (self.batch_size * self.accumulate * distributed.count())

    def _load(self, items, batches):
        loader = torch.utils.data.DataLoader(
            items, batch_sampler=batches, num_workers=self.data.workers, collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # seeds of the workers, which nothing uses: the global one stays as it is
        )  # fmt: skip
        for batch in loader:
            if isinstance(batch, TrainingError):
                raise batch
            images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            yield images.contiguous(memory_format=self.layout), labels

    def train(self):
        """One epoch in a new random order, augmented."""
        count = self.data.train_count
        order = torch.randperm(count, generator=self.generator)
        seeds = torch.randint(2**62, (count,), generator=self.generator)
        batches = distributed.parts(order, self.steps * self.accumulate, self.batch_size)
        yield from self._load(self._train, [[(i, int(seeds[i])) for i in part.tolist()] for part in batches])

    def test(self):
        """The test images in order; of several processes each takes its share of the batches."""
        batches = [list(part) for part in torch.arange(self.data.test_count).split(self.batch_size)]
        mine = batches[distributed.rank() :: distributed.count()]
        yield from self._load(self._test, [[(int(i), 0) for i in part] for part in mine])
