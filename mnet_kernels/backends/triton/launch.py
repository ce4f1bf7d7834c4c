"""What the launchers share: checks, the device guard, the cut of the positions into chunks, precision."""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton

from ... import schema
from .. import FUSED_DTYPES
from . import INTERPRETED
from . import card as known_as
from . import configs as _configs

# Given explicitly: triton's default is about to change.  The one place where fusion matters is tl.fma in any case.
MAX_RUN = 4096  # positions that one program of a weight gradient sums on the tensor cores
FIXED = {"enable_fp_fusion": True}


class Chunks(NamedTuple):
    """Cut of positions: every ``segment`` of rows into ``per_segment`` chunks of ``rows``, the last one shorter."""

    segment: int
    per_segment: int
    rows: int
    count: int


def chunks(segments, segment_rows, block_rows, blocks, capability):
    """Chunks such that chunks * blocks comes to about the programs wanted; whole blocks of rows, none empty."""
    wanted = max(1, _configs.programs(capability) // max(1, segments * blocks))
    tiles = triton.cdiv(segment_rows, block_rows)
    rows = triton.cdiv(tiles, min(wanted, max(tiles, 1))) * block_rows if tiles else block_rows
    per_segment = triton.cdiv(segment_rows, rows)
    return Chunks(segment_rows, max(per_segment, 1), rows, segments * per_segment)


def of_short_runs(cut):
    """Chunks, of one segment, of at most MAX_RUN positions."""
    if cut.rows <= MAX_RUN:
        return cut
    count = triton.cdiv(cut.segment, MAX_RUN)
    return cut._replace(rows=MAX_RUN, per_segment=count, count=count)


@functools.lru_cache(maxsize=64)
def card(device):
    """(compute capability, name) of a device; ((0, 0), None) under the interpreter."""
    if INTERPRETED:
        return (0, 0), None
    name, capability = known_as(device)
    return capability, name


def capability(t):
    """Compute capability of a tensor's device; (0, 0) under the interpreter."""
    return card(t.device)[0]


def config(kernel, shape, t):
    """The configuration of a kernel on a tensor."""
    return _configs.lookup(kernel, shape, t.element_size(), *card(t.device))


def device_of(t):
    """Makes the tensor's card the current one, where it is not yet."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def alignment(channels):
    """The largest power of two up to 16 that divides the channels: what the compiler may know about a row's start."""
    return channels & -channels if channels % 16 else 16


def dot_precision(t):
    """Precision of a float32 product: TF32 exactly where torch's own convolution would use it, on AMD's cards never."""
    if t.dtype == torch.float32 and not torch.version.hip and torch.backends.cudnn.conv.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def check_map(name, t, like=None, shape=None):
    """An activation: 4-d, channels_last, of a fused dtype; like another in dtype and device; of a shape."""
    check_storage(name, t)
    if not t.is_contiguous(memory_format=torch.channels_last):
        raise RuntimeError(
            f"{name} is not in channels_last memory: pass {name}.contiguous(memory_format=torch.channels_last)"
        )
    if like is not None and (t.dtype != like.dtype or t.device != like.device):
        raise RuntimeError(
            f"{name} is {_short(t.dtype)} on {t.device}; expected {_short(like.dtype)} on {like.device}: cast it"
        )
    if shape is not None:
        check_shape(name, t, shape)


def check_storage(name, t):
    """4-d and of a fused dtype."""
    if t.dim() != 4 or t.dtype not in FUSED_DTYPES:
        raise RuntimeError(
            f"{name} has dtype {_short(t.dtype)} and {t.dim()} dimensions; expected float32, bfloat16 or float16 and 4"
        )


def check_shape(name, t, shape):
    """A tensor's exact shape."""
    if tuple(t.shape) != tuple(shape):
        raise RuntimeError(f"{name} has shape {list(t.shape)}; expected {list(shape)}")


def table(name, t, shape, like):
    """A table of statistics or coefficients: float32, contiguous, at ``like``'s device; None stays None."""
    if t is None:
        return None
    check_shape(name, t, shape)
    if t.dtype != torch.float32 or t.device != like.device:
        raise RuntimeError(f"{name} is {_short(t.dtype)} on {t.device}; expected float32 on {like.device}: cast it")
    return t.contiguous()


def check_weight(w, shape, like, name="weight"):
    """A convolution's weight in the storage dtype, contiguous."""
    check_shape(name, w, shape)
    if w.dtype != like.dtype or w.device != like.device:
        raise RuntimeError(
            f"{name} is {_short(w.dtype)} on {w.device}; expected {_short(like.dtype)} on {like.device}: cast it"
        )
    return w.contiguous()


def check_act(name, act, bn_given=True):
    """An activation's index."""
    if not 0 <= act < len(schema.ACTIVATIONS):
        last = len(schema.ACTIVATIONS) - 1
        raise RuntimeError(f"{name} is {act}; expected an index from 0 to {last} (schema.ACTIVATIONS)")
    if act and not bn_given:
        raise RuntimeError(f"{name} is {act} without bn; expected 0: an activation is applied to a normalised value")


def check_one_of(residual, bn):
    """A residual is added where x is the block's input, masked where it is a batch norm's."""
    if bn is not None:
        raise RuntimeError("residual is given together with bn; expected one of them: only a block's input has one")


def new_map(like, *shape):
    """An uninitialised activation."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def new_table(like, *shape):
    """An uninitialised float32 table."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def positions(t):
    """N*H*W"""
    return t.shape[0] * t.shape[2] * t.shape[3]


def _short(dtype):
    return str(dtype).removeprefix("torch.")
