"""Rows of convolution, batch norm and activation to fold: the structures of tests/test_fold_rows.py."""

import copy
import random
from typing import NamedTuple

import torch
from networks import randomise
from precision import Judge
from torch import nn

import mnet_kernels as mk

KERNEL_ACTIVATIONS = {
    "identity": None, "relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish, "silu": nn.SiLU,
}  # fmt: skip
OTHER_ACTIVATIONS = {
    "gelu": nn.GELU, "sigmoid": nn.Sigmoid, "hardtanh": lambda: nn.Hardtanh(-0.7, 1.3), "leaky": nn.LeakyReLU,
}  # fmt: skip
ACTIVATIONS = KERNEL_ACTIVATIONS | OTHER_ACTIVATIONS
KINDS = ("pointwise", "depthwise", "dense")
LETTERS = [(kind, act) for kind in KINDS for act in ACTIVATIONS]
FORMS = ("flat", "nested", "pairs")  # how layers lie in an nn.Sequential
WIDTHS = (5, 16, 13, 8, 21, 3)


class Layer(NamedTuple):
    kind: str
    act: str
    kernel: int = 3  # a pointwise layer has 1
    stride: int = 1
    padding: int | None = None  # None: half the kernel
    dilation: int = 1
    bias: bool = False

    def __str__(self):
        odd = (
            [f"p{self.padding}"] * (self.padding is not None) + ["dilated"] * (self.dilation > 1) + ["bias"] * self.bias
        )
        kernel = 1 if self.kind == "pointwise" else self.kernel
        return "-".join((self.kind, self.act, f"k{kernel}s{self.stride}", *odd))


def modules(layer, i, o):
    """[convolution, batch norm] and the activation, where there is one."""
    kernel = 1 if layer.kind == "pointwise" else layer.kernel
    padding = layer.dilation * (kernel // 2) if layer.padding is None else layer.padding
    groups = i if layer.kind == "depthwise" else 1
    conv = nn.Conv2d(i, o, kernel, layer.stride, padding, layer.dilation, groups, layer.bias)
    act = ACTIVATIONS[layer.act]
    return [conv, nn.BatchNorm2d(o, eps=1e-3), *([] if act is None else [act()])]


def row(layers, form="flat", widths=WIDTHS, image=None):
    """A Sequential of these layers; the first takes ``image`` channels where it is given."""
    parts, i = [], image or widths[0]
    for at, layer in enumerate(layers):
        o = i if layer.kind == "depthwise" else widths[(at + 1) % len(widths)]
        parts.append(modules(layer, i, o))
        i = o
    if form == "flat":
        return nn.Sequential(*(m for part in parts for m in part))
    if form == "pairs":
        parts = [[m for part in parts[at : at + 2] for m in part] for at in range(0, len(parts), 2)]
    return nn.Sequential(*(nn.Sequential(*part) for part in parts))


def channels(model):
    """Of the image that it takes."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    return first.weight.shape[1] * first.groups


def walk(seed):
    """Every letter after every other and after itself, once: a closed walk over all pairs."""
    rng, left = random.Random(seed), {}
    for a in LETTERS:
        left[a] = list(LETTERS)
        rng.shuffle(left[a])
    stack, path = [LETTERS[0]], []
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            path.append(stack.pop())
    return path[::-1]


def rows_of_all_pairs(seed, length=5):
    """Rows of ``length`` letters in which each pair of neighbours occurs, and rows for each letter at each place."""
    path = walk(seed)
    found = [path[at : at + length] for at in range(0, len(path) - 1, length - 1)]
    for place in range(length):
        there = {r[place] for r in found if len(r) > place}
        for letter in LETTERS:
            if letter not in there:
                others = [LETTERS[(LETTERS.index(letter) + 7 * k) % len(LETTERS)] for k in range(1, length)]
                found.append([*others[:place], letter, *others[place:]])
    return found


def dressed(letters, rng):
    """Layers of these letters with kernels 1, 3 and 5, strides 1 and 2 (at most two of those), now and then another
    padding, a dilation or a bias."""
    layers, strided = [], 0
    for kind, act in letters:
        stride = 2 if strided < 2 and rng.random() < 0.25 else 1
        strided += stride == 2
        kernel = rng.choice((1, 3, 3, 5, 5)) if kind == "depthwise" else rng.choice((3, 3, 3, 5))
        padding = rng.choice((None, None, None, None, None, kernel // 2 + 1))
        dilation = 2 if kind != "pointwise" and rng.random() < 0.05 else 1
        if kind == "pointwise":
            padding = None
        layers.append(Layer(kind, act, kernel, stride, padding, dilation, rng.random() < 0.2))
    return layers


def only_kernels(counts):
    """Whether CPU kernels ran, and nothing on plain torch in their place."""
    return bool(counts) and all(label.startswith("mnet_cpu::") for label in counts)


def judge(model, size=(2, 9, 8), draws=4, must_run=False):
    """``fold(model, fused=True)`` in float32 by the pass rule: torch's error is the plain copy's, the reference the
    model itself in float64."""
    verdict = Judge(torch.float32)
    model.eval()
    n, h, w = size
    for _ in range(draws):
        randomise(model)
        plain, fused, exact = mk.fold(model), mk.fold(model, fused=True), copy.deepcopy(model).double()
        x = torch.randn(n, channels(model), h, w)
        with torch.no_grad():
            with mk.count_stages() as counts:
                ours = fused(x)
            want = exact(x.double())
            assert ours.shape == want.shape and ours.dtype == torch.float32
            verdict.add("out", ours, plain(x), want)
        if must_run:
            assert only_kernels(counts), dict(counts)
    verdict.verdict()
