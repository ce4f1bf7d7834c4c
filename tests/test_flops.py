"""torch.utils.flop_counter over the ops: as many as over the same block in torch's own ops."""

import subprocess
import sys

import pytest
import torch
from blocks import CASES, Case, Inputs, backends, fused_modes
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mnet_kernels as mk
from mnet_kernels import schema

# wide enough that squeeze-excite's few are not all there is
SIZE = {"n": 2, "c": 8, "e": 24, "o": 12, "h": 14, "w": 10}
OPS = [c._replace(**SIZE) for c in CASES if c.activation in ("relu6", "relu") and c.op != "stem_conv_bn_act"]
OPS += [Case("stem_conv_bn_act", stride=2, activation="relu6", **(SIZE | {"c": 3}))]


def counts(inputs, backend, mode=None, frozen=()):
    """(FLOPs of the forward, of the backward)."""
    leaves = [t.requires_grad_(name not in frozen) for name, t in inputs.leaves.items()]
    with mk.backend(backend, mode):
        with FlopCounterMode(display=False) as forward:
            out = inputs.call(leaves)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(out.sum(), [t for t in leaves if t.requires_grad])
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", OPS, ids=str)
def test_as_many_as_torch(case, training):
    inputs = Inputs(case, torch.float32)
    for bn in inputs.bns:
        bn.train(training)
    want = counts(inputs, "native")
    assert min(want) > 0
    for backend, mode in fused_modes(case, compiled=True):
        assert counts(inputs, backend, mode) == want, (backend, mode)


FROZEN = [("x",), ("weight1",), ("weight2",), ("x", "weight0", "gamma0", "beta0")]


# algebraic mode makes its expand layer's gradients in any case: the op cannot know that all of them are frozen
@pytest.mark.parametrize(
    ("mode", "frozen"), [*(("chain", f) for f in FROZEN), *(("algebraic", f) for f in FROZEN[:3])], ids=str
)
def test_frozen_parameters_count_nothing(mode, frozen):
    inputs = Inputs(OPS[-2]._replace(excite=False, expand=True), torch.float32)
    assert counts(inputs, "reference", mode, frozen) == counts(inputs, "native", None, frozen)


def test_every_op_of_every_namespace_has_a_formula():
    ops = [getattr(getattr(torch.ops, space), name) for space in schema.NAMESPACES.values() for name in schema.NAMES]
    if "folded_pack" in dir(torch.ops.mnet_cpu):
        ops += [getattr(torch.ops.mnet_cpu, f"folded_{name}") for name in ("pack", "pointwise", "expand_depthwise")]
    assert not [op for op in ops if op not in flop_registry]


@pytest.mark.skipif(not backends.implemented("cpu"), reason="the extension is not built")
@pytest.mark.parametrize("expand", [True, False])
def test_folded_rows(expand):
    """The inference ops of a folded model count what its convolutions do."""
    n, c, e, h, w = 2, 8, 24, 14, 10
    ops, x = torch.ops.mnet_cpu, torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last)
    wide, table = torch.randn(e, c, 1, 1), lambda channels: torch.rand(5, channels)
    with FlopCounterMode(display=False) as found:
        packed = ops.folded_pack(wide, expand)
        if expand:
            ops.folded_expand_depthwise(x, torch.zeros(c), wide, packed, table(e), 2, torch.randn(e, 1, 3, 3), 2)
        else:
            ops.folded_pointwise(x, wide, packed, None, 0, None, table(e), 2, None)
    depthwise = 2 * n * e * 9 * (h // 2) * (w // 2) if expand else 0
    assert found.get_total_flops() == 2 * n * h * w * c * e + depthwise


IMPORTS = """
import sys
{first}
assert ("torch.utils.flop_counter" in sys.modules) == {there}, "the package imports the counter"
from torch.utils.flop_counter import flop_registry
import mnet_kernels, torch
assert torch.ops.mnet_ref.pointwise in flop_registry
assert not any(type(finder).__module__.startswith("mnet_kernels") for finder in sys.meta_path)
"""


@pytest.mark.parametrize("first", ["import mnet_kernels", "import torch.utils.flop_counter"])
def test_whichever_is_imported_first(first):
    code = IMPORTS.format(first=first, there="flop_counter" in first)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
