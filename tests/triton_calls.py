"""Arguments of every stage that Triton has, small enough for its interpreter, with every kind of border and tail."""

import itertools

import torch

from mnet_kernels import backends, schema
from mnet_kernels.stages import reference

ACTS = range(len(schema.ACTIVATIONS))


def map_(dtype, *shape):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def table(channels):
    """bn [5, C] with values as they occur: scale around 1, shift and mean around 0."""
    return torch.stack([torch.randn(channels) for _ in range(3)] + [torch.rand(channels) + 0.5] * 2)


def coefficients(channels):
    return 0.1 * torch.randn(2, channels)


# n, c, e, h, w of the pointwise stages: tails of every kind, one position, one channel, several blocks
POINTWISE = [(1, 1, 1, 1, 1), (3, 13, 17, 5, 9), (2, 35, 24, 3, 11)]
# n, c, h, w, k, stride of the depthwise ones: several strips and columns, maps smaller than the kernel, even and odd
DEPTHWISE = [(1, 1, 1, 1, 5, 2), (2, 3, 5, 6, 3, 1), (1, 9, 6, 5, 3, 2), (1, 3, 5, 6, 5, 1), (1, 5, 9, 7, 5, 2)]


def pointwise_calls(dtype):
    for n, c, e, h, w in POINTWISE:
        weight, gate = (torch.randn(e, c, 1, 1) / c**0.5).to(dtype), torch.rand(n, c)
        x = map_(dtype, n, c, h, w)
        yield x, weight, None, 0, None, True
        yield x, weight, table(c), 3, gate, False
        for act in ACTS:
            yield x, weight, table(c), act, gate if act == 2 else None, True


def pointwise_backward_calls(dtype):
    for n, c, e, h, w in POINTWISE:
        weight, gate = (torch.randn(e, c, 1, 1) / c**0.5).to(dtype), torch.rand(n, c)
        x, residual = map_(dtype, n, c, h, w), map_(dtype, n, c, h, w)
        for y_act, act in zip(ACTS, reversed(ACTS), strict=True):
            up = map_(dtype, n, e, h, w), map_(dtype, n, e, h, w), table(e), coefficients(e), y_act, None
            if y_act == 2:
                yield None, *up[1:-1], torch.randn(n, e), x, weight, table(c), act, None, None, True, True, True
            yield *up, x, weight, table(c), act, gate if act % 2 else None, None, True, True, act < 2
        yield *up, x, weight, None, 0, None, residual, True, True, True
    yield *up, x, weight, table(c), 2, gate, None, True, False, True
    yield *up, x, weight, table(c), 2, gate, None, False, True, False
    yield *up, x, weight, table(c), 2, None, None, False, True, True
    yield *up, x, weight, None, 0, None, None, True, False, False
    yield *up, x, weight, None, 0, None, None, False, False, True


def depthwise_calls(dtype):
    for i, (n, c, h, w, k, stride) in enumerate(DEPTHWISE):
        x, weight = map_(dtype, n, c, h, w), (torch.randn(c, 1, k, k) / k).to(dtype)
        yield x, weight, table(c), i % 4, stride, True
        yield x, weight, None, 0, stride, i % 2 == 0


def depthwise_backward_calls(dtype):
    for i, (n, c, h, w, k, stride) in enumerate(DEPTHWISE):
        x, weight = map_(dtype, n, c, h, w), (torch.randn(c, 1, k, k) / k).to(dtype)
        out = n, c, schema.depthwise_size(h, stride), schema.depthwise_size(w, stride)
        gate, offset = torch.rand(n, c), torch.randn(n, c)
        up = map_(dtype, *out), map_(dtype, *out), table(c), coefficients(c)
        if i % 2:
            yield *up, i, None, None, x, weight, table(c), (i + 2) % 4, stride, None, True, True
            yield *up, 2, gate, offset, x, weight, None, 0, stride, map_(dtype, *x.shape), True, False
        else:
            yield *up, 3 - i % 4, gate, offset, x, weight, table(c), i % 4, stride, None, True, True
            yield *up, 1, None, None, x, weight, None, 0, stride, None, False, True


def normalize_calls(dtype):
    for (n, c, _, h, w), act in itertools.product(POINTWISE, ACTS):
        yield map_(dtype, n, c, h, w), table(c), act, map_(dtype, n, c, h, w) if act % 2 else None


def normalize_backward_calls(dtype):
    for (n, c, _, h, w), act in itertools.product(POINTWISE, ACTS):
        yield map_(dtype, n, c, h, w), map_(dtype, n, c, h, w), table(c), act


def squeeze_calls(dtype):
    for (n, c, _, h, w), act in itertools.product(POINTWISE, ACTS):
        yield map_(dtype, n, c, h, w), table(c), act


def finalize_calls(dtype):
    for c, count in ((1, 2), (300, 1000)):
        moments = torch.stack([torch.randn(c), torch.rand(c)])
        yield moments, torch.randn(c), torch.randn(c), 1e-3, count
        yield moments, None, torch.randn(c), 1e-5, 1
        yield moments, torch.randn(c), None, 1e-5, count


def finalize_backward_calls(dtype):
    for c, stats in itertools.product((1, 300), (True, False)):
        yield torch.randn(2, c), table(c), 57, stats


# an image of any strides: NCHW, channels_last, a slice; of one position and of several tiles
STEM = [(1, 1, 1, 1, 1, 2), (2, 3, 7, 9, 8, 2), (3, 4, 20, 5, 6, 1), (1, 8, 5, 4, 3, 1)]


def images(dtype, n, c, h, w):
    image = torch.randn(n, c, h, w).to(dtype)
    yield image
    yield image.contiguous(memory_format=torch.channels_last)
    yield torch.randn(n, h, 2 * w + 1, c + 1).to(dtype)[:, :, 1::2, 1:].permute(0, 3, 1, 2)


def stem_calls(dtype):
    for n, c, e, h, w, stride in STEM:
        for i, x in enumerate(images(dtype, n, c, h, w)):
            yield x, (torch.randn(e, c, 3, 3) / (9 * c) ** 0.5).to(dtype), stride, i < 2


def stem_backward_calls(dtype):
    for n, c, e, h, w, stride in STEM:
        out = n, e, schema.depthwise_size(h, stride), schema.depthwise_size(w, stride)
        for i, x in enumerate(images(dtype, n, c, h, w)):
            up = map_(dtype, *out), map_(dtype, *out), table(e), coefficients(e), (n + i) % 5
            yield *up, x, stride, i > 0, i < 2


def grams(channels, dtype):
    """A map whose second channel is constant and whose third is far from 0, where there are so many."""
    n, h, w = 3, 5, 7
    x = torch.randn(n, channels, h, w) * torch.rand(channels, 1, 1) + torch.randn(channels, 1, 1)
    if channels > 2:
        x[:, 1], x[:, 2] = 1.3, x[:, 2] + 30
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def gram_calls(dtype):
    for c in (1, 5, 16, 40):
        yield (grams(c, dtype),)


def normalize_gram_calls(dtype):
    for c, act in ((1, 0), (5, 2), (40, 3)):
        y = grams(c, dtype)
        yield y, table(c), act, torch.randn(y.shape).to(dtype).contiguous(memory_format=torch.channels_last)
        yield y, table(c), act, None


def expand_finalize_calls(dtype):
    for c, e in ((1, 1), (5, 19), (40, 7)):
        x, weight = grams(c, dtype), (torch.randn(e, c, 1, 1) / c**0.5).to(dtype)
        gram = reference.gram(x)
        yield gram, weight, torch.randn(e), torch.randn(e), 1e-3, 105
        yield gram, weight, None, torch.randn(e), 1e-5, 1
        yield gram, weight, torch.randn(e), None, 1e-5, 105


def expand_depthwise_calls(dtype):
    for i, (n, e, h, w, k, stride) in enumerate(DEPTHWISE):
        for c in (3, 20):
            x, shift = map_(dtype, n, c, h, w), torch.where(torch.rand(c) < 0.5, 0.0, torch.randn(c).to(dtype).float())
            expand = (torch.randn(e, c, 1, 1) / c**0.5).to(dtype)
            weight = (torch.randn(e, 1, k, k) / k).to(dtype)
            yield x, shift, expand, table(e), (i + c) % 5, weight, stride, c > 3 or i % 2 == 0


CALLS = {
    name: globals()[f"{name}_calls"]
    for name in schema.NAMES
    if name in backends.implemented("triton") and name != "update_running_stats"
}
