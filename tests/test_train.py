"""``python -m mnet_kernels.train``: a run and what it leaves, divergence, comparison, the command line."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from train_runs import SMALL, break_batches, history, last, make_config, run

pytest.importorskip("sklearn")

from mnet_kernels import train
from mnet_kernels.models import MODELS
from mnet_kernels.training import compare, data, engine, metrics, optim
from mnet_kernels.training.config import Config, build_model
from mnet_kernels.training.progress import Progress

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
