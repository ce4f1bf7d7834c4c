"""``python -m mnet_kernels.bench report FILE...``: saved results as Markdown tables and a chart.

Reads what ``mnet_kernels.bench --json``, ``bench/gpu.sh`` and pytest-benchmark (``--benchmark-json``) write.
"""

import argparse
import io
import json
import sys
from pathlib import Path

from ..training import TrainingError, require
from ..training.checkpoint import write_atomic
from . import BenchError, compare, environment, providers

GROUP = ("level", "direction", "launch", "batch", "amp", "training")
# rows of a pytest-benchmark file are not interleaved: what two of them differ by may be the machine's doing
NOT_INTERLEAVED = "not interleaved"


def read(path):
    """(header, rows) of a file of results; every row has the fields of ``compare.key`` beside its figures.

    Raises:
        BenchError: the file cannot be read, or is none of the kinds known.
    """
    try:
        found = json.loads(Path(path).read_text())
        if "benchmarks" in found:
            return _pytest_benchmark(found["benchmarks"])
        return found["header"], [row.get("key", {}) | row for row in found["rows"]]
    except OSError as exc:
        raise BenchError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        kinds = "mnet_kernels.bench --json, bench/gpu.sh or pytest --benchmark-json"
        raise BenchError(f"cannot use {path} ({exc!r}): expected what {kinds} writes") from exc


def _pytest_benchmark(benchmarks):
    rows, header = [], {}
    for one in benchmarks:
        info, stats = dict(one["extra_info"]), one["stats"]
        header = info.pop("header")
        quartiles = {"median_ms": 1e3 * stats["median"], "q25_ms": 1e3 * stats["q1"], "q75_ms": 1e3 * stats["q3"]}
        rows.append(info | quartiles | {"rounds": stats["rounds"]})
    base = {_place(row): row["median_ms"] for row in rows if row["provider"] == providers.BASELINE}
    for row in rows:
        if row["provider"] != providers.BASELINE and _place(row) in base:
            row |= {"speedup": base[_place(row)] / row["median_ms"], "verdict": NOT_INTERLEAVED}
    return header, rows


def _place(row):
    return tuple(row.get(name) for name in (*GROUP, "subject"))


def groups(rows):
    """Rows by what they share, in order: group -> subject -> provider -> row."""
    found = {}
    for row in rows:
        group = tuple(row.get(name) for name in GROUP)
        found.setdefault(group, {}).setdefault(row["subject"], {})[row["provider"]] = row
    return found


def _milliseconds(row):
    return f"{row['median_ms']:.{4 if row['median_ms'] < 1 else 2}f}" if "median_ms" in row else "failed"


def cell(row):
    """A row's speed-up, with its interval, and what is to be thought of it."""
    if row is None:
        return ""
    if "error" in row or "speedup" not in row:
        return "failed" if "error" in row else _milliseconds(row) + " ms"
    text = f"{row['speedup']:.2f}"
    if "speedup_low" in row:
        text += f" ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
    return text if row["verdict"] == "faster" else f"{text}, {row['verdict']}"


def heading(group):
    """What a group's rows are, in words."""
    level, direction, launch, batch, amp, _ = group
    text = f"{level}, {direction}, batch {batch}, {'float32' if amp == 'off' else amp}"
    return text + (", CUDA graph" if launch == "graph" else "")


def place(header):
    """Machine, versions, commit and date of a header, as one line."""
    names = [header.get("device"), f"torch {header.get('torch')}"]
    if header.get("driver"):
        names += [f"CUDA {header.get('cuda')}", f"cuDNN {header.get('cudnn')}", f"driver {header['driver']}"]
    else:
        names += [f"{header.get('threads')} threads"]
    if header.get("clock") == "thread":
        names.append("CPU time")
    names += [f"commit {(header.get('commit') or 'unknown')[:10]}", header.get("date")]
    return ", ".join(name for name in names if name)


def markdown(header, rows):
    """Tables of the rows of one header: a subject a line, a provider a column."""
    lines = [place(header), ""]
    for group, subjects in groups(rows).items():
        lines += _table(group, subjects)
    return "\n".join(lines)


def _table(group, subjects):
    baseline, again = providers.BASELINE, providers.BASELINE + compare.AGAIN
    names = list(dict.fromkeys(name for found in subjects.values() for name in found if name not in (baseline, again)))
    floors = [row["noise"] for found in subjects.values() for row in found.values() if row.get("noise") is not None]
    saved = any(row.get("saved_bytes") for found in subjects.values() for row in found.values())
    head = [group[0], f"{baseline}, ms", *names, *["kept for backward, MB: " + ", ".join([baseline, *names])] * saved]
    lines = [f"**{heading(group)}**: times as fast as {baseline}", "", _line(head), _line(["---"] * len(head))]
    for subject, found in subjects.items():
        base = found.get(baseline)
        cells = [subject, _milliseconds(base) if base else "", *(cell(found.get(name)) for name in names)]
        if saved:
            kept = [found.get(name, {}).get("saved_bytes") for name in (baseline, *names)]
            cells.append(", ".join("" if b is None else f"{b / 1e6:.1f}" for b in kept))
        lines.append(_line(cells))
    if floors:
        low, high = 100 * min(floors), 100 * max(floors)
        lines += ["", f"Noise floor (the same twice): {low:.1f} to {high:.1f} %."]
    return [*lines, ""]


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def summary(files):
    """One Markdown table of all files: a setting a line, a subject a column; each cell how many times as fast the
    fastest fused provider is as the fastest plain one beside it, by their medians, and that one's name.

    Raises:
        BenchError: no setting has both.
    """
    found = {}
    for header, rows in files:
        for group, subjects in groups(rows).items():
            line = found.setdefault((*group, *_surroundings(header)), {})
            for subject, by_provider in subjects.items():
                if text := _over_best(by_provider):
                    line.setdefault(subject, []).append(text)
    lines = {setting: line for setting, line in found.items() if line}
    if not lines:
        raise BenchError("there is nothing to sum up: no subject has both a plain and a fused provider")
    names = list(dict.fromkeys(subject for line in lines.values() for subject in line))
    table = [_line(["fastest fused over fastest plain", *names]), _line(["---"] * (1 + len(names)))]
    for setting, line in sorted(lines.items(), key=_order):
        group, surroundings = setting[: len(GROUP)], setting[len(GROUP) :]
        label = ", ".join(part for part in (heading(group), *surroundings) if part)
        table.append(_line([label, *("; ".join(line.get(name, [])) for name in names)]))
    return "\n".join(table) + "\n"


def _order(item):
    """Of lines: numbers by their size, all else as text."""
    setting = item[0]
    return tuple((0, part, "") if isinstance(part, int) else (1, 0, str(part)) for part in setting)


def _surroundings(header):
    """What the times of a processor depend on beside the setting: its threads, and whether glibc was told not to return
    freed memory."""
    if header.get("driver"):
        return ()
    count, tuned = header.get("threads"), "MALLOC_TRIM_THRESHOLD_" in (header.get("environ") or {})
    return f"{count} thread{'s' * (count != 1)}", "allocator tuned" if tuned else "allocator by default"


def _over_best(by_provider):
    """A subject's cell of the summary, or None where a side is missing.  The baseline counts by the faster of its two
    runs: a disturbed one would be to our favour."""
    times = {name: row["median_ms"] for name, row in by_provider.items() if "median_ms" in row and "error" not in row}
    if (again := times.pop(providers.BASELINE + compare.AGAIN, None)) is not None:
        times[providers.BASELINE] = min(again, times.get(providers.BASELINE, again))
    plain = [name for name in times if name in providers.NATIVE]
    ours = [name for name in times if "/" in name]
    if not plain or not ours:
        return None
    best = min(plain, key=times.get)
    return f"{times[best] / min(times[name] for name in ours):.2f} {best}"


def chart(files):
    """A PNG of all speed-ups with their intervals, as bytes; ``files``: list of (header, rows).

    Raises:
        BenchError: there is nothing to draw, or matplotlib is missing.
    """
    try:
        require("matplotlib", "the chart")
    except TrainingError as exc:
        raise BenchError(str(exc)) from exc
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (header, group, [(s, row) for s, found in subjects.items() for row in found.values() if _drawn(row)])
        for header, rows in files
        for group, subjects in groups(rows).items()
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        raise BenchError("there is no speed-up to draw: the files hold no provider beside the baseline")
    sizes = [1.2 + 0.3 * len(rows) for _, _, rows in panels]
    figure = Figure(figsize=(9, 0.6 + sum(sizes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for one, (header, group, rows) in zip(axes, panels, strict=True):
        _draw(one, header, group, rows)
    found = io.BytesIO()
    figure.savefig(found, format="png", dpi=100)
    return found.getvalue()


def _drawn(row):
    return "speedup" in row and row["provider"] != providers.BASELINE + compare.AGAIN


def _draw(axes, header, group, rows):
    names = list(dict.fromkeys(row["provider"] for _, row in rows))
    for i, (_, row) in enumerate(rows):
        if row.get("noise") is not None:
            low, high = 1 / (1 + row["noise"]), 1 + row["noise"]
            axes.barh(i, high - low, 0.9, left=low, color="#d0d7de", label="noise floor" if not i else None)
        colour = f"C{names.index(row['provider'])}"
        ends = (
            [[row["speedup"] - row["speedup_low"]], [row["speedup_high"] - row["speedup"]]]
            if "speedup_low" in row
            else None
        )
        axes.errorbar([row["speedup"]], [i], xerr=ends, fmt="o", color=colour, markersize=4, capsize=2)
    axes.axvline(1, color="#1b1f24", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{subject}: {row['provider']}" for subject, row in rows], fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as {providers.BASELINE}, 95 % interval; grey: two runs of the same", fontsize=8)
    axes.set_title(f"{heading(group)}\n{place(header)}", fontsize=8.5)
    axes.grid(axis="x", alpha=0.3)


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mnet_kernels.bench report",
        description="Saved results as Markdown tables, and as a chart.  Files measured with the same sources on the "
        "same machine stand in one table.",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="of mnet_kernels.bench, bench/gpu.sh, pytest-benchmark"
    )
    parser.add_argument("--png", metavar="FILE", help="write the chart there")
    parser.add_argument(
        "--summary", action="store_true", help="one table of all files: the fastest fused over the fastest plain"
    )
    return parser


def together(files):
    """Join the rows of files whose headers have one identity (sources, machine, versions): list of (header, rows)."""
    found = []
    for header, rows in files:
        same = next((f for f in found if environment.identity(f[0]) == environment.identity(header)), None)
        if same is None:
            found.append((header, list(rows)))
        else:
            same[1].extend(rows)
    return found


def main(argv=None):
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        files = together([read(path) for path in args.files])
        if args.png:
            write_atomic(args.png, chart(files))
        text = summary(files) if args.summary else "\n".join(markdown(header, rows) for header, rows in files)
    except (BenchError, TrainingError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0
