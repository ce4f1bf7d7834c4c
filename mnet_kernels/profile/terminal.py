"""A profile as a table in the terminal (rich)."""

from . import require
from .text import MARKS, amount, interval, milliseconds, short, subtitle, title, verdict

COLUMNS = ("", "ms", "20 to 80 %", "times as fast", "MB", "GB/s", "GFLOP/s", "of floor", "saved MB", "peak MB", "ops")
# what is left out first where the window is narrow
OPTIONAL = ("20 to 80 %", "GFLOP/s", "peak MB", "GB/s", "MB", "of floor", "ops", "saved MB")
GAP = 3


def show(profile, file=None):
    """Print a profile.

    Raises:
        BenchError: rich is missing.
    """
    require("rich", "the table")
    import rich.box
    import rich.console
    import rich.measure
    import rich.table

    console = rich.console.Console(file=file, highlight=False)
    rows = _rows(profile)
    columns = list(range(len(COLUMNS)))
    if console.is_terminal:  # a file has no width of its own
        columns = _that_fit(rows, console.width)
    console.print(f"[bold]{title(profile)}[/bold]\n{subtitle(profile)}", soft_wrap=True)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for i in columns:
        table.add_column(COLUMNS[i], justify="right" if i else "left", no_wrap=True)
    for cells in rows:
        if len(cells) == 1:
            table.add_section()
        table.add_row(*(cells[i] for i in columns if i < len(cells)), style="bold" if len(cells) == 1 else None)
    unbound = console.options.update(max_width=1000)
    console.width = max(console.width, rich.measure.Measurement.get(console, unbound, table).maximum)
    console.print(table)
    for number, entry in enumerate(profile.entries, 1):
        for side, why in entry.errors.items():
            console.print(f"{number}, {side}: {why}", markup=False, soft_wrap=True)
    console.print(verdict(profile), markup=False, soft_wrap=True)


def _rows(profile):
    """Lists of cells; an entry's name is a row of one cell, above its sides."""
    rows = []
    for number, entry in enumerate(profile.entries, 1):
        rows.append([short(entry, number) + (f" (x{len(entry.paths)})" if len(entry.paths) > 1 else "")])
        for side in entry.sides:
            is_faster = side is entry.fused and entry.speedup
            rows.append(_cells(side, interval(entry) + MARKS[entry.verdict] if is_faster else ""))
    return rows


def _cells(side, faster):
    return [
        f"  {side.provider}", milliseconds(side.median_ms),
        f"{milliseconds(side.q20_ms)}..{milliseconds(side.q80_ms)}", faster, amount(side.bytes / 1e6),
        amount(side.gbytes_per_s), amount(side.gflops_per_s), f"{100 * side.share:.0f} %",
        "" if side.saved_bytes is None else amount(side.saved_bytes / 1e6), amount(side.peak_bytes / 1e6),
        "" if side.ops is None else str(side.ops),
    ]  # fmt: skip


def _width(rows, columns):
    return sum(max(len(COLUMNS[i]), *(len(cells[i]) for cells in rows if i < len(cells))) + GAP for i in columns) + GAP


def _that_fit(rows, width):
    columns = list(range(len(COLUMNS)))
    for name in OPTIONAL:
        if _width(rows, columns) > width:
            columns.remove(COLUMNS.index(name))
    return columns
