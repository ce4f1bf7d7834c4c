"""Measuring: statistics on synthetic data, interleaving, subjects, providers, the table of modes."""

import gc
import json
import math
import mmap

import pytest
import torch
from bench_runs import CPU, QUICK, SETTING, SMALL, samples, small_block
from torch.utils._python_dispatch import TorchDispatchMode

import mnet_kernels
from mnet_kernels import backends, choice, stages
from mnet_kernels.bench import (
    BenchError,
    __main__,
    compare,
    environment,
    memory,
    modes,
    providers,
    shapes,
    stage_subjects,
    statistics,
    table,
    timing,
)
from mnet_kernels.bench.subjects import Block, Setting

# ---- statistics ------------------------------------------------------------------------------------------------------


def test_quantiles():
    assert statistics.quantiles([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx([1.8, 3.0, 4.2])


def test_the_interval_covers_the_true_ratio():
    """Nominally 95 of 100; the bootstrap of a median over 60 rounds comes near it."""
    covered = 0
    for _ in range(100):
        interval = statistics.ratio(samples(1.3), samples(1.0))
        covered += interval.low <= 1.3 <= interval.high
        assert interval.low <= interval.median <= interval.high
    assert covered >= 84


def test_the_interval_narrows_with_rounds():
    def width(rounds):
        found = [statistics.ratio(samples(1.0, rounds), samples(1.0, rounds)) for _ in range(20)]
        return sum(i.high - i.low for i in found)

    assert width(400) < 0.5 * width(25)


def test_what_disturbs_whole_rounds_cancels():
    drift = (torch.rand(50, dtype=torch.float64) * 5 + 1).tolist()
    assert statistics.ratio([2 * d for d in drift], drift) == pytest.approx((2, 2, 2))


def test_the_same_thing_twice_is_noise_and_a_difference_is_not():
    alarms = missed = 0
    for _ in range(50):
        base, again, other, faster = samples(1.0), samples(1.0), samples(1.0), samples(0.8)
        noise = statistics.noise_floor(base, again)
        alarms += statistics.verdict(statistics.ratio(base, other), noise) != "within noise"
        missed += statistics.verdict(statistics.ratio(base, faster), noise) != "faster"
        assert statistics.verdict(statistics.ratio(faster, base), noise) in ("slower", "within noise")
    assert alarms <= 4
    assert missed <= 10


@pytest.mark.parametrize(
    ("low", "high", "noise", "want"),
    [(1.02, 1.3, 0.01, "faster"), (1.02, 1.3, 0.05, "within noise"), (0.7, 0.9, 0.05, "slower"),
     (0.7, 0.97, 0.05, "within noise"), (0.9, 1.1, 0.0, "within noise")],
)  # fmt: skip
def test_verdict(low, high, noise, want):
    assert statistics.verdict(statistics.Interval((low + high) / 2, low, high), noise) == want


def test_ratio_refuses_unpaired_samples():
    for pair in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="one sample a round"):
            statistics.ratio(*pair)


def test_the_interval_is_the_bootstraps():
    """As scipy's percentile bootstrap of the same statistic has it."""
    scipy_stats = pytest.importorskip("scipy.stats")
    numpy = pytest.importorskip("numpy")
    base, other = samples(1.3), samples(1.0)
    pairs = numpy.array(base) / numpy.array(other)
    want = scipy_stats.bootstrap((pairs,), numpy.median, n_resamples=4000, method="percentile", rng=0)
    got = statistics.ratio(base, other)
    width = want.confidence_interval.high - want.confidence_interval.low
    assert got.low == pytest.approx(want.confidence_interval.low, abs=0.15 * width)
    assert got.high == pytest.approx(want.confidence_interval.high, abs=0.15 * width)


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_rounds_alternate_and_everything_is_timed_in_each(monkeypatch):
    monkeypatch.setattr(timing.Clock, "repeats", lambda self, call: 1)
    order, inside = [], []

    def call(name):
        order.append(name)
        inside.append(gc.isenabled())

    calls = {name: (lambda name=name: call(name)) for name in "abc"}
    found = timing.interleave(calls, CPU, seconds=0, min_rounds=4, max_rounds=9, warmup=2)
    assert "".join(order) == "aabbcc" + "abccbaabccba"
    assert {name: len(v) for name, v in found.items()} == dict.fromkeys("abc", 4)
    assert not any(inside[6:]) and gc.isenabled()


def test_rounds_are_bounded_and_times_are_per_call():
    ticks = iter(range(0, 10**9, 1000))  # every look at the clock is a microsecond later
    found = timing.interleave({"a": lambda: None}, CPU, seconds=60, max_rounds=7, now=lambda: next(ticks))
    repeats = round(timing.CPU_SAMPLE_SECONDS * 1e6)
    assert found == {"a": [pytest.approx(1e-3 / repeats)] * 7}


def test_interleave_refuses_nothing():
    for bounds in ({"min_rounds": 3, "max_rounds": 2}, {"min_rounds": 0}):
        with pytest.raises(ValueError, match="min_rounds"):
            timing.interleave({"a": lambda: None}, CPU, **bounds)
    with pytest.raises(ValueError, match="0 callables"):
        timing.interleave({}, CPU)


def test_deadline_stops_and_leaves_no_timer():
    with pytest.raises(TimeoutError, match="stopped after"), compare.deadline(0.05):
        while True:
            math.sqrt(2)
    with compare.deadline(None):
        pass


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_blocks_of_v2():
    names = [block.name for block in shapes.blocks(["v2"])]
    assert len(names) == len(set(names)) == 14
    assert names[:2] == ["v2 3x224x224 conv32k3s2 relu6", "v2 32x112x112 dw3s1 pw16 relu6"]
    assert "v2 96x14x14 pw576 dw3s1 pw96 relu6 +x" in names
    assert names[-1] == "v2 320x7x7 pw1280 relu6"


def test_unknown_model():
    with pytest.raises(BenchError, match="unknown model 'v9'"):
        shapes.models(["v9"])


def test_stage_work_is_counted():
    rows = {s.name: s for s in stage_subjects.stages(["v2"])}
    setting = Setting(CPU, 3, "bf16")
    depthwise = rows["depthwise 96x112x112 dw3s2 relu6"]
    assert depthwise.flops(setting) == 3 * 2 * 9 * 96 * 56 * 56
    assert depthwise.bytes(setting) == 3 * 2 * 96 * (112 * 112 + 56 * 56)
    backward = rows["pointwise_backward 96x56x56 pw24 relu6"]
    assert backward.flops(setting) == 3 * 2 * 2 * 96 * 24 * 56 * 56
    assert backward.bytes(setting) == 3 * 2 * 2 * (96 + 24) * 56 * 56
    stem = rows["stem_backward 3x224x224 conv32k3s2"]
    assert stem.flops(setting) == 3 * 2 * 27 * 32 * 112 * 112
    assert stem.bytes(setting) == 3 * 2 * (2 * 32 * 112 * 112 + 3 * 224 * 224)


@pytest.mark.parametrize("subject", stage_subjects.stages(["v3-small"], **SMALL), ids=lambda s: s.name)
def test_native_layers_compute_what_the_stages_do(subject):
    """Forward stages draw the same tensors: the outputs must agree.  Backward ones must run both ways."""
    if subject.backward:
        for provider in (providers.NATIVE["eager"], providers.Provider("reference", "reference")):
            for call in subject.prepare(provider, SETTING).calls.values():
                call()
        return
    seen = []
    reference = stages.stage("reference")

    class Table:
        def __getattr__(self, name):
            def run(*args):
                seen.append(getattr(reference, name)(*args))
                return seen[-1]

            return run

    with torch.no_grad():
        subject.fused(stage_subjects.Tensors(SETTING, True), Table())()
        function, arguments = subject.native(stage_subjects.Tensors(SETTING, True))
        want = function(*arguments)
    got = seen[-1] if isinstance(seen[-1], torch.Tensor) else seen[-1][0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_every_layer_of_a_block_is_measured_in_both_directions():
    names = {s.name for s in stage_subjects.stages(["v2"], **SMALL)}
    for block in shapes.blocks(["v2"], **SMALL):
        for layer in shapes.record(block.module, block.shape)[0]:
            size = f"{layer.channels}x{layer.height}x{layer.width}"
            kind = "stem" if layer.kind == "dense" else layer.kind
            for stage in (kind, f"{kind}_backward"):
                assert f"{stage} {size} {layer} {layer.act or ''}".strip() in names


# ---- who runs it -----------------------------------------------------------------------------------------------------


def test_plain_calls_the_children_and_leaves_the_original_alone():
    block = small_block()
    with mnet_kernels.count_stages() as counts:
        module = providers.fit(block.module, providers.NATIVE["eager"], CPU)
        out = module(torch.randn(2, *block.shape))
    assert not counts
    assert "forward" not in block.module.__dict__
    with mnet_kernels.count_stages() as counts:
        fused = providers.fit(block.module, providers.Provider("r", "reference", "chain"), CPU)
        assert fused(torch.randn(2, *block.shape)).shape == out.shape
    assert counts and all(label.startswith("mnet_ref::") for label in counts)


def test_a_provider_that_runs_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(mnet_kernels.choice, "_environment", ("native", "auto"))
    provider = providers.Provider("cpu/chain", "cpu", "chain")
    one = compare.Prepared(small_block(), provider, SETTING, ["forward"])
    assert "did not run by itself" in one.error["forward"]


def test_providers_by_name():
    names = [p.name for p in providers.parse(["eager", "reference", "reference/algebraic"], CPU)]
    assert names == ["eager", "reference/chain", "reference/algebraic", "reference/algebraic"]
    for name in ("eagre", "reference/other", "native"):
        with pytest.raises(BenchError, match="unknown provider"):
            providers.parse([name], CPU)
    with pytest.raises(BenchError, match="cannot be measured on cpu"):
        providers.parse(["cuda"], CPU)
    with pytest.raises(BenchError, match="unknown provider"):
        stage_subjects.parse(["eager"], CPU)
    (auto,) = providers.parse(["reference/auto"], CPU)
    assert (auto.name, auto.backend, auto.mode) == ("reference/auto", "reference", "auto")


def test_fused_backends_run_without_being_asked_for():
    want = [f"cpu/{mode}" for mode in backends.MODE_STAGES if backends.whole("cpu", mode)]
    assert [p.name for p in providers.runnable(CPU)] == want
    assert [p.name for p in providers.automatic(CPU)] == (["cpu/auto"] if want else [])


def test_saved_bytes():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    assert memory.saved_bytes(lambda: x @ w, [w]) == x.nbytes
    assert memory.saved_bytes(lambda: (x @ w).exp(), [w]) == 2 * x.nbytes  # x, and exp's result
    assert memory.saved_bytes(lambda: x.view(8, 4) @ x, [w]) == x.nbytes  # one storage, twice


# ---- comparing -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(memory.resource is None, reason="the system does not tell")
def test_page_faults():
    page, kept = memory.resource.getpagesize(), bytearray(1 << 24)

    def fresh():
        with mmap.mmap(-1, 1000 * page) as pages:
            for i in range(1000):
                pages[i * page] = 1

    def again():
        kept[::page] = bytes(len(kept) // page)

    again()
    found = memory.page_faults({"fresh": fresh, "again": again})
    # huge pages need fewer
    assert found["fresh"] >= 2 and found["again"] < 1000 and found["fresh"] > found["again"]


def test_compare_rows():
    block = small_block()
    wanted = providers.parse(["nchw", "reference"], CPU)
    prepared = compare.prepare(block, wanted, SETTING, ["train"])
    rows = compare.measure(block, prepared, SETTING, "train", **QUICK)
    by_name = {row["provider"]: row for row in rows}
    assert list(by_name) == ["eager", "eager (again)", "nchw", "reference/chain", "reference/algebraic"]
    for row in rows:
        assert row["q20_ms"] <= row["median_ms"] <= row["q80_ms"] and row["saved_bytes"] > 0
        assert row["page_faults"] >= 0
    assert by_name["reference/algebraic"]["saved_bytes"] < by_name["eager"]["saved_bytes"]
    assert sum(by_name["eager"]["convolutions"].values()) == 3
    assert "verdict" not in by_name["eager"] and "verdict" in by_name["nchw"]
    text = table.table(rows)
    assert all(name in text for name in by_name) and "noise floor" in text


class Broken(Block):
    """A block that some providers cannot prepare."""

    def prepare(self, provider, setting):
        if provider.name in self.broken:
            raise RuntimeError("does not compile")
        return super().prepare(provider, setting)


@pytest.mark.parametrize("broken", [("nchw",), ("eager",), ("eager", "nchw")], ids="+".join)
def test_a_failure_does_not_stop_the_others(broken):
    block = small_block()
    subject = Broken(block.name, block.module, block.shape)
    object.__setattr__(subject, "broken", broken)
    prepared = compare.prepare(subject, providers.parse(["nchw"], CPU), SETTING, ["forward"])
    rows = {row["provider"]: row for row in compare.measure(subject, prepared, SETTING, "forward", **QUICK)}
    for name in ("eager", "nchw"):
        assert ("error" in rows[name]) == (name in broken)
        assert ("median_ms" in rows[name]) == (name not in broken)
    assert "RuntimeError: does not compile" in table.table(list(rows.values()))


def test_header(tmp_path, monkeypatch):
    header = environment.header(CPU)
    assert header["torch"] == torch.__version__ and header["device"] and len(header["sources"]) == 16
    assert set(environment.identity(header)) == set(environment.IDENTITY)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("int a;")
    before = environment.sources()
    (tmp_path / "csrc" / "a.cpp").write_text("int b;")
    assert environment.sources() != before and environment.commit() is None


def test_a_convolution_that_is_not_cudnns_is_refused():
    one = compare.Prepared(small_block(), providers.NATIVE["cudnn"], SETTING, ["forward"])
    assert "torch gives these convolutions to others than cuDNN" in one.error["forward"]
    with pytest.raises(BenchError, match="needs a CUDA card"):
        providers.parse(["cudnn"], CPU)


def test_depthwise_of_stride_2_in_float32():
    """Only those, only under autocast; without it they are what they were."""
    block = next(b for b in shapes.blocks(["v2"], 0.25, 32) if "dw3s2" in b.name)
    found, amp = [], SETTING._replace(amp="bf16")
    x = torch.randn(SETTING.batch, *block.shape)
    for setting, expected in ((SETTING, {torch.float32}), (amp, {torch.float32, torch.bfloat16})):
        found.clear()
        eager, strided = (providers.fit(block.module, providers.NATIVE[n], CPU) for n in ("eager", "eager-strided-f32"))

        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func is torch.ops.aten.convolution.default:
                    found.append((args[8] > 1, args[0].dtype))
                return func(*args, **(kwargs or {}))

        with setting.autocast(), torch.no_grad():
            want = eager(x)
            with Seen():
                got = strided(x)
        assert {dtype for _, dtype in found} == expected
        assert {dtype for depthwise, dtype in found if depthwise} == {torch.float32}
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 if setting is amp else 0)


@pytest.mark.skipif(backends.why_unavailable("cpu", CPU) is not None, reason="no compiled CPU kernels")
@pytest.mark.parametrize("name", ["v1", "v2", "v3-small"])
def test_accelerate_runs_what_the_fused_model_runs(name):
    (model,) = shapes.models([name], 0.25, 64)
    counts = []
    for provider in providers.parse(["accelerate", "cpu/auto"], CPU):
        workload = model.prepare(provider, SETTING)
        with stages.count_stages() as found:
            workload.calls["train"]()
        counts.append(found)
    assert counts[0] == counts[1] and sum(counts[0].values()) > 50


def test_folded_in_eval_mode_alone(tmp_path):
    block = small_block()
    one = compare.Prepared(block, providers.NATIVE["folded"], SETTING, ["forward"])
    assert "measure it with --eval" in one.error["forward"]
    folded, eager = (providers.fit(block.module, providers.NATIVE[n], CPU, False) for n in ("folded", "eager"))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    x = torch.randn(SETTING.batch, *block.shape)
    torch.testing.assert_close(folded(x), eager(x), rtol=1e-4, atol=1e-4)
    file = tmp_path / "rows.json"
    small = ["--models", "v2", "--width", "0.25", "--resolution", "32", "--batch", "2", "--seconds", "0.1"]
    asked = ["folded", *(["cpu/folded"] if backends.why_unavailable("cpu", CPU) is None else [])]
    assert __main__.main(["model", "--eval", *small, "--providers", *asked, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    found = {(row["provider"], row["direction"], row["training"]) for row in rows}
    assert found == {(name, "forward", False) for name in ("eager", "eager (again)", *asked)}


# ---- the table of modes ---------------------------------------------------------------------------------------------


def test_modes_are_written_from_measured_blocks(tmp_path):
    subjects = shapes.blocks(["v2"], 0.25, 32)
    times = {"eager": 9.0, "cpu/chain": 6.0, "cpu/algebraic": 4.0, "cuda/chain": 1.0}
    results = [
        {"subject": s.name, "direction": d, "provider": name, "batch": 2, "amp": "bf16", "median_ms": ms}
        for s in subjects for d in ("forward", "train") for name, ms in times.items()
    ]  # fmt: skip
    rows = modes.rows(subjects, results)
    assert 0 < len(rows) < len(subjects)  # the first block has no expand layer
    assert {row["speedup"] for row in rows} == {1.5} and {row["dtype"] for row in rows} == {"bfloat16"}
    assert {row["backend"] for row in rows} == {"cpu"} and all(row["expanded"] > row["channels"] for row in rows)
    path = tmp_path / "modes.json"
    old = [rows[0] | {"dtype": "float32"}, rows[0] | {"speedup": 9.0}]
    path.write_text(json.dumps({"measured": {"cpu float32": {}}, "rows": old}))
    modes.write({"device": "d", "threads": 1, "torch": "t", "commit": "c", "more": 0}, rows, path)
    written = json.loads(path.read_text())
    assert sorted(map(str, written["rows"])) == sorted(map(str, [old[0], *rows]))
    assert written["measured"]["cpu bfloat16"] == {"device": "d", "threads": 1, "torch": "t", "commit": "c"}
    assert choice.thresholds(written["rows"])["cpu", torch.bfloat16] == 1
    with pytest.raises(BenchError, match="no block ran in both modes"):
        modes.write({}, modes.rows(subjects, results[:1]), path)


def test_the_fastest_backends_are_written_from_measured_blocks(tmp_path):
    subjects = shapes.blocks(["v1", "v2"], 0.25, 64)
    times = {"eager": 9.0, "compile": 6.0, "cuda/chain": 4.0, "triton/chain": 12.0, "triton/algebraic": 3.0}
    results = [
        {"subject": s.name, "direction": d, "provider": name, "batch": 2, "amp": "bf16", "device": device,
         "median_ms": ms / 100 if device == "cpu" or d == "forward" else ms}
        for s in subjects for d in ("forward", "train") for device in ("cuda", "cpu") for name, ms in times.items()
    ]  # fmt: skip
    rows = modes.fastest_rows(subjects, results, "a card")
    assert {row["op"] for row in rows} == set(modes.OPS.values())
    assert {(row["backend"], row["speedup"]) for row in rows} == {("cuda", 1.5), ("triton", 2.0)}
    path = tmp_path / "fastest.json"
    old = [rows[0] | {"card": "another"}, rows[0] | {"speedup": 9.0}]
    path.write_text(json.dumps({"measured": {}, "rows": old}))
    modes.write_fastest({"device": "a card", "threads": 1, "torch": "t", "commit": "c"}, rows, path)
    written = json.loads(path.read_text())
    assert sorted(map(str, written["rows"])) == sorted(map(str, [old[0], *rows]))
    found = choice.fastest_by_size(written["rows"])
    assert {key[0] for key in found} == {"a card", "another"}
    assert all(name == "triton" for key, sizes in found.items() if key[0] == "a card" for _, name in sizes)
    with pytest.raises(BenchError, match="no block ran native and fused on a card"):
        modes.write_fastest({}, modes.fastest_rows(subjects, [r for r in results if r["device"] == "cpu"], "c"), path)


@pytest.mark.parametrize("option", ["--write-modes", "--write-backends"])
def test_tables_are_of_blocks(option, capsys):
    assert __main__.main(["model", option]) == 2 and "needs blocks" in capsys.readouterr().err
