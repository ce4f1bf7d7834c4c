"""Stopping and going on: exact resume, damaged checkpoints, a full or failing disk."""

import errno
import io
import os
import shutil
import subprocess
import sys

import pytest
import torch
from train_runs import SMALL, TIMINGS, break_batches, history, interrupt, last, run, same

pytest.importorskip("sklearn")

from mnet_kernels.training import TrainingError, checkpoint, data, engine, metrics
from mnet_kernels.training.config import Config

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
