"""Fashion-MNIST from its four idx files: 70000 photographs of clothing, 28x28, grey."""

import gzip
import math
import zlib
from pathlib import Path

import torch

from . import TrainingError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
HELP = (
    "install Debian's package dataset-fashion-mnist, or give --data fashion-mnist:PATH with the folder of "
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (.gz or not)"
)


def read_idx(path, ndim):
    """One idx file of bytes, gzipped if its name ends in .gz, as a uint8 tensor of ``ndim`` dimensions.

    Layout: bytes 0 0, the type (8: unsigned byte), the number of dimensions, each size as big-endian 32 bits, the data.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as exc:
        raise TrainingError(f"cannot read {path}: {getattr(exc, 'strerror', None) or exc}; copy it anew") from exc
    head = 4 + 4 * ndim
    if content[:4] != bytes((0, 0, 8, ndim)) or len(content) < head:
        raise TrainingError(f"{path} is no idx file of unsigned bytes with {ndim} dimensions; copy it anew")
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim)]
    if len(content) - head != math.prod(sizes):
        raise TrainingError(f"{path} holds {len(content) - head} bytes of data, its header says {sizes}; copy it anew")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=head).view(sizes)


def _find(folder, name):
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise TrainingError(f"Fashion-MNIST: {folder} has no {name}(.gz); {HELP}")


def read(path=None):
    """``(train images [N, 1, 28, 28] uint8, train labels [N] int64, test images, test labels)``.

    ``path`` is the folder of the four files, or the root of torchvision's own copy; None is Debian's package.
    """
    folder = DEBIAN if path is None else Path(path)
    if not folder.is_dir():
        raise TrainingError(f"Fashion-MNIST: there is no folder {folder}; {HELP}")
    if (folder / "FashionMNIST" / "raw").is_dir():
        folder = folder / "FashionMNIST" / "raw"
    found = []
    for part in ("train", "t10k"):
        images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), 3)
        labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), 1).long()
        if len(images) != len(labels) or len(labels) == 0:
            raise TrainingError(f"{folder}: {part} has {len(images)} images and {len(labels)} labels; copy it anew")
        if labels.max() >= len(CLASSES):
            raise TrainingError(f"{folder}: {part} has a label {int(labels.max())}, expected 0 to {len(CLASSES) - 1}")
        found += [images[:, None], labels]
    return found
