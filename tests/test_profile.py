"""python -m mnet_kernels.profile: what it collects, what it writes, what it says when something is wrong."""

import gzip
import html.parser
import json
import re
import sys

import pytest
import torch

from mnet_kernels import backends
from mnet_kernels.bench import BenchError, compare, memory, providers, timing
from mnet_kernels.bench.subjects import Setting
from mnet_kernels.cost import cost
from mnet_kernels.profile import __main__, charts, collect, data, page, png, steps, subject, svg, terminal, trace

CPU = torch.device("cpu")
MACHINE = {"copy_bytes_per_s": 1e10, "matrix_flops": {"fp32": 5e10, "bf16": 5e10}, "matrix_flops_per_s": 5e10}
BLOCK = "8-24-8@10,k5,hardswish,se"
QUICK = {"seconds": 0.02, "rounds": 5}


def options(**changes):
    return collect.options(**({"device": CPU, "batch": 2, "fused": "reference/chain", **QUICK} | changes))


@pytest.fixture(scope="module")
def profile():
    """A profile of two blocks and a model, collected once."""
    torch.manual_seed(0)
    placed = subject.find("v1", width=0.25, resolution=32)
    chosen = [subject.Placed(subject.block(BLOCK)), next(p for p in placed if len(p.paths) > 1), placed[-1]]
    return collect.collect("MobileNet V1", chosen, options(), machine=MACHINE)


# ---- what is profiled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "layers"),
    [("24-144-24@56,k3,s1", "24x56x56 pw144 dw3s1 pw24 relu6 +x", 3),
     ("8-8-16@9x7,s2,relu", "8x9x7 dw3s2 pw16 relu", 2),
     ("40-120-48@14,k5,hardswish,se", "40x14x14 pw120 dw5s1 pw48 hardswish +se", 5),
     ("4-11-4@5,se3", "4x5x5 pw11 dw3s1 pw4 relu6 +x +se", 5),
     ("32-64@8", "32x8x8 dw3s1 pw64 relu6", 2)],
)  # fmt: skip
def test_a_block_in_words(text, name, layers):
    found = subject.block(text)
    assert found.name == name
    assert sum(isinstance(m, torch.nn.Conv2d) for m in found.module.modules()) == layers
    assert found.module.train()(torch.randn(2, *found.shape)).dim() == 4


def test_the_width_of_squeeze_excite():
    widths = [
        next(m.out_channels for n, m in subject.block(text).module.named_modules() if n.endswith("fc1"))
        for text in ("40-120-48@14,se", "40-120-48@14,se5")
    ]
    assert widths == [32, 5]  # torchvision's rule, and as asked for


@pytest.mark.parametrize(
    ("text", "message"),
    [("v9", "neither a model (v1, v2, v3-large, v3-small) nor a block such as"), ("24-144@56,k7", "option 'k7'"),
     ("0-4-4@5", "above 0"), ("8-8@5,se", "squeeze-excite needs an inverted residual"), ("8-8", "neither a model"),
     ("8-8-8@5,gelu", "unknown option 'gelu'")],
)  # fmt: skip
def test_what_is_no_block(text, message):
    with pytest.raises(BenchError, match=re.escape(message)):
        subject.find(text)


def test_a_models_blocks_and_where_they_stand():
    placed = subject.find("v2", width=0.25, resolution=32)
    assert sum(len(p.paths) for p in placed) == 19  # the stem, 17 inverted residuals and the last pointwise layer
    assert placed[0].paths == ("features.0",) and placed[-1].subject.level == "model"
    only = subject.find("v2", width=0.25, resolution=32, only=" +x")
    assert only and all(p.subject.name.endswith("+x") for p in only)
    with pytest.raises(BenchError, match="no block of v2 has 'nothing' in its name; there are:\n  v2 "):
        subject.find("v2", width=0.25, resolution=32, only="nothing")


# ---- what is collected -----------------------------------------------------------------------------------------------


def test_work_is_the_cost_models(profile):
    block = subject.block(BLOCK)
    found = cost(block.module, block.shape, 2, torch.float32, ("eager", "chain"))
    entry = profile.entries[0]
    for side, scheme in ((entry.unfused, "eager"), (entry.fused, "chain")):
        assert (side.scheme, side.bytes, side.flops) == (scheme, found.bytes(scheme), 6 * found.madds * 2)
        assert side.saved_bytes == found.saved[scheme]
        assert side.floor_ms >= 1e3 * side.bytes / MACHINE["copy_bytes_per_s"] * 0.999
        assert side.share == pytest.approx(side.floor_ms / side.median_ms)
        assert side.gbytes_per_s == pytest.approx(side.bytes / side.median_ms / 1e6)
        assert side.intensity == pytest.approx(side.gflops_per_s / side.gbytes_per_s)


def test_the_rates_are_the_higher_ones_of_before_and_after(monkeypatch):
    slow = {"matrix_flops": {"fp32": 2e10}, "copy_bytes_per_s": 3e10, "matrix_flops_per_s": 2e10, "note": "kept"}
    fast = {"matrix_flops": {"fp32": 5e10}, "copy_bytes_per_s": 1e10, "matrix_flops_per_s": 5e10, "note": "kept"}
    answers = iter((slow, fast))
    monkeypatch.setattr(collect, "rates", lambda *_: next(answers))
    found = collect.collect("b", [subject.Placed(subject.block("4-8-4@6"))], options())
    want = {"matrix_flops": {"fp32": 5e10}, "copy_bytes_per_s": 3e10, "matrix_flops_per_s": 5e10, "note": "kept"}
    assert found.machine == want
    given = collect.collect("b", [subject.Placed(subject.block("4-8-4@6"))], options(), want)
    for one, other in zip(found.entries[0].sides, given.entries[0].sides, strict=True):
        assert one.floor_ms == other.floor_ms > 0


def test_work_of_inference():
    block = subject.block("4-8-4@6")
    found, flops = collect.work(block, Setting(CPU, 3, training=False), ("eager", "chain"))
    madds = (4 * 8 + 9 * 8 + 8 * 4) * 36
    assert flops == 2 * madds * 3 and found.saved["chain"] == 0
    one, expanded = 3 * 36 * 4 * 4, 3 * 36 * 8 * 4  # bytes of a narrow and of an expanded map
    maps = {
        # a convolution reads and writes, batch norm and activation too
        "eager": (one + 5 * expanded) + (6 * expanded) + (expanded + one) + 2 * one + 3 * one,
        "chain": (one + expanded) + 2 * expanded + (expanded + one) + 3 * one,
    }
    for scheme, least in maps.items():
        small = found.bytes(scheme) - least
        assert 0 <= small < 0.2 * least, (scheme, small)  # weights and coefficients


def test_the_parts_of_a_step_add_up_to_its_median(profile):
    for entry in profile.entries:
        for side in entry.sides:
            assert sum(side.parts.values()) == pytest.approx(side.median_ms)
            assert set(side.parts) <= set(steps.PARTS) and all(ms > 0 for ms in side.parts.values())
            assert side.q20_ms <= side.median_ms <= side.q80_ms and len(side.samples_ms) == 5
        assert "activation" in entry.unfused.parts
    with_excite = [["squeeze-excite" in side.parts for side in entry.sides] for entry in profile.entries]
    assert with_excite == [[True, True], [False, False], [False, False]]


def test_memory_of_a_step_is_what_lives_in_it(profile):
    inputs = [4 * 2 * count for count in (8 * 10 * 10, 128 * 2 * 2, 3 * 32 * 32)]  # saved, but there before the step
    for entry, size in zip(profile.entries, inputs, strict=True):
        for side in entry.sides:
            times = [ms for ms, _ in side.memory]
            assert times == sorted(times) and len(times) <= steps.MEMORY_POINTS + 1
            assert side.peak_bytes == max(live for _, live in side.memory) >= side.saved_bytes - size
    assert profile.model.fused.saved_bytes < profile.model.unfused.saved_bytes


def test_ops_are_counted_below_autograd():
    block, device = subject.block("8-16-8@6"), CPU
    native = compare.Prepared(block, providers.NATIVE["eager"], Setting(device, 2), ["forward", "train"])
    names = [call.name.partition("::")[2] for call in steps.record(native.calls["forward"], device).calls]
    # three layers: convolution, the counter of batches, batch norm, two activations; and the residual
    assert names == ["convolution", "add_", "native_batch_norm", "hardtanh_"] * 2 + [
        "convolution", "add_", "native_batch_norm", "add",
    ]  # fmt: skip
    fused = compare.Prepared(block, providers.Provider("r", "reference", "chain"), Setting(device, 2), ["train"])
    with_stages = steps.record(fused.calls["train"], device)
    stages = [call.name.partition("::")[2] for call in with_stages.calls if call.name.startswith("mnet_ref::")]
    assert [s for s in stages if s in ("pointwise", "depthwise")] == ["pointwise", "depthwise", "pointwise"]
    backward = [s for s in stages if s.endswith("wise_backward")]
    assert backward == ["pointwise_backward", "depthwise_backward", "pointwise_backward"]
    assert with_stages.kernels == len(with_stages.calls)
    assert sum(with_stages.parts(1e6).values()) == pytest.approx(1e6)
    assert sum(with_stages.parts(1e-6).values()) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("name", "shapes", "want"),
    [("aten::convolution", [[2, 8, 4, 4], [8, 1, 3, 3]], "depthwise"),
     ("aten::convolution_backward", [[2, 8, 4, 4], [2, 8, 4, 4], [8, 1, 5, 5]], "depthwise"),
     ("aten::convolution", [[2, 8, 4, 4], [16, 8, 1, 1]], "pointwise"),
     ("aten::convolution", [[2, 8, 1, 1], [16, 8, 1, 1]], "pointwise"),
     ("aten::convolution", [[2, 3, 4, 4], [16, 3, 3, 3]], "dense conv"),
     ("mnet_cuda::depthwise_backward", [], "depthwise"), ("mnet_cpu::expand_depthwise", [], "expand+depthwise"),
     ("mnet_cpu::stem_backward", [], "dense conv"), ("mnet_cpu::finalize", [], "batch norm"),
     ("aten::native_batch_norm_backward", [], "batch norm"),
     ("aten::hardswish_backward", [], "activation"), ("aten::addmm", [], "other")],
)  # fmt: skip
def test_parts(name, shapes, want):
    assert steps.part(name, shapes) == want


def test_parts_of_squeeze_excite():
    for name, shapes in (("aten::addmm", []), ("aten::convolution", [[2, 8, 1, 1], [16, 8, 1, 1]])):
        assert steps.part(name, shapes, steps.EXCITE["block"]) == "squeeze-excite"
    assert steps.part("aten::addmm", [], steps.EXCITE["model"]) == "other"  # the classifier


def test_what_disturbed_one_step_is_left_out():
    calm, disturbed = [0.0, 1.0, 3.0, 4.0], [0.0, 1.0, 53.0, 54.0]
    points = [[0.5, 1], [27.0, 2], [54.0, 3]]
    assert steps._undisturbed(points, disturbed, [calm, disturbed]) == [[0.5, 1], [2.0, 2], [4.0, 3]]


@pytest.mark.parametrize(
    ("factor", "verdict", "told"), [(1.0, "within noise", "within noise (marked ~): 1"), (0.5, "faster", None),
                                    (2.0, "slower", "slower (marked !): 1")]
)  # fmt: skip
def test_what_is_said_of_a_difference(factor, verdict, told, monkeypatch):
    """Times are drawn, with outliers as a busy machine has them: the same twice is noise, and said to be."""
    generator = torch.Generator().manual_seed(0)

    def interleave(calls, *_, **__):
        def draw(factor):
            spread = torch.randn(60, generator=generator) * 0.05 + (torch.rand(60, generator=generator) < 0.05)
            return (factor * spread.exp()).tolist()

        return {name: draw(factor if i == 2 else 1.0) for i, name in enumerate(calls)}

    monkeypatch.setattr(timing, "interleave", interleave)
    found = collect.collect("b", [subject.Placed(subject.block("4-8-4@6"))], options(), MACHINE)
    (entry,) = found.entries
    assert entry.verdict == verdict and 0 < entry.noise < 0.2
    assert entry.speedup[1] <= entry.speedup[0] <= entry.speedup[2]
    assert entry.speedup[0] == pytest.approx(1 / factor, rel=0.1)
    words = page.text.verdict(found)
    assert "noise floor: two runs of the same differed" in words
    assert told in words if told else "marked" not in words


def test_a_side_that_fails_is_said_and_the_other_shown(monkeypatch, capsys):
    prepare = subject.Block.prepare

    def broken(self, provider, setting):
        if provider.backend == "reference":
            raise RuntimeError("no such kernel image")
        return prepare(self, provider, setting)

    monkeypatch.setattr(subject.Block, "prepare", broken)
    found = collect.collect("b", [subject.Placed(subject.block(BLOCK))], options(), MACHINE)
    (entry,) = found.entries
    assert entry.fused is None and entry.unfused.median_ms > 0 and entry.verdict is None
    terminal.show(found)
    for shown in (page.render(found), capsys.readouterr().out):
        assert "no such kernel image" in shown
    assert png.render(found).startswith(b"\x89PNG")


@pytest.mark.skipif(not backends.whole("cpu", "chain"), reason="the CPU kernels were not built")
def test_the_fused_side_is_the_best_that_runs_here():
    assert options(fused=None).fused == providers.Provider("cpu/auto", "cpu", "auto")


def test_names_that_are_no_sides():
    with pytest.raises(BenchError, match="eager against itself"):
        options(fused="eager")
    with pytest.raises(BenchError, match="unknown provider 'eagre'"):
        options(baseline="eagre")


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


def test_the_thread_clock_needs_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with pytest.raises(BenchError, match="counts one thread's time, and torch has 4: --threads 1"):
        timing.clock("thread", CPU)
    with pytest.raises(BenchError, match="is for the CPU"):
        timing.clock("thread", torch.device("cuda"))


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


def test_peak_memory_agrees_with_what_is_saved():
    """A forward pass that keeps what it saves: the timeline's peak is at least that, and not much more."""
    x = torch.randn(64, 1024, requires_grad=True)

    def step():
        torch.autograd.grad((x.exp() * 2).sum(), x)

    found = steps.record(step, CPU)
    assert memory.saved_bytes(lambda: x.exp() * 2) == x.nbytes
    assert x.nbytes <= found.peak_bytes <= 4 * x.nbytes
