"""Single stages against the torch layers they stand for.

A stage is cut elsewhere than torch's layers: a fused convolution normalises what it reads and takes the moments of what
it writes.  Native is measured as batch norm (statistics included) and activation of the input, then the convolution:
over a block the sums of both columns are the whole block, while a single row may lean to one side (``normalize`` to the
fused one, a block's first convolution, which reads no batch norm, to the native one).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import backends
from ..backends.native import ACTIVATIONS
from ..schema import ACTIVATIONS as NAMES
from ..schema import IDENTITY, accumulate_dtype, depthwise_size
from ..stages import stage
from . import BenchError, providers, shapes
from .subjects import Workload

EPS = 1e-5


class Tensors:
    """Random tensors of one subject, in a setting's dtype and a provider's layout, drawn as they are asked for."""

    def __init__(self, setting, channels_last):
        self.setting, self.channels_last = setting, channels_last
        self.generator = torch.Generator().manual_seed(0)

    def map(self, channels, height, width):
        shape = (self.setting.batch, channels, height, width)
        t = torch.randn(shape, generator=self.generator).to(self.setting.device, self.setting.storage)
        return t.contiguous(memory_format=torch.channels_last) if self.channels_last else t

    def weight(self, *shape):
        t = torch.randn(shape, generator=self.generator) / torch.Size(shape[1:]).numel() ** 0.5
        return t.to(self.setting.device, self.setting.storage)

    def vector(self, *shape):
        """Positive numbers around 1, in the accumulate dtype."""
        t = torch.rand(shape, generator=self.generator) + 0.5
        return t.to(self.setting.device, accumulate_dtype(self.setting.storage))

    def table(self, y):
        """bn [5, C] of a map with random gamma and beta, as the stages take it."""
        c = y.shape[1]
        v = y.to(accumulate_dtype(y.dtype))
        moments = torch.stack([v.mean((0, 2, 3)), v.var((0, 2, 3), correction=0)])
        return torch.ops.mnet_ref.finalize(moments, self.vector(c), self.vector(c), EPS, y.numel() // c)


def _normalized(y, gamma, beta, act):
    return ACTIVATIONS[act](F.batch_norm(y, None, None, gamma, beta, True, 0.0, EPS))


def _convolution(x, weight, stride):
    groups = weight.shape[0] if weight.shape[1] == 1 and weight.shape[-1] > 1 else 1
    return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)


@dataclass(frozen=True)
class Stage:
    """One row of measurements; subclasses give the tensors, the fused stages and the native layers."""

    layers: tuple  # of the block, from the stage's first on

    level = "stage"
    stages = ()  # what a backend must have to run it
    backward = False

    @property
    def directions(self):
        return ("backward",) if self.backward else ("forward",)

    def runs_on(self, provider):
        """Whether a provider has every kernel of this stage."""
        return provider.backend == "native" or set(self.stages) <= backends.implemented(provider.backend)

    def shape_of_output(self, layer):
        return layer.out_channels, depthwise_size(layer.height, layer.stride), depthwise_size(layer.width, layer.stride)

    def shape_of_input(self, layer):
        return layer.channels, layer.height, layer.width

    @property
    def name(self):
        """Stages, input size, layers and the activation read through."""
        size = "x".join(map(str, self.shape_of_input(self.layers[0])))
        return f"{'+'.join(self.stages)} {size} {' '.join(map(str, self.layers))} {self.layers[0].act or ''}".strip()

    def bytes(self, setting):
        """Bytes the stage must move: every map it reads or writes, once."""
        size = torch.finfo(setting.storage).bits // 8
        return setting.batch * size * sum(c * h * w for c, h, w in self.maps())

    def flops(self, setting):
        """Arithmetic of its convolutions (a multiply-add counts two), all gradients included."""
        total = 0
        for layer in self.convolutions():
            c, h, w = self.shape_of_output(layer)
            total += 2 * c * h * w * layer.kernel**2 * (1 if layer.kind == "depthwise" else layer.channels)
        return total * setting.batch * (2 if self.backward else 1)

    def convolutions(self):
        return self.layers[:1]

    def prepare(self, provider, setting):
        new = Tensors(setting, provider.channels_last)
        if provider.backend == "native":
            return Workload({self.directions[0]: self._native_call(new, provider)})
        if not self.runs_on(provider):
            raise BenchError(f"{provider.backend} lacks a kernel of {'+'.join(self.stages)}")
        fused = self.fused(new, stage(provider.backend))

        def call():
            with torch.no_grad():
                fused()

        return Workload({self.directions[0]: call})

    def _native_call(self, new, provider):
        function, arguments = self.native(new)
        function = providers.compiled(function, provider)
        if not self.backward:

            def forward():
                with torch.no_grad():
                    function(*arguments)

            return forward
        leaves = [t.requires_grad_() for t in arguments if t is not None]
        # the graph is kept for the next call, so compiled code may not reuse the saved tensors' memory
        with torch._functorch.config.patch(donated_buffer=False):
            out = function(*arguments)
            upstream = torch.empty_like(out).copy_(torch.randn(out.shape, generator=new.generator))

            def backward():
                torch.autograd.grad(out, leaves, upstream, retain_graph=True)

            backward()
        return backward


class Convolution(Stage):
    """``pointwise`` or ``depthwise``."""

    @property
    def stages(self):
        return (self.layers[0].kind,)

    def maps(self):
        return [self.shape_of_input(self.layers[0]), self.shape_of_output(self.layers[0])]

    def _weight(self, new):
        layer = self.layers[0]
        inner = 1 if layer.kind == "depthwise" else layer.channels
        return new.weight(layer.out_channels, inner, layer.kernel, layer.kernel)

    def fused(self, new, table):
        layer = self.layers[0]
        x, weight = new.map(*self.shape_of_input(layer)), self._weight(new)
        bn = None if layer.act is None else new.table(x)
        act = IDENTITY if layer.act is None else NAMES.index(layer.act)
        if layer.kind == "pointwise":
            return lambda: table.pointwise(x, weight, bn, act, None, True)
        return lambda: table.depthwise(x, weight, bn, act, layer.stride, True)

    def native(self, new):
        layer = self.layers[0]
        x, weight = new.map(*self.shape_of_input(layer)), self._weight(new)
        if layer.act is None:
            return (lambda x, weight: _convolution(x, weight, layer.stride)), (x, weight)

        def function(x, weight, gamma, beta):
            return _convolution(_normalized(x, gamma, beta, layer.act), weight, layer.stride)

        return function, (x, weight, new.vector(layer.channels), new.vector(layer.channels))


class ConvolutionBackward(Convolution):
    """``pointwise_backward`` or ``depthwise_backward``: gradients of input and weight."""

    backward = True

    @property
    def stages(self):
        return (f"{self.layers[0].kind}_backward",)

    def maps(self):
        layer = self.layers[0]
        return [self.shape_of_output(layer)] * 2 + [self.shape_of_input(layer)] * 2

    def fused(self, new, table):
        layer = self.layers[0]
        x, weight = new.map(*self.shape_of_input(layer)), self._weight(new)
        grad, y = (new.map(*self.shape_of_output(layer)) for _ in range(2))
        bn = None if layer.act is None else new.table(x)
        act = IDENTITY if layer.act is None else NAMES.index(layer.act)
        upstream = (grad, y, new.table(y), new.vector(2, layer.out_channels), IDENTITY)
        if layer.kind == "pointwise":
            tail = (None, x, weight, bn, act, None, None, True, True, True)
            return lambda: table.pointwise_backward(*upstream, *tail)
        tail = (None, None, x, weight, bn, act, layer.stride, None, True, True)
        return lambda: table.depthwise_backward(*upstream, *tail)


class Stem(Convolution):
    """``stem``: the dense convolution of the image."""

    stages = ("stem",)

    def fused(self, new, table):
        layer = self.layers[0]
        x, weight = new.map(*self.shape_of_input(layer)), self._weight(new)
        return lambda: table.stem(x, weight, layer.stride, True)


class StemBackward(Stem):
    """``stem_backward``: the gradient of the weight; the image needs none."""

    stages = ("stem_backward",)
    backward = True

    def maps(self):
        layer = self.layers[0]
        return [self.shape_of_output(layer)] * 2 + [self.shape_of_input(layer)]

    def flops(self, setting):
        return super().flops(setting) // 2  # one product, not two

    def fused(self, new, table):
        layer = self.layers[0]
        x = new.map(*self.shape_of_input(layer))
        grad, y = (new.map(*self.shape_of_output(layer)) for _ in range(2))
        upstream = (grad, y, new.table(y), new.vector(2, layer.out_channels), IDENTITY)
        return lambda: table.stem_backward(*upstream, x, layer.stride, False, True)

    def native(self, new):
        layer = self.layers[0]
        x, weight = new.map(*self.shape_of_input(layer)), self._weight(new)
        return (lambda weight: _convolution(x, weight, layer.stride)), (weight,)


class Normalize(Stage):
    """``normalize`` of a project layer's output."""

    stages = ("normalize",)

    @property
    def name(self):
        return f"{self.stages[0]} {'x'.join(map(str, self.shape_of_output(self.layers[0])))}"

    def maps(self):
        return [self.shape_of_output(self.layers[0])] * 2

    def convolutions(self):
        return ()

    def fused(self, new, table):
        y = new.map(*self.shape_of_output(self.layers[0]))
        bn = new.table(y)
        return lambda: table.normalize(y, bn, IDENTITY, None)

    def native(self, new):
        y = new.map(*self.shape_of_output(self.layers[0]))
        c = y.shape[1]
        return (lambda y, gamma, beta: _normalized(y, gamma, beta, "identity")), (y, new.vector(c), new.vector(c))


class NormalizeBackward(Normalize):
    """``normalize_backward``: the sums over the block's upstream gradient."""

    stages = ("normalize_backward",)
    backward = True

    def fused(self, new, table):
        grad, y = (new.map(*self.shape_of_output(self.layers[0])) for _ in range(2))
        bn = new.table(y)
        return lambda: table.normalize_backward(grad, y, bn, IDENTITY)


class ExpandDepthwise(Stage):
    """Algebraic mode's forward of expand and depthwise: ``gram``, ``expand_finalize``, ``expand_depthwise``."""

    stages = ("gram", "expand_finalize", "expand_depthwise")

    def maps(self):
        return [self.shape_of_input(self.layers[0])] * 2 + [self.shape_of_output(self.layers[1])]

    def convolutions(self):
        return self.layers[:2]

    def _leaves(self, new):
        expand, depthwise = self.layers[:2]
        e = expand.out_channels
        x = new.map(*self.shape_of_input(expand))
        w1, w2 = new.weight(e, expand.channels, 1, 1), new.weight(e, 1, depthwise.kernel, depthwise.kernel)
        return x, w1, new.vector(e), new.vector(e), w2

    def _count(self, x):
        return x.numel() // x.shape[1]

    def fused(self, new, table):
        x, w1, gamma, beta, w2 = self._leaves(new)
        depthwise = self.layers[1]
        act = NAMES.index(depthwise.act)

        def call():
            gram = table.gram(x)
            bn, _ = table.expand_finalize(gram, w1, gamma, beta, EPS, self._count(x))
            table.expand_depthwise(x, gram[-1], w1, bn, act, w2, depthwise.stride, True)

        return call

    def native(self, new):
        depthwise = self.layers[1]

        def function(x, w1, gamma, beta, w2):
            return _convolution(_normalized(_convolution(x, w1, 1), gamma, beta, depthwise.act), w2, depthwise.stride)

        return function, self._leaves(new)


class ExpandDepthwiseBackward(ExpandDepthwise):
    """Algebraic mode's backward from the project layer's input down: B2, its coefficients and the mix (B3)."""

    stages = ("expand_depthwise_backward", "expand_finalize_backward", "expand_mix")
    backward = True

    def maps(self):
        x, y2, y3 = self.shape_of_input(self.layers[0]), *map(self.shape_of_output, self.layers[1:3])
        return [y3, y3, y2, x, x] + [x, x, x]

    def _project(self, new):
        project = self.layers[2]
        return new.weight(project.out_channels, project.channels, 1, 1)

    def fused(self, new, table):
        x, w1, gamma, beta, w2 = self._leaves(new)
        w3, depthwise, project = self._project(new), *self.layers[1:3]
        grad, y3 = (new.map(*self.shape_of_output(project)) for _ in range(2))
        y2 = new.map(*self.shape_of_output(depthwise))
        gram = torch.ops.mnet_ref.gram(x)
        bn, _ = torch.ops.mnet_ref.expand_finalize(gram, w1, gamma, beta, EPS, self._count(x))
        upstream = (grad, y3, new.table(y3), new.vector(2, project.out_channels), IDENTITY, w3, None, None)
        act1, act2 = NAMES.index(depthwise.act), NAMES.index(project.act)
        middle = (y2, new.table(y2), new.vector(2, depthwise.channels), act2)
        last = (x, gram[-1], w1, bn, act1, w2, depthwise.stride, True, True)

        def call():
            dx, gramgrad, _ = table.expand_depthwise_backward(*upstream, *middle, *last)
            mix = table.expand_finalize_backward(gramgrad, gram, gram[-1], bn, w1, self._count(x))[3]
            table.expand_mix(dx, x, gram[-1], mix, None)

        return call

    def native(self, new):
        below, leaves = super().native(new)
        project, w3 = self.layers[2], self._project(new)

        def function(x, w1, gamma, beta, w2, gamma2, beta2):
            z2 = _normalized(below(x, w1, gamma, beta, w2), gamma2, beta2, project.act)
            return _convolution(z2, w3, 1)

        return function, (*leaves, new.vector(project.channels), new.vector(project.channels))


def stages(names=None, width=1.0, resolution=224):
    """The distinct stages of the models' blocks: convolutions, then the ends of blocks, then algebraic mode's."""
    found = {}

    def add(cls, *layers):
        row = cls(layers)
        found.setdefault(row.name, row)

    records = [shapes.record(block.module, block.shape)[0] for block in shapes.blocks(names, width, resolution)]
    for rows in records:
        for layer in rows:
            stem = layer.kind == "dense"
            add(Stem if stem else Convolution, layer)
            add(StemBackward if stem else ConvolutionBackward, layer)
    for rows in records:
        add(Normalize, rows[-1])
        add(NormalizeBackward, rows[-1])
    for rows in records:
        if [layer.kind for layer in rows] == ["pointwise", "depthwise", "pointwise"]:
            add(ExpandDepthwise, *rows[:2])
            add(ExpandDepthwiseBackward, *rows)
    return list(found.values())


def runnable(device):
    """Providers for stages: each fused backend that has any kernel for a device, but the oracle."""
    found = []
    for name in backends.NAMES:
        if name not in ("native", "reference") and backends.why_unavailable(name, torch.device(device)) is None:
            found.append(providers.Provider(name, name))
    return found


def parse(names, device):
    """Fused backends by name, as providers for stages.

    Raises:
        BenchError: an unknown name, or a backend without any kernel here.
    """
    for name in names:
        if name not in backends.NAMES or name == "native":
            known = ", ".join(n for n in backends.NAMES if n != "native")
            raise BenchError(f"unknown provider {name!r} of a stage: expected one of {known}")
        why = backends.why_unavailable(name, torch.device(device))
        if why:
            raise BenchError(f"backend {name!r} cannot be measured on {device}: {why}")
    return [providers.Provider(name, name) for name in names]
