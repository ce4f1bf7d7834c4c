"""What one of several training processes does, without starting any."""

import pytest
import torch
from train_runs import SMALL

pytest.importorskip("sklearn")

from mnet_kernels import train
from mnet_kernels.training import data, distributed


def test_no_comparison_under_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main([*SMALL, "--compare", "--out", str(tmp_path / "none")]) == 1
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
