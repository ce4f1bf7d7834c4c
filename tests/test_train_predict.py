"""``evaluate`` and ``predict`` of ``python -m mnet_kernels.train``."""

import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
from PIL import Image
from train_runs import break_batches, history, interrupt, run

from mnet_kernels import train
from mnet_kernels.training import data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert run(out, "--ema", "0.5") == 0
    return out


def use(capsys, *options):
    capsys.readouterr()
    code = train.main([*map(str, options), "--device", "cpu"])
    return code, capsys.readouterr()


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_evaluate_gives_the_accuracy_of_the_run(finished, capsys, name):
    code, shown = use(capsys, "evaluate", finished / name)
    lines = shown.out.splitlines()
    records = history(finished)
    wanted = max(r["test_accuracy"] for r in records) if name == "best.pt" else records[-1]["test_accuracy"]
    assert code == 0 and lines[0].split() == ["class", "images", "accuracy"]
    assert lines[-1].startswith(f"test accuracy {100 * wanted:.2f} %, loss ") and "360 images of digits" in lines[-1]
    rows = [re.fullmatch(r"(\d) +(\d+) +([\d.]+) %", line).groups() for line in lines[1:-1]]
    assert [name for name, _, _ in rows] == list("0123456789")
    assert sum(int(count) for _, count, _ in rows) == 360
    assert sum(int(n) * float(p) for _, n, p in rows) / 360 == pytest.approx(100 * wanted, abs=0.02)


def test_predict_is_what_the_model_says_of_the_test_images(finished, capsys, tmp_path):
    digits = data.load("digits")
    paths = []
    for i in range(4):
        pixels = (digits.test_images[i, 0] * 255).round().to(torch.uint8)
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels.numpy()).save(paths[-1])
    code, shown = use(capsys, "predict", finished / "last.pt", *paths, "--top", "10", "--backend", "native")
    lines = shown.out.splitlines()
    assert code == 0 and lines[0].split() == ["image", "class", "probability"] and len(lines) == 41

    from mnet_kernels.training.config import Config
    from mnet_kernels.training.engine import Trainer

    state = torch.load(finished / "last.pt", weights_only=True)
    trainer = Trainer(Config(**state["config"]), data.load("digits", 96))
    trainer.restore(state)
    model = trainer.result.eval()
    images, _ = next(iter(trainer.batches.test()))
    with torch.no_grad():
        wanted = 100 * model(images[:4]).softmax(1)
    for i, path in enumerate(paths):
        block = lines[1 + 10 * i : 11 + 10 * i]
        assert block[0].startswith(str(path)) and not block[1].strip().startswith("/")
        found = {
            int(label): float(value) for label, value in (re.findall(r"(\d) +([\d.]+) %$", row)[0] for row in block)
        }
        assert sorted(found) == list(range(10)) and list(found.values()) == sorted(found.values(), reverse=True)
        for label, value in found.items():
            assert value == pytest.approx(wanted[i, label].item(), abs=0.6)  # the file has 8 bits, the source 4.1


def test_predict_with_a_folders_classes(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.jpg")
    options = ["--data", tmp_path / "photos", "--width", "0.1", "--res", "32", "--batch-size", "4", "--epochs", "1"]
    code, _ = use(capsys, *options, "--workers", "0", "--out", tmp_path / "run")
    assert code == 0
    code, shown = use(capsys, "predict", tmp_path / "run" / "best.pt", tmp_path / "photos" / "cat" / "0.jpg")
    lines = shown.out.splitlines()
    assert code == 0 and len(lines) == 3
    values = [float(line.split()[-2]) for line in lines[1:]]
    assert sum(values) == pytest.approx(100, abs=0.02) and "cat" in shown.out and "dog" in shown.out
    code, shown = use(capsys, "evaluate", tmp_path / "run" / "best.pt", "--workers", "0", "--res", "64")
    assert code == 0 and "at 64 px" in shown.out
    code, shown = use(capsys, "evaluate", tmp_path / "run" / "best.pt", "--data", "digits")
    assert code == 1 and "trained on cat, dog" in shown.err


def test_errors_name_the_file(finished, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for options, message in (
        (["predict", tmp_path / "none.pt", "x.png"], "there is no checkpoint"),
        (["predict", tmp_path / "broken.png", "x.png"], "is damaged or not a checkpoint"),
        (["predict", finished / "best.pt", tmp_path / "none.png"], f"there is no image {tmp_path / 'none.png'}"),
        (
            ["predict", finished / "best.pt", tmp_path / "broken.png"],
            f"cannot read the image {tmp_path / 'broken.png'}",
        ),
        (["evaluate", tmp_path / "none.pt"], "there is no checkpoint"),
    ):
        code, shown = use(capsys, *options)
        assert code == 1 and shown.err.startswith("error: ") and message in shown.err and shown.err.count("\n") == 1


def test_help_of_both(capsys):
    for command in ("evaluate", "predict"):
        with pytest.raises(SystemExit) as exit_:
            train.main([command, "--help"])
        assert exit_.value.code == 0 and "CHECKPOINT" in capsys.readouterr().out


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        break_batches(patch, epoch=2, step=1, action=interrupt)
        assert run(tmp_path, "--tensorboard") == 130
    assert run(tmp_path, "--tensorboard", "--resume") == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("train_loss", "test_accuracy", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(r["epoch"], pytest.approx(r[name], rel=1e-6)) for r in history(tmp_path)]


def test_missing_tensorboard(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run(tmp_path / "out", "--tensorboard") == 1
    assert capsys.readouterr().err.startswith("error: --tensorboard needs tensorboard, which cannot be imported")
    assert not (tmp_path / "out").exists()
