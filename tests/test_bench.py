"""Measuring: statistics on synthetic data, interleaving, subjects, resuming; every phase of bench/gpu.py on the CPU."""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mnet_kernels
from mnet_kernels import backends, choice, stages
from mnet_kernels.bench import (
    BenchError,
    __main__,
    compare,
    environment,
    host,
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

BENCH = Path(__file__).resolve().parents[1] / "bench"
CPU = torch.device("cpu")
SMALL = {"width": 0.25, "resolution": 32}
SETTING = Setting(CPU, 2)
QUICK = {"seconds": 0.02, "min_rounds": 3, "max_rounds": 5, "warmup": 1}


# ---- statistics ------------------------------------------------------------------------------------------------------


def samples(median, rounds=60, spread=0.05):
    """Log-normal times around a median, with rare outliers as a shared machine has them."""
    noise = torch.randn(rounds, dtype=torch.float64) * spread
    outliers = (torch.rand(rounds) < 0.05) * torch.rand(rounds) * 2
    return (median * (noise + outliers).exp()).tolist()


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
    assert len(names) == len(set(names)) == 13
    assert names[0] == "v2 32x112x112 dw3s1 pw16 relu6"
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
            for stage in (layer.kind, f"{layer.kind}_backward"):
                assert f"{stage} {size} {layer} {layer.act or ''}".strip() in names


def small_block():
    return next(b for b in shapes.blocks(["v2"], **SMALL) if b.name.endswith("+x") and " pw" in b.name[4:14])


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


def test_compare_rows():
    block = small_block()
    wanted = providers.parse(["nchw", "reference"], CPU)
    prepared = compare.prepare(block, wanted, SETTING, ["train"])
    rows = compare.measure(block, prepared, SETTING, "train", **QUICK)
    by_name = {row["provider"]: row for row in rows}
    assert list(by_name) == ["eager", "eager (again)", "nchw", "reference/chain", "reference/algebraic"]
    for row in rows:
        assert row["q20_ms"] <= row["median_ms"] <= row["q80_ms"] and row["saved_bytes"] > 0
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


# ---- the command lines -----------------------------------------------------------------------------------------------


@pytest.fixture
def scripts(monkeypatch):
    """The modules of bench/, importable as gpu.py imports them."""
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def options(*more):
    return ["--device", "cpu", "--models", "v2", "--seconds", "0.01", "--providers", "eager", "reference", *more]


def test_the_module_prints_and_writes(tmp_path, capsys):
    path = tmp_path / "rows.json"
    small = ["--width", "0.25", "--resolution", "32", "--batch", "2", "--seconds", "0.01", "--rounds", "5"]
    only = [
        "--models",
        "v2",
        "--device",
        "cpu",
        "--only",
        "2x2 pw",
        "--providers",
        "eager",
        "nchw",
        "--json",
        str(path),
    ]
    assert __main__.main(["block", *small, *only]) == 0
    assert "speed-up" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["header"]["torch"] == torch.__version__
    assert {row["provider"] for row in written["rows"]} == {"eager", "eager (again)", "nchw"}
    assert {row["direction"] for row in written["rows"]} == {"forward", "train"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["model", "--device", "cpu", "--providers", "fast"], "unknown provider 'fast'"),
     (["stage", "--device", "cpu", "--backend", "cuda"], "cannot be measured on cpu"),
     (["block", "--device", "cpu", "--graph"], "needs a CUDA device")],
)  # fmt: skip
def test_the_module_says_what_is_wrong(arguments, message, capsys):
    assert __main__.main([*arguments, "--width", "0.25", "--resolution", "32"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("phase", ["stages", "blocks", "models"])
def test_a_phase_measures_and_goes_on(phase, scripts, tmp_path, monkeypatch):
    import gpu

    arguments = [phase, str(tmp_path), *options("--first", "2")]
    assert gpu.main(arguments) == 0
    path = tmp_path / f"{phase}.json"
    first = json.loads(path.read_text())
    assert first["header"]["card"]["copy_bytes_per_s"] > 0
    assert {"eager", "eager (again)"} < {row["key"]["provider"] for row in first["rows"]}
    assert all(row["median_ms"] > 0 for row in first["rows"])
    if phase == "stages":
        assert all(row["floor_ms"] > 0 and row["bytes"] > 0 for row in first["rows"])

    def again(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(compare, "prepare", again)
    assert gpu.main(arguments) == 0
    second = json.loads(path.read_text())
    assert second["rows"] == first["rows"] and second["header"]["continued"] == 1


def test_a_phase_says_what_failed_and_measures_the_rest(scripts, tmp_path, monkeypatch):
    import gpu

    original = Block.prepare

    def prepare(self, provider, setting):
        if provider.backend == "reference":
            raise RuntimeError("no such kernel image")
        return original(self, provider, setting)

    monkeypatch.setattr(Block, "prepare", prepare)
    arguments = ["blocks", str(tmp_path), *options("--first", "1")]
    assert gpu.main(arguments) == 1
    rows = {row["key"]["provider"]: row for row in json.loads((tmp_path / "blocks.json").read_text())["rows"]}
    assert "no such kernel image" in rows["reference/chain"]["error"] and rows["eager"]["median_ms"] > 0
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(BENCH))
    assert gpu.main(arguments) == 0
    rows = {row["key"]["provider"]: row for row in json.loads((tmp_path / "blocks.json").read_text())["rows"]}
    assert "error" not in rows["reference/chain"]


def test_a_phase_out_of_time(scripts, tmp_path, capsys):
    import gpu

    assert gpu.main(["models", str(tmp_path), *options("--budget", "5")]) == 4
    assert "call again" in capsys.readouterr().out


@pytest.mark.parametrize("phase", ["build", "test", "sanitize", "stages", "blocks", "models"])
def test_without_a_card(phase, scripts, tmp_path, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([phase, str(tmp_path / "out")]) == 3
    assert "no CUDA card" in capsys.readouterr().out and not (tmp_path / "out").exists()


def session(scripts, tmp_path, phase, budget=100.0):
    import gpu
    from session import Session

    args = gpu.build_parser().parse_args([phase, str(tmp_path), "--device", "cpu", "--budget", str(budget)])
    return Session(args)


def test_the_test_phase_counts(scripts, tmp_path, monkeypatch):
    import commands

    suite = tmp_path / "test_two.py"
    suite.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('why')\n"
    )
    run = commands._run

    def small(session, command, log, env=None):
        command = [str(suite) if str(part).startswith("tests") else part for part in command]
        return run(session, command, log, env)

    monkeypatch.setattr(commands, "_run", small)
    one = session(scripts, tmp_path, "test")
    commands.test(one)
    (row,) = one.results.rows
    assert (row["tests"], row["failures"], row["skipped"]) == (3, 1, 1)
    assert row["failed"][0]["test"].endswith("test_b") and row["skipped_because"] == {"why": 1}
    assert one.finish() == 1 and "1 failed" in (tmp_path / "test.log").read_text()


def test_a_program_out_of_time(scripts, tmp_path):
    import commands

    one = session(scripts, tmp_path, "test", budget=1.0)
    code, seconds = commands._run(one, [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    assert code is None and seconds < 30


def test_the_build_phase(scripts, tmp_path, monkeypatch):
    """What the row says of a failed build and of one that works; the compiler itself is not run."""
    import commands

    monkeypatch.setattr(commands, "_extensions", lambda: [])
    for code in (1, 0):

        def run(session, command, log, env=None, code=code):
            assert command[1:] == ["setup.py", "build_ext", "--inplace"]
            Path(log).write_text("error: no compiler\n")
            return code, 2.0

        monkeypatch.setattr(commands, "_run", run)
        one = session(scripts, tmp_path, "build")
        commands.build(one)
        (row,) = one.results.rows
        built = mnet_kernels.build_info()["extension"]["extension"]
        assert ("error" in row) == (code == 1 or not built)
        if "build_info" in row:
            assert row["build_info"]["version"] == mnet_kernels.__version__


def test_the_sanitize_phase_is_skipped_and_said(scripts, tmp_path, capsys):
    import commands

    one = session(scripts, tmp_path, "sanitize")
    commands.sanitize(one)
    assert one.finish() == 0 and "skipped" in one.results.rows[0]
    assert "sanitize is skipped" in capsys.readouterr().out


def test_results(scripts, tmp_path):
    from results import Results

    path, identity = tmp_path / "x" / "rows.json", {"sources": "a", "driver": None}
    first = Results(path, {"n": 1}, identity)
    first.add({"k": 1}, error="no")
    assert first.find({"k": 1}) is None
    first.add({"k": 1}, value=1.5, bad=float("nan"))
    first.add({"k": 1}, value=99)
    first.add({"k": 2}, value=2)
    second = Results(path, {"n": 2}, identity)
    assert second.rows == first.rows == [{"key": {"k": 1}, "value": 1.5, "bad": None}, {"key": {"k": 2}, "value": 2}]
    assert second.header["n"] == 1 and second.header["continued"] == 1 and second.aside is None
    third = Results(path, {"n": 3}, identity | {"sources": "b"})
    assert third.rows == [] and third.aside == "rows-1.json"
    assert len(json.loads((path.parent / "rows-1.json").read_text())["rows"]) == 2
    path.write_text("{")
    assert Results(path, {}, identity).aside == "rows-2.json"


# ---- as programs -----------------------------------------------------------------------------------------------------


def program(*command, **env):
    root = str(BENCH.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Under pytest-xdist a pytest started here would take itself for a worker, and benchmarks would not be measured.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env = dict(inherited, PYTHONPATH=path, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="", **env)
    return subprocess.run([str(c) for c in command], cwd=root, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("arguments", "code"), [(["stages"], 3), (["dance"], 2)])
def test_gpu_sh(arguments, code, tmp_path):
    done = program("bash", BENCH / "gpu.sh", *arguments, tmp_path)
    assert done.returncode == code, done.stdout + done.stderr


def test_pytest_benchmark_suites(tmp_path):
    pytest.importorskip("pytest_benchmark")
    small = ["--device", "cpu", "--width", "0.25", "--resolution", "32", "--models", "v2", "--batch", "2"]
    found = program(sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", *small)
    for suite in ("bench_stage.py", "bench_block.py", "bench_model.py", "bench_host.py"):
        assert f"{suite}::" in found.stdout, found.stdout + found.stderr
    assert "reference" not in found.stdout
    chosen = ["-k", "bench_model and train and eager", "--benchmark-only", f"--benchmark-json={tmp_path / 'rows.json'}"]
    fast = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2"]
    done = program(sys.executable, "-m", "pytest", "bench/bench_model.py", "-q", *small, *chosen, *fast)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())["benchmarks"]
    assert row["stats"]["median"] > 0
    assert row["extra_info"]["provider"] == "eager" and row["extra_info"]["saved_bytes"] > 0
    assert sum(row["extra_info"]["convolutions"].values()) == 52
    assert row["extra_info"]["header"]["torch"] == torch.__version__


def test_what_a_call_costs_the_host(tmp_path, capsys):
    path = tmp_path / "host.json"
    small = ["--device", "cpu", "--seconds", "0.01", "--rounds", "5", "--direction", "train", "--json", str(path)]
    assert __main__.main(["host", "--batch", "1", "8", "--providers", "eager", "reference/chain", *small]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {(row["subject"], row["batch"]) for row in rows} == {(b.name, n) for b in host.blocks() for n in (1, 8)}
    assert {row["provider"] for row in rows} == {"eager", "eager (again)", "reference/chain"}
    assert all(0 < row["median_ms"] < 1000 for row in rows)
    capsys.readouterr()
    assert __main__.main(["host", "--graph", "--device", "cpu"]) == 2


def test_the_hosts_cost_is_the_threads_time(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "interleave", lambda calls, device, now, **_: seen.append((device, now)) or {})
    (block, *_) = host.blocks()
    prepared = compare.prepare(block, [], SETTING, ["forward"])
    compare.measure(block, prepared, SETTING, "forward", now=None)
    assert seen == [(CPU, timing.CLOCKS["thread"])]


def test_a_convolution_that_is_not_cudnns_is_refused():
    one = compare.Prepared(small_block(), providers.NATIVE["cudnn"], SETTING, ["forward"])
    assert "torch gives these convolutions to others than cuDNN" in one.error["forward"]
    with pytest.raises(BenchError, match="needs a CUDA card"):
        providers.parse(["cudnn"], CPU)


def saved_row(subject, provider, **values):
    key = {"level": "block", "subject": subject, "device": "cpu", "batch": 2, "amp": "off", "training": True}
    return key | {"direction": "train", "launch": "eager", "provider": provider, "median_ms": 2.0} | values


SAVED_HEADER = {"device": "a processor", "torch": "2.14", "threads": 1, "commit": "0123456789abcdef", "date": "today"}
RATIO = {"speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6, "noise": 0.05, "verdict": "faster"}
SAVED = [
    saved_row("a", "eager", saved_bytes=4_000_000), saved_row("a", "eager (again)", **RATIO),
    saved_row("a", "cpu/chain", saved_bytes=1_500_000, **RATIO),
    saved_row("b", "eager"), saved_row("b", "cpu/chain", **(RATIO | {"noise": 0.7, "verdict": "within noise"})),
    saved_row("c", "eager"), saved_row("c", "cpu/chain", error="no such kernel"),
]  # fmt: skip


def test_report(tmp_path, capsys):
    plain, keyed, chart = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.png"
    plain.write_text(json.dumps({"header": SAVED_HEADER, "rows": SAVED}))
    names = set(compare.key(small_block(), SETTING, "train", "eager", "eager"))
    rows = [
        {"key": {k: v for k, v in r.items() if k in names}, **{k: v for k, v in r.items() if k not in names}}
        for r in SAVED
    ]
    keyed.write_text(json.dumps({"header": SAVED_HEADER | {"torch": "2.15"}, "rows": rows}))
    assert __main__.main(["report", str(plain), str(keyed), "--png", str(chart)]) == 0
    first, second = capsys.readouterr().out.split("a processor, torch 2.15, ")
    for text in (first, second):
        assert "**block, train, batch 2, float32**: times as fast as eager" in text
        assert "| a | 2.00 | 1.50 (1.40 to 1.60) | 4.0, 1.5 |" in text
        assert "| b | 2.00 | 1.50 (1.40 to 1.60), within noise |" in text and "| c | 2.00 | failed |" in text
        assert "Noise floor (the same twice): 5.0 to 70.0 %." in text and "again" not in text
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_report_of_two_files_of_one_machine_is_one_table(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, rows in zip(paths, (SAVED[:3], SAVED[3:]), strict=True):
        path.write_text(json.dumps({"header": SAVED_HEADER, "rows": rows}))
    assert __main__.main(["report", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    assert out.count("a processor") == 1 and "| a |" in out and "| b |" in out


def test_report_of_pytest_benchmark_says_that_it_is_not_interleaved(tmp_path, capsys):
    stats = {"eager": 3e-3, "cpu/chain": 2e-3}
    rows = [
        {"stats": {"median": t, "q1": t, "q3": t, "rounds": 5}, "extra_info": {"header": SAVED_HEADER}
         | {k: v for k, v in saved_row("a", name).items() if k != "median_ms"}}
        for name, t in stats.items()
    ]  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"benchmarks": rows}))
    assert __main__.main(["report", str(path)]) == 0
    assert "| a | 3.00 | 1.50, not interleaved |" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", "[]", '{"rows": 1}', '{"header": {}, "rows": [1]}'])
def test_report_of_something_else(content, tmp_path, capsys):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    assert __main__.main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot ") and str(path) in error


def test_report_without_a_speed_up_has_no_chart(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"header": SAVED_HEADER, "rows": SAVED[:1]}))
    assert __main__.main(["report", str(path), "--png", str(tmp_path / "c.png")]) == 2
    assert "no speed-up to draw" in capsys.readouterr().err


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


def test_host_cost(tmp_path):
    done = program(sys.executable, BENCH / "host_cost.py", "--seconds", "0.01", "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {(row["way"], row["direction"]) for row in rows} == {
        (way, direction)
        for way in ("stages", "function", "registered", "custom_op", "functional", "native", "function (again)")
        for direction in ("forward", "forward and backward")
    }
    assert all(row["median_us"] > 0 for row in rows)


def test_parsers_agree_with_the_script():
    """gpu.sh documents the phases that gpu.py has."""
    text = (BENCH / "gpu.sh").read_text()
    for phase in ("build", "test", "sanitize", "stages", "blocks", "models"):
        assert f"# {phase} " in text
    assert isinstance(__main__.build_parser(), argparse.ArgumentParser)


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


def test_modes_are_of_blocks(capsys):
    assert __main__.main(["model", "--write-modes"]) == 2 and "needs blocks" in capsys.readouterr().err
