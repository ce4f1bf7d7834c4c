"""Image sets of ``python -m mnet_kernels.train``: Fashion-MNIST's idx files and folders of images."""

import gzip
import shutil

import pytest
import torch

pytest.importorskip("torchvision")
from PIL import Image
from train_runs import history, interrupt, last, make_config, same

from mnet_kernels import train
from mnet_kernels.training import TrainingError, data, fashion, folder, options

TINY = ["--width", "0.1", "--res", "32", "--batch-size", "8", "--epochs", "2", "--device", "cpu", "--workers", "0"]


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = header + array.numpy().tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx(tmp_path):
    """A folder like Fashion-MNIST's, of 48 and 16 random images: two files gzipped, two not."""
    for part, count, suffix in (("train", 48, ".gz"), ("t10k", 16, "")):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", torch.randint(256, (count, 28, 28)).to(torch.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", (torch.arange(count) % 10).to(torch.uint8))
    return tmp_path


def test_fashion_mnist_is_what_torchvision_reads(idx, tmp_path):
    from torchvision.datasets import FashionMNIST

    raw = tmp_path / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in idx.glob("*-ubyte*"):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (raw / path.name.removesuffix(".gz")).write_bytes(content)
    found = data.load(f"fashion-mnist:{idx}")
    assert data.load(f"fashion-mnist:{tmp_path / 'root'}").train_images.equal(found.train_images)
    for part, images, labels in (
        (True, found.train_images, found.train_labels),
        (False, found.test_images, found.test_labels),
    ):
        source = FashionMNIST(tmp_path / "root", train=part)
        assert torch.equal(images[:, 0], source.data) and torch.equal(labels, source.targets)
    assert list(found.classes) == source.classes
    pixels = found.train_images.double() / 255
    assert found.mean == pytest.approx(pixels.mean().item()) and found.std == pytest.approx(pixels.std().item())


def test_fashion_mnist_test_images_stay_as_they_are(idx):
    found = data.load(f"fashion-mnist:{idx}")
    before = found.test_images.clone()
    batches = data.Batches(found, 28, 8, torch.device("cpu"), False, torch.Generator())
    for _ in range(2):
        images = torch.cat([images for images, _ in batches.test()])
        wanted = (before / 255 - found.mean) / found.std
        torch.testing.assert_close(images, wanted.expand(-1, 3, -1, -1), rtol=0, atol=1e-5)


def test_fashion_mnist_has_its_own_defaults(idx):
    args = options.parse(["--data", f"fashion-mnist:{idx}", "--epochs", "3"])
    assert (args.res, args.stem_stride, args.epochs, args.width, args.model) == (28, 1, 3, 1.0, "v2")
    assert options.parse([]).res == 64 and options.parse([]).ema == 0
    out = idx / "run"
    assert train.main([*TINY, "--data", f"fashion-mnist:{idx}", "--out", str(out)]) == 0
    assert last(out)["inputs"]["classes"] == list(fashion.CLASSES)


def test_fashion_mnist_is_real_where_it_is_installed():
    if not fashion.DEBIAN.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    found = data.load("fashion-mnist")
    assert found.train_labels.bincount().tolist() == [6000] * 10
    assert found.test_labels.bincount().tolist() == [1000] * 10
    assert found.mean == pytest.approx(0.2860, abs=1e-4) and found.std == pytest.approx(0.3530, abs=1e-4)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def fewer_labels(path):
    write_idx(path.with_name("t10k-labels-idx1-ubyte"), torch.zeros(3, dtype=torch.uint8))


def wrong_label(path):
    write_idx(path.with_name("t10k-labels-idx1-ubyte"), torch.full((16,), 10, dtype=torch.uint8))


@pytest.mark.parametrize(
    "name, action, message",
    [
        ("train-labels-idx1-ubyte.gz", lambda path: path.unlink(), "has no train-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte.gz", shorten, "cannot read .*train-images-idx3-ubyte.gz"),
        ("train-images-idx3-ubyte.gz", lambda path: path.write_bytes(b"x"), "cannot read .*train-images"),
        ("t10k-images-idx3-ubyte", shorten, r"header says \[16, 28, 28\]"),
        ("t10k-images-idx3-ubyte", lambda path: path.write_bytes(b"<html>"), "no idx file"),
        ("t10k-images-idx3-ubyte", fewer_labels, "16 images and 3 labels"),
        ("t10k-images-idx3-ubyte", wrong_label, "a label 10"),
    ],
)
def test_damaged_fashion_mnist(idx, name, action, message):
    action(idx / name)
    with pytest.raises(TrainingError, match=message):
        data.load(f"fashion-mnist:{idx}")


def test_missing_fashion_mnist(tmp_path, capsys):
    assert train.main(["--data", f"fashion-mnist:{tmp_path / 'none'}", "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: Fashion-MNIST: there is no folder") and "dataset-fashion-mnist" in message


# ---- folders --------------------------------------------------------------------------------------------------------


def write_images(root, counts):
    """Random photographs of different sizes: ``counts[class]`` each."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(256, (36 + i, 48, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


def test_folder_without_a_split_holds_out_every_fifth(tmp_path):
    found = data.load(str(write_images(tmp_path / "photos", {"b": 6, "a": 11})))
    assert found.classes == ("a", "b") and found.name == "photos"
    names = [(path[-8:], label) for path, label in found.test]
    assert names == [("a/00.png", 0), ("a/05.png", 0), ("a/10.png", 0), ("b/00.png", 1), ("b/05.png", 1)]
    assert len(found.train) == 12 and not set(found.train) & set(found.test)
    half = data.load(str(tmp_path / "photos"), limit_train=6)
    assert sorted(label for _, label in half.train) == [0, 0, 0, 0, 1, 1] and half.test == found.test


@pytest.mark.parametrize("name", ["val", "test"])
def test_folder_with_a_split(tmp_path, name):
    write_images(tmp_path / "train", {"a": 3, "b": 4})
    write_images(tmp_path / name, {"a": 2, "b": 1})
    found = data.load(str(tmp_path))
    assert (found.train_count, found.test_count, found.split) == (7, 3, f"{name}/ is test")


def batches(root, workers, **changes):
    config = make_config(data=str(root), res=32, batch_size=4, **changes)
    return data.load(str(root), None, workers).batches(config, torch.device("cpu"), torch.Generator().manual_seed(5))


def test_folder_batches_do_not_depend_on_the_workers(tmp_path):
    root = write_images(tmp_path / "photos", {"a": 8, "b": 8})
    outside = torch.get_rng_state()
    alone, helped = batches(root, 0, random_erase=0.5), batches(root, 2, random_erase=0.5)
    one = [list(alone.train()) for _ in range(2)]
    two = [list(helped.train()) for _ in range(2)]
    assert same(one, two) and not same(one[0], one[1])
    assert torch.equal(torch.get_rng_state(), outside)
    assert len(one[0]) == alone.steps == 3
    images, _ = one[0][0]
    assert images.shape == (4, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)


def test_folder_test_images_are_torchvisions_evaluation(tmp_path):
    from torchvision.transforms import v2

    root = write_images(tmp_path / "photos", {"a": 6, "b": 6})
    found = torch.cat([images for images, _ in batches(root, 0).test()])
    middle = v2.Compose([v2.Resize(37), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    paths = [path for path, _ in data.load(str(root)).test]
    wanted = torch.stack([middle(Image.open(path).convert("RGB")) for path in paths])
    mean, std = torch.tensor(folder.MEAN).view(3, 1, 1), torch.tensor(folder.STD).view(3, 1, 1)
    torch.testing.assert_close(found, (wanted - mean) / std, rtol=0, atol=1e-5)


def test_folder_run_resumes_exactly(tmp_path, monkeypatch):
    root = write_images(tmp_path / "photos", {"a": 12, "b": 12})
    settings = [*TINY, "--data", str(root), "--mixup", "0.2"]
    assert train.main([*settings, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        original, calls = folder.FolderBatches.train, []

        def breaking(self):
            calls.append(None)
            for images, labels in original(self):
                yield interrupt(images) if len(calls) == 2 else images, labels

        patch.setattr(folder.FolderBatches, "train", breaking)
        assert train.main([*settings, "--out", str(tmp_path / "parts")]) == 130
    assert train.main([*settings, "--out", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (last(tmp_path / name) for name in ("whole", "parts"))
    assert same(whole["model"], parts["model"]) and same(whole["rng"], parts["rng"])
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


def no_folder(root):
    shutil.rmtree(root)


def empty_class(root):
    (root / "c").mkdir()


def one_image(root):
    write_images(root, {"c": 1})


def one_class(root):
    shutil.rmtree(root / "b")


def other_classes(root):
    (root / "train").mkdir()
    for name in ("a", "b"):
        (root / name).rename(root / "train" / name)
    write_images(root / "val", {"a": 1, "z": 1})


def corrupt(root):
    (root / "b" / "03.png").write_bytes((root / "b" / "03.png").read_bytes()[:200])


@pytest.mark.parametrize(
    "action, message",
    [
        (no_folder, "there is no such folder; expected digits, fashion-mnist"),
        (empty_class, "for the classes c"),
        (one_image, "class c has too few images (1)"),
        (one_class, "only one class (a)"),
        (other_classes, "train/ and val/ have different classes: b, z"),
        (corrupt, "03.png: "),
    ],
)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_folder(tmp_path, capsys, action, message, workers):
    root = write_images(tmp_path / "photos", {"a": 6, "b": 6})
    action(root)
    assert train.main([*TINY, "--workers", workers, "--data", str(root), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert "Traceback" not in error
