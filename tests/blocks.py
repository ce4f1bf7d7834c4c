"""Random blocks, run on any backend: the shared set-up of the tests."""

from typing import NamedTuple

import torch

import mnet_kernels as mk
from mnet_kernels import BatchNormParams, SqueezeExciteParams, backends, functional

FUSED = (("reference", "chain"), ("reference", "algebraic"))
ACTIVATIONS = ("identity", "relu", "relu6", "hardswish", "silu")
POINTWISE = ("pointwise_conv_bn_act", "pointwise_conv_bn_act_pool")


class Case(NamedTuple):
    """One block: op of the functional API and its geometry."""

    op: str = "inverted_residual"
    kernel: int = 3
    stride: int = 1
    activation: str = "relu6"
    residual: bool = False
    excite: bool = False
    expand: bool = True
    n: int = 3
    c: int = 5
    e: int = 13
    o: int = 6
    h: int = 9
    w: int = 7

    def __str__(self):
        flags = [name for name in ("residual", "excite") if getattr(self, name)] + ["noexpand"] * (not self.expand)
        return "-".join(map(str, (self.op, f"k{self.kernel}s{self.stride}", self.activation, *flags)))


def layer_shapes(case):
    """Weight shapes, in order."""
    dw = (case.kernel, case.kernel)
    if case.op == "depthwise_conv_bn_act":
        return [(case.c, 1, *dw)]
    if case.op in POINTWISE:
        return [(case.o, case.c, 1, 1)]
    if case.op == "separable_conv":
        return [(case.c, 1, *dw), (case.o, case.c, 1, 1)]
    e = case.e if case.expand else case.c
    out = case.c if case.residual else case.o
    return [(e, case.c, 1, 1)] * case.expand + [(e, 1, *dw), (out, e, 1, 1)]


class Inputs:
    """Leaves of one case: x, weights, batch norms (as nn.BatchNorm2d) and squeeze-excite's tensors."""

    def __init__(self, case, dtype=torch.float64, device="cpu"):
        self.case = case
        make = {"dtype": dtype, "device": device}
        shapes = layer_shapes(case)
        self.x = (
            torch.randn(case.n, case.c, case.h, case.w, **make) + torch.randn(case.c, 1, 1, **make)
        ).requires_grad_()
        self.weights = [
            (torch.randn(s, **make) / s[1:].numel() ** 0.5).requires_grad_() for s in map(torch.Size, shapes)
        ]
        self.bns = [torch.nn.BatchNorm2d(s[0], eps=1e-3, momentum=0.2, **make) for s in shapes]
        for bn in self.bns:
            with torch.no_grad():
                bn.weight.copy_(torch.rand_like(bn.weight) + 0.5)
                bn.bias.copy_(torch.randn_like(bn.bias) * 0.5 + 0.5)
                bn.running_mean.copy_(torch.randn_like(bn.running_mean))
                bn.running_var.copy_(torch.rand_like(bn.running_var) + 0.5)
        self.excite = []
        if case.excite:
            e = shapes[-1][1]
            # scaled so that neither the hidden ReLUs nor the hard sigmoid saturate: every gradient must be non-zero
            reduce, expand = torch.randn(3, e, 1, 1, **make) / e, torch.randn(e, 3, 1, 1, **make) / 3
            biases = torch.rand(3, **make) + 1, torch.randn(e, **make) / 3
            self.excite = [t.requires_grad_() for t in (reduce, biases[0], expand, biases[1])]

    @property
    def leaves(self):
        """Every differentiable leaf by name."""
        named = {"x": self.x}
        for i, (weight, bn) in enumerate(zip(self.weights, self.bns, strict=True)):
            named[f"weight{i}"] = weight
            if bn.affine:
                named |= {f"gamma{i}": bn.weight, f"beta{i}": bn.bias}
        return named | {f"excite{i}": t for i, t in enumerate(self.excite)}

    def call(self, leaves=None):
        """The op on these inputs (``leaves``: values to use instead, in the order of ``self.leaves``)."""
        case = self.case
        named = self.leaves if leaves is None else dict(zip(self.leaves, leaves, strict=True))
        layers = []
        for i, bn in enumerate(self.bns):
            params = BatchNormParams.of(bn)
            params = params._replace(weight=named.get(f"gamma{i}"), bias=named.get(f"beta{i}"))
            layers += [named[f"weight{i}"], params]
        options = {"activation": case.activation}
        if case.op not in POINTWISE:
            options["stride"] = case.stride
        if case.op == "inverted_residual":
            layers = layers if case.expand else [None, None, *layers]
            options["residual"] = case.residual
            if case.excite:
                options["squeeze_excite"] = SqueezeExciteParams(*(named[f"excite{i}"] for i in range(4)))
        return getattr(functional, case.op)(named["x"], *layers, **options)


def step(inputs, backend, mode=None, autocast=None, upstream=None):
    """Forward and backward; returns {name: tensor} of the output, every gradient and every running statistic.

    The batch norms' buffers are put back afterwards, so that the next call starts from the same state.
    """
    before = [{k: v.clone() for k, v in bn.state_dict().items()} for bn in inputs.bns]
    wanted = {name: t for name, t in inputs.leaves.items() if t.requires_grad}
    device = inputs.x.device.type
    with mk.backend(backend, mode), torch.autocast(device, autocast, enabled=autocast is not None):
        out = inputs.call()
    if upstream is None:
        upstream = upstream_of(out)
    grads = torch.autograd.grad(out, list(wanted.values()), upstream.to(out.dtype)) if wanted else ()
    result = {"out": out.detach()} | {f"d_{k}": g for k, g in zip(wanted, grads, strict=True)}
    for i, (bn, old) in enumerate(zip(inputs.bns, before, strict=True)):
        result |= {f"{k}{i}": v.clone() for k, v in bn.named_buffers()}
        bn.load_state_dict(old)
    return result


def upstream_of(out):
    """A gradient for an output: fixed by its shape alone, bfloat16-representable, so that all dtypes get the same."""
    generator = torch.Generator().manual_seed(out.numel())
    values = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return values.bfloat16().to(out.device, torch.float64)


def assert_same(got, want, tolerance=1e-10):
    """Every tensor equal to ``tolerance`` relative to its largest value, or absolutely where that is below 1."""
    assert got.keys() == want.keys()
    for name in want:
        a, b = got[name].double(), want[name].double()
        assert a.shape == b.shape, name
        if b.numel():
            error = (a - b).abs().max().item() / max(1.0, b.abs().max().item())
            assert error <= tolerance, f"{name}: {error:.1e}"


CASES = [
    *(Case("depthwise_conv_bn_act", k, s, a) for k in (3, 5) for s in (1, 2) for a in ACTIVATIONS),
    *(Case(op, activation=a) for op in POINTWISE for a in ACTIVATIONS),
    *(Case("separable_conv", k, s, a) for k in (3, 5) for s in (1, 2) for a in ("relu6", "hardswish")),
    *(Case(kernel=k, stride=s, activation=a) for k in (3, 5) for s in (1, 2) for a in ACTIVATIONS),
    *(
        Case(kernel=k, stride=s, activation=a, excite=True)
        for k in (3, 5) for s in (1, 2) for a in ("relu", "hardswish")
    ),
    *(Case(kernel=k, activation=a, residual=True, excite=x) for k in (3, 5) for a in ACTIVATIONS[2:] for x in (0, 1)),
    *(Case(stride=s, residual=s == 1, expand=False, excite=x, activation="relu") for s in (1, 2) for x in (0, 1)),
]  # fmt: skip


def fused_modes(case, compiled=False, device="cpu"):
    """The fused (backend, mode) pairs that differ for a case; ``compiled``: every whole one of the device too (those
    have no float64)."""
    own = [name for name, where in backends.DEVICES.items() if compiled and where[0] == device]
    pairs = FUSED + tuple((name, mode) for name in own for mode in backends.MODE_STAGES if backends.whole(name, mode))
    return [(b, mode) for b, mode in pairs if mode == "chain" or (case.op == "inverted_residual" and case.expand)]
