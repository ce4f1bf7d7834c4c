"""A small drawing surface for SVG, with axes.  Colours come from the page's CSS classes."""

import math
from html import escape


class Canvas:
    """Elements of one picture of ``width`` x ``height`` pixels; y grows downwards."""

    def __init__(self, width, height, label):
        self.width, self.height, self.label, self.elements = width, height, label, []

    def add(self, tag, text=None, title=None, **attributes):
        """One element; ``class_`` is its CSS class, underscores in other names become hyphens."""
        given = " ".join(
            f'{name.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
            for name, value in attributes.items()
            if value is not None
        )
        inner = (f"<title>{escape(title)}</title>" if title else "") + (escape(text) if text else "")
        self.elements.append(f"<{tag} {given}>{inner}</{tag}>" if inner else f"<{tag} {given}/>")

    def line(self, x1, y1, x2, y2, class_, title=None):
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_, title=title)

    def text(self, x, y, text, class_="t", anchor="start", rotate=None):
        turn = None if rotate is None else f"rotate({rotate:.1f} {x:.1f} {y:.1f})"
        self.add("text", text, x=x, y=y, class_=class_, text_anchor=anchor, transform=turn)

    def rect(self, x, y, width, height, class_, title=None):
        self.add("rect", x=x, y=y, width=max(0.0, width), height=height, class_=class_, title=title)

    def path(self, points, class_):
        self.add("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), class_=class_)

    def render(self, class_):
        """The picture as text."""
        inner = "".join(self.elements)
        return (
            f'<svg class="{class_}" width="{self.width}" height="{self.height}" role="img" '
            f'viewBox="0 0 {self.width} {self.height}" aria-label="{escape(self.label)}">{inner}</svg>'
        )  # fmt: skip


def _text(value):
    return f"{value:.1f}" if isinstance(value, float) else str(value)


class Axis:
    """Values to pixels, linear or logarithmic, with round ticks."""

    def __init__(self, low, high, start, end, log=False):
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value):
        def at(v):
            return math.log10(v) if self.log else v

        share = (at(value) - at(self.low)) / (at(self.high) - at(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self, count=6):
        """About ``count`` round values within the axis."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1,) if last - first > 3 else (1, 2, 5)
            found = [m * 10.0**e for e in range(first, last + 1) for m in steps]
        else:
            rough = (self.high - self.low) / count
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
            found = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [v for v in found if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]


def plain(value):
    """A tick's label."""
    return f"{value:.10f}".rstrip("0").rstrip(".") if value else "0"


def frame(canvas, x, y, x_label, y_label):
    """Grid, ticks and names of two axes."""
    for value in x.ticks():
        canvas.line(x(value), y.start, x(value), y.end, "grid")
        canvas.text(x(value), y.start + 17, plain(value), "t", "middle")
    for value in y.ticks():
        canvas.line(x.start, y(value), x.end, y(value), "grid")
        canvas.text(x.start - 7, y(value) + 4, plain(value), "t", "end")
    canvas.line(x.start, y.start, x.end, y.start, "axis")
    canvas.line(x.start, y.start, x.start, y.end, "axis")
    canvas.text((x.start + x.end) / 2, y.start + 37, x_label, "t", "middle")
    canvas.text(13, (y.start + y.end) / 2, y_label, "t", "middle", rotate=-90)
