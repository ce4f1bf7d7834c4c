"""A profile as one self-contained HTML page: charts, table, the ops of every block.  Nothing is loaded from outside."""

from html import escape
from importlib import resources

from . import charts, text
from .steps import PARTS

WIDE, SMALL = 920, 372


def render(profile):
    """The page as text."""
    style = resources.files(__package__).joinpath("page.css").read_text()
    script = resources.files(__package__).joinpath("page.js").read_text()
    title = escape(text.title(profile))
    entry = profile.model or next((e for e in profile.entries if e.sides), None)
    body = [
        f'<header><h1>{title}</h1><button id="theme" type="button">dark / light</button>',
        "".join(f"<p>{escape(line)}</p>" for line in text.subtitle(profile).split("\n")),
        "</header>",
    ]
    if entry is not None:
        body.append(_tiles(entry))
    body.append("".join(f'<p class="note">{escape(line)}</p>' for line in text.verdict(profile).split("\n")))
    if entry is not None:
        body += [_time(profile), _roofline(profile), _memory(entry)]
    body += [_table(profile), _ops(profile), _method(profile)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body><main>{''.join(body)}</main><script>{script}</script></body></html>\n"
    )


def _both(draw, *arguments):
    """A chart for wide and one for small windows; CSS shows one of them."""
    return draw(*arguments, WIDE).render("wide") + draw(*arguments, SMALL).render("small")


def _figure(name, caption, legend, picture):
    return (
        f"<section><h2>{escape(name)}</h2><p>{escape(caption)}</p>{legend}<figure>{picture}</figure></section>"
    )  # fmt: skip


def _legend(pairs):
    items = "".join(f'<li><i class="{css}"></i>{escape(name)}</li>' for css, name in pairs)
    return f'<ul class="legend">{items}</ul>'


def _sides(profile):
    return [("unfused", profile.settings["unfused"]), ("fused", profile.settings["fused"])]


def _tiles(entry):
    """The totals of the whole model, or of the first block."""
    a, b = entry.unfused, entry.fused
    if a is None or b is None:
        return ""
    step = f"{text.milliseconds(a.median_ms)} to {text.milliseconds(b.median_ms)} ms"
    found = [("time", step, _faster(entry))]
    for name, attribute in (
        ("saved for backward", "saved_bytes"),
        ("peak memory", "peak_bytes"),
        ("bytes moved", "bytes"),
    ):
        old, new = getattr(a, attribute), getattr(b, attribute)
        if old and new:
            found.append((name, f"{text.amount(old / 1e6)} to {text.amount(new / 1e6)} MB", _ratio(old, new)))
    if a.ops and b.ops:
        found.append(("ops", f"{a.ops} to {b.ops}", _ratio(a.ops, b.ops)))
    tiles = "".join(
        f"<li><b>{escape(r)}</b><span>{escape(n)}</span><small>{escape(v)}</small></li>" for n, v, r in found
    )
    return f'<p class="note">{escape(text.name(entry))}:</p><ul class="tiles">{tiles}</ul>'


def _faster(entry):
    if entry.verdict == "within noise":
        return "within noise"
    return f"{entry.speedup[0]:.2f}x as fast" if entry.speedup else "?"


def _ratio(old, new):
    return f"{old / new:.2f}x less" if new <= old else f"{new / old:.2f}x more"


def _time(profile):
    used = [p for p in PARTS if any(p in side.parts for entry in profile.entries for side in entry.sides)]
    a, b = profile.settings["unfused"], profile.settings["fused"]
    caption = (
        f"Of every entry the upper bar is {a}, the lower {b}, as shares of {a}'s time. An op's time is the "
        "least of several steps under torch.profiler; the rest of the median is Python, autograd and dispatch, and "
        "what varies. A fused stage normalises and activates what it reads: that is in its time."
    )
    legend = _legend([(charts.css(part), part) for part in used])
    return _figure("Where the time goes", caption, legend, _both(charts.bars, profile))


def _roofline(profile):
    caption = (
        "With fewer bytes for the same arithmetic a point moves to the right, in less time up. The roofs were measured "
        "on this machine; what stays in a cache can be faster than the copy line. Numbers are those of the table, the "
        "whole model is a diamond. Point at a mark for its figures."
    )
    return _figure("Roofline", caption, _legend(_sides(profile)), _both(charts.roofline, profile))


def _memory(entry):
    caption = (
        f"{text.name(entry)}: what torch and the kernels have allocated above the start of the step. The "
        "time is that of the least disturbed steps, stretched to the median."
    )
    legend = _legend([(side, one.provider) for side in ("unfused", "fused") if (one := getattr(entry, side))])
    return _figure("Memory over the step", caption, legend, _both(charts.memory, entry))


HEAD = (
    "#", "block", "by", "ms", "20 to 80 %", "times as fast", "MB moved", "GB/s", "GFLOP/s", "of floor", "saved MB",
    "peak MB", "ops",
)  # fmt: skip


def _table(profile):
    rows = []
    for number, entry in enumerate(profile.entries, 1):
        count = f" (x{len(entry.paths)})" if len(entry.paths) > 1 else ""
        lines = [(s.provider, _cells(s, entry)) for s in entry.sides]
        lines += [(side, f'<td colspan="{len(HEAD) - 3}">{escape(why)}</td>') for side, why in entry.errors.items()]
        for i, (name, cells) in enumerate(lines):
            first = "".join(
                f'<th rowspan="{len(lines)}">{escape(cell)}</th>' for cell in (str(number), text.name(entry) + count)
            )
            rows.append(f"<tr{' class=first' * (i == 0)}>{first * (i == 0)}<td>{escape(name)}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in HEAD)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<section><h2>Every figure</h2><div class="scroll">{table}</div></section>'


def _cells(side, entry):
    faster = ""
    if side is entry.fused and entry.speedup:
        faster = text.interval(entry) + text.MARKS[entry.verdict]
    values = (
        text.milliseconds(side.median_ms), f"{text.milliseconds(side.q20_ms)} to {text.milliseconds(side.q80_ms)}",
        faster, text.amount(side.bytes / 1e6), text.amount(side.gbytes_per_s), text.amount(side.gflops_per_s),
        f"{100 * side.share:.0f} %", "" if side.saved_bytes is None else text.amount(side.saved_bytes / 1e6),
        text.amount(side.peak_bytes / 1e6), "" if side.ops is None else str(side.ops),
    )  # fmt: skip
    return "".join(f"<td>{escape(value)}</td>" for value in values)


def _ops(profile):
    found = []
    for number, entry in enumerate(profile.entries, 1):
        columns = [_calls(side) for side in entry.sides if side.calls]
        if columns:
            found.append(
                f"<details{' open' * (not found)}><summary>{escape(text.short(entry, number))}</summary>"
                f'<div class="columns">{"".join(columns)}</div></details>'
            )
    return f"<section><h2>Stages and ops, in order</h2>{''.join(found)}</section>" if found else ""


def _calls(side):
    rows = "".join(
        f'<tr><td><i class="{charts.css(call.part)}"></i>{escape(call.name)}</td><td>{escape(call.shape)}</td>'
        f"<td>{text.milliseconds(call.ms)}</td></tr>"
        for call in side.calls
    )
    chosen = ", ".join(f"{count} x {name}" for name, count in (side.convolutions or {}).items())
    chosen = f"<p>torch's convolutions: {escape(chosen)}</p>" if chosen else ""
    return (
        f"<div><h3>{escape(side.provider)}</h3>{chosen}"
        f"<table><thead><tr><th>op</th><th>reads</th><th>ms</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _method(profile):
    settings, environ = profile.settings, profile.header.get("environ") or {}
    clock = "the CPU time of the one thread" if settings["clock"] == "thread" else "elapsed time"
    lines = [
        "Times: both sides, and the baseline a second time, one after another in rounds for "
        f"{settings['seconds']:g} s an entry ({clock}); medians, and the bootstrap's 95 % interval of the ratio over "
        "rounds. A difference no larger than between the two runs of the baseline is called noise.",
        "MB moved and FLOPs are counted (python -m mnet_kernels.cost): every kernel reads its inputs and writes its "
        "outputs once; 2 FLOPs a multiply-add of the convolutions, the same for both sides.",
        "Of floor: the time that copying those bytes and multiplying those matrices takes at the measured rates, "
        "kernel by kernel, as a share of the time taken.",
        "Saved MB: distinct storages kept for backward. Peak MB: the most that was allocated above the start of the "
        "step; on the CPU a process holds more than that by the holes in malloc's heap. Ops: kernels launched on a "
        "card, ops dispatched on the CPU.",
        "Blocks run alone, at the shapes that they have in the model.",
        "Environment: " + (", ".join(f"{name}={value}" for name, value in environ.items()) or "nothing set") + ".",
    ]
    return "<section><h2>How it was measured</h2>" + "".join(f"<p>{escape(line)}</p>" for line in lines) + "</section>"
