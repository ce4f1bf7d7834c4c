"""Options and the one way of running of the pytest-benchmark suites: bench_stage.py, _block, _model and _host.

The baseline is the provider ``eager``; how each compares with it: python -m mnet_kernels.bench report FILE.
"""

import pytest
import torch

from mnet_kernels.bench import BenchError, compare, environment, host, providers, stage_subjects, timing
from mnet_kernels.bench.subjects import Setting
from mnet_kernels.models import MODELS
from mnet_kernels.training.config import AMP_DTYPES

CASES = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("mnet-kernels")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--batch", type=int, nargs="+", help="images (default: 4 on the CPU, 256 on a card; host: 1 2 4 8)")
    group.addoption("--amp", choices=AMP_DTYPES, default="off", help="mixed precision; for stages the storage dtype")
    group.addoption("--width", type=float, default=1.0, help="width multiplier of the models")
    group.addoption("--resolution", type=int, default=224, help="side of the images")
    group.addoption("--models", nargs="+", choices=MODELS, help="default: all")
    group.addoption("--providers", nargs="+", help="default: nchw, eager, compile and every fused backend that runs")


def wanted(config, level):
    """The providers of a suite; the reference is the oracle, and runs only if it is named."""
    device, names = torch.device(config.getoption("device")), config.getoption("providers")
    native = [n for n in names or ("nchw", "eager", "compile") if n in providers.NATIVE]
    kind = stage_subjects if level == "stage" else providers
    try:
        rest = [n for n in names or () if n not in providers.NATIVE]
        fused = kind.parse(rest, device) if names else kind.runnable(device)
    except BenchError as exc:
        raise pytest.UsageError(str(exc)) from exc
    return {p.name: p for p in providers.parse(native, device) + fused}


def parametrize(metafunc, level, list_subjects):
    """One benchmark for every subject, direction, batch and provider, all by name (--benchmark-group-by=param:...)."""
    get = metafunc.config.getoption
    usual = host.BATCHES if level == "host" else [256 if get("device") == "cuda" else 4]
    known = wanted(metafunc.config, level)
    subjects = {subject.name: subject for subject in list_subjects(get("models"), get("width"), get("resolution"))}
    metafunc.config.stash[CASES] = metafunc.config.stash.get(CASES, {}) | {level: (subjects, known)}
    cases = [
        pytest.param(level, name, direction, batch, provider, id=f"{name}-{direction}-{batch}-{provider}")
        for name, subject in subjects.items()
        for direction in subject.directions
        for batch in get("batch") or usual
        for provider in known
        if subject.runs_on(known[provider])
    ]
    metafunc.parametrize(("level", "subject", "direction", "batch", "provider"), cases)


@pytest.fixture(scope="session")
def header(pytestconfig):
    return environment.header(pytestconfig.getoption("device"))


@pytest.fixture
def measure(benchmark, header, pytestconfig):
    """Run one case; everything that places the figure goes to extra_info."""

    def run(level, subject, direction, batch, provider):
        device = torch.device(pytestconfig.getoption("device"))
        subjects, known = pytestconfig.stash[CASES][level]
        subject, provider = subjects[subject], known[provider]
        setting = Setting(device, batch, pytestconfig.getoption("amp"))
        torch.backends.cudnn.benchmark = True
        torch._dynamo.reset()
        prepared = compare.Prepared(subject, provider, setting, [direction])
        if prepared.error:
            pytest.fail(prepared.error[direction])
        call = prepared.calls[direction]
        benchmark.group = f"{subject.level} {subject.name} {direction} batch {batch}"
        benchmark.extra_info |= {"header": header, **compare.key(subject, setting, direction, "eager", provider.name)}
        benchmark.extra_info |= prepared.facts[direction]

        def synchronized():
            call()
            timing.synchronize(device)

        # what a call costs the host does not include what the card then does
        benchmark(call if level == "host" else synchronized)

    return run
