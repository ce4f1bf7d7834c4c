"""The report's pictures: roofline, time by part, memory over a step.  Each is drawn at a given width in pixels."""

import math

from .steps import PARTS
from .svg import Axis, Canvas, frame
from .text import amount, interval, milliseconds, short, size

NARROW = 600  # below this width labels go above what they name


def css(part):
    """The CSS class of a part."""
    return "p" + str(PARTS.index(part))


# ---- roofline --------------------------------------------------------------------------------------------------------


def roof(machine, intensity):
    """GFLOP/s that this machine's rates allow at an intensity."""
    return min(machine["copy_bytes_per_s"] * intensity, machine["matrix_flops_per_s"]) * 1e-9


def bounds(profile):
    """((lowest, highest intensity), (lowest, highest GFLOP/s)) of a roofline that shows every point and the ridge."""
    sides = [side for entry in profile.entries for side in entry.sides]
    ridge = profile.machine["matrix_flops_per_s"] / profile.machine["copy_bytes_per_s"]
    found = [side.intensity for side in sides] + [ridge]
    rates = [side.gflops_per_s for side in sides]
    top = max([profile.machine["matrix_flops_per_s"] * 1e-9, *rates])
    return (min(found) / 1.6, max(found) * 1.8), (min(rates, default=top / 10) / 2, top * 1.7)


def roofline(profile, width):
    """Every entry as two points joined by a line, under the measured roofs."""
    height = 430 if width > NARROW else 380
    canvas = Canvas(width, height, "Roofline: FLOP/s over FLOPs a byte, fused and unfused")
    (low, high), (bottom, top) = bounds(profile)
    x, y = Axis(low, high, 58, width - 14, log=True), Axis(bottom, top, height - 50, 14, log=True)
    wide = width > NARROW
    frame(canvas, x, y, "FLOPs per byte moved" + " (both counted)" * wide, "GFLOP/s")
    _roofs(canvas, profile.machine, x, y)
    marks, taken = [], []
    for number, entry in enumerate(profile.entries, 1):
        at = {side: (x(s.intensity), y(s.gflops_per_s)) for side in ("unfused", "fused") if (s := getattr(entry, side))}
        if len(at) == 2:
            canvas.path(at.values(), "join")
        for side, (px, py) in at.items():
            one = getattr(entry, side)
            told = (
                f"{short(entry, number)}\n{one.provider}: {amount(one.gflops_per_s)} GFLOP/s, "
                f"{amount(one.gbytes_per_s)} GB/s, {amount(one.intensity)} FLOPs a byte"
            )
            marks.append((side, px, py, told, entry.level == "model"))
            taken.append((px - 6, py - 6, px + 6, py + 6))
    for side, px, py, told, is_model in marks:
        if is_model:
            canvas.add("path", title=told, class_=side, d=f"M{px:.1f} {py - 8:.1f}l8 8l-8 8l-8 -8z")
        else:
            canvas.add("circle", title=told, class_=side, cx=px, cy=py, r=5)
    for number, entry in enumerate(profile.entries, 1):
        side = entry.fused or entry.unfused
        if side is not None:
            _label(
                canvas, x(side.intensity), y(side.gflops_per_s), str(number), taken, (x.start, y.end, x.end, y.start)
            )
    return canvas


def _roofs(canvas, machine, x, y):
    ridge = machine["matrix_flops_per_s"] / machine["copy_bytes_per_s"]
    left = max(x.low, y.low * 1e9 / machine["copy_bytes_per_s"])
    points = [(x(v), y(roof(machine, v))) for v in (left, ridge, x.high)]
    canvas.path(points, "roof")
    (x0, y0), (x1, y1), (x2, y2) = points
    slope = math.degrees(math.atan2(y1 - y0, x1 - x0))
    at = 0.45
    canvas.text(
        x0 + at * (x1 - x0) - 5, y0 + at * (y1 - y0) - 7, f"copy {amount(machine['copy_bytes_per_s'] / 1e9)} GB/s",
        "t halo", "middle", rotate=slope,
    )  # fmt: skip
    name = f"matrix product {amount(machine['matrix_flops_per_s'] / 1e9)} GFLOP/s"
    canvas.text(x2 - 4, y2 - 7, name, "t halo", "end")


def _label(canvas, px, py, text, taken, inside):
    """Write a point's number where it covers no other mark."""
    half, best = 4 * len(text), None
    for reach in (14, 22, 32, 44):
        for angle in range(0, 360, 30):
            cx, cy = px + reach * math.cos(math.radians(angle)), py + reach * math.sin(math.radians(angle))
            box = (cx - half, cy - 7, cx + half, cy + 7)
            if box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]:
                continue
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                best = (cx, cy, box, reach)
                break
        if best:
            break
    cx, cy, box, reach = best or (px + 14, py, (px + 6, py - 7, px + 22, py + 7), 14)
    taken.append(box)
    if reach > 20:
        canvas.line(px, py, cx, cy, "leader")
    canvas.text(cx, cy + 4, text, "t number", "middle")


# ---- time by part ----------------------------------------------------------------------------------------------------


def bars(profile, width):
    """Two bars an entry, stacked by part, as shares of the unfused time."""
    entries = [entry for entry in profile.entries if entry.sides]
    wide = width > NARROW
    left, right, row = (300, 74, 54) if wide else (4, 74, 74)
    canvas = Canvas(width, row * len(entries) + 30, "Time by part, fused and unfused")
    longest = max((side.median_ms / _whole(entry) for entry in entries for side in entry.sides), default=1.0)
    x = Axis(0.0, longest, left, width - right)
    for value in x.ticks(5 if wide else 3):
        canvas.line(x(value), 4, x(value), canvas.height - 26, "grid")
        canvas.text(x(value), canvas.height - 9, f"{100 * value:.0f} %", "t", "middle" if value or wide else "start")
    for number, entry in enumerate(profile.entries, 1):
        if entry in entries:
            top = 4 + row * entries.index(entry)
            _bar_names(canvas, entry, number, top, wide)
            for i, side in enumerate(entry.sides):
                _bar(canvas, x, side, _whole(entry), top + 20 * i + (4 if wide else 26))
    return canvas


def _whole(entry):
    return (entry.unfused or entry.fused).median_ms


def _bar_names(canvas, entry, number, top, wide):
    count = f", {len(entry.paths)} times" if len(entry.paths) > 1 else ""
    faster = f"{interval(entry)} times as fast{count}" if entry.speedup else count.lstrip(", ")
    if entry.verdict == "within noise":
        faster = f"within noise: {interval(entry)}{count}"
    if wide:
        canvas.text(0, top + 16, short(entry, number), "t strong")
        canvas.text(0, top + 35, faster, "t")
    else:
        canvas.text(0, top + 6, short(entry, number), "t strong")
        canvas.text(0, top + 21, faster, "t")


def _bar(canvas, x, side, whole, top):
    at = x.start
    for part in PARTS:
        ms = side.parts.get(part, 0.0)
        if ms:
            end = at + x(ms / whole) - x.start
            told = f"{side.provider}, {part}: {milliseconds(ms)} ms, {100 * ms / side.median_ms:.0f} %"
            canvas.rect(at, top, end - at, 17, css(part), told)
            at = end
    canvas.text(at + 5, top + 13, f"{milliseconds(side.median_ms)} ms", "t")


# ---- memory over the step --------------------------------------------------------------------------------------------


def memory(entry, width):
    """Bytes alive above the start, over one step of both sides."""
    canvas = Canvas(width, 320, "Memory over the step, fused and unfused")
    sides = {side: s for side in ("unfused", "fused") if (s := getattr(entry, side)) is not None}
    curves = {side: _stretched(one) for side, one in sides.items()}
    end = max(points[-1][0] for points in curves.values())
    peaks = {side: max(points, key=lambda p: p[1]) for side, points in curves.items()}
    top = max(p[1] for p in peaks.values()) or 1.0
    x, y = Axis(0.0, end, 58, width - 14), Axis(0.0, top * 1.15, 270, 14)
    frame(canvas, x, y, "ms", "MB")
    for side, points in curves.items():
        steps = [(x(t), y(max(0.0, mb))) for t, mb in points]
        corners = [p for a, b in zip(steps, steps[1:], strict=False) for p in (a, (b[0], a[1]))] + steps[-1:]
        canvas.path(corners, f"curve {side}")
    for side, (t, mb) in peaks.items():
        anchor = "start" if x(t) < width * 0.5 else "end"
        canvas.add("circle", class_=side, cx=x(t), cy=y(mb), r=4, title=f"{sides[side].provider}: {size(mb * 1e6)}")
        canvas.text(x(t) + (7 if anchor == "start" else -7), y(mb) - 7, f"peak {amount(mb)} MB", "t halo", anchor)
    return canvas


def _stretched(side):
    """[ms, MB]; the profiler slows a step down, and its clock is stretched to the time measured without it."""
    scale = side.median_ms / side.memory[-1][0] if side.memory[-1][0] else 1.0
    return [(ms * scale, size_ * 1e-6) for ms, size_ in side.memory]
