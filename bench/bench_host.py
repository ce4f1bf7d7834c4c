"""What a call costs the host: one of every kind of block on tiny maps, batch 1 to 8.

pytest bench/bench_host.py --benchmark-only --benchmark-json FILE
"""

from conftest import parametrize

from mnet_kernels.bench import host


def pytest_generate_tests(metafunc):
    parametrize(metafunc, "host", host.blocks)


def bench_host(measure, level, subject, direction, batch, provider):
    measure(level, subject, direction, batch, provider)
