"""Tile sizes and launch options of every kernel: one rule (:func:`lookup`), no autotuning at run time.

First come rows given for a measurement (:func:`override`), then those that ``python -m mnet_kernels.tune`` measured on
this card (measured.py), then the table.  A row is keyed by kernel, shape class, bytes of the storage dtype and compute
capability; of the table the highest capability not above the card's serves it.  Every row of the table is an ESTIMATE
from register and shared memory counts of the compiled kernel: none has been measured on a card.  Capability (0, 0) is
the interpreter's: tiles so small that tiny inputs meet every border, and few programs, so that each walks over several
tiles.  AMD's cards, whose numbers mean something else, are all capability :data:`AMD`.

==================  ====================================  ==============================================
kernel              shape class                           block: (rows, columns, depth)
==================  ====================================  ==============================================
pointwise           narrow: at most 32 output channels    positions, output channels, input channels
pointwise_dgrad     narrow: at most 32 input channels     positions, input channels, output channels
pointwise_wgrad     narrow: either side at most 32        output channels, input channels, positions
depthwise           k3, k5                                columns of the map, channels, -
depthwise_backward  k3, k5                                columns of the map (a stride's group each), channels, -
elementwise         any                                   positions, channels, -
stem                any                                   positions, output channels, taps
stem_backward       any                                   output channels, taps, positions
gram                narrow: at most 32 channels           positions, channels, -
expand_depthwise    k3, k5                                columns of the map, expanded channels, input channels
==================  ====================================  ==============================================
"""

import functools
import logging
from typing import NamedTuple

from ...log import say_once
from . import measured

NARROW = 32
AMD = (0, 1)


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
    ("stem", "any"): Config(32, 16, 16, 4, 1),
    ("stem_backward", "any"): Config(16, 16, 32, 4, 1),
    ("gram", "narrow"): Config(16, 16, 0, 4, 1),
    ("gram", "wide"): Config(16, 16, 0, 4, 1),
    ("expand_depthwise", "k3"): Config(16, 16, 16, 4, 1),
    ("expand_depthwise", "k5"): Config(16, 16, 16, 4, 1),
}
# Stride 1 and 2 share a row: the tiles are in columns of the output.  No row spills under triton 3.6 to 3.9.
_HALF_80 = {
    ("pointwise", "narrow"): Config(64, 32, 32, 8, 3),
    ("pointwise", "wide"): Config(128, 64, 32, 8, 3),
    ("pointwise_dgrad", "narrow"): Config(128, 32, 32, 8, 3),
    ("pointwise_dgrad", "wide"): Config(64, 64, 32, 8, 3),
    ("pointwise_wgrad", "narrow"): Config(32, 32, 64, 4, 3),
    ("pointwise_wgrad", "wide"): Config(64, 64, 64, 8, 3),
    ("depthwise", "k3"): Config(8, 64, 0, 8, 1),
    ("depthwise", "k5"): Config(4, 64, 0, 4, 1),
    ("depthwise_backward", "k3"): Config(8, 64, 0, 8, 1),
    ("depthwise_backward", "k5"): Config(8, 32, 0, 4, 1),
    ("elementwise", "any"): Config(16, 64, 0, 4, 1),
    ("stem", "any"): Config(128, 32, 32, 4, 1),
    ("stem_backward", "any"): Config(32, 32, 64, 4, 1),
    ("gram", "narrow"): Config(64, 32, 0, 4, 1),
    ("gram", "wide"): Config(32, 64, 0, 8, 1),
    ("expand_depthwise", "k3"): Config(16, 32, 16, 4, 1),
    ("expand_depthwise", "k5"): Config(16, 32, 16, 4, 1),
}
_FLOAT_80 = _HALF_80 | {
    ("pointwise", "narrow"): Config(64, 32, 16, 4, 3),
    ("pointwise", "wide"): Config(64, 64, 16, 8, 3),
    ("pointwise_dgrad", "narrow"): Config(64, 32, 16, 8, 2),
    ("pointwise_dgrad", "wide"): Config(64, 64, 16, 4, 2),
    ("pointwise_wgrad", "narrow"): Config(32, 32, 32, 4, 2),
    ("pointwise_wgrad", "wide"): Config(64, 64, 32, 8, 2),
    ("depthwise", "k3"): Config(16, 64, 0, 8, 1),
    ("depthwise", "k5"): Config(8, 64, 0, 8, 1),
    ("gram", "narrow"): Config(64, 32, 0, 8, 1),
    ("expand_depthwise", "k3"): Config(32, 32, 32, 8, 1),
    ("expand_depthwise", "k5"): Config(16, 32, 32, 4, 1),
}
# 64 KiB of shared memory and, of registers, 256 a lane.
_HALF_AMD = _HALF_80 | {("pointwise_dgrad", "narrow"): Config(64, 32, 32, 8, 2)}
_FLOAT_AMD = _FLOAT_80 | {("expand_depthwise", "k3"): Config(16, 32, 32, 4, 1)}
TABLE = {
    (kernel, shape, size, capability): config
    for (size, capability), rows in {
        (2, (0, 0)): _INTERPRETER,
        (4, (0, 0)): _INTERPRETER,
        (2, (8, 0)): _HALF_80,
        (4, (8, 0)): _FLOAT_80,
        (2, (9, 0)): _HALF_80 | {("pointwise", "wide"): Config(128, 64, 32, 8, 4)},
        (4, (9, 0)): _FLOAT_80,
        (2, AMD): _HALF_AMD,
        (4, AMD): _FLOAT_AMD,
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


def impossible(kernel, shape, config):
    """Why a configuration cannot be a kernel's; None if it can."""
    like = next((row for key, row in TABLE.items() if key[:2] == (kernel, shape)), None)
    if like is None:
        return f"no kernel {kernel!r} with shape class {shape!r}"
    if any(type(value) is not int for value in config):
        return "a value is no integer"
    # tl.dot takes no side below 16; of the kernels with a product only gram has no depth.
    least = 16 if like.depth or kernel == "gram" else 1
    blocks = config[:3] if like.depth else config[:2]
    if any(not least <= block <= 1024 or block & (block - 1) for block in blocks):
        return f"its blocks are not powers of two from {least} to 1024"
    if not like.depth and config.depth:
        return "its depth is not 0"
    if config.rows * config.columns > 32768:
        return "its block has more than 32768 values"
    if config.warps not in (1, 2, 4, 8, 16) or not 1 <= config.stages <= 8:
        return "its warps are not 1, 2, 4, 8 or 16, or its stages not 1 to 8"
    return None


def key(row):
    """(kernel, shape class, bytes) of a row of measured.py."""
    return row["kernel"], row["shape"], row["bytes"]


def read(file, card, capability):
    """{(kernel, shape class, bytes): (configuration, row)} of a file of measured.py; {} where there is none.

    Raises:
        ValueError: the file cannot be used, and why.
    """
    found = {}
    for row in measured.read(file, card, capability):
        try:
            config = Config(**row["config"])
            why = impossible(row["kernel"], row["shape"], config)
            if row["bytes"] not in (2, 4):
                why = "its bytes are not 2 or 4"
            found[key(row)] = config, row
        except (KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
        if why:
            raise ValueError(f"row {row!r}: {why}")
    return found


@functools.lru_cache(maxsize=64)
def of_card(card, capability):
    """What was measured on a card, as :func:`read` gives it; a file that cannot be used is said once and left out."""
    if card is None or not measured.wanted() or measured.triton_version() is None:
        return {}
    file = measured.path(card)
    try:
        found = read(file, card, capability)
    except ValueError as error:
        say_once(
            f"{file} is not used: {error}. The table's estimates serve; python -m mnet_kernels.tune measures anew",
            logging.WARNING,
        )
        return {}
    if found:
        say_once(f"triton: {len(found)} configurations measured on this card, from {file}")
    return found


_given = {}


def override(rows):
    """Put rows, {(kernel, shape class, bytes): configuration}, before all others, in place of earlier ones."""
    _given.clear()
    _given.update(rows)


def given():
    """The rows of :func:`override`."""
    return dict(_given)


@functools.lru_cache(maxsize=1024)
def _chosen(kernel, shape, size, capability, card):
    """(configuration, its row of measured.py or None): measured first, then the table."""
    found = of_card(card, capability).get((kernel, shape, size))
    if found:
        return found
    known = [row[3] for row in TABLE if row[:3] == (kernel, shape, size) and row[3] <= capability]
    return TABLE[kernel, shape, size, max(known)], None


def lookup(kernel, shape, size, capability, card=None):
    """The configuration for a card of this capability and name; without a name the table's.

    The same throughout the process, but for :func:`override`: the card's file is read at the first call.
    """
    if _given:
        found = _given.get((kernel, shape, size))
        if found:
            return found
    return _chosen(kernel, shape, size, capability, card)[0]


def origin(kernel, shape, size, capability, card=None):
    """Where :func:`lookup` has it from: "given", the row of measured.py, or "estimate"."""
    if (kernel, shape, size) in _given:
        return "given"
    return _chosen(kernel, shape, size, capability, card)[1] or "estimate"


def forget():
    """Read the files anew at the next call."""
    of_card.cache_clear()
    _chosen.cache_clear()


def strip(capability):
    """Rows of a depthwise strip at most: what a strip reads twice is (kernel - 1) / strip of the map."""
    return 32 if capability > (0, 0) else 4


def programs(capability):
    """How many programs to aim at."""
    return PROGRAMS if capability > (0, 0) else PROGRAMS_INTERPRETED
