"""What one call of a block costs the host: an autograd.Function outside plain ops, or one op with register_autograd.

    python bench/host_cost.py [--json FILE] [--seconds 2]

A small network's step is bound by the host: by Python, the dispatcher and autograd, not by arithmetic.  Here the stages
do nothing but allocate their outputs, so that what is left is the way they are put together (chain mode, three layers):

stages          the stage ops alone, called in order, forward then backward, without autograd
function        FusedBlock, this package's way: one autograd.Function around the stage ops
registered      the same stages inside a pair of ops, forward and backward, tied by torch.library.register_autograd
custom_op       the same pair by torch.library.custom_op
functional      the public function: argument checks, choice of backend, FusedBlock, running statistics
native          the same block in torch's own ops, at [1, 8, 4, 4]: its arithmetic is in the figure, and is small

Times are CPU time of the one thread, so that other processes cost little.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import torch

from mnet_kernels import BatchNormParams, functional, schema, stages
from mnet_kernels.autograd import Block, FusedBlock, Layer, chain
from mnet_kernels.autograd.batch_norm import PER_LAYER
from mnet_kernels.bench import environment, statistics, timing
from mnet_kernels.training.checkpoint import write_atomic
from mnet_kernels.training.metrics import dumps

CHANNELS, HIDDEN, SIZE = 8, 16, 4
EMPTY, OPS = "mnet_empty", "mnet_host_cost"
LAYERS = (
    Layer("pointwise", 1, schema.ACTIVATIONS.index("relu6"), 1e-5, True),
    Layer("depthwise", 1, schema.ACTIVATIONS.index("relu6"), 1e-5, True),
    Layer("pointwise", 1, schema.IDENTITY, 1e-5, True),
)
BLOCK = Block("reference", "chain", LAYERS, True, None)
COUNT = len(LAYERS)
_libraries = []


class EmptyStages:
    """A table of stage callables, as the package's own, whose ops allocate what the fakes say and compute nothing."""

    def __init__(self):
        library = schema.define(EMPTY)
        _libraries.append(library)
        for name in schema.NAMES:
            library.impl(name, schema.FAKES[name], "CompositeExplicitAutograd")
            setattr(self, name, getattr(getattr(torch.ops, EMPTY), name).default)


@contextlib.contextmanager
def empty_reference(table):
    """Let the package's backend ``reference`` run on the empty stages."""
    before = stages._tables["reference"]
    stages._tables["reference"] = table
    try:
        yield
    finally:
        stages._tables["reference"] = before


def _forward(table, x, tensors):
    """(out, what backward needs) of the block, from weight, gamma and beta of every layer."""
    rows = [(*tensors[3 * i : 3 * i + 3], None, None) for i in range(COUNT)]
    out, saved, _ = chain.forward(table, BLOCK, x, rows, [row[0] for row in rows], [])
    return [out, *saved]


def _backward(table, grad, x, tensors, saved):
    """Gradients of x and of every weight, gamma and beta."""
    needs = [True, True, True, False, False] * COUNT
    dx, grads = chain.backward(table, BLOCK, grad, x, saved, list(tensors[::3]), [], True, needs)
    return [dx, *(grads[i * PER_LAYER + j] for i in range(COUNT) for j in range(3))]


def _tie(forward, backward, register):
    """Autograd of a pair of ops, by ``register(derivative, setup_context)``."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], *inputs[1], *output[1:])

    def derivative(ctx, grads):
        x, *rest = ctx.saved_tensors
        dx, *found = backward(grads[0], x, rest[: 3 * COUNT], rest[3 * COUNT :])
        return dx, found

    register(derivative, setup_context)
    return lambda x, tensors: forward(x, tensors)[0]


def registered(table):
    """A pair of ops by ``Library.define`` and ``impl``, tied by register_autograd."""
    library = torch.library.Library(OPS, "DEF")
    _libraries.append(library)
    library.define("forward(Tensor x, Tensor[] tensors) -> Tensor[]")
    library.define("backward(Tensor grad, Tensor x, Tensor[] tensors, Tensor[] saved) -> Tensor[]")
    library.impl("forward", lambda x, t: _forward(table, x, t), "CompositeExplicitAutograd")
    library.impl("backward", lambda grad, x, t, saved: _backward(table, grad, x, t, saved), "CompositeExplicitAutograd")
    ops = getattr(torch.ops, OPS)

    def register(derivative, setup_context):
        torch.library.register_autograd(f"{OPS}::forward", derivative, setup_context=setup_context, lib=library)

    return _tie(ops.forward.default, ops.backward.default, register)


def custom(table):
    """The same pair by ``torch.library.custom_op``."""

    @torch.library.custom_op(f"{OPS}_custom::forward", mutates_args=())
    def forward(x: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return _forward(table, x, tensors)

    @torch.library.custom_op(f"{OPS}_custom::backward", mutates_args=())
    def backward(
        grad: torch.Tensor, x: torch.Tensor, tensors: list[torch.Tensor], saved: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        return _backward(table, grad, x, tensors, saved)

    def register(derivative, setup_context):
        forward.register_autograd(derivative, setup_context=setup_context)

    return _tie(forward, backward, register)


class Calls:
    """The ways of running one block, as callables: ``forward`` and ``forward and backward`` of each."""

    def __init__(self):
        self.table = EmptyStages()
        shapes = [(HIDDEN, CHANNELS, 1, 1), (HIDDEN, 1, 3, 3), (CHANNELS, HIDDEN, 1, 1)]
        self.x = torch.randn(1, CHANNELS, SIZE, SIZE).contiguous(memory_format=torch.channels_last).requires_grad_()
        self.weights = [torch.randn(s).requires_grad_() for s in shapes]
        self.norms = [torch.nn.BatchNorm2d(s[0]) for s in shapes]
        rows = zip(self.weights, self.norms, strict=True)
        self.tensors = [t for w, bn in rows for t in (w, bn.weight, bn.bias)]
        self.leaves = [self.x, *self.tensors]
        self.upstream = torch.randn_like(self.x)

    def _functional(self, backend):
        layers = [t for w, bn in zip(self.weights, self.norms, strict=True) for t in (w, BatchNormParams.of(bn))]
        return functional.inverted_residual(self.x, *layers, residual=True, backend=backend)

    def _function(self):
        row = (t for i in range(COUNT) for t in (*self.tensors[3 * i : 3 * i + 3], None, None))
        return FusedBlock.apply(BLOCK, None, self.x, *row)[0]

    def _stages(self, backward):
        with torch.no_grad():
            _, *saved = _forward(self.table, self.x, self.tensors)
            if backward:
                _backward(self.table, self.upstream, self.x, self.tensors, saved)

    def all(self):
        """name -> (forward, forward and backward)."""
        registered_, custom_ = registered(self.table), custom(self.table)
        outputs = {
            "function": self._function,
            "registered": lambda: registered_(self.x, self.tensors),
            "custom_op": lambda: custom_(self.x, self.tensors),
            "functional": lambda: self._functional("reference"),
            "native": lambda: self._functional("native"),
        }

        def both(output):
            return lambda: torch.autograd.grad(output(), self.leaves, self.upstream)

        found = {"stages": (lambda: self._stages(False), lambda: self._stages(True))}
        return found | {name: (output, both(output)) for name, output in outputs.items()}


def measure(seconds):
    """Rows of microseconds per call."""
    calls, rows = Calls(), []
    with empty_reference(calls.table):
        ways = calls.all()
        for i, direction in enumerate(("forward", "forward and backward")):
            chosen = {name: pair[i] for name, pair in ways.items()}
            chosen["function (again)"] = ways["function"][i]
            bounds = {"seconds": seconds, "min_rounds": 20, "max_rounds": 2000, "warmup": 50}
            samples = timing.interleave(chosen, "cpu", now=time.thread_time_ns, **bounds)
            noise = statistics.noise_floor(samples["function"], samples["function (again)"])
            for name, found in samples.items():
                low, median, high = (1e3 * q for q in statistics.quantiles(found))
                interval = statistics.ratio(samples["function"], found)
                rows.append(
                    {
                        "way": name, "direction": direction, "median_us": median, "q20_us": low, "q80_us": high,
                        "speedup": interval.median, "speedup_low": interval.low, "speedup_high": interval.high,
                        "noise": noise, "verdict": statistics.verdict(interval, noise), "rounds": len(found),
                    }
                )  # fmt: skip
    return rows


def main(argv=None):
    """Measure, print the table, write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="timed rounds of each direction (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="write header and rows there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    header, rows = environment.header("cpu"), measure(args.seconds)
    print(f"{header['device']}, torch {header['torch']}, commit {header['commit']}; microseconds per call")
    for direction in dict.fromkeys(row["direction"] for row in rows):
        print(f"\n{direction:22}  median    20 %    80 %  times as fast as function")
        for row in rows:
            if row["direction"] == direction:
                ratio = f"{row['speedup']:.2f} [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}] {row['verdict']}"
                print(f"{row['way']:22}{row['median_us']:8.1f}{row['q20_us']:8.1f}{row['q80_us']:8.1f}  {ratio}")
        noise = next(row["noise"] for row in rows if row["direction"] == direction)
        print(f"noise floor {100 * noise:.1f} %")
    if args.json:
        write_atomic(Path(args.json), (dumps({"header": header, "rows": rows}, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
