"""A timeline for Perfetto (ui.perfetto.dev) or chrome://tracing: both sides' steps, with a named range per stage."""

import contextlib
import os
import tempfile

import torch
from torch.profiler import record_function

from ..bench import timing
from ..graph import known
from ..stages import wrapped
from ..training.checkpoint import write_atomic
from .steps import profiled

STEPS = 2


@contextlib.contextmanager
def _range(name, on_card):
    """A range of torch.profiler, and of NVTX on a card."""
    with record_function(name), torch.cuda.nvtx.range(name) if on_card else contextlib.nullcontext():
        yield


def stage_ranges(on_card=False):
    """The context in which every stage is a range named after it and the map it reads."""

    def wrap(name, call):
        def ranged(*args):
            shape = next(("x".join(map(str, a.shape)) for a in args if _is_map(a)), "")
            with _range(f"stage {name} {shape}".rstrip(), on_card):
                return call(*args)

        return ranged

    return wrapped(wrap)


def _is_map(value):
    return isinstance(value, torch.Tensor) and value.dim() == 4


@contextlib.contextmanager
def layer_ranges(on_card=False):
    """The context in which every layer and block of plain torch is a range (its backward has autograd's own names).

    By global module hooks, under which a fused module would call its children: for eager plain torch only.
    """
    stack = []

    def before(module, args):
        if next(module.children(), None) is None or known.is_fused(module):
            shape = next(("x".join(map(str, a.shape)) for a in args if _is_map(a)), "")
            entered = _range(f"layer {type(module).__name__} {shape}".rstrip(), on_card)
            entered.__enter__()
            stack.append((module, entered))

    def after(module, args, output):
        if stack and stack[-1][0] is module:
            stack.pop()[1].__exit__(None, None, None)

    hooks = torch.nn.modules.module
    handles = [hooks.register_module_forward_pre_hook(before), hooks.register_module_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write(path, prepared, direction, device):
    """Record :data:`STEPS` steps of every provider and write the timeline to ``path`` (``.gz``: compressed).

    Args:
        prepared: list of ``mnet_kernels.bench.compare.Prepared`` without errors.
        direction: of theirs.
        device: a ``torch.device``.
    """
    on_card = device.type == "cuda"
    with timing.stream(device), profiled(device) as found:
        for one in prepared:
            plain = one.provider.backend == "native" and one.provider.compile is None
            for _ in range(STEPS):
                ranges = layer_ranges(on_card) if plain else stage_ranges(on_card)
                with ranges, _range(f"{one.provider.name} {direction}", on_card):
                    one.calls[direction]()
                timing.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        # the profiler writes by itself: only what is whole is put in the place of the user's file
        aside = os.path.join(folder, "trace.json" + ".gz" * str(path).endswith(".gz"))
        found.export_chrome_trace(aside)
        with open(aside, "rb") as file:
            write_atomic(path, file.read())
