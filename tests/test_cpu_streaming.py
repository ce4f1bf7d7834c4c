"""Maps that the compiled CPU stages write past the caches (from 8 MiB on, in whole cache lines): bit for bit what they
write of each image alone, which is smaller."""

import pytest
import torch

from mnet_kernels import backends

pytestmark = pytest.mark.skipif(not backends.implemented("cpu"), reason="the extension is not built")

IMAGES = 3
SIDE = 150  # x 32 channels: 2.9 MB an image, 8.6 MB together


def maps(c, side=SIDE):
    return torch.randn(IMAGES, c, side, side).contiguous(memory_format=torch.channels_last)


def table(like):
    bn = torch.randn(5, like.shape[1])
    bn[3:].abs_()
    return bn


def of_image(args, i):
    """The arguments of a stage for one image: no other tensor here has so many rows."""
    return [a[i : i + 1] if isinstance(a, torch.Tensor) and a.shape[0] == IMAGES else a for a in args]


def check(op, args):
    together = op(*args)[0]
    assert together.is_contiguous(memory_format=torch.channels_last)
    for i in range(IMAGES):
        assert torch.equal(together[i : i + 1], op(*of_image(args, i))[0]), f"image {i}"


# 40 channels are no whole lines: never past the caches
@pytest.mark.parametrize("channels", [32, 40])
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (5, 2)])
def test_depthwise(channels, k, stride):
    x = maps(channels, SIDE * stride)
    weight = torch.randn(channels, 1, k, k)
    check(torch.ops.mnet_cpu.depthwise, (x, weight, table(x), 2, stride, True))


@pytest.mark.parametrize("channels", [32, 40])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_backward(channels, normalized, stride):
    x, y, grad = maps(channels), maps(channels, SIDE // stride), maps(channels, SIDE // stride)
    weight, coef = torch.randn(channels, 1, 3, 3), torch.randn(2, channels)
    bn, residual = (table(x), None) if normalized else (None, maps(channels))
    act = 2 if normalized else 0
    upstream = (grad, y, table(y), coef, 1, None, None)
    check(torch.ops.mnet_cpu.depthwise_backward, (*upstream, x, weight, bn, act, stride, residual, True, True))


@pytest.mark.parametrize("channels", [32, 40])
@pytest.mark.parametrize("normalized", [True, False])
def test_pointwise_backward(channels, normalized):
    e = 16
    x, y, grad = maps(channels), maps(e), maps(e)
    weight, coef = torch.randn(e, channels, 1, 1), torch.randn(2, e)
    bn, residual = (table(x), None) if normalized else (None, maps(channels))
    act = 2 if normalized else 0
    upstream = (grad, y, table(y), coef, 0, None)
    check(torch.ops.mnet_cpu.pointwise_backward, (*upstream, x, weight, bn, act, None, residual, True, True, True))


def test_pointwise_backward_with_a_gate():
    c, e = 32, 16
    x, y, grad = maps(c), maps(e), maps(e)
    weight, coef, gate = torch.randn(e, c, 1, 1), torch.randn(2, e), torch.rand(IMAGES, c)
    args = (grad, y, table(y), coef, 0, None, x, weight, table(x), 2, gate, None, True, True, True)
    check(torch.ops.mnet_cpu.pointwise_backward, args)


@pytest.mark.parametrize("channels", [32, 40])
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (5, 2)])
def test_expand_depthwise(channels, k, stride):
    x, bn = maps(8, SIDE * stride), torch.randn(5, channels)
    args = (x, torch.randn(8), torch.randn(channels, 8, 1, 1), bn, 2, torch.randn(channels, 1, k, k), stride, True)
    check(torch.ops.mnet_cpu.expand_depthwise, args)
