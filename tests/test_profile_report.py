"""python -m mnet_kernels.profile: what it writes, and what the command says when something is wrong."""

import gzip
import html.parser
import json
import re
import sys

import pytest
import torch
from profiles import BLOCK, CPU, MACHINE

from mnet_kernels.bench import compare, providers
from mnet_kernels.bench.subjects import Setting
from mnet_kernels.profile import __main__, charts, collect, data, page, png, subject, svg, trace

# ---- what is written -------------------------------------------------------------------------------------------------


def test_json_keeps_everything(profile, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(profile.as_dict()))
    again = data.load(path)
    assert again.as_dict() == json.loads(path.read_text())
    assert again.entries[0].fused.calls[0] == profile.entries[0].fused.calls[0]
    written = json.loads(path.read_text())
    assert (written["kind"], written["format"]) == ("mnet_kernels.profile", 1)
    assert written["header"]["torch"] == torch.__version__ and written["header"]["device"] and written["header"]["date"]
    assert set(written["settings"]) == {
        "target", "direction", "batch", "dtype", "amp", "device", "unfused", "fused", "seconds", "clock",
    }  # fmt: skip
    fields = {
        "provider", "median_ms", "q20_ms", "q80_ms", "samples_ms", "scheme", "bytes", "flops", "floor_ms",
        "saved_bytes", "peak_bytes", "ops", "parts", "memory", "calls", "convolutions",
    }  # fmt: skip
    for entry in written["entries"]:
        assert set(entry["unfused"]) == set(entry["fused"]) == fields
        assert entry["verdict"] in ("faster", "slower", "within noise") and len(entry["speedup"]) == 3
    assert sum(written["entries"][0]["unfused"]["convolutions"].values()) >= 2


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order; gathers text, and whatever would be loaded from elsewhere."""

    VOID = {"meta", "br", "line", "rect", "circle", "path"}

    def __init__(self):
        super().__init__()
        self.open, self.words, self.outside, self.count = [], [], [], {}

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.outside += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID or tag in ("circle", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


def test_the_page_is_whole_and_loads_nothing(profile):
    text = page.render(profile)
    parser = Page()
    parser.feed(text)
    assert [tag for tag in parser.open if tag != "meta"] == [] and not parser.outside
    assert "url(" not in text and "@import" not in text and "http" not in text
    words = "\n".join(parser.words)
    for number, entry in enumerate(profile.entries, 1):
        assert page.text.name(entry) in words and page.text.short(entry, number) in words
    for told in (profile.header["device"], f"torch {torch.__version__}", "reference/chain against eager", "of floor"):
        assert told in words
    assert parser.count["svg"] == 6  # three charts, for wide and for small windows
    assert parser.count["details"] == len(profile.blocks)
    assert "prefers-color-scheme: dark" in text and 'id="theme"' in text
    assert "mnet_ref::pointwise_backward" in words
    assert "nan" not in re.sub(r"<style>.*</script>", "", text, flags=re.S).lower().replace("tenant", "")


@pytest.mark.parametrize("width", [page.WIDE, page.SMALL])
def test_marks_lie_within_the_chart(profile, width):
    for canvas in (charts.roofline(profile, width), charts.bars(profile, width), charts.memory(profile.model, width)):
        drawn = "".join(canvas.elements)
        for name, limit in (("cx", width), ("cy", canvas.height), ("x", width), ("y", canvas.height)):
            values = [float(v) for v in re.findall(rf' {name}="([-0-9.]+)"', drawn)]
            assert values and all(0 <= v <= limit for v in values) or name.startswith("c"), (name, values)


def test_labels_do_not_cover_each_other(profile):
    drawn = "".join(charts.roofline(profile, page.WIDE).elements)
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="t number"', drawn)
    assert len(places) == len(profile.entries)
    boxes = [(float(x), float(y)) for x, y in places]
    for i, (x, y) in enumerate(boxes):
        assert all(abs(x - a) >= 8 or abs(y - b) >= 14 for a, b in boxes[:i])


def test_ticks():
    assert svg.Axis(0.0, 100.0, 0, 1).ticks(5) == [0, 20, 40, 60, 80, 100]
    assert svg.Axis(0.8, 30.0, 0, 1, log=True).ticks() == pytest.approx([1, 2, 5, 10, 20])
    assert svg.Axis(1.0, 1e6, 0, 1, log=True).ticks() == pytest.approx([10**i for i in range(7)])
    assert [svg.plain(v) for v in (0, 0.5, 20.0, 1e6)] == ["0", "0.5", "20", "1000000"]


def test_text_in_a_chart_is_escaped():
    canvas = svg.Canvas(10, 10, 'a "b"')
    canvas.text(1, 1, "<script>")
    assert "<script>" not in canvas.render("wide") and "a &quot;b&quot;" in canvas.render("wide")


def test_the_picture(profile):
    assert png.render(profile).startswith(b"\x89PNG")


def test_the_timeline_names_stages_and_layers(tmp_path):
    block, setting = subject.block("4-8-4@6"), Setting(CPU, 2)
    sides = (providers.NATIVE["eager"], providers.Provider("reference/chain", "reference", "chain"))
    prepared = [compare.Prepared(block, p, setting, ["train"]) for p in sides]
    path = tmp_path / "t.json.gz"
    trace.write(path, prepared, "train", CPU)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert names.count("eager train") == names.count("reference/chain train") == trace.STEPS
    assert names.count("layer Conv2d 2x4x6x6") == trace.STEPS
    assert names.count("stage depthwise 2x8x6x6") == trace.STEPS
    assert names.count("stage pointwise_backward 2x4x6x6") == trace.STEPS
    out = prepared[1].calls["train"]
    with torch.profiler.profile() as found:
        out()
    assert not any(e.name.startswith("stage ") for e in found.events())  # only while a timeline is written


# ---- the command line ------------------------------------------------------------------------------------------------


def run(*arguments):
    return __main__.main([BLOCK, "--device", "cpu", "--batch", "2", "--seconds", "0.02", "--rounds", "5", *arguments])


def test_the_command_writes_and_reads_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collect, "rates", lambda *_: MACHINE)
    paths = {kind: str(tmp_path / f"p.{kind}") for kind in ("html", "json", "png")}
    outputs = [f"--{kind}={path}" for kind, path in paths.items()]
    assert run("--backend", "reference/chain", "--eval", *outputs) == 0
    out = capsys.readouterr().out
    assert "inference, batch 2, float32" in out and "reference/chain" in out and "peak MB" in out
    assert json.loads((tmp_path / "p.json").read_text())["entries"][0]["fused"]["saved_bytes"] is None
    first = (tmp_path / "p.html").read_text()
    (tmp_path / "p.html").unlink()
    assert __main__.main([paths["json"], "--html", paths["html"]]) == 0
    assert (tmp_path / "p.html").read_text() == first
    assert __main__.main([paths["json"], "--trace", str(tmp_path / "t")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--html", "/nowhere/p.html"], "--html /nowhere/p.html: cannot write into /nowhere"), (["--json", "/"], "folder"),
     (["--backend", "cuda"], "cannot be measured on cpu"), (["--baseline", "fast"], "unknown provider 'fast'"),
     (["--batch", "0"], "--batch must be above 0, got 0"), (["--rounds", "2"], "--rounds must be at least 5"),
     (["--baseline", "cudnn"], "provider 'cudnn' cannot be measured on cpu")],
)  # fmt: skip
def test_the_command_says_what_is_wrong(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(collect, "collect", lambda *_, **__: pytest.fail("measured"))
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize(("module", "arguments"), [("rich", []), ("matplotlib", ["--png", "p.png"])])
def test_a_missing_extra_is_said_before_anything_is_measured(module, arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(collect, "collect", lambda *_, **__: pytest.fail("measured"))
    assert run(*arguments) == 2
    assert f"needs {module}" in (error := capsys.readouterr().err) and "pip install 'mnet-kernels[profile]'" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot use"), ('{"kind": "other"}', "this is no profile"),
     ('{"kind": "mnet_kernels.profile", "format": 99}', "format 99, and this version reads 1"),
     ('{"kind": "mnet_kernels.profile", "format": 1, "header": {}}', "damaged"), (None, "cannot read")],
)  # fmt: skip
def test_a_file_that_is_no_profile(content, message, tmp_path, capsys):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_text(content)
    assert __main__.main([str(path)]) == 2
    assert message in capsys.readouterr().err
