"""A block in algebraic mode has its input's gram from the block that wrote it, or gathers it anew: never another's."""

import copy

import pytest
import torch
from blocks import assert_same
from test_models_v2 import NARROW, training_step, twins
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import mobilenet_v2

import mnet_kernels as mk
from mnet_kernels import backends
from mnet_kernels.nn import FusedInvertedResidual, FusedSequential

GIVES, GATHERS = "mnet_ref::normalize_gram", "mnet_ref::gram"


def row():
    """Blocks in a row: without an expand layer, with a residual, with a stride, with squeeze-excite."""
    blocks = [
        FusedInvertedResidual(4, 5, 1, 1),
        FusedInvertedResidual(5, 5, 1, 3),
        FusedInvertedResidual(5, 7, 2, 2, kernel_size=5, activation_layer=nn.Hardswish),
        FusedInvertedResidual(7, 7, 1, 3, squeeze_channels=3, layout="v3", activation_layer=nn.Hardswish),
    ]
    for module in nn.Sequential(*blocks).modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return blocks


def results(blocks, run, x):
    """Output, gradients and buffers of copies of the blocks; and the stages that ran in the forward pass."""
    blocks, x = nn.Sequential(*copy.deepcopy(blocks)), x.detach().clone().requires_grad_()
    with mk.count_stages() as counts:
        out = run(blocks, x)
    leaves = [x, *blocks.parameters()]
    grads = torch.autograd.grad(out.float().square().sum(), leaves) if out.requires_grad else []
    return [out.detach(), *grads, *blocks.buffers()], counts


def in_a_row(blocks, x):
    return FusedSequential(*blocks)(x)


def one_by_one(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def same(blocks, x=None, mode="algebraic", backend="reference"):
    """Both ways give the same to the bit; returns the stages of a row."""
    x = torch.randn(3, 4, 9, 7).relu() + torch.randn(4, 1, 1) if x is None else x
    with mk.backend(backend, mode):
        got, counts = results(blocks, in_a_row, x)
        want, _ = results(blocks, one_by_one, x)
    assert len(got) == len(want) and all(map(torch.equal, got, want))
    return counts


def test_every_block_has_it_from_the_one_before():
    counts = same(row())
    assert counts[GIVES] == 3 and counts[GATHERS] == 0 and counts["mnet_ref::normalize"] == 1
    counts = same(row()[1:], torch.randn(2, 5, 6, 6))
    assert counts[GIVES] == 2 and counts[GATHERS] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype):
    with torch.autocast("cpu", dtype):
        assert same(row())[GIVES] == 3
    blocks = row()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert same(blocks)[GIVES] == 3


def test_it_is_gathered_where_it_is_taken_alone():
    assert GIVES not in same(row(), mode="chain")
    for block in (blocks := row())[1:]:
        block.eval()
    assert GIVES not in same(blocks)
    blocks[2].train()
    counts = same(blocks)
    assert counts[GIVES] == 1 and counts[GATHERS] == 0
    if backends.whole("cpu", "algebraic"):  # which has no such stage
        counts = same(row(), backend="cpu")
        assert counts["mnet_cpu::gram"] == 3 and not any(label.endswith("normalize_gram") for label in counts)


def _doubles(module, args, out):
    out.mul_(2)


def _other(module, args):
    return (args[0].flip(0) * 3,)


class Another(FusedInvertedResidual):
    def forward(self, x):
        return super().forward(x) + 1


def _replaced(block):
    original = block.forward
    block.forward = lambda x: original(x) * 2


# what is done to the third of four blocks -> how many give their gram, and how many are gathered anew
TOUCHED = {
    "its output changed in place": (lambda b: b.register_forward_hook(_doubles), 1, 2),
    "its input replaced": (lambda b: b.register_forward_pre_hook(_other), 1, 2),
    "a child seen": (lambda b: b.conv[0].register_forward_hook(lambda *_: None), 1, 1),
    "replaced": (_replaced, 1, 2),
    "compiled by itself": (lambda b: b.compile(backend="eager"), 1, 1),
    "another mode": (lambda b: setattr(b, "mode", "chain"), 1, 1),
    "another backend": (lambda b: setattr(b, "backend", "native"), 1, 1),
}


@pytest.mark.parametrize("what", TOUCHED)
def test_what_somebody_may_have_changed_is_gathered_anew(what):
    """Blocks that are called as they are, with everything else the same."""
    blocks = row()
    touch, gives, gathers = TOUCHED[what]

    def touched(blocks, run, x):
        blocks = copy.deepcopy(blocks)
        touch(blocks[2])
        with mk.count_stages() as counts:
            out = run(blocks, x)
        return out, counts

    x = torch.randn(3, 4, 9, 7)
    for block in blocks:  # pinned, so that a pin of one block is heard
        block.backend, block.mode = "reference", "algebraic"
    with torch.no_grad():
        (got, counts), (want, _) = touched(blocks, in_a_row, x), touched(blocks, one_by_one, x)
    torch._dynamo.reset()
    assert torch.equal(got, want)
    assert (counts[GIVES], counts[GATHERS]) == (gives, gathers)


def test_a_subclass_is_called():
    blocks = row()
    blocks[1].__class__ = Another
    counts = same(blocks)
    assert counts[GIVES] == 1 and counts[GATHERS] == 2


# ---- a network -------------------------------------------------------------------------------------------------------


@pytest.fixture
def network():
    _, model = twins(**NARROW)
    return model, torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(NARROW["num_classes"], (4,))


def step(model, *batch):
    with mk.backend("reference", "algebraic"), mk.count_stages() as counts:
        return training_step(model, *batch), counts


def expanding(model):
    return sum(isinstance(m, FusedInvertedResidual) for m in model.modules()) - 1  # the first has no expand layer


def test_network(network):
    """A training step of V2: that with a hook on every block, which are then called one by one."""
    model, *batch = network
    keys, seen = list(model.state_dict()), copy.deepcopy(model)
    for block in seen.features[1:-1]:
        block.register_forward_hook(lambda *_: None)
    got, counts = step(copy.deepcopy(model), *batch)
    want, others = step(seen, *batch)
    assert_same(got, want)
    assert counts[GIVES] == expanding(model) and GATHERS not in counts
    assert others[GATHERS] == expanding(model) and GIVES not in others
    assert list(model.state_dict()) == keys


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_network_checkpointed(network):
    """Whole and block by block: what is computed again is the same (the running statistics move again, as torch's)."""
    model, *batch = network
    want, _ = step(copy.deepcopy(model), *batch)
    blocks = copy.deepcopy(model)
    for i in range(1, len(blocks.features) - 1):
        blocks.features[i] = Checkpointed(blocks.features[i])
    for checkpointed in (Checkpointed(copy.deepcopy(model)), blocks):
        got, _ = step(checkpointed, *batch)
        got = {name.replace("inner.", ""): t for name, t in got.items()}
        assert_same(*({k: t for k, t in r.items() if k in ("out", "loss") or k[:2] == "d_"} for r in (got, want)))


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_network_distributed(network, one_process):
    model, *batch = network
    want, _ = step(copy.deepcopy(model), *batch)
    got, counts = step(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), *batch)
    assert counts[GIVES] == expanding(model)
    assert_same({name.replace("module.", ""): t for name, t in got.items()}, want)


def test_compiled():
    """One graph, forward and backward, in which a gram is a tensor as any other."""
    model, x = FusedSequential(*row()[:3]).double(), torch.randn(3, 4, 9, 7, dtype=torch.float64)
    wanted, graphs = list(model.parameters()), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with mk.backend("reference", "algebraic"):
        outs = [model(x), torch.compile(model, fullgraph=True, backend=keep)(x)]
    torch._dynamo.reset()
    grads = [torch.autograd.grad(out.square().sum(), wanted) for out in outs]
    assert len(graphs) == 1
    for got, want in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, want)


def test_network_exported(network):
    model, *batch = network
    program = torch.export.export(model.eval(), (batch[0],))
    assert not any("mnet" in str(node.target) for node in program.graph.nodes)


def test_accelerated_blocks_do_as_well(network):
    """Their container is another library's; accelerated, it runs neighbouring blocks as one too."""
    model, *batch = network
    _, counts = step(copy.deepcopy(model), *batch)
    theirs = mobilenet_v2(**NARROW, dropout=0.0).double()
    theirs.load_state_dict(model.state_dict())
    want = training_step(copy.deepcopy(theirs), *batch)
    mk.accelerate(theirs)
    got, others = step(theirs, *batch)
    assert others == counts and counts[GIVES] == expanding(model)
    assert_same(got, want)
