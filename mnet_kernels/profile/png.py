"""A profile as one picture for a document (matplotlib)."""

import io

from . import require
from .charts import bounds, roof
from .steps import PARTS
from .svg import Axis, plain
from .text import amount, machine, milliseconds, short, title, versions

COLOURS = dict(
    zip(
        PARTS,
        ("#2f6fb3", "#16887a", "#6b4fa0", "#8a6a48", "#dd7a1f", "#e6bd1a", "#b8336f", "#7a828c", "#c9cfd6"),
        strict=True,
    )
)
SIDES = {"unfused": "#b4490f", "fused": "#1a5fb4"}
DPI = 100


def render(profile):
    """The picture as the bytes of a PNG: time by part, and the roofline.

    Raises:
        BenchError: matplotlib is missing.
    """
    require("matplotlib", "the picture")
    # The object interface with its own canvas: needs no display and leaves the caller's pyplot backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = [entry for entry in profile.entries if entry.sides]
    figure = Figure(figsize=(12, max(5.2, 1.4 + 0.42 * len(entries))), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{title(profile)}\n{machine(profile)}\n{versions(profile)}, {profile.header['date']}", fontsize=9.5
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _bars(left, profile, entries)
    _roofline(right, profile)
    found = io.BytesIO()
    figure.savefig(found, format="png", dpi=DPI)
    return found.getvalue()


def _bars(axes, profile, entries):
    used, names = set(), []
    for i, entry in enumerate(entries):
        whole = (entry.unfused or entry.fused).median_ms
        for j, side in enumerate(entry.sides):
            at = 0.0
            for part in (p for p in PARTS if p in side.parts):
                label = None if part in used else part
                used.add(part)
                width = 100 * side.parts[part] / whole
                axes.barh(i + 0.36 * j, width, 0.34, left=at, color=COLOURS[part], label=label)
                at += width
            axes.text(at + 1, i + 0.36 * j, f"{milliseconds(side.median_ms)} ms", va="center", fontsize=7)
        faster = ""
        if entry.speedup:
            faster = "within noise" if entry.verdict == "within noise" else f"{entry.speedup[0]:.2f}x as fast"
        names.append(f"{short(entry, profile.entries.index(entry) + 1)}\n{faster}")
    axes.set_yticks([i + 0.18 for i in range(len(entries))], names, fontsize=7.5)
    axes.invert_yaxis()
    longest = max(side.median_ms / (e.unfused or e.fused).median_ms for e in entries for side in e.sides)
    axes.set_xlim(0, 100 * longest + 16)
    unfused, fused = profile.settings["unfused"], profile.settings["fused"]
    axes.set_xlabel(f"time, % of {unfused} (upper bar {unfused}, lower {fused})", fontsize=8.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: PARTS.index(labels[i]))
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], fontsize=7.5, ncols=4, loc="lower center",
        bbox_to_anchor=(0.5, 1.0), frameon=False,
    )  # fmt: skip


def _roofline(axes, profile):
    (low, high), (bottom, top) = bounds(profile)
    m = profile.machine
    ridge = m["matrix_flops_per_s"] / m["copy_bytes_per_s"]
    axes.loglog([low, ridge, high], [roof(m, v) for v in (low, ridge, high)], color="#1b1f24", linewidth=1.6)
    for entry in profile.entries:
        ends = [(side.intensity, side.gflops_per_s) for side in entry.sides]
        axes.plot(*zip(*ends, strict=True), color="#7a828c", linewidth=1, zorder=2) if ends else None
    for side, colour in SIDES.items():
        ones = [(i, e, s) for i, e in enumerate(profile.entries, 1) if (s := getattr(e, side)) is not None]
        face = colour if side == "fused" else "white"
        for level, marker in (("block", "o"), ("model", "D")):
            found = [s for _, e, s in ones if e.level == level]
            axes.plot(
                [s.intensity for s in found], [s.gflops_per_s for s in found], marker, color=colour,
                markerfacecolor=face, markersize=6, zorder=3,
                label=profile.settings[side] if level == "block" else None,
            )  # fmt: skip
        if side == "fused":
            for i, _, s in ones:
                axes.annotate(str(i), (s.intensity, s.gflops_per_s), (5, 4), textcoords="offset points", fontsize=7.5)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, top)
    axes.set_xlabel("FLOPs per byte moved (both counted)", fontsize=8.5)
    axes.set_ylabel("GFLOP/s", fontsize=8.5)
    for axis, least, most in ((axes.xaxis, low, high), (axes.yaxis, bottom, top)):
        ticks = Axis(least, most, 0, 1, log=True).ticks()
        axis.set_ticks(ticks, [plain(value) for value in ticks], fontsize=8)
        axis.set_minor_formatter("")
    copy, matrix = amount(m["copy_bytes_per_s"] / 1e9), amount(m["matrix_flops_per_s"] / 1e9)
    axes.set_title(f"roofs: copy {copy} GB/s, matrix product {matrix} GFLOP/s", fontsize=8.5)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="lower right")
