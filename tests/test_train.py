"""``python -m mnet_kernels.train``: data, exact resume, failures that must be clear, results, comparison."""

import dataclasses
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from train_runs import SMALL, TIMINGS, break_batches, history, interrupt, last, make_config, run, same

pytest.importorskip("sklearn")

from mnet_kernels import train
from mnet_kernels.models import MODELS
from mnet_kernels.training import TrainingError, checkpoint, compare, data, engine, metrics, optim
from mnet_kernels.training.config import Config, build_model
from mnet_kernels.training.progress import Progress


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two epochs; not to be changed."""
    out = tmp_path_factory.mktemp("finished")
    assert run(out) == 0
    return out


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


# ---- a run and what it leaves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_and_its_stem(name):
    for stride in (1, 2):
        model = build_model(name, 10, 0.25, stride)
        first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
        assert first.stride == (stride, stride)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_it_learns(tmp_path, capsys):
    options = ["--width", "0.25", "--res", "32", "--epochs", "8", "--device", "cpu"]
    assert train.main([*options, "--out", str(tmp_path)]) == 0
    records = metrics.read_records(tmp_path / "metrics.jsonl")
    assert records[-1]["test_accuracy"] > 0.8  # chance is 0.1
    assert records[-2]["train_loss"] < records[1]["train_loss"] - 0.5
    out = capsys.readouterr().out
    assert (
        len(re.findall(r"^epoch +\d+/8  loss \d\.\d{4}  test accuracy +\d+\.\d\d %  +[\d.]+ images/s$", out, re.M)) == 8
    )
    assert f"final test accuracy {100 * records[-1]['test_accuracy']:.2f} %" in out


def test_metrics_file(finished):
    text = (finished / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert [r["event"] for r in records] == ["header", "epoch", "epoch", "summary"]
    header, summary = records[0], records[-1]
    assert header["config"]["seed"] == 0 and header["config"]["width"] == 0.1 and header["config"]["implementation"]
    assert header["torch"] == torch.__version__ and isinstance(header["build_info"], dict)
    assert (header["train_images"], header["test_images"]) == (96, 360)
    assert [r["epoch"] for r in records[1:-1]] == [1, 2]
    assert summary["test_accuracy"] == records[2]["test_accuracy"] == round(records[2]["test_accuracy"] * 360) / 360
    assert summary["best_test_accuracy"] == max(r["test_accuracy"] for r in records[1:-1])
    assert summary["peak_memory_bytes"] >= summary["start_memory_bytes"] > 10e6
    assert not list(finished.glob("*.tmp"))


def test_metrics_are_strict_json():
    assert json.loads(metrics.dumps({"a": float("nan"), "b": [1.5, float("inf")], "c": torch.float32})) == {
        "a": None, "b": [1.5, None], "c": "torch.float32",
    }  # fmt: skip


def test_rate_leaves_out_the_first_epoch():
    def rate(*rates):
        return metrics.typical_rate([{"images_per_s": r} for r in rates])

    assert rate(1, 20, 30, 40) == 30 and rate(7) == 7


def test_checkpoint_gives_the_reported_accuracy(finished):
    best = torch.load(finished / "best.pt", weights_only=True)
    config = Config(**best["config"])
    trainer = engine.Trainer(config, data.load(config.data, config.limit_train))
    trainer.model.load_state_dict(best["model"])
    assert (
        trainer.evaluate()["test_accuracy"]
        == best["test_accuracy"]
        == max(r["test_accuracy"] for r in history(finished))
    )


def assert_curves(path):
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert min(image.shape[:2]) > 200
    assert image[..., :3].std() > 0.02
    columns = image[..., :3].min(axis=(0, 2))
    half = len(columns) // 2
    assert (columns[:half] < 0.5).any() and (columns[half:] < 0.5).any()  # something dark in both panels


def test_curves_are_drawn(finished):
    assert_curves(finished / "curves.png")


def test_curves_of_several_runs_share_a_time_axis(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, plot = [], axes.plot
    monkeypatch.setattr(
        axes, "plot", lambda self, x, y, *a, **k: drawn.append((k["label"], x, y)) or plot(self, x, y, *a, **k)
    )
    records = [
        {"epoch": e, "train_loss": 2.0 / e, "test_loss": 3.0 / e, "test_accuracy": 0.1 * e, "train_seconds": 60.0 * e}
        for e in (1, 2, 3)
    ]
    assert metrics.plot(tmp_path / "curves.png", {"native": records, "cpu/auto": records[:2]}, "title") is None
    assert_curves(tmp_path / "curves.png")
    names = ["native, train", "native, test", "native", "cpu/auto, train", "cpu/auto, test", "cpu/auto"]
    assert [name for name, _, _ in drawn] == names
    assert drawn[0][1:] == ([1, 2, 3], [2.0, 1.0, 2.0 / 3]) and drawn[1][2] == [3.0, 1.5, 1.0]
    assert drawn[2][1] == [1, 3, 6] and drawn[5][1] == [1, 3] and drawn[5][2] == pytest.approx([10, 20])


def test_without_matplotlib_a_run_goes_through(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(tmp_path, epochs=1) == 0
    assert capsys.readouterr().out.count("matplotlib is not installed") == 1
    assert not (tmp_path / "curves.png").exists() and (tmp_path / "last.pt").exists()


def test_learning_rate_schedule():
    config = make_config(epochs=10, warmup_epochs=2.0, lr=1.0)
    rates = [optim.learning_rate(config, step, 5) for step in range(50)]
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True)) and rates[10] == 1.0
    assert all(a > b for a, b in zip(rates[10:-1], rates[11:], strict=True)) and 0 < rates[-1] < 0.01
    assert optim.learning_rate(make_config(epochs=1, warmup_epochs=5.0), 0, 1) > 0


def test_weight_decay_spares_norms_and_biases():
    trainer = engine.Trainer(make_config(weight_decay=0.5), data.load("digits", 96))
    groups = {group["weight_decay"]: group["params"] for group in trainer.optimizer.param_groups}
    assert {p.ndim for p in groups[0.0]} == {1} and {p.ndim for p in groups[0.5]} == {2, 4}
    assert sum(map(len, groups.values())) == len(list(trainer.model.parameters()))


def test_fp16_scales_the_loss(tmp_path):
    assert run(tmp_path, "--amp", "fp16", epochs=1) == 0
    assert last(tmp_path)["scaler"]["scale"] > 1


def test_no_channels_last(tmp_path, monkeypatch):
    assert run(tmp_path, "--no-channels-last", epochs=1) == 0
    assert all(t.is_contiguous() for t in last(tmp_path)["model"].values())


# ---- resuming -------------------------------------------------------------------------------------------------------


RECIPES = {
    "off": [],
    "bf16": ["--amp", "bf16"],
    "fp16": ["--amp", "fp16", "--accumulate", "2", "--batch-size", "16"],
    "rmsprop": ["--optimizer", "rmsprop", "--lr", "0.01", "--schedule", "step", "--lr-step", "1", "--ema", "0.9"],
    "mixed": ["--optimizer", "sgd", "--mixup", "0.2", "--cutmix", "1", "--random-erase", "0.5", "--ema", "0.99"],
    "compiled": ["--compile", "aot_eager"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_resume_is_exact(tmp_path, monkeypatch, capsys, name):
    options = RECIPES[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, *options, epochs=4) == 0
    with monkeypatch.context() as patch:
        break_batches(patch, epoch=3, step=2, action=interrupt)
        assert run(parts, *options, epochs=4) == 130
    message = capsys.readouterr().err
    assert "go on" in message and " ".join(["--out", str(parts), *options, "--resume"]) in message
    assert last(parts)["epoch"] == 2
    assert run(parts, *options, "--resume", epochs=4) == 0
    a, b = last(whole), last(parts)
    for state in (a, b):
        state["history"] = [{k: v for k, v in r.items() if k not in TIMINGS} for r in state["history"]]
    assert same(a, b)
    assert history(whole) == history(parts) and len(history(parts)) == 4
    assert [r["event"] for r in metrics.read_records(parts / "metrics.jsonl")].count("resume") == 1


def test_every_random_state_matters(finished):
    """The exact resume above would also pass if nothing were drawn: order, augmentation and dropout must draw."""
    state = last(finished)
    fresh = engine.Trainer(Config(**state["config"]), data.load("digits", 96)).state()["rng"]
    assert not torch.equal(fresh["processes"][0]["torch"], state["rng"]["processes"][0]["torch"])  # dropout
    assert not torch.equal(fresh["data"], state["rng"]["data"])


def test_seed_decides(finished, tmp_path):
    assert run(tmp_path / "same") == 0 and run(tmp_path / "other", "--seed", "1") == 0
    assert same(last(tmp_path / "same")["model"], last(finished)["model"])
    assert not same(last(tmp_path / "other")["model"], last(finished)["model"])


def test_resume_of_a_finished_run_changes_nothing(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "copy")
    assert run(tmp_path / "copy", "--resume") == 0
    assert (tmp_path / "copy" / "last.pt").read_bytes() == (finished / "last.pt").read_bytes()
    assert "final test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, named",
    [
        (["--seed", "7"], ["seed (saved 0, now 7)"]),
        (["--batch-size", "16", "--lr", "0.01"], ["batch-size (saved 32, now 16)", "lr (saved 0.1, now 0.01)"]),
        (["--limit-train", "64"], ["limit-train (saved 96, now 64)"]),
        (["--width", "0.2"], ["width (saved 0.1, now 0.2)"]),
        (["--backend", "reference"], ["backend (saved auto, now reference)"]),
    ],
)
def test_resume_with_other_settings_names_them(finished, capsys, options, named):
    before = (finished / "last.pt").read_bytes()
    assert run(finished, "--resume", *options) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: cannot resume") and all(text in message for text in named)
    assert "momentum" not in message
    assert (finished / "last.pt").read_bytes() == before


def test_nothing_to_resume(tmp_path, capsys):
    assert run(tmp_path / "none", "--resume") == 1
    assert "nothing to resume" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_unfinished_run_is_not_replaced_unasked(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        break_batches(patch, epoch=2, step=1, action=interrupt)
        assert run(tmp_path) == 130
    before = (tmp_path / "last.pt").read_bytes()
    assert run(tmp_path, "--seed", "1") == 1
    assert "unfinished run (epoch 1 of 2)" in capsys.readouterr().err
    assert (tmp_path / "last.pt").read_bytes() == before
    assert run(tmp_path, "--overwrite", "--seed", "1", epochs=1) == 0
    assert run(tmp_path, epochs=1) == 0  # a finished one is replaced
    assert last(tmp_path)["config"]["seed"] == 0


def test_interrupt_before_the_first_checkpoint(tmp_path, monkeypatch, capsys):
    break_batches(monkeypatch, epoch=1, step=2, action=interrupt)
    assert run(tmp_path) == 130
    assert "nothing was saved" in capsys.readouterr().err and not (tmp_path / "last.pt").exists()


# ---- damaged checkpoints --------------------------------------------------------------------------------------------


def truncate(content):
    return content[: len(content) // 2]


def flip(content):
    """One byte of a weight changed: torch's own reader does not notice."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def foreign(content):
    buffer = io.BytesIO()
    torch.save({"state_dict": {}}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", [truncate, flip, foreign, lambda _: b"", lambda _: b"not a checkpoint"])
def test_damaged_checkpoint(finished, tmp_path, capsys, damage):
    content = (finished / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(damage(content))
    for options in (["--resume"], []):  # without --resume it may be an unfinished run: not thrown away unasked
        assert run(tmp_path, *options) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"error: {tmp_path / 'last.pt'} is damaged") and "--overwrite" in message
        assert message.count("\n") == 1
    (tmp_path / "last.pt").write_bytes(content)
    assert run(tmp_path, "--resume") == 0


def test_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"format": 1, **dict.fromkeys(checkpoint.KEYS), "model": Evil()}, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match="damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "executed").exists()


def test_checkpoint_of_another_format(tmp_path):
    torch.save({"format": 99, **dict.fromkeys(checkpoint.KEYS)}, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match="format 99"):
        checkpoint.load(tmp_path / "last.pt")


# ---- a full or failing disk -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, capsys, name):
    saved = {}

    def fill(images):
        saved["bytes"] = (tmp_path / "last.pt").read_bytes()
        (tmp_path / (name + ".tmp")).symlink_to("/dev/full")  # the kernel answers every write with ENOSPC
        return images

    # The best checkpoint is written only when an epoch is better: make every one so.
    monkeypatch.setattr(engine.Trainer, "best", lambda self: self.history[-1])
    break_batches(monkeypatch, epoch=2, step=1, action=fill)
    assert run(tmp_path) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: cannot write {tmp_path / name}: No space left on device (")
    assert "MB needed" in message and "MB free" in message and "untouched" in message
    assert (tmp_path / "last.pt").read_bytes() == saved["bytes"]
    assert not list(tmp_path.glob("*.tmp"))
    assert len(history(tmp_path)) == 1
    monkeypatch.undo()
    assert run(tmp_path, "--resume") == 0  # with room again


SCRIPT = """
mount -t tmpfs -o size={size} tmpfs {disk} || exit 99
{python} -m mnet_kernels.train {options} --out {disk}/run 2>{log}
echo $? >>{log}
ls {disk}/run >>{log}
cp {disk}/run/last.pt {copy}
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare (Linux)")
def test_really_full_disk(tmp_path, finished):
    disk, log, copy = (tmp_path / name for name in ("disk", "log", "last.pt"))
    disk.mkdir()
    best, large = ((finished / name).stat().st_size for name in ("best.pt", "last.pt"))
    size = best + 2 * large - 100_000  # one of each, but no second last.pt beside the first
    script = SCRIPT.format(
        size=size, disk=disk, python=sys.executable, log=log, copy=copy, options=" ".join([*SMALL, "--epochs", "2"])
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], env=env, capture_output=True, text=True)
    if done.returncode in (1, 99) and not log.exists():
        pytest.skip("no right to mount a file system in a namespace of its own")
    text = log.read_text()
    assert "No space left on device" in text and "error: cannot write" in text
    assert "\n1\n" in text and ".tmp" not in text.partition("\n1\n")[2]
    assert checkpoint.load(copy)["epoch"] == 1


def test_failing_flush_keeps_the_old_file(tmp_path, monkeypatch):
    checkpoint.write_atomic(tmp_path / "file", b"old")

    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(TrainingError, match="Input/output error"):
        checkpoint.write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_out_is_no_directory(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "run") == 1
    assert capsys.readouterr().err.startswith("error: cannot use ")


# ---- divergence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, shown", [(float("nan"), "nan"), (float("inf"), "nan|inf")])
def test_bad_loss_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys, value, shown):
    saved = {}

    def poison(images):
        saved["bytes"] = (tmp_path / "last.pt").read_bytes()
        return images.fill_(value)

    break_batches(monkeypatch, epoch=2, step=2, action=poison)
    assert run(tmp_path, "--amp", "bf16", epochs=3) == 1
    message = capsys.readouterr().err
    assert re.search(rf"error: the loss became ({shown}) in epoch 2, step 2 of 3 \(lr [\d.]+, amp bf16\)", message)
    assert "smaller --lr, or --amp off" in message and "checkpoint of epoch 1 is untouched" in message
    assert (tmp_path / "last.pt").read_bytes() == saved["bytes"]


def test_huge_learning_rate_is_stopped_before_its_weights_are_saved(tmp_path, capsys):
    # one step: its loss is still finite
    options = ["--lr", "1e38", "--clip-grad", "0", "--warmup-epochs", "0", "--limit-train", "32"]
    assert run(tmp_path, *options) == 1
    message = capsys.readouterr().err
    assert "NaN or infinite" in message or "became" in message
    assert "lr 1e+38" in message and "no checkpoint was written" in message
    assert not (tmp_path / "last.pt").exists()


# ---- comparison -----------------------------------------------------------------------------------------------------


def test_compare(tmp_path, capfd):
    assert run(tmp_path, "--compare", "--compare-backend", "reference", "--threads", str(torch.get_num_threads())) == 0
    out = capfd.readouterr().out
    assert "comparing backend reference" in out
    found = json.loads((tmp_path / "compare.json").read_text())
    native, fused = found["native"], found["fused"]
    assert native["implementation"] == "native" and fused["implementation"].startswith("reference/")
    rows = {title.strip(): rest for title, rest in re.findall(r"^( *[a-z][^\d\n]*?)  +([-\d].*)$", out, re.M)}
    for title, key, factor, digits in compare.ROWS:
        cells = rows[title.strip()].split()
        assert cells[:2] == [f"{side[key] * factor:.{digits}f}" for side in (native, fused)]
        if key == "test_accuracy":
            points = found["ratios"]["test_accuracy_points"]
            assert points == pytest.approx(100 * (fused[key] - native[key])) and cells[2] == f"{points:+.2f}"
        else:
            assert found["ratios"][key] == pytest.approx(fused[key] / native[key])
            assert cells[2] == f"{found['ratios'][key]:.2f}"
    headers = [metrics.read_records(tmp_path / side / "metrics.jsonl")[0]["config"] for side in ("native", "fused")]
    differing = {name for name in headers[0] if headers[0][name] != headers[1][name]}
    assert differing == {"backend", "implementation"}
    # Each in a process of its own: its memory has nothing of this one's.
    first = [history(tmp_path / side)[0]["train_loss"] for side in ("native", "fused")]
    assert first[0] == pytest.approx(first[1], rel=2e-2)
    assert_curves(tmp_path / "curves.png")


def test_compare_reports_a_failing_child(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "_run_child", lambda options, quiet: 1)
    assert run(tmp_path, "--compare", "--compare-backend", "reference") == 1
    assert "backend native" in capsys.readouterr().err and not (tmp_path / "compare.json").exists()


def test_compare_children_get_the_settings():
    parser = train.build_parser()
    options = ["--no-channels-last", "--epochs", "3", "--seed", "5", "--amp", "bf16", "--weight-decay", "0"]
    options += ["--stem-stride", "1", *SMALL]
    config = train._config(parser.parse_args(options))
    child = parser.parse_args(compare.command(config, "reference", "there", threads=1)[3:])
    assert child.threads == 1 and child.out == "there" and child.overwrite
    again = train._config(child)
    assert dataclasses.replace(again, backend=config.backend, implementation=config.implementation) == config
    assert again.backend == "reference"


def test_compare_picks_the_backend_asked_for():
    assert compare.fused_backend(make_config(backend="triton")) == "triton"
    assert compare.fused_backend(make_config(backend="triton"), "reference") == "reference"
    assert compare.fused_backend(make_config(backend="native")) not in ("native", "auto")


# ---- the command line -----------------------------------------------------------------------------------------------


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "examples:" in text and "metrics.jsonl" in text
    for action in train.build_parser()._actions:
        assert action.help and all(option in text for option in action.option_strings)
    assert "None" not in text and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epochs", "0"], "argument --epochs: 0 is not at least 1"),
        (["--lr", "nan"], "argument --lr: nan is not above 0"),
        (["--width", "-1"], "argument --width: -1 is not above 0"),
        (["--batch-size", "x"], "invalid int value"),
        (["--optimizer", "adam9"], "invalid choice: 'adam9'"),
        (["--model", "v9"], "invalid choice"),
        (["--wat"], "unrecognized arguments: --wat"),
    ],
)
def test_bad_arguments(capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        train.main(options)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--resume", "--overwrite"], "exclude each other"),
        (["--compare", "--resume"], "--compare cannot resume"),
        (["--compare-backend", "reference"], "needs --compare"),
        (["--limit-train", "5000"], "has 1437 training images"),
    ],
)
def test_bad_combinations(tmp_path, capsys, options, message):
    assert run(tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is not there")
def test_no_cuda(tmp_path, capsys):
    assert run(tmp_path, "--device", "cuda") == 1
    assert "sees no CUDA device" in capsys.readouterr().err


def test_unavailable_backend(tmp_path, capsys):
    assert run(tmp_path / "out", "--backend", "triton") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "triton" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_scikit_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run(tmp_path) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: the data set 'digits' needs scikit-learn")
    assert "pip install 'mnet-kernels[train]'" in message


def test_import_is_lazy():
    code = (
        "import sys, torch; before = set(sys.modules); import mnet_kernels\n"  # torch itself may import tqdm
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'sklearn', 'torchvision', 'matplotlib', 'tqdm'}))\n"
        "print([name for name in sys.modules if name.startswith('mnet_kernels.train')])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["[]", "[]"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar(monkeypatch, capsys):
    pytest.importorskip("tqdm")

    def bar(stream, **options):
        assert list(Progress(stream=stream, **options).steps(range(3), 3, "epoch 1")) == [0, 1, 2]
        return stream.getvalue()

    assert "epoch 1" in bar(Terminal())
    assert bar(Terminal(), enabled=False) == "" == bar(io.StringIO())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert bar(Terminal()) == ""
    assert "tqdm is not installed" in capsys.readouterr().out


def test_as_a_program(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "mnet_kernels.train", "--resume", "--out", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (
        done.returncode == 1 and done.stderr.startswith("error: nothing to resume") and "Traceback" not in done.stderr
    )
