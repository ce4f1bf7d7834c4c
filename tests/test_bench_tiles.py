"""The CUDA kernels' tile table, shown and overridden from the benchmark (the rule itself: csrc/tests/tiles_cpu.cpp)."""

import pytest

from mnet_kernels import backends
from mnet_kernels.bench import BenchError, __main__, environment, tiles

pytestmark = pytest.mark.skipif(not backends.implemented("cpu"), reason="the extension is not built")


@pytest.fixture(autouse=True)
def _table_alone():
    yield
    tiles.override([])


def test_every_row_says_where_it_comes_from():
    rows = tiles.rows()
    assert {"pointwise", "depthwise_backward", "expand_depthwise", "stem", "stem_backward"} <= {
        row["kernel"] for row in rows
    }
    for row in rows:
        assert row["reason"] and row["blocks"] > 0 and row["architecture"] >= 80
        measured = row["measured"]
        assert measured is None or all(measured[key] for key in ("card", "commit", "date", "microseconds"))


def test_an_override_comes_first_and_keeps_the_rest():
    table = tiles.rows()
    tiles.override(["pointwise:bits=16,channels=48,blocks=512", "gram:least=9", "stem_backward:runs=64"])
    first, second, third, *rest = tiles.rows()
    assert rest == table
    medium = next(r for r in table if r["kernel"] == "pointwise" and r["channels"] == 64)
    assert first == {**medium, "channels": 48, "blocks": 512, "override": True, "reason": "given"}
    assert (second["kernel"], second["least"], second["blocks"]) == ("gram", 9, 528)
    assert (third["kernel"], third["runs"], third["blocks"]) == ("stem_backward", 64, 1056)
    header = environment.header("cpu")
    assert header["tiles"] == [first, second, third]
    tiles.override([])
    assert tiles.rows() == table and environment.identity(environment.header("cpu")) != environment.identity(header)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gemm:blocks=3", "'gemm' is not one of depthwise, "),
        ("pointwise:rows=3", "'rows=3' is not NAME=NUMBER"),
        ("pointwise:blocks=-1", "'blocks=-1' is not NAME=NUMBER"),
        ("pointwise:bits=16,tile=3", "of the 3 that are compiled"),
        ("pointwise:bits=32,tile=1", "of the 1 that are compiled"),
        ("stem:tile=1", "of the 1 that are compiled"),
        ("normalize:blocks=0", "blocks and least positive"),
        ("normalize:bits=64", "bits must be 0, 16 or 32"),
    ],
)
def test_what_is_not_possible(spec, message):
    with pytest.raises(BenchError, match=message):
        tiles.override([spec])
    assert not tiles.given()


def test_the_command_prints_it(capsys):
    assert __main__.main(["stage", "--list-tiles", "--tile", "depthwise:blocks=77"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| depthwise | 0 | 80 | 0 | 0 | 77 | 0 | 2048 | 1 | given | given |" in lines
    assert sum(" estimate " in line for line in lines) == len(tiles.rows()) - 1
    assert __main__.main(["stage", "--list-tiles", "--tile", "depthwise:tile=5"]) == 2
    assert "--tile: depthwise: " in capsys.readouterr().err
