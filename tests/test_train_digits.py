"""The digits and what is done to images: split, resizing, augmentation."""

import dataclasses

import pytest
import torch

pytest.importorskip("sklearn")

from mnet_kernels.training import TrainingError, data

# ---- data ---------------------------------------------------------------------------------------------------------


def test_digits_are_real_and_split_by_index():
    from sklearn.datasets import load_digits

    source = load_digits()
    digits = data.load("digits")
    assert digits.train_images.shape == (1437, 1, 8, 8) and digits.test_images.shape == (360, 1, 8, 8)
    rebuilt = torch.empty(1797, 8, 8)
    labels = torch.empty(1797, dtype=torch.int64)
    test = torch.arange(1797) % 5 == 0
    rebuilt[test], rebuilt[~test] = digits.test_images[:, 0], digits.train_images[:, 0]
    labels[test], labels[~test] = digits.test_labels, digits.train_labels
    # Every image of the source exactly once, with its own label: the two halves are disjoint and complete.
    assert torch.equal(rebuilt, torch.from_numpy(source.images).float() / 16)
    assert torch.equal(labels, torch.from_numpy(source.target))
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.test_labels.bincount(minlength=10).min() >= 25
    assert digits.mean == pytest.approx(digits.train_images.mean().item())


def test_limit_train_takes_the_first_and_keeps_the_test_set():
    whole, part = data.load("digits"), data.load("digits", 50)
    assert torch.equal(part.train_images, whole.train_images[:50])
    assert torch.equal(part.test_images, whole.test_images)
    with pytest.raises(TrainingError, match="has 1437"):
        data.load("digits", 1438)


def test_batches_cover_an_epoch_without_repeats_and_are_normalised():
    digits = data.load("digits", 100)
    digits = dataclasses.replace(digits, train_labels=torch.arange(100), augment=data.Augment())
    batches = data.Batches(digits, 32, 30, torch.device("cpu"), True, torch.Generator().manual_seed(3))
    epochs = [list(batches.train()) for _ in range(2)]
    orders = [torch.cat([labels for _, labels in epoch]) for epoch in epochs]
    for order in orders:
        assert len(order) == 90 == len(order.unique())
    assert not torch.equal(*orders)
    images, labels = epochs[0][0]
    assert images.shape == (30, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)
    wanted = torch.nn.functional.interpolate(digits.train_images[labels], size=(32, 32), mode="bilinear")
    wanted = ((wanted - digits.mean) / digits.std).expand(-1, 3, -1, -1)
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-5)
    test = torch.cat([images for images, _ in batches.test()])
    assert len(test) == 360 and abs(test.mean().item()) < 0.05 and abs(test.std().item() - 1) < 0.2  # enlarging smooths


def blob(row, column, side=64):
    """One image [1, 1, side, side] with a soft spot at pixel (row, column)."""
    axis = torch.arange(side, dtype=torch.float32)
    image = torch.exp(-((axis[:, None] - row) ** 2 + (axis - column) ** 2) / 8)
    return image[None, None]


def centre(image):
    """Centre of mass (row, column) relative to the image's middle, and the mass."""
    axis = torch.arange(image.shape[-1], dtype=torch.float32) - (image.shape[-1] - 1) / 2
    mass = image.sum()
    return (image.sum(-1) * axis).sum().item() / mass.item(), (image.sum(-2) * axis).sum().item() / mass.item(), mass


def test_augmentation_is_the_affine_map_it_says():
    def apply(image, count=200, **limits):
        generator = torch.Generator().manual_seed(0)
        return data.random_affine(image.expand(count, -1, -1, -1), data.Augment(**limits), generator)

    spot = blob(31.5, 51.5)  # 20 pixels right of the middle
    torch.testing.assert_close(apply(spot, 1), spot, rtol=0, atol=1e-5)
    shifted = [centre(image) for image in apply(spot, shift=0.1)[:, 0]]
    for values, middle in (([r for r, _, _ in shifted], 0), ([c for _, c, _ in shifted], 20)):
        assert middle - 6.5 < min(values) < middle - 5.5 and middle + 5.5 < max(values) < middle + 6.5
    rotated = [centre(image) for image in apply(spot, degrees=30)[:, 0]]
    assert all(abs((r * r + c * c) ** 0.5 - 20) < 0.2 for r, c, _ in rotated)
    assert -10.2 < min(r for r, _, _ in rotated) < -9.5 and 9.5 < max(r for r, _, _ in rotated) < 10.2
    mass = centre(spot[0])[2]
    zooms = [(c / 20, (m / mass).item()) for _, c, m in (centre(image) for image in apply(spot, scale=0.2)[:, 0])]
    assert 0.79 < min(zooms)[0] < 0.82 and 1.18 < max(zooms)[0] < 1.21
    assert all(area == pytest.approx(side**2, rel=0.03) for side, area in zooms)
