"""Whole models: forward without autograd, and training steps with SGD.

pytest bench/bench_model.py --benchmark-only --benchmark-json FILE
"""

from conftest import parametrize

from mnet_kernels.bench import shapes


def pytest_generate_tests(metafunc):
    parametrize(metafunc, "model", shapes.models)


def bench_model(measure, level, subject, direction, batch, provider):
    measure(level, subject, direction, batch, provider)
