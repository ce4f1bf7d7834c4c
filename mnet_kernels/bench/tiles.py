"""The CUDA kernels' tile table (csrc/cuda/tiles.h): shown, and overridden for a measurement.

A row says, for a kernel, storage width (``bits``, 0: any), ``architecture`` (80: compute capability 8.0 and later
ones) and width of the result (up to ``channels``, 0: any), which compiled ``tile`` to take and how to cut the work:
``blocks`` aimed at, ``enough`` for a card, at most ``runs`` partial results, at ``least`` so many steps a block.
"""

from ..backends import compiled
from . import BenchError

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

    A spec is ``KERNEL:name=value,...``; what it leaves out is that of the row it stands before.

    Raises:
        BenchError: an unknown kernel or name, a value that is no number or is not possible.
    """
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
    values = {}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        if name not in KEYS + VALUES or not value.isdecimal():
            raise BenchError(f"--tile {spec}: {part!r} is not NAME=NUMBER with a name of {', '.join(KEYS + VALUES)}")
        values[name] = int(value)
    keys = {"bits": 0, "architecture": 80, "channels": 0} | {n: v for n, v in values.items() if n in KEYS}
    return next(row for row in table if row["kernel"] == kernel and _fits(row, keys)) | keys | values


def _fits(row, keys):
    """Whether a row of the table is asked for everything that an override with these keys is; the last one always."""
    wide = row["channels"] == 0 or 0 < keys["channels"] <= row["channels"]
    return wide and (row["bits"] in (0, keys["bits"]) or keys["bits"] == 0)
