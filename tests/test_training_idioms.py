"""What training code does around a model: loss scaling, functional calls, accumulation, threads, changing batches."""

import copy
import gc
import threading

import pytest
import torch
from blocks import assert_same
from torch import nn

import mnet_kernels as mk

BACKENDS = [name for name in ("reference", "cpu") if name == "reference" or mk.backends.whole("cpu", "chain")]
backends = pytest.mark.parametrize("backend", BACKENDS)


def model(dtype=torch.float32):
    return mk.FusedMobileNetV2(width_mult=0.1, num_classes=5, dropout=0.0).to(dtype)


def loss_of(net, x, labels):
    return nn.functional.cross_entropy(net(x), labels)


def batch(n=6, size=48, dtype=torch.float32):
    return torch.randn(n, 3, size, size, dtype=dtype), torch.randint(5, (n,))


@backends
def test_a_step_with_infinite_gradients_is_skipped(backend):
    """As with torch's own ops: the weights stay, the running statistics have moved, the scale halves.

    In six blocks: in the whole network a few values a channel, behind 50 layers of float16, say nothing of statistics.
    """
    x, labels = batch()
    whole = model()
    start = nn.Sequential(whole.features[:6], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    results = []
    for name in ("native", backend):
        net = copy.deepcopy(start)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows float16 gradients
        with mk.backend(name), torch.autocast("cpu", torch.float16):
            loss = loss_of(net, x, labels)
        scaler.scale(loss).backward()
        assert any(not p.grad.isfinite().all() for p in net.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**39
        for p, before in zip(net.parameters(), start.parameters(), strict=True):
            assert torch.equal(p, before)
        results.append(dict(net.named_buffers()))
    assert results[1]["0.1.conv.0.1.num_batches_tracked"] == 1
    for key, want in results[0].items():
        scale = want.abs().max().item()
        torch.testing.assert_close(results[1][key], want, rtol=0, atol=2e-2 * scale + 1e-3, msg=key)


@backends
def test_functional_call_uses_what_it_is_given(backend):
    net, x = model().eval(), batch()[0]
    other = {k: v + 0.01 * torch.rand_like(v) for k, v in net.state_dict().items() if v.is_floating_point()}
    twin = copy.deepcopy(net)
    twin.load_state_dict(other, strict=False)
    with mk.backend(backend), torch.no_grad():
        got = torch.func.functional_call(net, other, (x,))
        torch.testing.assert_close(got, twin(x), rtol=0, atol=0)
        assert not torch.equal(got, net(x))


@backends
def test_gradients_accumulate(backend):
    net, (x, labels) = model(), batch(12)
    with mk.backend(backend):
        for part in (slice(0, 6), slice(6, 12)):
            loss_of(net, x[part], labels[part]).backward()
        got = {n: p.grad.clone() for n, p in net.named_parameters()}
        sums = dict.fromkeys(got, 0)
        for part in (slice(0, 6), slice(6, 12)):
            net.zero_grad()
            loss_of(net, x[part], labels[part]).backward()
            sums = {n: sums[n] + p.grad for n, p in net.named_parameters()}
    assert_same(got, sums, 1e-6)


@backends
def test_two_models_on_two_threads(backend):
    nets, data = [model() for _ in range(2)], [batch() for _ in range(2)]
    with mk.backend(backend):
        want = [copy.deepcopy(net) for net in nets]
        for net, args in zip(want, data, strict=True):
            for _ in range(5):
                net.zero_grad()
                loss_of(net, *args).backward()

        def work(net, args):
            for _ in range(5):
                net.zero_grad()
                loss_of(net, *args).backward()

        threads = [threading.Thread(target=work, args=pair) for pair in zip(nets, data, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for net, other in zip(nets, want, strict=True):
        assert_same(dict(net.named_buffers()), dict(other.named_buffers()), 1e-5)
        for (name, p), q in zip(net.named_parameters(), other.named_parameters(), strict=True):
            assert p.grad is not None and (p.grad - q[1].grad).abs().max() <= 1e-3 * q[1].grad.abs().max() + 1e-5, name


def test_no_tensor_outlives_its_step():
    """The number of live tensors after a step does not grow."""
    gc.collect()
    others = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]  # noqa: F841  held: they stay
    net, (x, labels) = model(), batch(4, 32)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    counts = []
    with mk.backend(BACKENDS[-1]):
        for i in range(60):
            optimizer.zero_grad(set_to_none=True)
            loss_of(net, x, labels).backward()
            optimizer.step()
            if i % 20 == 19:
                gc.collect()
                counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("backend", ["native", *BACKENDS])
def test_changing_batch_sizes_do_not_recompile(backend):
    """After the first change torch takes the size as a symbol; so do the fused ops."""
    torch._dynamo.reset()
    graphs = []

    def remember(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model().features[:4], fullgraph=True, backend=remember)
    with mk.backend(backend), torch.no_grad():
        for n in (4, 6, 9, 13, 5):
            assert len(compiled(torch.randn(n, 3, 32, 32))) == n
    torch._dynamo.reset()
    assert len(graphs) == 2
