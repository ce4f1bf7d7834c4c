"""Whole networks against their originals: the shared set-up of the model tests."""

import pytest
import torch

import mnet_kernels as mk

PATHS = [("native", None), ("reference", "chain"), ("reference", "algebraic")]
paths = pytest.mark.parametrize(("backend", "mode"), PATHS, ids=["native", "chain", "algebraic"])


def randomise(model):
    """Draw every parameter and statistic anew, so that no gradient vanishes and no batch norm is the identity."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)):
                m.weight.normal_(std=m.weight[0].numel() ** -0.5)
                if m.bias is not None:
                    m.bias.uniform_(0.5, 1.5)
                    if isinstance(m, torch.nn.Conv2d):
                        # squeeze-excite's: next to the bias the sum is so small that its ReLU, of perhaps three hidden
                        # units, is alive, and so is its hard sigmoid
                        m.weight *= m.weight[0].numel() ** -0.5
            elif isinstance(m, torch.nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0.5, 0.5)
                m.running_mean.normal_(std=0.3)
                m.running_var.uniform_(0.5, 1.5)
                m.num_batches_tracked.fill_(7)


def twins(theirs, ours):
    """Both in float64, with the same random weights and statistics; ours must have their keys, in their order."""
    randomise(theirs.double())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.double().load_state_dict(theirs.state_dict())
    return theirs, ours


def step(model, x, target):
    """Forward and backward: {name: tensor} of output, loss, every gradient and every buffer afterwards."""
    x = x.clone().requires_grad_()
    out = model(x)
    loss = torch.nn.functional.cross_entropy(out, target)
    named = {"x": x, **{k: p for k, p in model.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(loss, list(named.values()))
    result = {"out": out.detach(), "loss": loss.detach()} | {f"d_{k}": g for k, g in zip(named, grads, strict=True)}
    assert not any(v.requires_grad for v in model.buffers()), "a running statistic became part of the graph"
    return result | {k: v.clone() for k, v in model.named_buffers()}


def assert_equal(got, want, tolerance=1e-10):
    """Every tensor equal to ``tolerance`` of its largest value.

    Zero may only be the gradient of a batch norm's bias, where a batch norm further on takes the shift out again.
    """
    assert got.keys() == want.keys()
    for name in want:
        a, b = got[name].double(), want[name].double()
        scale = b.abs().max().item()
        assert a.shape == b.shape, name
        if scale < 1e-8:
            assert name.startswith("d_") and name.endswith(".bias"), f"{name} is zero: the test shows nothing"
            scale = 1.0
        error = (a - b).abs().max().item() / scale
        assert error <= tolerance, f"{name}: {error:.1e}"


def compare(theirs, ours, backend, mode, size, batch=4, training=True, classes=5):
    """One step of both in one mode; returns the counted stages of ours."""
    x, target = torch.randn(batch, 3, *size, dtype=torch.float64), torch.randint(classes, (batch,))
    want = step(theirs.train(training), x, target)
    with mk.count_stages() as counts, mk.backend(backend, mode):
        got = step(ours.train(training), x, target)
    assert_equal(got, want)
    return counts


def native_calls(counts):
    """Calls of public ops that ran on plain torch."""
    return sum(n for name, n in counts.items() if name.startswith("native::"))


def takes_raw_stem(model):
    """Whether the first of a V2's or V3's blocks reads the stem's raw output, which is then not written."""
    block = model.features[1]
    first = next(m for m in block.modules() if isinstance(m, torch.nn.Conv2d))
    return not block.use_res_connect and first.groups > 1


def written(counts):
    """Maps that blocks wrote, with their gram or without."""
    return counts["mnet_ref::normalize"] + counts["mnet_ref::normalize_gram"]
