"""Single stages against the torch layers they stand for (mnet_kernels/bench/stage_subjects.py says how they are cut).

pytest bench/bench_stage.py --benchmark-only --benchmark-json FILE
"""

from conftest import parametrize

from mnet_kernels.bench import stage_subjects


def pytest_generate_tests(metafunc):
    parametrize(metafunc, "stage", stage_subjects.stages)


def bench_stage(measure, level, subject, direction, batch, provider):
    measure(level, subject, direction, batch, provider)
