"""An accelerated model is the plain model, whatever is done to both: hypothesis writes the programs.

The steps and what is compared after each are drop_in_program's.  MNET_PROGRAMS=2000 runs as many programs instead of
the few of the suite, and makes a failing one as short as it can; `python tests/drop_in_program.py` runs programs
without hypothesis, by the hour.
"""

import logging
import os

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
pytest.importorskip("timm")
from drop_in_compare import Disagreement  # noqa: E402
from drop_in_edits import GENTLE  # noqa: E402
from drop_in_models import FAMILIES, SIZE  # noqa: E402
from drop_in_plants import FAULTS, RIGHT, planted  # noqa: E402
from drop_in_program import RULES, Draw, Program, random_program  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test  # noqa: E402

PROGRAMS = int(os.environ.get("MNET_PROGRAMS", 60))
COMPILATIONS = 3  # in a run of the suite: each takes a second


@pytest.fixture(autouse=True)
def _quiet_and_single():
    """Maps this small gain nothing by threads; what runs its children one by one need not say so each time."""
    logger, threads = logging.getLogger("mnet_kernels"), torch.get_num_threads()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)


class Choice(Draw):
    """Draws from hypothesis, which so can shrink a program that fails."""

    def __init__(self, data):
        self.number = lambda n: data.draw(st.integers(0, n - 1))


class Machine(RuleBasedStateMachine):
    """One program; its rules are put in by ``machine``."""

    program = None
    compilations = COMPILATIONS

    @initialize(family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 2**16))
    def begin(self, family, seed):
        self.program = Program(family, seed, compilations=0)

    def step(self, name, data):
        if name == "compiled":
            if type(self).compilations <= 0:
                return
            self.program.compilations = 1
        self.program.run(name, Choice(data))
        if name == "compiled":
            type(self).compilations -= 1 - self.program.compilations

    def teardown(self):
        if self.program is not None:
            self.program.end()


def machine(names, base=Machine):
    """A state machine of the rules of these names, which draws the same programs in every run."""

    def steps(name):
        def run(self, data):
            self.step(name, data)

        run.__name__ = name
        return rule(data=st.data())(run)

    return hypothesis.seed(0)(type("Programs", (base,), {name: steps(name) for name in sorted(names)}))


def run(machine, programs, steps):
    options = settings(
        max_examples=programs,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, *([Phase.shrink] if "MNET_PROGRAMS" in os.environ else [])],  # shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)


def test_any_program():
    """After every step of any program both are the same."""
    run(machine(RULES), PROGRAMS, 25)


class FusedMachine(Machine):
    """Programs without an edit that forbids fusing: in every forward as many layers run fused as in the first."""

    @initialize(family=st.sampled_from(sorted(set(FAMILIES) - {"holder"})), seed=st.integers(0, 2**16))
    def begin(self, family, seed):
        super().begin(family, seed)
        self.first = self.fused_layers()
        assert self.first >= 2, "nothing is fused to begin with"

    def fused_layers(self):
        """Depthwise layers of one forward that ran fused."""
        self.program.fused.clear()
        self.program.use("a forward", lambda model: {"out": model(self.program.tensor((4, 3, SIZE, SIZE)))})
        return sum(n for name, n in self.program.fused.items() if name.endswith("depthwise"))

    def step(self, name, data):
        super().step(name, data)
        found = self.fused_layers()
        if found < self.first:
            raise Disagreement(f"{found} fused depthwise layers, {self.first} before\n{self.program}")


def test_what_may_be_fused_is_fused():
    """Copies, casts, new weights, frozen ones, evaluation and whatever else changes no layer leave all blocks fused."""
    run(machine(GENTLE | {"plain_step", "call_with_weights", "part", "no_grad"}, FusedMachine), 12, 16)


def test_a_right_stand_in_passes():
    """The stand-ins that faults are planted into are themselves right: what the machine finds below is the fault."""
    with planted(RIGHT):
        for seed in range(15):
            _, _, failure = random_program(seed, 25)
            assert failure is None, failure


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    with planted(fault), pytest.raises(Disagreement, match=FAULTS[fault]):
        for seed in range(100):
            _, _, failure = random_program(seed, 25)
            if failure is not None:
                raise failure
