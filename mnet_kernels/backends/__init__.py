"""The backends by name: what each can run, where, and why not.

==========  ===========================================================  =======================
name        what runs                                                    device
==========  ===========================================================  =======================
native      plain torch ops with torch's own autograd                    any
reference   the fused block's stages in plain torch (the oracle)         any
cpu         the fused block's stages in C++                              CPU
cuda        the fused block's stages in CUDA C++ (of algebraic mode the  CUDA, capability >= 8.0
            forward ones)
triton      the same in Triton                                           CUDA, capability >= 8.0
==========  ===========================================================  =======================
"""

import torch

from .. import schema
from . import compiled, triton

NAMES = ("native", "reference", "cpu", "triton", "cuda")
# The device types a backend is bound to (the Triton interpreter takes CPU tensors too).
DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": triton.DEVICES}
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)

# Stages of the two modes.  A backend is chosen by itself only where all of a mode's stages are its own.
_COMMON = {
    "finalize", "update_running_stats", "normalize", "squeeze", "normalize_backward", "finalize_backward",
    "pointwise", "pointwise_backward",
}  # fmt: skip
MODE_STAGES = {
    "chain": frozenset(_COMMON | {"depthwise", "depthwise_backward"}),
    "algebraic": frozenset(_COMMON | {name for name in schema.NAMES if name.startswith("expand_")} | {"gram"}),
}
STEM_STAGES = frozenset({"stem", "stem_backward"})  # where they lack, that one layer runs on torch's own ops
BACKWARD_STAGES = frozenset({"expand_mix"} | {name for name in schema.NAMES if name.endswith("_backward")})
# The most input channels of a block that a backend's algebraic kernels take.
WIDEST = {"cuda": 64}


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why and what to do."""


def implemented(backend):
    """Names of the stages that a fused backend has kernels for in this installation."""
    if backend == "reference":
        return frozenset(schema.NAMES)
    if backend in ("cpu", "cuda"):
        return compiled.implemented(schema.NAMESPACES[backend])
    if backend == "triton":
        return triton.implemented()
    raise ValueError(f"backend {backend!r} has no stages, expected one of {', '.join(NAMES[1:])}")


def missing_stages(backend, mode, trains=True):
    """Stages of a mode that the backend lacks, in schema order (the reference runs them).

    Without gradients (``trains`` False) those of the backward are not needed.
    """
    needed = MODE_STAGES[mode] if trains else MODE_STAGES[mode] - BACKWARD_STAGES
    return tuple(n for n in schema.NAMES if n in needed and n not in implemented(backend))


def whole(backend, mode):
    """Whether the backend has every stage of a mode."""
    return not missing_stages(backend, mode)


def has_stem(backend):
    """Whether the backend has the stages of the stem."""
    return implemented(backend) >= STEM_STAGES


def hands_on_gram(backend):
    """Whether the backend gathers the gram of a block's output as it writes it, for the next block to take."""
    return "normalize_gram" in implemented(backend)


def why_not_algebraic(backend, wide, trains):
    """Why a backend that has chain mode whole cannot run a block in algebraic mode; None if it can, or has neither.

    ``wide``: the block's input has more channels than WIDEST says.
    """
    if not whole(backend, "chain"):
        return None
    lacking = missing_stages(backend, "algebraic", trains)
    if lacking:
        return f"it has no kernel yet for {', '.join(lacking)}" + (
            ""
            if missing_stages(backend, "algebraic", False)
            else ", which only a call without gradients can do without"
        )
    return f"its kernels take blocks of at most {WIDEST[backend]} input channels" if wide else None


def why_unavailable(backend, device):
    """Why a fused backend cannot run on a device in this installation, and what to do; None if it can."""
    needed = DEVICES.get(backend)
    if needed is not None and device.type not in needed:
        where = " or ".join(needed)
        return f"it runs on {where} tensors, and the input is on {device}: move the model and the input to {where}"
    if not implemented(backend):
        if backend == "triton":
            return triton.why_missing()
        built = compiled.info()
        why = built["reason"]
        if built["extension"]:
            why = f"the extension was built without {backend} kernels" + (f" ({why})" if why else "")
        return (
            f"{why}. To build it: pip install --no-build-isolation --force-reinstall --no-deps . (with a C++ compiler, "
            "and for CUDA with nvcc); mnet_kernels.build_info() tells what was built"
        )
    if backend in ("cuda", "triton") and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            major, minor = capability
            return f"its kernels need compute capability 8.0 or higher and {device} has {major}.{minor}: use 'native'"
    return None
