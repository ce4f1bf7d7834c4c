"""Options and the one way of running of the pytest-benchmark suites: bench_stage.py, bench_block.py, bench_model.py."""

import pytest
import torch

from mnet_kernels.bench import BenchError, compare, environment, providers, stage_subjects, timing
from mnet_kernels.bench.subjects import Setting
from mnet_kernels.models import MODELS
from mnet_kernels.training.config import AMP_DTYPES


def pytest_addoption(parser):
    group = parser.getgroup("mnet-kernels")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--batch", type=int, help="images (default: 4 on the CPU, 256 on a card)")
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
    return [providers.NATIVE[n] for n in native] + fused


def parametrize(metafunc, level, list_subjects):
    """One benchmark for every subject, direction and provider."""
    get = metafunc.config.getoption
    cases = [
        pytest.param(subject, direction, provider, id=f"{subject.name}-{direction}-{provider.name}")
        for subject in list_subjects(get("models"), get("width"), get("resolution"))
        for direction in subject.directions
        for provider in wanted(metafunc.config, level)
        if subject.runs_on(provider)
    ]
    metafunc.parametrize(("subject", "direction", "provider"), cases)


@pytest.fixture(scope="session")
def header(pytestconfig):
    return environment.header(pytestconfig.getoption("device"))


@pytest.fixture
def measure(benchmark, header, pytestconfig):
    """Run one case; everything that places the figure goes to extra_info."""

    def run(subject, direction, provider):
        device = torch.device(pytestconfig.getoption("device"))
        batch = pytestconfig.getoption("batch") or (256 if device.type == "cuda" else 4)
        setting = Setting(device, batch, pytestconfig.getoption("amp"))
        torch.backends.cudnn.benchmark = True
        torch._dynamo.reset()
        prepared = compare.Prepared(subject, provider, setting, [direction])
        if prepared.error:
            pytest.fail(prepared.error[direction])
        call = prepared.calls[direction]
        benchmark.group = f"{subject.level} {subject.name} {direction}"
        benchmark.extra_info |= {"header": header, **compare.key(subject, setting, direction, "eager", provider.name)}
        benchmark.extra_info |= prepared.facts[direction]

        def synchronized():
            call()
            timing.synchronize(device)

        benchmark(synchronized)

    return run
