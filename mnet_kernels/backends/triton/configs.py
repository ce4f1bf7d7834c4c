"""Tile sizes and launch options of every kernel: one table, no autotuning at run time.

A row is keyed by kernel, shape class, bytes of the storage dtype and compute capability; the highest capability not
above the card's serves it.  Every row is an ESTIMATE from register and shared memory counts of the compiled kernel:
none has been measured on a card.  Capability (0, 0) is the interpreter's: tiles so small that tiny inputs meet every
border, and few programs, so that each walks over several tiles.

==================  ====================================  ==============================================
kernel              shape class                           block: (rows, columns, depth)
==================  ====================================  ==============================================
pointwise           narrow: at most 32 output channels    positions, output channels, input channels
pointwise_dgrad     narrow: at most 32 input channels     positions, input channels, output channels
pointwise_wgrad     narrow: either side at most 32        output channels, input channels, positions
depthwise           k3, k5                                columns of the map, channels, -
depthwise_backward  k3, k5                                columns of the map (a stride's group each), channels, -
elementwise         any                                   positions, channels, -
==================  ====================================  ==============================================
"""

import functools
from typing import NamedTuple

NARROW = 32


class Config(NamedTuple):
    """Block sizes and the launch options ``num_warps`` and ``num_stages``."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_INTERPRETER = {
    ("pointwise", "narrow"): Config(32, 16, 16, 4, 1),
    ("pointwise", "wide"): Config(16, 32, 32, 4, 1),
    ("pointwise_dgrad", "narrow"): Config(32, 16, 16, 4, 1),
    ("pointwise_dgrad", "wide"): Config(16, 32, 32, 4, 1),
    ("pointwise_wgrad", "narrow"): Config(16, 16, 32, 4, 1),
    ("pointwise_wgrad", "wide"): Config(16, 16, 32, 4, 1),
    ("depthwise", "k3"): Config(4, 8, 0, 4, 1),
    ("depthwise", "k5"): Config(4, 8, 0, 4, 1),
    ("depthwise_backward", "k3"): Config(4, 8, 0, 4, 1),
    ("depthwise_backward", "k5"): Config(4, 8, 0, 4, 1),
    ("elementwise", "any"): Config(16, 8, 0, 4, 1),
}
# Stride 1 and 2 share a row: the tiles are in columns of the output.
_HALF_80 = {
    ("pointwise", "narrow"): Config(128, 32, 32, 4, 3),
    ("pointwise", "wide"): Config(128, 64, 32, 8, 3),
    ("pointwise_dgrad", "narrow"): Config(128, 32, 32, 8, 3),
    ("pointwise_dgrad", "wide"): Config(64, 64, 32, 4, 3),
    ("pointwise_wgrad", "narrow"): Config(32, 32, 64, 4, 3),
    ("pointwise_wgrad", "wide"): Config(64, 64, 64, 8, 3),
    ("depthwise", "k3"): Config(8, 64, 0, 8, 1),
    ("depthwise", "k5"): Config(8, 32, 0, 4, 1),
    ("depthwise_backward", "k3"): Config(8, 64, 0, 8, 1),
    ("depthwise_backward", "k5"): Config(8, 32, 0, 4, 1),
    ("elementwise", "any"): Config(16, 64, 0, 4, 1),
}
_FLOAT_80 = _HALF_80 | {
    ("pointwise", "narrow"): Config(64, 32, 32, 4, 3),
    ("pointwise", "wide"): Config(32, 64, 32, 4, 3),
    ("pointwise_dgrad", "narrow"): Config(64, 32, 32, 8, 2),
    ("pointwise_dgrad", "wide"): Config(64, 64, 16, 4, 2),
    ("pointwise_wgrad", "narrow"): Config(32, 32, 32, 4, 2),
    ("pointwise_wgrad", "wide"): Config(64, 64, 32, 8, 2),
    ("depthwise", "k3"): Config(16, 64, 0, 8, 1),
    ("depthwise", "k5"): Config(8, 64, 0, 8, 1),
}
TABLE = {
    (kernel, shape, size, capability): config
    for (size, capability), rows in {
        (2, (0, 0)): _INTERPRETER,
        (4, (0, 0)): _INTERPRETER,
        (2, (8, 0)): _HALF_80,
        (4, (8, 0)): _FLOAT_80,
        (2, (9, 0)): _HALF_80 | {("pointwise", "wide"): Config(128, 64, 32, 8, 4)},
        (4, (9, 0)): _FLOAT_80,
    }.items()
    for (kernel, shape), config in rows.items()
}

# Programs of a launch that walk over the positions and leave one partial result each.  The same number on every card:
# results do not depend on how many multiprocessors it has.
PROGRAMS = 1024
PROGRAMS_INTERPRETED = 4


def width_class(*channels):
    """Shape class of the pointwise kernels."""
    return "narrow" if min(channels) <= NARROW else "wide"


@functools.lru_cache(maxsize=1024)
def lookup(kernel, shape, size, capability):
    """The row for a card of this capability."""
    known = [key[3] for key in TABLE if key[:3] == (kernel, shape, size) and key[3] <= capability]
    return TABLE[kernel, shape, size, max(known)]


def strip(capability):
    """Rows of a depthwise strip at most: what a strip reads twice is (kernel - 1) / strip of the map."""
    return 32 if capability > (0, 0) else 4


def programs(capability):
    """How many programs to aim at."""
    return PROGRAMS if capability > (0, 0) else PROGRAMS_INTERPRETED
