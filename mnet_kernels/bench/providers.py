"""Who runs a subject: plain torch in the ways it is used, and the fused backends that are whole."""

import copy
import functools
from typing import NamedTuple

import torch

import mnet_kernels

from .. import backends
from ..choice import default_fused
from ..graph import known, swap
from ..graph.accelerate import accelerate
from ..graph.fold import fold
from . import BenchError


class Provider(NamedTuple):
    """One way of running: a backend and mode (``auto``: as users get it), a memory layout, torch.compile's mode or None
    for eager, whether autocast is off for depthwise convolutions of stride 2, whether batch norms are folded into the
    convolutions before them (eval mode only), and whether it is the plain network after ``accelerate``."""

    name: str
    backend: str = "native"
    mode: str | None = None
    channels_last: bool = True
    compile: str | None = None
    float32_strided: bool = False
    folded: bool = False
    accelerated: bool = False


BASELINE = "eager"
AUTO = "auto"  # the mode of each block left to automatic choice
FOLDED = "cpu/folded"  # fold(model, fused=True)
ACCELERATE = "accelerate"  # the plain network after accelerate(model), on the backend that users get
NATIVE = {
    p.name: p
    for p in (
        Provider("nchw", channels_last=False),
        Provider(BASELINE),
        Provider("compile", compile="default"),
        # Graphs are captured around whole steps, alike for every provider: not by torch.compile itself.
        Provider("max-autotune", compile="max-autotune-no-cudagraphs"),
        # For mixed precision on CPUs, where torch takes longer for these convolutions in bfloat16 than in float32.
        Provider("eager-strided-f32", float32_strided=True),
        Provider("compile-strided-f32", compile="default", float32_strided=True),
        Provider("folded", folded=True),
        Provider("folded-compile", compile="default", folded=True),
        # eager, but refused where torch gives a convolution to another library than cuDNN
        Provider("cudnn"),
    )
}


def fused(backend, device, mode=None):
    """The providers of one fused backend on a device: each mode that it has every stage of (or only ``mode``).

    Raises:
        BenchError: it cannot run here, or is not whole; says what is missing.
    """
    device = torch.device(device)
    modes = [mode] if mode else list(backends.MODE_STAGES)
    needed = {AUTO: "chain"}
    why = backends.why_unavailable(backend, device)
    if why:
        raise BenchError(f"backend {backend!r} cannot be measured on {device}: {why}")
    whole = [m for m in modes if backends.whole(backend, needed.get(m, m))]
    if not whole:
        lacking = "; ".join(f"{m} lacks {', '.join(backends.missing_stages(backend, needed.get(m, m)))}" for m in modes)
        raise BenchError(f"backend {backend!r} is not whole, so that no block runs on it alone: {lacking}")
    return [Provider(f"{backend}/{m}", backend, m) for m in whole]


def runnable(device):
    """Every fused provider that can run on a device; the reference is the oracle and no competitor."""
    found = []
    for backend in backends.NAMES:
        if backend not in ("native", "reference"):
            try:
                found += fused(backend, device)
            except BenchError:
                continue
    return found


def automatic(device):
    """[the provider of what runs where users choose nothing], or [] where that is plain torch."""
    name = default_fused(device)
    return [] if name == "reference" else fused(name, device, AUTO)


def parse(names, device):
    """Providers by name: one of :data:`NATIVE`, :data:`FOLDED`, :data:`ACCELERATE`, ``BACKEND`` (each of its modes) or
    ``BACKEND/MODE`` (or auto)."""
    found = []
    for name in names:
        backend, _, mode = name.partition("/")
        if name in NATIVE:
            if name == "cudnn" and torch.device(device).type != "cuda":
                raise BenchError(f"provider 'cudnn' cannot be measured on {device}: it needs a CUDA card")
            found.append(NATIVE[name])
        elif name == FOLDED:
            fused("cpu", device)  # or it says why not
            found.append(Provider(name, "cpu", folded=True))
        elif name == ACCELERATE:
            (provider,) = fused(default_fused(device), device, AUTO)  # or it says why not
            found.append(provider._replace(name=name, accelerated=True))
        elif backend in backends.NAMES and backend != "native" and mode in ("", AUTO, *backends.MODE_STAGES):
            found += fused(backend, device, mode or None)
        else:
            modes = " or /".join((*backends.MODE_STAGES, AUTO))
            raise BenchError(
                f"unknown provider {name!r}: expected one of {', '.join(NATIVE)}, {FOLDED}, {ACCELERATE}, or a fused "
                f"backend ({', '.join(n for n in backends.NAMES if n != 'native')}), alone or with its mode (/{modes})"
            )
    return found


def plain(module):
    """Make every fused module in ``module`` what it is in plain torch: exactly torchvision's network."""
    swap.unswap_all(module)
    return module


def strided_in_float32(module):
    """Make the depthwise convolutions of stride 2 compute in float32 under autocast; what they return is cast back."""
    for m in module.modules():
        if isinstance(m, torch.nn.Conv2d) and m.groups > 1 and m.stride[0] > 1:
            m.forward = functools.partial(_in_float32, m)
    return module


def _in_float32(conv, x):
    with torch.autocast(x.device.type, enabled=False):
        out = torch.nn.Conv2d.forward(conv, x.float())
    return out.to(x.dtype)


def fit(module, provider, device, training=True):
    """A copy of ``module`` on a device, in training or eval mode, run by a provider (not yet compiled: that happens at
    its first call).

    Raises:
        BenchError: a folded provider in training mode.
    """
    if provider.folded and training:
        raise BenchError(f"provider {provider.name!r} has no batch norm left to train: measure it with --eval")
    module = (_folded(module, provider) if provider.folded else copy.deepcopy(module)).to(device).train(training)
    if provider.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if provider.accelerated:
        accelerate(plain(module), backend=provider.backend, mode=provider.mode)
    elif provider.backend == "native":
        plain(module)
        if provider.float32_strided:
            strided_in_float32(module)
    elif not provider.folded:
        for m in module.modules():
            if known.is_fused(m):
                swap.pin(m, provider.backend, provider.mode)
    return compiled(module, provider)


def _folded(module, provider):
    return fold(module, fused=provider.backend != "native")


def compiled(function, provider):
    """``function`` or module under torch.compile where the provider says so."""
    if provider.compile is None:
        return function
    return torch.compile(function, mode=provider.compile, dynamic=False, fullgraph=True)


def assert_own_path(provider, call):
    """Run ``call`` once and make sure that a fused provider measured nothing else's kernels.

    Raises:
        BenchError: a block ran native, or a stage on the reference.
    """
    with mnet_kernels.count_stages() as counts:
        call()
    if provider.backend in ("native", "reference"):
        return
    foreign = [label for label in counts if label.startswith(("native::", "mnet_ref::"))]
    if foreign or not counts:
        raise BenchError(
            f"{provider.name} did not run by itself ({', '.join(foreign) or 'no stage was called'}): unset "
            "MNET_BACKEND and see mnet_kernels.build_info()"
        )
