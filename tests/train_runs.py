"""Short runs of ``python -m mnet_kernels.train`` for its tests, and what they leave behind."""

import dataclasses

import torch

from mnet_kernels import train
from mnet_kernels.training import checkpoint, data, metrics

# Small enough for one to two seconds a run: 3 steps an epoch.
SMALL = ["--width", "0.1", "--res", "32", "--limit-train", "96", "--batch-size", "32", "--device", "cpu"]
TIMINGS = {"train_seconds", "test_seconds", "images_per_s"}


def run(out, *options, epochs=2):
    return train.main([*SMALL, "--epochs", str(epochs), "--out", str(out), *options])


def last(out):
    return checkpoint.load(out / "last.pt")


def history(out):
    return [
        {k: v for k, v in r.items() if k not in TIMINGS}
        for r in metrics.read_records(out / "metrics.jsonl")
        if r["event"] == "epoch"
    ]


def break_batches(monkeypatch, epoch, step, action):
    """Let ``action(images)`` act on the batch of one step (both counted from 1) of this process's next run."""
    original = data.Batches.train
    calls = []

    def batches(self):
        calls.append(None)
        for i, (images, labels) in enumerate(original(self)):
            if (len(calls), i + 1) == (epoch, step):
                images = action(images)
            yield images, labels

    monkeypatch.setattr(data.Batches, "train", batches)


def interrupt(images):
    raise KeyboardInterrupt


def make_config(**changes):
    args = train.build_parser().parse_args(SMALL)
    return dataclasses.replace(train._config(args), **changes)


def same(a, b):
    """Whether two nested structures are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
