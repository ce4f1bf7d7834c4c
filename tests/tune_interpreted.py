"""The search for configurations, run whole in Triton's interpreter on tiny maps; test_tune.py starts it."""

import sys
from pathlib import Path

import fast_interpreter  # noqa: F401
import torch

from mnet_kernels.backends.triton import INTERPRETED, configs, launch
from mnet_kernels.bench import tune_problems, tuning
from mnet_kernels.bench.shapes import Layer

assert INTERPRETED, "run with TRITON_INTERPRET=1"
torch.set_num_threads(1)
CPU = torch.device("cpu")
LAYERS = {
    "pointwise": Layer("pointwise", 5, 4, 3, 9, 1, 1, "relu6"),
    "pointwise_dgrad": Layer("pointwise", 5, 4, 3, 9, 1, 1, "hardswish"),
    "pointwise_wgrad": Layer("pointwise", 5, 4, 3, 9, 1, 1, None),
    "depthwise": Layer("depthwise", 3, 3, 5, 3, 3, 2, "relu"),
    "depthwise_backward": Layer("depthwise", 3, 2, 4, 3, 3, 1, "silu"),
    "elementwise": Layer("pointwise", 3, 4, 3, 5, 1, 1, None),
    "stem": Layer("dense", 3, 7, 5, 4, 3, 2, None),
    "stem_backward": Layer("dense", 3, 5, 7, 4, 3, 2, None),
    "gram": Layer("pointwise", 5, 4, 3, 9, 1, 1, None),
    "expand_depthwise": Layer("depthwise", 18, 5, 4, 18, 3, 1, "relu6"),
}


def bench(kernel, shape, dtype):
    options = {"batch": 2, "seconds": 0.0, "bounds": {"min_rounds": 1, "max_rounds": 2, "warmup": 1}}
    return tuning.Bench((kernel, shape, dtype.itemsize), [LAYERS[kernel]], CPU, [dtype], **options)


# every kernel's calls and baseline keep to the pass rule with the table's row, and a damaged result does not
SHAPES = {"depthwise": "k3", "expand_depthwise": "k3", "elementwise": "any", "stem": "any"}
for kernel, dtype in zip(LAYERS, [torch.float32, torch.bfloat16] * 5, strict=True):
    shape = SHAPES.get(kernel.removesuffix("_backward"), "narrow")
    found = bench(kernel, shape, dtype)
    row = configs.lookup(kernel, shape, dtype.itemsize, (0, 0))
    run, results = found.run, []
    found.run = lambda *call, run=run, results=results: results.append(run(*call)) or results[-1]
    assert found.right(row), kernel
    found.run = lambda *call, results=results: [t * 1.25 for t in tune_problems._results(results.pop(0))]
    assert not found.right(row), kernel

# the search, over candidates that launch: which one is in force is seen by the launcher
seen, lookup = set(), launch._configs.lookup
launch._configs.lookup = lambda *key: seen.add(lookup(*key)) or lookup(*key)
tuning.neighbours = lambda kernel, shape, row: [row._replace(rows=16), row._replace(rows=64)]
key = ("pointwise", "narrow", 4)
options = {"batch": 2, "seconds": 0.0, "bounds": {"min_rounds": 2, "max_rounds": 2, "warmup": 1}}
search = bench(*key[:2], torch.float32)
assert all(search.right(config) for config in tuning.neighbours(*key[:2], configs.lookup(*key, (0, 0))))
seen.clear()
outcome = tuning.tune(key, [LAYERS["pointwise"]], CPU, None, (0, 0), [torch.float32], **options)
assert seen == {outcome.before, *tuning.neighbours(None, None, outcome.before)} and not configs.given()
assert (outcome.tried, outcome.failed, outcome.wrong) == (2, 0, 0) and outcome.after in seen
print(tuning.table({key: outcome}))
tuning.write(Path(sys.argv[1]), {key: outcome._replace(after=outcome.before._replace(rows=64))}, "a card", (0, 0))
