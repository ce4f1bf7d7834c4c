"""Who decides what runs: environment, context, module, call, automatic; and what is said about it."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from blocks import Case, Inputs

import mnet_kernels as mk
from mnet_kernels import backends, choice, functional
from mnet_kernels.backends import compiled
from mnet_kernels.models import MODELS

CPU = torch.device("cpu")


def ran(inputs, **options):
    """The namespaces that a call ran in."""
    with mk.count_stages() as counts:
        inputs.call(**options)
    return {label.split("::")[0] for label in counts}


@pytest.fixture
def nothing_built(monkeypatch):
    """An installation without the extension."""
    monkeypatch.setattr(compiled, "_extension", None)
    monkeypatch.setattr(compiled, "_reason", "the package was not built (no _build.json)")
    choice._decide.cache_clear()
    yield
    choice._decide.cache_clear()


def test_without_the_extension_the_result_is_native(nothing_built, caplog):
    assert ran(Inputs(Case(), torch.float32)) == {"native"}
    assert "running native torch ops on cpu" in caplog.text and "not built" in caplog.text


def test_context_nests_and_keeps_what_is_not_given():
    inputs = Inputs(Case())
    with mk.backend("reference", mode="algebraic"):
        assert ran(inputs) == {"mnet_ref"}
        with mk.backend("native"):
            assert ran(inputs) == {"native"}
        with mk.backend(mode="chain"), mk.count_stages() as counts:
            inputs.call()
        assert counts["mnet_ref::depthwise"] == 1
    with pytest.raises(KeyError), mk.backend("native"):
        raise KeyError
    assert choice._scopes == ()


def test_context_overrules_module_and_module_overrules_environment(monkeypatch):
    block = mk.nn.FusedInvertedResidual(4, 4, 1, 2, backend="reference").double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    monkeypatch.setattr(choice, "_environment", ("cpu", "auto"))
    with mk.count_stages() as counts:
        block(x)
    assert counts["mnet_ref::depthwise"] == 1
    with mk.backend("native"), mk.count_stages() as counts:
        block(x)
    assert counts == {"native::inverted_residual": 1}


def test_native_in_the_environment_always_works(monkeypatch):
    """The way out of any trouble: nothing overrules it."""
    monkeypatch.setattr(choice, "_environment", ("native", "auto"))
    with mk.backend("cuda"):
        assert ran(Inputs(Case())) == {"native"}


@pytest.mark.parametrize(
    "name, value, fails",
    [
        ("MNET_BACKEND", "native", None),
        ("MNET_BACKEND", " Reference ", None),
        (
            "MNET_BACKEND",
            "cudnn",
            "must be one of auto, native, reference, cpu, triton, cuda; got 'cudnn'",
        ),
        ("MNET_MODE", "algebraic", None),
        ("MNET_MODE", "fast", "MNET_MODE must be one of auto, chain, algebraic; got 'fast'"),
    ],
)
def test_environment(name, value, fails):
    code = "import mnet_kernels.choice as c; print(*c._environment)"
    env = {**os.environ, name: value, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if fails:
        assert done.returncode and fails in done.stderr
    else:
        assert value.strip().lower() in done.stdout.split()


@pytest.mark.parametrize("name, mode", [("cudnn", None), ("chain", None), ("native", "fast")])
def test_unknown_names(name, mode):
    with pytest.raises(ValueError, match="must be one of"), mk.backend(name, mode):
        pass
    block = mk.nn.FusedPointwiseConvBNAct(3, 4, backend=name, mode=mode)
    with pytest.raises(ValueError, match="must be one of"):
        block(torch.randn(1, 3, 2, 2))


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_of_another_device(name):
    with mk.backend(name), pytest.raises(mk.BackendUnavailableError, match="runs on cuda tensors.*on cpu.*move"):
        Inputs(Case(), torch.float32).call()


def test_kernels_that_never_ran_on_a_card_are_taken_by_name(monkeypatch):
    """Automatic choice says how; what is to be compared with native takes the first of them."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device: None)
    choice._decide.cache_clear()
    try:
        found = choice.choose(cuda, torch.float32)
    finally:
        choice._decide.cache_clear()
    assert found.backend == "native" and "by name: mnet_kernels.backend('cuda') or" in found.reason
    for whole in (["cuda", "triton"], ["triton"], []):
        monkeypatch.setattr(backends, "whole", lambda name, mode, whole=whole: name in whole)
        assert choice.default_fused("cuda") == (whole or ["reference"])[0]


def test_a_backend_that_was_not_built(nothing_built):
    with mk.backend("cpu"), pytest.raises(mk.BackendUnavailableError, match="not built.*pip install --no-build-iso"):
        Inputs(Case(), torch.float32).call()


def test_said_once_and_why(caplog):
    caplog.set_level(logging.INFO, logger="mnet_kernels")
    inputs = Inputs(Case())
    for _ in range(3):
        with mk.backend("reference", "chain"):
            inputs.call()
    said = [r.message for r in caplog.records if "running" in r.message]
    assert len(said) == 1 and "'reference'" in said[0] and "'chain'" in said[0] and "mnet_kernels.backend" in said[0]


def test_float64_takes_native_on_a_fused_backend(caplog):
    inputs = Inputs(Case())
    backend = "cpu" if backends.implemented("cpu") else "auto"
    for _ in range(2):
        with mk.backend(backend):
            assert ran(inputs) == {"native"}
    assert len([r for r in caplog.records if "float64" in r.message]) == 1


def test_stages_that_a_backend_lacks_run_on_the_reference_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setattr(backends, "implemented", lambda name: frozenset({"depthwise"}))
    choice._decide.cache_clear()
    try:
        found = choice.choose(CPU, torch.float32, "cpu", "chain")
        automatic = choice.choose(CPU, torch.float32)
    finally:
        choice._decide.cache_clear()
    assert found.backend == "cpu" and "slow reference: pointwise, finalize" in caplog.text
    assert automatic.backend == "native" and "no kernel yet for" in automatic.reason


def test_algebraic_needs_an_expand_layer():
    with mk.backend("reference", "algebraic"), mk.count_stages() as counts:
        Inputs(Case(expand=False)).call()
    assert counts["mnet_ref::depthwise"] == 1


ROW = {"backend": "cpu", "dtype": "float32", "height": 56, "width": 56, "speedup": 1.2}


def test_thresholds():
    """From the largest map down, as long as algebraic mode is the faster one on average."""
    rows = [ROW, ROW | {"height": 112, "speedup": 1.5}, ROW | {"height": 28, "speedup": 0.8}, ROW | {"height": 14}]
    assert choice.thresholds(rows) == {("cpu", torch.float32): 56 * 56}
    assert choice.thresholds([*rows, ROW | {"height": 28, "speedup": 1.3}]) == {("cpu", torch.float32): 14 * 56}
    assert choice.thresholds([*rows, ROW | {"height": 200, "speedup": 0.9}]) == {}
    assert choice.thresholds([*rows, ROW | {"dtype": "bfloat16"}])["cpu", torch.bfloat16] == 56 * 56


def test_the_measured_table_is_whole():
    document = json.loads(choice.MEASURED.read_text())
    assert document["rows"] and {f"{row['backend']} {row['dtype']}" for row in document["rows"]} == set(
        document["measured"]
    )
    assert choice.thresholds(document["rows"]) == choice._THRESHOLDS


@pytest.fixture
def from_thirty_positions(monkeypatch):
    monkeypatch.setattr(choice, "_THRESHOLDS", {("cpu", torch.float32): 30})
    choice._decide.cache_clear()
    yield
    choice._decide.cache_clear()


@pytest.mark.skipif(not backends.whole("cpu", "algebraic"), reason="the extension is not built")
def test_automatic_mode_goes_by_the_size_of_the_map(from_thirty_positions, caplog):
    caplog.set_level(logging.INFO, logger="mnet_kernels")

    def stages(name="auto", mode=None, dtype=torch.float32, **case):
        with mk.backend(name, mode), mk.count_stages() as counts:
            Inputs(Case(**case), dtype).call()
        return {label for label in counts if "depthwise" in label}

    assert stages(h=6, w=5) == stages("cpu", h=6, w=5) == {"mnet_cpu::expand_depthwise"}
    assert "measured faster" in caplog.text
    assert stages(h=5, w=5) == stages(h=6, w=5, expand=False) == {"mnet_cpu::depthwise"}
    assert stages(mode="chain", h=6, w=5) == {"mnet_cpu::depthwise"}
    assert stages(mode="algebraic", h=5, w=5) == {"mnet_cpu::expand_depthwise"}
    assert stages("reference", h=6, w=5) == {"mnet_ref::depthwise"}
    assert stages(dtype=torch.bfloat16, h=6, w=5) == {"mnet_cpu::depthwise"}  # no row for it


def test_automatic_mode_without_the_stages_is_chain(from_thirty_positions, monkeypatch):
    own = backends.MODE_STAGES["chain"]
    monkeypatch.setattr(backends, "implemented", lambda name: own)
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device: None)
    found = choice.choose(CPU, torch.float32, positions=10**6)
    assert (found.backend, found.mode) == ("cpu", "chain")


ALGEBRAIC_FORWARD = {"gram", "normalize_gram", "expand_finalize", "expand_depthwise"}


@pytest.fixture
def cuda_as_it_is(monkeypatch):
    """A card, and the stages that tests/test_cuda_on_host.py finds in backend ``cuda``."""
    stages = backends.MODE_STAGES["chain"] | ALGEBRAIC_FORWARD
    monkeypatch.setattr(backends, "implemented", lambda name: stages)
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device: None)
    choice._decide.cache_clear()
    yield
    choice._decide.cache_clear()


# The blocks with an expand layer, in order: input channels, how many of them, and their modes on backend cuda where
# algebraic mode is asked for, in a training step and without gradients.
NARROW, WIDE = ("chain", "algebraic"), ("chain", "chain")
BLOCKS = {
    "v2": [(16, 1, NARROW), (24, 2, NARROW), (32, 3, NARROW), (64, 4, NARROW), (96, 3, WIDE), (160, 3, WIDE)],
    "v3-large": [(16, 1, NARROW), (24, 2, NARROW), (40, 3, NARROW), (80, 4, WIDE), (112, 2, WIDE), (160, 2, WIDE)],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_mode_of_every_block_on_cuda(name, cuda_as_it_is, monkeypatch):
    cuda, real, found = torch.device("cuda"), choice.choose, {True: [], False: []}

    def choose(device, dtype, backend, mode, positions=None, channels=None, trains=None, **_):
        if positions is not None:
            mode = real(cuda, dtype, "cuda", "algebraic", positions, channels, trains).mode
            found[trains].append((channels, mode))
        return real(device, dtype, "native")

    monkeypatch.setattr(functional, "choose", choose)
    model = MODELS[name]()
    x = torch.randn(1, 3, 32, 32)
    model(x.repeat(2, 1, 1, 1))
    with torch.no_grad():
        model.eval()(x)
    rows = [(c, train, free) for (c, train), (_, free) in zip(found[True], found[False], strict=True)]
    assert rows == [(c, *modes) for c, count, modes in BLOCKS[name] for _ in range(count)]
    # the first block has no expand layer
    assert len(rows) + 1 == sum(isinstance(m, mk.nn.FusedInvertedResidual) for m in model.modules())


def test_what_algebraic_mode_on_cuda_lacks_is_said(cuda_as_it_is, caplog):
    cuda = torch.device("cuda")
    free = choice.choose(cuda, torch.bfloat16, "cuda", "algebraic", 100, 64, False)
    assert free.mode == "algebraic" and "slow reference" not in caplog.text
    training = choice.choose(cuda, torch.bfloat16, "cuda", "algebraic", 100, 64, True)
    assert training[:2] == ("cuda", "chain")
    assert "no kernel yet for expand_depthwise_backward" in caplog.text and "without gradients" in caplog.text
    wide = choice.choose(cuda, torch.bfloat16, "cuda", "algebraic", 100, 65, False)
    assert wide[:2] == ("cuda", "chain") and "at most 64 input channels" in caplog.text
    assert choice.choose(cuda, torch.bfloat16, "cuda", "auto", 10**6, 64, False).mode == "chain"  # nothing measured


# ---- what was measured on a card ------------------------------------------------------------------------------------

CARD = "NVIDIA H100 80GB HBM3"
SPEEDUPS = {  # (op, side of the map) -> speed-ups over native by backend
    ("inverted_residual", 112): {"cuda": 2.0, "triton": 1.5},
    ("inverted_residual", 56): {"cuda": 1.2, "triton": 1.6},
    ("inverted_residual", 7): {"cuda": 0.9, "triton": 0.8},
    ("separable_conv", 14): {"triton": 1.1},
}


@pytest.fixture
def measured_card(monkeypatch):
    rows = [
        {"card": CARD, "dtype": "bfloat16", "op": op, "height": side, "width": side, "backend": name, "speedup": value}
        for (op, side), values in SPEEDUPS.items()
        for name, value in values.items()
    ]
    monkeypatch.setattr(choice, "_FASTEST", choice.fastest_by_size(rows))
    monkeypatch.setattr(choice, "_card", lambda device: CARD)
    monkeypatch.setattr(backends, "implemented", lambda name: backends.MODE_STAGES["chain"])
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device: None)
    choice._decide.cache_clear()
    yield monkeypatch
    choice._decide.cache_clear()


def chosen(op, side, dtype=torch.bfloat16, **more):
    return choice.choose(torch.device("cuda", 0), dtype, op=op, size=side * side, **more)


def test_what_measured_fastest_on_the_card_runs(measured_card):
    for side, want in ((224, "cuda"), (112, "cuda"), (111, "triton"), (56, "triton"), (28, "native"), (1, "native")):
        found = chosen("inverted_residual", side)
        assert (found.backend, found.mode) == (want, None if want == "native" else "chain"), side
        assert "measured fastest on this card" in found.reason
    # below the smallest size that was measured its row counts; a sequence goes by its blocks
    assert chosen("separable_conv", 7).backend == chosen("separable_sequence", 7).backend == "triton"


def test_what_was_not_measured_goes_by_the_rule(measured_card):
    for found in (chosen("inverted_residual", 56, torch.float32), chosen("stem_conv_bn_act", 56)):
        assert found.backend == "native" and "have not passed all their tests on a card yet" in found.reason
    # and who asks for a backend by name gets it
    assert chosen("inverted_residual", 56, backend="cuda").backend == "cuda"
    with choice.backend("native"):
        assert chosen("inverted_residual", 112).backend == "native"


def test_a_measured_backend_that_is_not_there_is_passed_over(measured_card):
    measured_card.setattr(backends, "why_unavailable", lambda name, device: "not built" if name == "cuda" else None)
    found = chosen("inverted_residual", 112)
    assert found.backend == "native" and "cuda: not built" in found.reason


def test_the_measured_backend_of_a_block_that_is_too_wide(measured_card):
    stages = backends.MODE_STAGES["chain"] | backends.MODE_STAGES["algebraic"]
    measured_card.setattr(backends, "implemented", lambda name: stages)
    modes = [
        chosen("inverted_residual", 112, mode="algebraic", positions=112**2, channels=c, trains=False).mode
        for c in (64, 65)
    ]
    assert modes == ["algebraic", "chain"]


def test_blocks_ask_with_their_op_and_size(monkeypatch):
    seen, real = [], choice.choose

    def choose(*args, op=None, size=None, **more):
        seen.append((op, size))
        return real(*args[:2], "native")

    monkeypatch.setattr(functional, "choose", choose)
    mk.nn.FusedInvertedResidual(4, 4, 1, 2)(torch.randn(2, 4, 5, 6))
    mk.nn.FusedStemConvBNAct(3, 4, 2)(torch.randn(2, 3, 8, 8))
    assert seen == [("inverted_residual", 30), ("stem_conv_bn_act", 64)]


def test_whether_a_gradient_may_be_asked_for():
    block = mk.nn.FusedInvertedResidual(4, 4, 1, 2)
    seen = []

    def choose(*args, **_):
        seen.append(args[6])
        return choice.choose(*args[:2], "native")

    x = torch.randn(2, 4, 5, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "choose", choose)
        block(x)
        with torch.no_grad():
            block(x)
        with torch.inference_mode():
            block(x)
        block.requires_grad_(False)
        block(x)
        block(x.requires_grad_())
    assert seen == [True, False, False, False, True]


def test_build_info():
    info = mk.build_info()
    assert set(info) == {"version", "torch", "triton", "extension", "backends", "tuned"}
    assert info["version"] == mk.__version__ and info["torch"] == torch.__version__
    assert set(info["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert info["backends"]["reference"]["whole"] == ["chain", "algebraic"]
    extension = info["extension"]
    assert extension["extension"] or extension["reason"]
    assert extension["extension"] == bool(info["backends"]["cpu"]["stages"])
