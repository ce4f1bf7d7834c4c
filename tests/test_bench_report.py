"""Saved measurements as tables and charts."""

import json

import pytest
from bench_runs import SETTING, small_block

from mnet_kernels.bench import (
    __main__,
    compare,
)


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


def test_summary_is_over_the_fastest_plain_provider(tmp_path, capsys):
    tuned = SAVED_HEADER | {"environ": {"MALLOC_TRIM_THRESHOLD_": "4294967296"}}
    rows = {
        "a": [
            saved_row("a", "eager"),
            saved_row("a", "eager (again)", median_ms=3.0),
            saved_row("a", "compile", median_ms=1.5),
        ],
        "b": [
            saved_row("b", "eager", median_ms=9.0),
            saved_row("b", "eager (again)"),  # the first run was disturbed
            saved_row("b", "compile", error="no memory"),
        ],
        "c": [saved_row("c", "eager")],
    }
    ours = [saved_row("a", "cpu/chain", median_ms=1.0), saved_row("a", "cpu/auto", median_ms=0.5)]
    ours += [saved_row("b", "cpu/auto", median_ms=4.0), saved_row("c", "cpu/auto", error="no such kernel")]
    plain = [row for name in rows for row in rows[name]]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, header in zip(paths, (SAVED_HEADER, tuned), strict=True):
        path.write_text(json.dumps({"header": header, "rows": plain + ours}))
    assert __main__.main(["report", "--summary", *map(str, reversed(paths))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "| fastest fused over fastest plain | a | b |",
        "| --- | --- | --- |",
        "| block, train, batch 2, float32, 1 thread, allocator by default | 3.00 compile | 0.50 eager |",
        "| block, train, batch 2, float32, 1 thread, allocator tuned | 3.00 compile | 0.50 eager |",
    ]
    paths[0].write_text(json.dumps({"header": SAVED_HEADER, "rows": plain}))
    assert __main__.main(["report", "--summary", str(paths[0])]) == 2
    assert "nothing to sum up" in capsys.readouterr().err


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
