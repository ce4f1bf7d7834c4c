"""Random changes of training images: affine maps per image, erased boxes, mixed batches.

Everything draws from the one CPU generator whose state is part of the checkpoint, also torchvision's transforms,
which know only torch's global one.
"""

import contextlib
import dataclasses
import math

import torch
import torch.nn.functional as F

from . import require


@dataclasses.dataclass(frozen=True)
class Augment:
    """Limits of the random affine map of a training image; each image draws its own, uniformly."""

    degrees: float = 0.0  # rotation, +-
    scale: float = 0.0  # zoom factor 1 +- scale
    shift: float = 0.0  # translation as a fraction of the image side, +-
    flip: bool = False  # mirrored left to right, every second image


def random_affine(images, augment, generator):
    """Rotate, zoom, shift and flip each image [N, C, H, W] by its own draw; what comes into view is 0 (background)."""
    n = images.shape[0]
    draw = torch.rand(4, n, generator=generator).mul_(2).sub_(1).to(images.device)
    angle = draw[0] * math.radians(augment.degrees)
    zoom = 1 + draw[1] * augment.scale
    # affine_grid maps output to input coordinates in [-1, 1]: the side is 2 long, and zooming in divides.
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    shift = draw[2:] * (2 * augment.shift)
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(n, 2, 3)
    if augment.flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(images.device)
        theta[:, 0] = torch.where(mirrored[:, None], -theta[:, 0], theta[:, 0])
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@contextlib.contextmanager
def drawing_from(generator):
    """Let torch's global CPU generator go on where ``generator`` stands, and give both back afterwards."""
    outside = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(outside)


def random_erase(images, probability, generator):
    """Set a random box of each image [N, C, H, W] to 0 with ``probability``, in place (torchvision's RandomErasing)."""
    erase = require("torchvision.transforms.v2", "--random-erase").RandomErasing(p=probability)
    with drawing_from(generator):
        for image in images:
            changed = erase(image)
            if changed is not image:
                image.copy_(changed)
    return images


def mixer(mixup, cutmix, num_classes, generator):
    """MixUp, CutMix or (both alphas given) one of the two at random for each batch, of torchvision.

    Returns a function from ``(images, labels [N] int64)`` to mixed images and label weights [N, num_classes].
    """
    if not (mixup or cutmix):
        return lambda images, labels: (images, labels)
    v2 = require("torchvision.transforms.v2", "--mixup and --cutmix")
    choices = [kind(alpha=a, num_classes=num_classes) for kind, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a]
    mix = v2.RandomChoice(choices)

    def mixed(images, labels):
        channels_last = images.is_contiguous(memory_format=torch.channels_last)
        with drawing_from(generator):
            images, labels = mix(images, labels)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout), labels

    return mixed
