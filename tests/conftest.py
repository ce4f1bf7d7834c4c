import os
import random
import zlib

import pytest
import torch

from mnet_kernels import log

# Two threads: the sums of a reduction then split as on the smallest machine the suite is meant for.  One each where
# pytest-xdist runs several tests at once: threads that wait for each other on busy cores slow a test down 50 times.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(min(THREADS, torch.get_num_threads()))
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of the programs that tests start


# Fresh inputs in every run; the seed is printed, and MNET_TEST_SEED=<seed> runs the same inputs again.
SEED = int(os.environ.setdefault("MNET_TEST_SEED", str(random.SystemRandom().randrange(2**31))))


def pytest_report_header(config):
    return f"MNET_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def _fresh_state(request):
    """Every test draws its own inputs, from the run's seed and its name, and hears everything that is said once."""
    torch.manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))
    log.forget()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of two epochs on the digits; not to be changed."""
    pytest.importorskip("sklearn")
    from train_runs import run

    out = tmp_path_factory.mktemp("finished")
    assert run(out) == 0
    return out


@pytest.fixture(scope="session")
def profile():
    """Of two blocks and a model, collected once; not to be changed."""
    from profiles import collected

    return collected()
