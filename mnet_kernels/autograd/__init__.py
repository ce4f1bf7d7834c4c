"""Forward and backward of the fused blocks as compositions of stages: written once, for every fused backend.

One autograd.Function, over plain (non-differentiable) stage ops.  An op with ``register_autograd`` around the block
would do the same at a higher host cost per call (bench/host_cost.py measures both), and needs a fixed number of saved
tensors; this way eager and torch.compile see the same stage ops, and Inductor plans their memory.
"""

import contextlib
from typing import NamedTuple

import torch

from ..stages import stage
from . import algebraic, chain, native_backward
from .batch_norm import PER_LAYER

__all__ = ["Block", "FusedBlock", "Layer", "autocast_off", "autocast_on"]

_MODES = {"chain": chain, "algebraic": algebraic}


class Layer(NamedTuple):
    """One convolution with its batch norm and activation; ``act`` indexes schema.ACTIVATIONS."""

    kind: str
    stride: int
    act: int
    eps: float
    batch_stats: bool
    group: object = None  # of processes, over which the batch statistics are taken


class Block(NamedTuple):
    """The static description of a block.

    Chain mode can pass a raw map from block to block, so that each stays an autograd node of its own whose saved maps
    are freed as soon as its backward is done.  Between two such blocks the gradients are no derivatives but what the
    backward stages hand on: of the map, the masked gradient at its batch norm; of its table, the sums (two rows).
    Where the backward is differentiated itself they are derivatives (native_backward.py).
    """

    backend: str
    mode: str
    layers: tuple[Layer, ...]
    residual: bool
    excite: tuple[str, str] | None  # the names of squeeze-excite's activation and gate
    source_act: int | None = None  # x is raw: its bn table is the last tensor, this its activation
    raw: bool = False  # the output is raw, followed by its bn table
    pooled: bool = False  # the output is the mean over H and W, [N, C]; the last layer is pointwise
    takes_gram: bool = False  # algebraic mode: the gram of x is the last tensor
    gives_gram: bool = False  # the output is followed by its gram
    # shared by the nodes between which raw maps pass: not empty once a graph was asked of a backward of them
    differentiated: list | None = None


def autocast_on(device_type):
    """Whether autocast is on for a device type (torch raises for the meta device, which has none)."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_off(device_type):
    """Autocast off for one device type, entered only where it is on (entering costs several microseconds)."""
    if autocast_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _lay_out(grad, weight):
    """grad with the strides of its parameter, which DistributedDataParallel and fused optimizers want to the letter.

    Where they differ along dimensions of size 1 alone, as channels_last does for 1x1 and depthwise weights, it stays
    where it is.
    """
    if grad is None or grad.stride() == weight.stride():
        return grad
    for size, mine, wanted in zip(grad.shape, grad.stride(), weight.stride(), strict=True):
        if size != 1 and mine != wanted:
            return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    return grad.as_strided(weight.shape, weight.stride())


class FusedBlock(torch.autograd.Function):
    """``apply(block, on_stats, x, *tensors) -> (out, [bn table if block.raw, or gram,] mean_1, var_1, ...)``.

    ``tensors``: PER_LAYER a layer, then squeeze-excite's four if ``block.excite``, then x's bn table if x is raw, or
    its gram.  x: [N, C, H, W] in channels_last memory and the storage dtype; weights in any dtype (rounded to the
    storage dtype here, their gradients come back in their own).  mean and (unbiased) variance of every layer with batch
    statistics are for the running ones and carry no gradient, nor does a gram: the block that takes it has the gradient
    of x through its statistics in its own formulas.  ``on_stats`` (or None) is called with them before anything is
    saved for backward: there activation checkpointing stops its recomputation, and the running statistics must have
    moved by then, as torch's do.
    """

    @staticmethod
    def forward(ctx, block, on_stats, x, *tensors):
        layers = [tensors[i * PER_LAYER : (i + 1) * PER_LAYER] for i in range(len(block.layers))]
        extra = tensors[len(layers) * PER_LAYER :]
        weights = [t[0].to(x.dtype) for t in layers]
        out, saved, stats = _MODES[block.mode].forward(stage(block.backend), block, x, layers, weights, extra)
        if on_stats is not None:
            on_stats(stats)
        ctx.block = block
        ctx.saved_count = len(saved)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        if not torch.compiler.is_dynamo_compiling():
            # For native_backward.py.  Not by save_for_backward, which would refuse a plain backward after a change in
            # place of what that does not read (torch refuses none of a bias, or of a weight that autocast has rounded).
            ctx.parameters = tensors[: len(layers) * PER_LAYER]
            ctx.versions = native_backward.versions(layers)
        ctx.save_for_backward(x, *saved, *weights, *extra)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats, *(out[1:] if block.gives_gram else ()))
        return (*out, *stats) if block.raw or block.gives_gram else (out, *stats)

    @staticmethod
    def backward(ctx, grad, *others):
        nothing = (None,) * (3 + len(ctx.dtypes))
        if grad is None:
            return nothing
        block, count = ctx.block, len(ctx.block.layers)
        x, *rest = ctx.saved_tensors
        saved, rest = rest[: ctx.saved_count], rest[ctx.saved_count :]
        weights, extra = rest[:count], rest[count:]
        needs = ctx.needs_input_grad[2:]
        if native_backward.wanted(block, grad):
            with autocast_off(x.device.type):
                grads = native_backward.gradients(
                    block, (grad, others[0]) if block.raw else (grad,), x, ctx.parameters, ctx.versions, extra,
                    _MODES[block.mode].tables(block, saved), needs,
                )  # fmt: skip
            return (None, None, *grads)
        if not block.pooled:
            grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        if block.raw:
            grad = grad, others[0]
        with autocast_off(x.device.type):
            dx, grads = _MODES[block.mode].backward(
                stage(block.backend), block, grad, x, saved, weights, extra, needs[0], needs[1:]
            )
        grads = [None if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)]
        for i, weight in enumerate(weights):
            grads[i * PER_LAYER] = _lay_out(grads[i * PER_LAYER], weight)
        if block.excite:
            for i in (0, 2):
                grads[count * PER_LAYER + i] = _lay_out(grads[count * PER_LAYER + i], extra[i])
        return (None, None, dx, *grads)
