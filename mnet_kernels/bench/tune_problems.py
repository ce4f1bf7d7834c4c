"""What the search for Triton configurations runs: calls of stages on layers of this package's models.

A row of the table serves a shape class, so it is timed on a few layers of that class, from the largest maps to the
smallest, and judged on the same layers with fewer images.  The pass rule: relative L2 and largest error against the
reference stage in float64, as geometric means over layers and draws, at most twice those of torch's own ops in the
storage dtype plus a unit in the last place.
"""

import math

import torch
import torch.nn.functional as F

from ..backends.native import ACTIVATIONS
from ..backends.triton import configs
from ..schema import ACTIVATIONS as NAMES
from ..schema import IDENTITY, depthwise_size
from . import shapes

LAYERS = 4  # of a shape class
CHECK_IMAGES = 16  # enough for programs that walk over several tiles, and little memory in float64
DRAWS = 2  # of what is checked: one draw's rounding scatters
EPS = 1e-5
EXPANSION = 6  # of an expand layer, where only the depthwise one behind it is at hand
KINKS = (-3.0, 0.0, 3.0, 6.0)
SMALLEST = 1e-30


def layers(names=None, resolution=224):
    """The distinct convolutions of the models, and the last one of every block: (layer, whether it ends a block)."""
    found = {}
    for block in shapes.blocks(names, 1.0, resolution):
        rows = shapes.record(block.module, block.shape)[0]
        for layer in rows:
            # layers that differ in the activation alone move the same bytes
            key = layer._replace(act=None)
            found[key] = found.get(key, (layer, False))[0], found.get(key, (layer, False))[1] or layer is rows[-1]
    return list(found.values())


def of_class(kernel, shape, known, count=LAYERS):
    """``count`` layers that a row of the table serves, evenly from the one that moves most to the one with least."""
    classes = {
        "pointwise": lambda layer: configs.width_class(layer.out_channels),
        "pointwise_dgrad": lambda layer: configs.width_class(layer.channels),
        "pointwise_wgrad": lambda layer: configs.width_class(layer.channels, layer.out_channels),
    }
    if kernel == "elementwise":
        fitting = [layer for layer, last in known if last]
    elif kernel.startswith("stem"):
        fitting = [layer for layer, _ in known if layer.kind == "dense"]
    elif kernel == "gram":  # of the inputs of expand layers
        fitting = [layer for layer, _ in known if layer.kind == "pointwise" and layer.act is None]
        fitting = [layer for layer in fitting if configs.width_class(layer.channels) == shape]
    elif kernel in classes:
        fitting = [layer for layer, _ in known if layer.kind == "pointwise" and classes[kernel](layer) == shape]
    else:
        fitting = [layer for layer, _ in known if layer.kind == "depthwise" and f"k{layer.kernel}" == shape]
    order = sorted(fitting, key=_values, reverse=True)
    if len(order) <= count:
        return order
    return [order[round(i * (len(order) - 1) / max(count - 1, 1))] for i in range(count)]


def _output(layer):
    return layer.out_channels, depthwise_size(layer.height, layer.stride), depthwise_size(layer.width, layer.stride)


def _values(layer):
    return math.prod(_output(layer)) + layer.channels * layer.height * layer.width


class Draw:
    """Random tensors, drawn on the device that they are for."""

    def __init__(self, device, dtype, images, seed=0):
        self.device, self.dtype, self.images = device, dtype, images
        self.generator = torch.Generator(device).manual_seed(seed)

    def _normal(self, *shape):
        return torch.randn(shape, device=self.device, generator=self.generator)

    def image(self, *shape):
        """As data loaders give it: NCHW."""
        return self._normal(self.images, *shape).to(self.dtype)

    def map(self, *shape):
        return self.image(*shape).contiguous(memory_format=torch.channels_last)

    def weight(self, layer):
        inputs = 1 if layer.kind == "depthwise" else layer.channels
        return self.weight_of(layer.out_channels, inputs, layer.kernel, layer.kernel)

    def weight_of(self, *shape):
        return (self._normal(*shape) / math.prod(shape[1:]) ** 0.5).to(self.dtype)

    def vector(self, *shape):
        return torch.rand(shape, device=self.device, generator=self.generator) + 0.5

    def table(self, y):
        """bn [5, C] of a map."""
        channels = y.shape[1]
        moments = torch.stack([y.float().mean((0, 2, 3)), y.float().var((0, 2, 3), correction=0)])
        return torch.ops.mnet_ref.finalize(
            moments, self.vector(channels), self.vector(channels), EPS, y.numel() // channels
        )


def calls(kernel, layer, new):
    """[(stage, arguments)] that launch a kernel, and of the tuned ones no other, on a layer."""
    if kernel == "elementwise":
        grad, y = new.map(*_output(layer)), new.map(*_output(layer))
        bn = new.table(y)
        return [
            ("normalize", (y, bn, IDENTITY, None)),
            ("normalize_backward", (grad, y, bn, IDENTITY)),
            ("squeeze", (y, bn, IDENTITY)),
        ]
    if kernel in _OTHERS:
        return _OTHERS[kernel](layer, new)
    x, weight = new.map(layer.channels, layer.height, layer.width), new.weight(layer)
    bn, act = (None, IDENTITY) if layer.act is None else (new.table(x), NAMES.index(layer.act))
    if bn is not None and new.dtype == torch.float32:
        _avoid_kinks(x, bn)
    if kernel == "pointwise":
        return [("pointwise", (x, weight, bn, act, None, True))]
    if kernel == "depthwise":
        return [("depthwise", (x, weight, bn, act, layer.stride, True))]
    grad, y = new.map(*_output(layer)), new.map(*_output(layer))
    upstream = (grad, y, new.table(y), new.vector(2, layer.out_channels), IDENTITY)
    if kernel == "depthwise_backward":
        rest = (None, None, x, weight, bn, act, layer.stride, None, True, True)
        return [("depthwise_backward", upstream + rest)]
    needs = (True, True, False) if kernel == "pointwise_dgrad" else (False, False, True)
    return [("pointwise_backward", upstream + (None, x, weight, bn, act, None, None) + needs)]


def _stem_calls(layer, new):
    return [("stem", (new.image(layer.channels, layer.height, layer.width), new.weight(layer), layer.stride, True))]


def _stem_backward_calls(layer, new):
    grad, y = new.map(*_output(layer)), new.map(*_output(layer))
    x, coef = new.image(layer.channels, layer.height, layer.width), new.vector(2, layer.out_channels)
    return [("stem_backward", (grad, y, new.table(y), coef, IDENTITY, x, layer.stride, False, True))]


def _gram_calls(layer, new):
    x = new.map(layer.channels, layer.height, layer.width)
    return [("gram", (x,)), ("normalize_gram", (x, new.table(x), IDENTITY, None))]


def _expand_depthwise_calls(layer, new):
    inputs, act = max(1, layer.channels // EXPANSION), IDENTITY if layer.act is None else NAMES.index(layer.act)
    x = new.map(inputs, layer.height, layer.width)
    gram, expand = torch.ops.mnet_ref.gram(x), new.weight_of(layer.channels, inputs, 1, 1)
    gamma, beta, count = new.vector(layer.channels), new.vector(layer.channels), x.numel() // inputs
    bn, _ = torch.ops.mnet_ref.expand_finalize(gram, expand, gamma, beta, EPS, count)
    return [("expand_depthwise", (x, gram[-1].clone(), expand, bn, act, new.weight(layer), layer.stride, True))]


_OTHERS = {
    "stem": _stem_calls,
    "stem_backward": _stem_backward_calls,
    "gram": _gram_calls,
    "expand_depthwise": _expand_depthwise_calls,
}


def _avoid_kinks(x, bn):
    """Move values off an activation's kinks: one derivative on the other side would outweigh all rounding."""
    u = x * bn[0].view(1, -1, 1, 1) + bn[1].view(1, -1, 1, 1)
    near = torch.zeros_like(u, dtype=torch.bool)
    for kink in KINKS:
        near |= (u - kink).abs() < 1e-3
    x += near * 0.01


# ---- the pass rule --------------------------------------------------------------------------------------------------


def _affine(x, bn):
    return (x.float() * bn[0].view(1, -1, 1, 1) + bn[1].view(1, -1, 1, 1)).to(x.dtype)


def _activated(x, bn, act):
    return x if bn is None else ACTIVATIONS[NAMES[act]](_affine(x, bn))


def _sums(g, y, bn):
    g = g.float()
    return torch.stack([g.sum((0, 2, 3)), (g * (y.float() - bn[2].view(1, -1, 1, 1))).sum((0, 2, 3))])


def _forward(x, weight, bn, act, stride):
    groups = weight.shape[0] if weight.shape[-1] > 1 and weight.shape[1] == 1 else 1
    y = F.conv2d(_activated(x, bn, act), weight, None, stride, weight.shape[-1] // 2, 1, groups)
    return y, torch.stack([y.float().mean((0, 2, 3)), y.float().var((0, 2, 3), correction=0)])


def _backward(grad, y, y_bn, coef, x, weight, bn, act, stride, wants):
    b, c, mean, scale = (v.view(1, -1, 1, 1) for v in (coef[0], coef[1], y_bn[2], y_bn[0]))
    dy = (scale * grad.float() + b * (y.float() - mean) + c).to(y.dtype)
    pad, groups = weight.shape[-1] // 2, weight.shape[0] if weight.shape[-1] > 1 and weight.shape[1] == 1 else 1
    gx, dw, _ = torch.ops.aten.convolution_backward(
        dy,
        _activated(x, bn, act),
        weight,
        None,
        [stride] * 2,
        [pad] * 2,
        [1, 1],
        False,
        [0, 0],
        groups,
        [*wants, False],
    )
    if bn is None or not wants[0]:
        return gx, None, dw
    u = _affine(x, bn).requires_grad_()
    with torch.enable_grad():
        z = ACTIVATIONS[NAMES[act]](u)
    (gx,) = torch.autograd.grad(z, u, gx)
    return gx, _sums(gx, x, bn), dw


def _gram(x):
    v = x.float().transpose(0, 1).flatten(1)
    mean = v.mean(1, keepdim=True)
    d = v - mean
    # no channel of a draw is far from 0: no shift
    return torch.cat([d @ d.T / v.shape[1], mean.T, torch.zeros_like(mean.T)])


def torchs(stage, args):
    """A call of :func:`calls` by torch's own ops in the storage dtype: what a configuration's error is measured by."""
    if stage == "pointwise":
        return _forward(*args[:4], 1)
    if stage == "depthwise":
        return _forward(*args[:5])
    if stage == "pointwise_backward":
        return _backward(*args[:4], *args[6:10], 1, (args[-3], args[-1]))
    if stage == "depthwise_backward":
        return _backward(*args[:4], *args[7:12], (args[-2], args[-1]))
    if stage == "stem":
        return _forward(*args[:2], None, IDENTITY, args[2])
    if stage == "stem_backward":
        x, weight = args[5], args[5].new_empty(args[1].shape[1], args[5].shape[1], 3, 3)
        return (None, _backward(*args[:4], x, weight, None, IDENTITY, args[6], (False, True))[2])
    if stage == "gram":
        return (_gram(args[0]),)
    if stage == "normalize_gram":
        out = _affine(*args[:2])
        return out, _gram(out)
    if stage == "expand_depthwise":
        x, shift, expand, bn, act, weight, stride, _ = args
        y = F.conv2d((x.float() - shift.view(1, -1, 1, 1)).to(x.dtype), expand)
        return _forward(y, weight, bn, act, stride)
    if stage == "normalize":
        return (_affine(*args[:2]),)
    if stage == "normalize_backward":
        return (_sums(*args[:3]),)
    y, bn = args[:2]
    u, one = _affine(y, bn), torch.ones_like(y).float()
    centred = (y.float() - bn[2].view(1, -1, 1, 1)).sum((2, 3))
    return (torch.stack([u.mean((2, 3)).float(), one.sum((2, 3)), centred]),)


def _errors(got, exact):
    got, difference = got.double(), got.double() - exact
    return (difference.norm() / exact.norm().clamp(min=SMALLEST)).item(), difference.abs().max().item()


def _units(dtype, exact):
    """What one unit in the last place comes to in each of the errors."""
    eps, (_, exponent) = torch.finfo(dtype).eps, torch.frexp(exact.abs().max().clamp(min=SMALLEST))
    return eps / 2, eps * 2.0 ** (exponent.item() - 1)


def _results(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


class Judge:
    """The pass rule over a list of calls; ``run(stage, arguments)`` is what is judged."""

    def __init__(self, dtype, checks):
        self._checks = []
        for stage, args in checks:
            exact = _results(getattr(torch.ops.mnet_ref, stage)(*map(_double, args)))
            own = torchs(stage, args)
            wanted = [
                (k, ref, _errors(low, ref), _units(dtype, ref))
                for k, (ref, low) in enumerate(zip(exact, own, strict=False))
                if ref.numel()
            ]
            self._checks.append((stage, args, wanted))

    def right(self, run):
        """Whether every result keeps to the rule."""
        found = {}
        for stage, args, wanted in self._checks:
            out = _results(run(stage, args))
            for k, exact, own, units in wanted:
                if out[k].shape != exact.shape:
                    return False
                rows = zip(_errors(out[k], exact), own, units, strict=True)
                for kind, row in enumerate(rows):
                    found.setdefault((stage, k, kind), []).append(row)
        return all(_keeps(*map(_geometric_mean, zip(*rows, strict=True))) for rows in found.values())


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def _geometric_mean(values):
    if not all(map(math.isfinite, values)):
        return math.inf
    return math.exp(sum(math.log(max(value, SMALLEST)) for value in values) / len(values))


def _keeps(ours, torchs, unit):
    return ours <= 2 * torchs + unit and math.isfinite(ours)
