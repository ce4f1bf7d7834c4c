"""``torchrun -m mnet_kernels.train`` with two processes on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from train_runs import SMALL, last, same

pytest.importorskip("sklearn")

from mnet_kernels import train
from mnet_kernels.training import data, distributed, metrics

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")

OPTIONS = [*SMALL, "--batch-size", "16", "--accumulate", "2", "--ema", "0.9", "--mixup", "0.2", "--epochs", "2"]

# What each of the two processes does, joined once: a run with nothing to resume, a whole run, one interrupted in its
# second epoch, and that one resumed.
PROGRAM = """
import sys
from train_runs import break_batches, interrupt
import pytest
from mnet_kernels import train
from mnet_kernels.training import distributed

options, out = sys.argv[1:-1], sys.argv[-1]
with distributed.joined("cpu"):
    assert train.main([*options, "--out", out + "/none", "--resume"]) == 1
    assert train.main([*options, "--out", out + "/whole"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        break_batches(patch, epoch=2, step=2, action=interrupt)
        assert train.main([*options, "--out", out + "/parts"]) == 130
    assert train.main([*options, "--out", out + "/parts", "--resume"]) == 0
"""


def torchrun(*command):
    path = os.pathsep.join(filter(None, sys.path))
    # gloo otherwise binds to what the machine's name resolves to, which need not be this machine.
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*program, *map(str, command)], env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("distributed")
    (out / "program.py").write_text(PROGRAM)
    done = torchrun(out / "program.py", *OPTIONS, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


def test_one_process_speaks_and_writes(finished):
    out, done = finished
    assert done.stdout.count("training v2") == 3 and done.stdout.count("final test accuracy") == 2
    assert "a step: 2 processes x 2 accumulated x 16 images = 64; batch statistics over 16" in done.stdout
    assert "torchrun --nproc-per-node 2 -m mnet_kernels.train" in done.stderr
    records = metrics.read_records(out / "whole" / "metrics.jsonl")
    assert [r["event"] for r in records] == ["header", "epoch", "epoch", "summary"]
    assert records[0]["config"]["processes"] == 2
    assert records[-1]["test_accuracy"] == round(records[-1]["test_accuracy"] * 360) / 360


def test_resume_is_exact(finished):
    out, _ = finished
    whole, parts = (last(out / name) for name in ("whole", "parts"))
    for key in ("model", "ema", "optimizer", "rng", "epoch", "step"):
        assert same(whole[key], parts[key]), key
    own = [process["torch"] for process in whole["rng"]["processes"]]
    assert len(own) == 2 and not torch.equal(*own)  # each draws its own dropout


def test_the_model_is_the_one_that_was_tested(finished, capsys):
    out, _ = finished
    assert train.main(["evaluate", str(out / "whole" / "last.pt"), "--device", "cpu"]) == 0
    tested = metrics.read_records(out / "whole" / "metrics.jsonl")[-1]["test_accuracy"]
    assert f"test accuracy {100 * tested:.2f} %" in capsys.readouterr().out


def test_another_number_of_processes_cannot_resume(finished, capsys):
    out, _ = finished
    assert train.main([*OPTIONS, "--out", str(out / "whole"), "--resume"]) == 1
    assert "processes (saved 2, now 1)" in capsys.readouterr().err


def test_an_error_is_said_and_writes_nothing(finished):
    out, done = finished
    assert "error: nothing to resume" in done.stderr and not (out / "none").exists()


def test_no_comparison_under_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main([*OPTIONS, "--compare", "--out", str(tmp_path / "none")]) == 1
    assert "run it without torchrun" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_processes_share_every_batch(monkeypatch):
    """The parts of two processes are, side by side, the batches of one process with twice the batch size."""
    digits = data.load("digits", 100)

    def images(rank, count, size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "count", lambda: count)
        batches = data.Batches(digits, 16, size, torch.device("cpu"), False, torch.Generator().manual_seed(4))
        return [labels for _, labels in batches.train()], torch.cat([labels for _, labels in batches.test()])

    whole, parts = images(0, 1, 20), [images(rank, 2, 10) for rank in range(2)]
    assert len(whole[0]) == 5
    for batch, *halves in zip(whole[0], parts[0][0], parts[1][0], strict=True):
        assert torch.equal(batch, torch.cat(halves))
    assert sum(len(test) for _, test in parts) == 360
    assert sorted(torch.cat([test for _, test in parts]).tolist()) == sorted(whole[1].tolist())
