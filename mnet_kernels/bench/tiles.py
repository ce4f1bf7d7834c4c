"""The CUDA kernels' tile table (csrc/cuda/tiles.h): shown, and overridden for a measurement.

A row says, for a kernel, storage width (``bits``, 0: any), ``architecture`` (80: compute capability 8.0 and later
ones) and width of the result (up to ``channels``, 0: any), which compiled ``tile`` to take and how to cut the work:
``blocks`` aimed at, ``enough`` for a card, at most ``runs`` partial results, at ``least`` so many steps a block.

The Triton kernels' table is shown by ``python -m mnet_kernels.tune --list``; its rows are overridden from here too.
"""

import torch

from ..backends import compiled, triton
from ..backends.triton import configs
from . import BenchError

TRITON = "triton/"  # before the kernel in the spec of a Triton row

KEYS = ("bits", "architecture", "channels")
VALUES = ("tile", "blocks", "enough", "runs", "least")


def rows():
    """The rows as dicts, in the order they are asked; the first that fits is taken.  Overrides come first."""
    return _extension().tiles()


def given():
    """The overrides, as plain values for a result's header."""
    extension = compiled.extension()
    return [r for r in extension.tiles() if r["override"]] if extension is not None else []


def override(specs):
    """Put rows before the table's, in place of earlier overrides; none: the table alone.

    A spec is ``KERNEL:name=value,...``; what it leaves out is that of the row it stands before.  One for Triton begins
    with ``triton/KERNEL:CLASS:BYTES:``, its row's key.

    Raises:
        BenchError: an unknown kernel or name, a value that is no number or is not possible.
    """
    configs.override(dict(_triton_row(spec) for spec in specs if spec.startswith(TRITON)))
    specs = [spec for spec in specs if not spec.startswith(TRITON)]
    if not specs and compiled.extension() is None:
        return
    extension = _extension()
    table = [row for row in extension.tiles() if not row["override"]]
    try:
        extension.override_tiles([_row(spec, table) for spec in specs])
    except ValueError as error:
        raise BenchError(f"--tile: {error}") from None


def table():
    """The rows as a Markdown table."""
    names = ("kernel", *KEYS, *VALUES)
    lines = ["| " + " | ".join((*names, "from", "why")) + " |", "|" + "---|" * (len(names) + 2)]
    for row in rows():
        source = "given" if row["override"] else "estimate"
        if row["measured"]:
            source = "{card}, {commit}, {date}: {microseconds} us".format(**row["measured"])
        lines.append("| " + " | ".join(str(v) for v in (*(row[n] for n in names), source, row["reason"])) + " |")
    return "\n".join(lines)


def _extension():
    extension = compiled.extension()
    if extension is None:
        raise BenchError(
            "the tile table is in the compiled extension, which is not there: see mnet_kernels.build_info()"
        )
    return extension


def _row(spec, table):
    kernel, _, rest = spec.partition(":")
    kernels = list(dict.fromkeys(row["kernel"] for row in table))
    if kernel not in kernels:
        raise BenchError(f"--tile {spec}: {kernel!r} is not one of {', '.join(kernels)}")
    values = _values(spec, rest, KEYS + VALUES)
    keys = {"bits": 0, "architecture": 80, "channels": 0} | {n: v for n, v in values.items() if n in KEYS}
    return next(row for row in table if row["kernel"] == kernel and _fits(row, keys)) | keys | values


def _values(spec, rest, names):
    found = {}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        if name not in names or not value.isdecimal():
            raise BenchError(f"--tile {spec}: {part!r} is not NAME=NUMBER with a name of {', '.join(names)}")
        found[name] = int(value)
    return found


def _triton_row(spec):
    """(key, configuration); what is left out is the table's for this card, without one for the newest."""
    kernel, shape, size, rest = (spec.removeprefix(TRITON).split(":", 3) + [""] * 3)[:4]
    capability = max(key[3] for key in configs.TABLE)
    if torch.cuda.is_available():
        _, capability = triton.card(torch.cuda.current_device())
    keys = {(name, shape_class, str(n)): (name, shape_class, n) for name, shape_class, n, _ in configs.TABLE}
    key = keys.get((kernel, shape, size))
    if key is None:
        known = ", ".join(map(":".join, keys))
        raise BenchError(f"--tile {spec}: {kernel}:{shape}:{size} is not one of {known}")
    config = configs.lookup(*key, capability)._replace(**_values(spec, rest, configs.Config._fields))
    why = configs.impossible(kernel, shape, config)
    if why:
        raise BenchError(f"--tile {spec}: {why}")
    return key, config


def _fits(row, keys):
    """Whether a row of the table is asked for everything that an override with these keys is; the last one always."""
    wide = row["channels"] == 0 or 0 < keys["channels"] <= row["channels"]
    return wide and (row["bits"] in (0, keys["bits"]) or keys["bits"] == 0)
