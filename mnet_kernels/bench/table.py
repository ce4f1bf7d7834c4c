"""Results as text."""

from ..training.metrics import dumps

COLUMNS = (
    "provider",
    "median ms",
    "20 %",
    "80 %",
    "speed-up",
    "95 % interval",
    "verdict",
    "saved MB",
    "faults",
    "first call s",
)


def _number(value, digits):
    return "" if value is None else f"{value:.{digits}f}"


def _milliseconds(value):
    return _number(value, 1 if value is None or value >= 10 else 3 if value >= 1 else 4)


def _cells(row):
    if "error" in row:
        return [row["provider"], row["error"]]
    if "verdict" in row:
        interval = f"{row['speedup_low']:.3f}..{row['speedup_high']:.3f}"
        ratio = [f"{row['speedup']:.3f}", interval, row["verdict"]]
    else:
        ratio = ["1", "", ""]
    saved = row.get("saved_bytes")
    return [
        row["provider"], *(_milliseconds(row[k]) for k in ("median_ms", "q20_ms", "q80_ms")), *ratio,
        _number(saved and saved / 1e6, 1), _number(row.get("page_faults"), 0), _number(row.get("first_call_s"), 2),
    ]  # fmt: skip


def table(rows):
    """One subject's rows as lines: what it is, the columns, one line a provider, the noise floor."""
    first = rows[0]
    title = f"{first['level']} {first['subject']}: {first['direction']}, batch {first['batch']}, amp {first['amp']}"
    lines = [f"{title}, launch {first['launch']}"]
    cells = [list(COLUMNS), *(_cells(row) for row in rows)]
    widths = [max(len(r[i]) for r in cells if len(r) == len(COLUMNS)) for i in range(len(COLUMNS))]
    widths[0] = max(len(r[0]) for r in cells)
    for row in cells:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        lines.append("  " + "  ".join(padded if len(row) == len(COLUMNS) else [padded[0], row[1]]).rstrip())
    noise = next((row["noise"] for row in rows if "noise" in row), None)
    if noise is not None:
        lines.append(
            f"  noise floor (the same twice): {100 * noise:.1f} %; rounds: {max(r.get('rounds', 0) for r in rows)}"
        )
    chosen = next((row["convolutions"] for row in rows if row.get("convolutions") and row["provider"] == "eager"), None)
    if chosen:
        lines.append("  torch's convolutions (eager): " + ", ".join(f"{n} x {label}" for label, n in chosen.items()))
    return "\n".join(lines)


def document(header, rows):
    """Header and rows as JSON text."""
    return dumps({"header": header, "rows": rows}, indent=1) + "\n"
