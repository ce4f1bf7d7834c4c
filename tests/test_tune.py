"""The search for Triton configurations without a card: the choice, its file, the rows in force, the command."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mnet_kernels
from mnet_kernels import backends, log, tune
from mnet_kernels.backends.triton import configs, measured
from mnet_kernels.bench import BenchError, environment, tiles, tune_problems, tuning
from mnet_kernels.bench.shapes import Layer

TESTS = Path(__file__).parent
KEY, CARD, CAPABILITY = ("pointwise", "wide", 2), "NVIDIA H100 80GB HBM3", (9, 0)
ROW = configs.TABLE[(*KEY, CAPABILITY)]
A, B, C = (ROW._replace(rows=64), ROW._replace(columns=32), ROW._replace(warps=4))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of its own for every test."""
    monkeypatch.setenv("MNET_TUNE_DIR", str(tmp_path / "tune"))
    monkeypatch.delenv("MNET_TUNE", raising=False)
    monkeypatch.setattr(measured, "triton_version", lambda: "3.8.0")
    configs.forget()
    log.forget()
    yield tmp_path / "tune"
    configs.override({})
    configs.forget()


# ---- the choice -----------------------------------------------------------------------------------------------------


class Fake:
    """A card that takes stated times; ``again`` is how much slower the table's row is when it runs twice."""

    def __init__(self, times, again=1.01, broken=(), wrong=()):
        self.times, self.again, self.broken, self.wrong = times, again, broken, wrong
        self.checked, self.rounds = [], []

    def attempt(self, config):
        if config in self.broken:
            raise RuntimeError("out of resource: shared memory")

    def right(self, config):
        self.checked.append(config)
        return config not in self.wrong

    def samples(self, wanted):
        self.rounds.append(wanted)
        drift = [1.0, 1.2, 0.9, 1.1, 1.0]  # of the machine, a round each
        scale = {"again": self.again}
        return {n: [self.times[c] * scale.get(n, 1.0) * d for d in drift] for n, c in wanted.items()}

    def choose(self, *candidates):
        return tuning.choose(ROW, candidates, self.attempt, self.right, self.samples)


def test_the_fastest_wins():
    card = Fake({ROW: 100.0, A: 90.0, B: 80.0, C: 120.0})
    found = card.choose(A, B, C)
    assert found == tuning.Outcome(ROW, B, 100.0, 80.0, 3, 0, 0)
    assert card.checked == [B, A]  # what is slower is not even checked
    assert list(card.rounds[1].values()) == [ROW, ROW, B, A]


def test_within_the_noise_the_tables_row_stays():
    assert Fake({ROW: 100.0, A: 97.0}, again=1.05).choose(A).after == ROW
    assert Fake({ROW: 100.0, A: 97.0}, again=0.95).choose(A).after == ROW
    assert Fake({ROW: 100.0, A: 97.0}, again=1.01).choose(A).after == A


def test_what_computes_wrongly_never_wins():
    found = Fake({ROW: 100.0, A: 90.0, B: 10.0}, wrong=(B,)).choose(A, B)
    assert (found.after, found.failed, found.wrong) == (A, 0, 1)
    assert Fake({ROW: 100.0, B: 10.0}, wrong=(B,)).choose(B).after == ROW


def test_what_does_not_launch_is_skipped():
    found = Fake({ROW: 100.0, A: 90.0}, broken=(B, C)).choose(A, B, C)
    assert (found.after, found.tried, found.failed, found.wrong) == (A, 3, 2, 0)
    assert Fake({ROW: 100.0}, broken=(A, B)).choose(A, B).after == ROW
    with pytest.raises(BenchError, match="the table's row, 128x64x32, .* does not run here: out of resource"):
        Fake({}, broken=(ROW,)).choose(A)


def test_only_a_few_go_to_the_final():
    times = {ROW: 100.0} | {ROW._replace(stages=n): 10.0 * n for n in range(1, 8)}
    card = Fake(times)
    assert card.choose(*list(times)[1:]).after.stages == 1 and len(card.checked) == tuning.FINALISTS


def test_neighbours_are_possible_and_near():
    for kernel, shape, _, capability in configs.TABLE:
        row = configs.TABLE[kernel, shape, 2, capability]
        found = tuning.neighbours(kernel, shape, row)
        assert row not in found and len(set(found)) == len(found) >= 5
        for config in found:
            assert configs.impossible(kernel, shape, config) is None
            changed = [(a, b) for a, b in zip(row[:3], config[:3], strict=True) if a != b]
            assert len(changed) <= 1 and all(max(pair) == 2 * min(pair) for pair in changed)
            assert config.warps in (4, 8, row.warps) and (config.stages == row.stages or not changed)


def test_every_row_of_the_table_is_possible():
    assert not [row for row, config in configs.TABLE.items() if configs.impossible(*row[:2], config)]


# ---- the file -------------------------------------------------------------------------------------------------------


def outcome(after=A):
    return tuning.Outcome(ROW, after, 100.0, 80.0, 3, 0, 0)


def lookup(card=CARD, key=KEY):
    return configs.lookup(*key, CAPABILITY, card)


def test_there_and_back(cache):
    assert lookup() == ROW and configs.origin(*KEY, CAPABILITY, CARD) == "estimate"
    file = measured.path(CARD)
    assert file == cache / "NVIDIA_H100_80GB_HBM3-3.8.0.json"
    other = ("depthwise", "k5", 4)
    wide = configs.TABLE[(*other, CAPABILITY)]._replace(columns=128)
    assert tuning.write(file, {KEY: outcome(), other: outcome(wide)}, CARD, CAPABILITY) == 2
    assert lookup() == A and lookup(key=other) == wide
    row = configs.origin(*KEY, CAPABILITY, CARD)
    assert (row["microseconds"], row["table_microseconds"]) == (80.0, 100.0)
    assert row["package"] == mnet_kernels.__version__ and row["card"] == CARD and row["date"][:2] == "20"
    # every other card, and a call that names none, keeps to the table
    assert lookup("NVIDIA A100") == lookup(None) == ROW
    # measured again: a key's row is replaced or, where the table's is as fast, dropped; other keys' stay
    assert tuning.write(file, {KEY: outcome(ROW)}, CARD, CAPABILITY) == 1
    assert lookup() == ROW and lookup(key=other) == wide


def test_measured_rows_are_for_those_who_want_them(cache, monkeypatch):
    tuning.write(measured.path(CARD), {KEY: outcome()}, CARD, CAPABILITY)
    configs.override({KEY: B})
    assert lookup() == B and configs.origin(*KEY, CAPABILITY, CARD) == "given"
    configs.override({})
    assert lookup() == A
    monkeypatch.setenv("MNET_TUNE", "0")
    assert lookup() == A  # constant within a process
    configs.forget()
    assert lookup() == ROW


def test_where_the_files_are(monkeypatch):
    monkeypatch.delenv("MNET_TUNE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert measured.directory() == Path("/cache/mnet_kernels/tune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert measured.directory() == Path("/home/somebody/.cache/mnet_kernels/tune")


def damaged(change):
    def write(file):
        document = json.loads(file.read_text())
        change(document, document["rows"][0])
        file.write_text(json.dumps(document))

    return write


REASONS = {
    "it cannot be read": lambda file: file.write_text(file.read_text()[:-9]),
    "it cannot be read ": lambda file: file.write_bytes(b"\xff\xfe"),
    "it is not an object with rows": lambda file: file.write_text("[]"),
    "its format is 2, here it is 1": damaged(lambda d, r: d.update(format=2)),
    "its card is 'NVIDIA A100'": damaged(lambda d, r: d.update(card="NVIDIA A100")),
    r"its capability is \[8, 0\], here it is \[9, 0\]": damaged(lambda d, r: d.update(capability=[8, 0])),
    "its triton is '3.7.0', here it is '3.8.0'": damaged(lambda d, r: d.update(triton="3.7.0")),
    "its kernels is 'abc'": damaged(lambda d, r: d.update(kernels="abc")),
    "it is not an object$": damaged(lambda d, r: d["rows"].append(3)),
    "its card is not the file's": damaged(lambda d, r: r.update(card="another")),
    "its capability is not the file's": damaged(lambda d, r: r.update(capability=[8, 0])),
    "microseconds is not a positive number": damaged(lambda d, r: r.update(microseconds=float("nan"))),
    "table_microseconds is not a positive number": damaged(lambda d, r: r.pop("table_microseconds")),
    "it has no date": damaged(lambda d, r: r.update(date="")),
    "it has no package": damaged(lambda d, r: r.pop("package")),
    "no kernel 'gemm' with": damaged(lambda d, r: r.update(kernel="gemm")),
    "no kernel 'pointwise' with shape class 'k3'": damaged(lambda d, r: r.update(shape="k3")),
    "its bytes are not 2 or 4": damaged(lambda d, r: r.update(bytes=8)),
    "KeyError": damaged(lambda d, r: r.pop("config")),
    "TypeError: .*speed": damaged(lambda d, r: r["config"].update(speed=1)),
    "TypeError": damaged(lambda d, r: r.update(kernel=[])),
    "a value is no integer": damaged(lambda d, r: r["config"].update(rows=64.0)),
    "powers of two from 16": damaged(lambda d, r: r["config"].update(rows=48)),
    "powers of two from 16 ": damaged(lambda d, r: r["config"].update(depth=8)),
    "more than 32768 values": damaged(lambda d, r: r["config"].update(rows=1024)),
    "its warps are not 1, 2": damaged(lambda d, r: r["config"].update(warps=3)),
    "its stages not 1 to 8": damaged(lambda d, r: r["config"].update(stages=0)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_file_that_is_not_used(reason, caplog):
    file = measured.path(CARD)
    tuning.write(file, {KEY: outcome()}, CARD, CAPABILITY)
    assert lookup() == A
    REASONS[reason](file)
    configs.forget()
    with caplog.at_level(logging.WARNING, "mnet_kernels"):
        assert lookup() == ROW and lookup(key=("depthwise", "k3", 2)) in configs.TABLE.values()
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(file) in said and "python -m mnet_kernels.tune" in said
    with pytest.raises(ValueError, match=reason):
        configs.read(file, CARD, CAPABILITY)
    # a search begins it anew
    assert tuning.write(file, {KEY: outcome(B)}, CARD, CAPABILITY) == 1 and lookup() == B


def test_a_depth_where_there_is_none():
    row = configs.TABLE["depthwise", "k3", 2, CAPABILITY]
    assert configs.impossible("depthwise", "k3", row._replace(depth=16)) == "its depth is not 0"


def test_other_source_is_other_kernels(tmp_path, monkeypatch):
    before = measured.kernels()
    monkeypatch.setattr(measured, "__file__", str(tmp_path / "measured.py"))
    for text in ("x = 1", "x = 2"):
        (tmp_path / "pointwise.py").write_text(text)
        assert measured.kernels.__wrapped__() != before
        before = measured.kernels.__wrapped__()


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot write"):
        tuning.write(tmp_path / "file" / "rows.json", {KEY: outcome()}, CARD, CAPABILITY)


def test_what_is_in_use_is_told(monkeypatch):
    assert mnet_kernels.build_info()["tuned"] == {} or torch.cuda.is_available()
    tuning.write(measured.path(CARD), {KEY: outcome()}, CARD, CAPABILITY)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY)
    assert mnet_kernels.build_info()["tuned"] == {CARD: {"file": str(measured.path(CARD)), "rows": 1}}
    assert environment.triton_rows(torch.device("cuda", 0)) == [[*KEY, *A]]
    assert environment.triton_rows(torch.device("cpu")) is None


# ---- what is run ----------------------------------------------------------------------------------------------------


def test_layers_of_a_class():
    known = [
        (Layer("pointwise", c, side, side, e, 1, 1, "relu6"), last)
        for c, side, e, last in ((16, 112, 96, False), (96, 56, 24, True), (24, 56, 144, False), (144, 28, 64, True))
    ] + [(Layer("depthwise", 96, side, side, 96, k, 2, "relu6"), False) for side, k in ((112, 3), (14, 5), (56, 3))]

    def names(kernel, shape, count=4):
        return [str(layer) for layer in tune_problems.of_class(kernel, shape, known, count)]

    assert names("pointwise", "narrow") == ["pw24"] and names("pointwise", "wide") == ["pw96", "pw144", "pw64"]
    assert names("pointwise", "wide", 2) == ["pw96", "pw64"] and names("pointwise", "wide", 1) == ["pw96"]
    assert names("pointwise_dgrad", "narrow") == ["pw96", "pw144"] and names("pointwise_wgrad", "wide") == ["pw64"]
    assert names("depthwise", "k3") == ["dw3s2"] * 2 and names("depthwise_backward", "k5") == ["dw5s2"]
    assert names("elementwise", "any") == ["pw24", "pw64"]


def test_every_class_has_layers():
    known = tune_problems.layers(["v3-small"], 64)
    assert all(tune_problems.of_class(*key[:2], known) for key in tuning.table_keys())
    assert len({layer._replace(act=None) for layer, _ in known}) == len(known) and any(last for _, last in known)


@pytest.mark.skipif(bool(backends.triton.why_missing()), reason="triton is not installed")
def test_the_search_itself(tmp_path):
    environ = os.environ | {"TRITON_INTERPRET": "1", "MNET_NO_EXT": "1", "OMP_NUM_THREADS": "1"}
    environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(TESTS / "tune_interpreted.py"), str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| pointwise | narrow | 4 | 32x16x16, 4 warps, stages 1 |" in done.stdout
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["config"] == {"rows": 64, "columns": 16, "depth": 16, "warps": 4, "stages": 1}


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_list(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.endswith("| estimate |")]
    assert len(rows) == sum(key[3] > (0, 0) for key in configs.TABLE)
    assert "| 9.0 and later | pointwise | wide | 2 | 128x64x32, 8 warps, stages 4 | estimate |" in rows
    tuning.write(measured.path(CARD), {KEY: outcome()}, CARD, CAPABILITY)
    monkeypatch.setattr(tune, "_cards", lambda: [(CARD, CAPABILITY)])
    assert tune.main(["--list"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "80.0 us, the table's 100.0" in line]
    assert row.startswith(f"| {CARD} | pointwise | wide | 2 | 64x64x32, 8 warps, stages 4 | {CARD}, ")


def test_without_a_card(capsys, cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 3
    assert capsys.readouterr().err.startswith("error: no CUDA card here") and not cache.exists()
    assert tune.main(["--batch", "0"]) == 2 and "--batch 0" in capsys.readouterr().err
    monkeypatch.setattr(tune_problems, "layers", lambda: [(Layer("depthwise", 9, 7, 7, 9, 5, 1, None), False)])
    assert tune.main(["--dry-run", "--kernels", "depthwise", "--dtypes", "fp16"]) == 0
    out = capsys.readouterr().out
    assert "depthwise k5 2 bytes: 4x64, 4 warps" in out and "  on 64x9x7x7 dw5s1" in out and "try 8x64, 8" in out


def test_a_whole_run(capsys, monkeypatch):
    """The command around a search: keys, layers and dtypes asked for, the file, the table."""
    asked = []

    def search(key, layers, device, card, capability, dtypes, **options):
        asked.append((key, len(layers), dtypes, options))
        return outcome() if key == KEY else outcome(ROW)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY)
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device: None)
    layer = Layer("pointwise", 64, 7, 7, 64, 1, 1, None)
    monkeypatch.setattr(tune_problems, "layers", lambda: [(layer, True)])
    monkeypatch.setattr(tuning, "tune", search)
    assert tune.main(["--kernels", "pointwise", "--dtypes", "bf16", "fp16", "--batch", "8"]) == 0
    both = [torch.bfloat16, torch.float16]
    options = {"batch": 8, "seconds": 2.0}
    assert asked == [(("pointwise", "narrow", 2), 0, both, options), (KEY, 1, both, options)]
    out = capsys.readouterr().out
    chosen = "64x64x32, 8 warps, stages 4 | 100.0 | 80.0 | 1.25 | 3, 0, 0 |"
    assert f"| pointwise | wide | 2 | 128x64x32, 8 warps, stages 4 | {chosen}" in out
    assert f"1 rows in {measured.path(CARD)}" in out and lookup() == A
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device: "triton is not installed")
    assert tune.main([]) == 2 and "backend 'triton': triton is not installed" in capsys.readouterr().err


def test_the_benchmark_overrides_a_row(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiles.override(["triton/pointwise:wide:2:rows=64", "triton/depthwise:k3:4:warps=4"])
    assert lookup() == A and lookup(key=("depthwise", "k3", 4)).warps == 4
    assert environment.header("cpu")["triton_rows"][1] == [*KEY, *A]
    for spec, why in {
        "triton/gemm:wide:2:rows=64": "gemm:wide:2 is not one of pointwise:narrow:2, ",
        "triton/pointwise": "pointwise:: is not one of",
        "triton/pointwise:wide:2:blocks=64": "'blocks=64' is not NAME=NUMBER with a name of rows, ",
        "triton/pointwise:wide:2:rows=48": "powers of two",
    }.items():
        with pytest.raises(BenchError, match=why):
            tiles.override([spec])
    tiles.override([])
    assert not configs.given()
