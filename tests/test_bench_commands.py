"""The commands that measure: every phase of bench/gpu.py on the CPU, the suites and scripts as programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_runs import CPU, SETTING

import mnet_kernels
from mnet_kernels.backends.triton import configs
from mnet_kernels.bench import BenchError, __main__, compare, host, timing, tuning
from mnet_kernels.bench.subjects import Block

BENCH = Path(__file__).resolve().parents[1] / "bench"


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


@pytest.mark.parametrize("phase", ["build", "test", "sanitize", "tune", "stages", "blocks", "models"])
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


def test_the_tune_phase(scripts, tmp_path, monkeypatch):
    """Row by row, going on where it stopped; what fails is said and the rest is searched."""
    import commands

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    asked = []

    def tune(key, layers, device, card, capability, dtypes, **options):
        asked.append(key)
        if key == ("depthwise", "k5", 4):
            raise BenchError("no such kernel")
        assert layers and dtypes == [torch.float32 if key[2] == 4 else torch.bfloat16] and options["batch"] == 64
        row = configs.lookup(*key, capability)
        return tuning.Outcome(row, row._replace(warps=16) if key == ("gram", "wide", 2) else row, 2.0, 1.0, 9, 0, 0)

    def run():
        found = session(scripts, tmp_path, "tune")
        found.device, found.args.batch, found.args.seconds, found.args.resolution = torch.device("cuda"), 64, 1.0, 224
        commands.tune(found)
        return found

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(commands.backends, "why_unavailable", lambda name, device: "no triton")
    assert run().results.rows == [{"key": {"part": "tune"}, "skipped": "no triton"}] and not asked
    monkeypatch.setattr(commands.backends, "why_unavailable", lambda name, device: None)
    assert run().failed == ["depthwise k5 4"] and sorted(asked) == sorted(tuning.table_keys())
    (file,) = (tmp_path / "tune").iterdir()
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["kernel"], row["shape"], row["bytes"], row["config"]["warps"]) == ("gram", "wide", 2, 16)
    del asked[:]
    assert len(run().results.rows) == 1 + len(tuning.table_keys()) - 1 and asked == [("depthwise", "k5", 4)]


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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_peak_memory(tmp_path):
    small = ["--batch", "2", "--amp", "off", "--providers", "nchw", "eager", "--json", tmp_path / "rows.json"]
    done = program(sys.executable, BENCH / "peak_memory.py", *small)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["provider"] for row in rows] == ["nchw", "eager"] and "peak +" in done.stdout
    assert all(row["peak_bytes"] > row["saved_bytes"] / 2 > 0 for row in rows)


def test_curves(scripts):
    """The paired difference of known values, and its interval by Student's t with 4 degrees of freedom."""
    curves = pytest.importorskip("curves")
    mean, half = curves.paired([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 1.0, 3.0, 3.0, 3.0])
    assert mean == pytest.approx(1.0) and half == pytest.approx(2.776 * 0.5**0.5 / 5**0.5, rel=1e-3)
    runs = {"off": {name: [[dict.fromkeys(curves.FIGURES, i + (name == "cpu/chain"))] for i in (1.0, 2.0, 4.0)]
                    for name in curves.PROVIDERS}}  # fmt: skip
    lines = curves.table(runs, "off")
    assert len(lines) == 2 + len(curves.PROVIDERS)
    assert lines[2] == "| native | 2.3333 | 2.3333 | 2.3333 |"
    assert "3.3333, +1.0000 ± 0.0000" in next(line for line in lines if line.startswith("| cpu/chain"))


def test_curves_go_on(scripts, tmp_path, monkeypatch, capsys):
    curves, path, seen = pytest.importorskip("curves"), tmp_path / "curves.json", []

    def train(seed, amp, options, args):
        seen.append(seed)
        return [dict.fromkeys(curves.FIGURES, float(seed))]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["curves.py", "--amp", "off", "--json", str(path), *arguments])
        del seen[:]
        curves.main()
        return sorted(set(seen)), len(seen) // len(curves.PROVIDERS)

    monkeypatch.setattr(curves, "train", train)
    assert run("--seeds", "2") == ([0, 1], 2) and run("--seeds", "4") == ([2, 3], 2)
    assert "| native | 1.5000 | 1.5000 | 1.5000 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has other model and steps: ..v2., 200., here"):
        run("--steps", "400")


def test_parsers_agree_with_the_script():
    """gpu.sh documents the phases that gpu.py has."""
    text = (BENCH / "gpu.sh").read_text()
    for phase in ("build", "test", "sanitize", "tune", "stages", "blocks", "models"):
        assert f"# {phase} " in text
