"""python -m mnet_kernels.profile: what it profiles, and what it collects."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from profiles import BLOCK, CPU, MACHINE, options

from mnet_kernels import backends
from mnet_kernels.bench import BenchError, compare, memory, providers, timing
from mnet_kernels.bench.subjects import Setting
from mnet_kernels.cost import cost
from mnet_kernels.profile import collect, page, png, steps, subject, terminal

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


def test_peak_memory_agrees_with_what_is_saved():
    """A forward pass that keeps what it saves: the timeline's peak is at least that, and not much more."""
    x = torch.randn(64, 1024, requires_grad=True)

    def step():
        torch.autograd.grad((x.exp() * 2).sum(), x)

    found = steps.record(step, CPU)
    assert memory.saved_bytes(lambda: x.exp() * 2) == x.nbytes
    assert x.nbytes <= found.peak_bytes <= 4 * x.nbytes


@pytest.fixture
def one_thread():
    """Two that wait for each other take minutes where other work has the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(not backends.whole("cpu", "chain"), reason="the CPU kernels were not built")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_peak_memory_is_what_a_process_needs(tmp_path, one_thread):
    """The figure that is shown, and the peak of resident memory of a fresh process above what it holds between steps.

    malloc gives freed tensors back at once there: holes in its heap are not the step's.
    """
    path, root = tmp_path / "rows.json", Path(__file__).resolve().parents[1]
    command = [sys.executable, root / "bench" / "peak_memory.py", "--res", "128", "--batch", "8", "--amp", "off"]
    env = os.environ | {"PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "131072"}
    subprocess.run([*command, "--json", path], env=env, check=True, timeout=300)
    needed = {row["provider"]: row["step_bytes"] for row in json.loads(path.read_text())["rows"]}
    (model,) = (p for p in subject.find("v2", resolution=128) if p.subject.level == "model")
    found = collect.collect("V2", [model], options(batch=8, fused="cpu/auto"), MACHINE)
    (entry,) = found.entries
    for side in entry.sides:
        assert side.peak_bytes == pytest.approx(needed[side.provider], rel=0.15), side.provider
        assert max(size for _, size in side.memory) == side.peak_bytes


def test_the_thread_clock_needs_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with pytest.raises(BenchError, match="counts one thread's time, and torch has 4: --threads 1"):
        timing.clock("thread", CPU)
    with pytest.raises(BenchError, match="is for the CPU"):
        timing.clock("thread", torch.device("cuda"))
