"""Gradients are tensors of their own: no storage shared, none larger than the gradient, strides as the parameter's."""

import pytest
import torch
from blocks import CASES, Inputs, fused_modes
from torch import nn

import mnet_kernels as mk
from mnet_kernels import functional
from mnet_kernels.functional import BatchNormParams, ConvBNAct, InvertedResidualParams

FORMATS = (torch.contiguous_format, torch.channels_last)


def laid_out(parameter, memory_format):
    """The parameter's own values in a memory format, as ``module.to(memory_format=...)`` lays them out."""
    if parameter.dim() == 4:
        parameter.data = parameter.data.to(memory_format=memory_format)


def assert_own_memory(parameters):
    """Every parameter has a gradient of its own storage and of its strides."""
    storages = set()
    for name, p in parameters.items():
        assert p.grad.untyped_storage().nbytes() == p.grad.numel() * p.grad.element_size(), f"{name} holds more"
        assert p.grad.untyped_storage().data_ptr() not in storages, f"{name} shares its storage"
        assert p.grad.stride() == p.stride(), f"{name}: {p.grad.stride()} for {p.stride()}"
        storages.add(p.grad.untyped_storage().data_ptr())


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.activation in ("relu6", "relu")], ids=str)
def test_blocks(case, dtype, memory_format):
    """Of every kind of block, over every backend; bfloat16 under autocast, with parameters of float32."""
    inputs = Inputs(case, torch.float32)
    parameters = {name: t for name, t in inputs.leaves.items() if name != "x"}
    for p in parameters.values():
        laid_out(p, memory_format)
    for backend, mode in fused_modes(case, compiled=True):
        for p in parameters.values():
            p.grad = None
        with mk.backend(backend, mode), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = inputs.call()
        out.float().square().sum().backward()
        assert_own_memory(parameters)


class Row(nn.Module):
    """A stem, a block on its raw map, a block in algebraic mode and a pooled head."""

    def __init__(self):
        super().__init__()
        shapes = [(8, 3, 3, 3), (8, 1, 3, 3), (6, 8, 1, 1), (9, 6, 1, 1), (9, 1, 5, 5), (6, 9, 1, 1), (7, 6, 1, 1)]
        self.weights = nn.ParameterList([torch.randn(s) for s in shapes])
        self.norms = nn.ModuleList([nn.BatchNorm2d(s[0]) for s in shapes])

    def forward(self, x):
        kinds = ["dense", "depthwise", "pointwise", "pointwise", "depthwise", "pointwise", "pointwise"]
        rows = [
            ConvBNAct(kind, weight, BatchNormParams.of(norm), "relu6", 2 if kind == "dense" else 1)
            for kind, weight, norm in zip(kinds, self.weights, self.norms, strict=True)
        ]
        blocks = [InvertedResidualParams(tuple(rows[1:3])), InvertedResidualParams(tuple(rows[3:6]), residual=True)]
        x = functional.inverted_residual_sequence(x, blocks, stem=rows[0])
        return functional.pointwise_conv_bn_act_pool(x, rows[6].weight, rows[6].bn)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["chain", "algebraic"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_raw_and_pooled_nodes(backend, mode, memory_format):
    model = Row().to(memory_format=memory_format)
    with mk.backend(backend, mode):
        model(torch.randn(2, 3, 12, 10)).square().sum().backward()
    assert_own_memory(dict(model.named_parameters()))


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_compiled(memory_format):
    model = Row().to(memory_format=memory_format)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with mk.backend("reference", "chain"):
        compiled(torch.randn(2, 3, 12, 10)).square().sum().backward()
    assert_own_memory(dict(model.named_parameters()))


def test_values_are_kept():
    """Laying a gradient out moves its values with it: a stem's weight in channels_last has another order in memory."""
    plain, other = Row(), Row().to(memory_format=torch.channels_last)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 12, 10)
    with mk.backend("reference", "chain"):
        for model in (plain, other):
            model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
