"""Whole blocks in the shapes of the models: forward without autograd, and forward with backward.

pytest bench/bench_block.py --benchmark-only --benchmark-json FILE
"""

from conftest import parametrize

from mnet_kernels.bench import shapes


def pytest_generate_tests(metafunc):
    parametrize(metafunc, "block", shapes.blocks)


def bench_block(measure, level, subject, direction, batch, provider):
    measure(level, subject, direction, batch, provider)
