"""Programs that count by hooks or by dispatched ops find as much in a fused model as in the plain one.

What torchinfo, fvcore, ptflops and thop do, in few lines: hooks on the layers, which read their classes and shapes; and
torch's own counter.
"""

import collections
import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mnet_kernels as mk

timm = pytest.importorskip("timm")

SIZE = (2, 3, 64, 64)


def accelerated(model):
    model = copy.deepcopy(model)
    assert mk.accelerate(model).replaced
    return model


def with_weights_of(model, plain):
    model.load_state_dict(plain.state_dict())
    return model


def v2():
    plain = torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.5)
    return plain, with_weights_of(mk.FusedMobileNetV2(5, width_mult=0.5), plain)


def v3():
    plain = torchvision.models.mobilenet_v3_small(num_classes=5)
    return plain, with_weights_of(mk.fused_mobilenet_v3_small(num_classes=5), plain)


def swapped(make):
    def pair():
        plain = make()
        return plain, accelerated(plain)

    return pair


def folded(make):
    """A folded copy, and one with kernels."""

    def pair():
        plain = make()
        return mk.fold(plain), mk.fold(plain, fused=True)

    return pair


PAIRS = {
    "FusedMobileNetV2": v2,
    "FusedMobileNetV3": v3,
    "tv-mobilenet_v2": swapped(lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.5)),
    "tv-mobilenet_v3_small": swapped(lambda: torchvision.models.mobilenet_v3_small(num_classes=5)),
    "tv-efficientnet_b0": swapped(lambda: torchvision.models.efficientnet_b0(num_classes=5)),
    "tv-mnasnet0_5": swapped(lambda: torchvision.models.mnasnet0_5(num_classes=5)),
    "timm-mobilenetv1": swapped(lambda: timm.create_model("mobilenetv1_100", num_classes=5)),
    "timm-mobilenetv3": swapped(lambda: timm.create_model("mobilenetv3_small_050", num_classes=5)),
    "fold-v2": folded(lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.5)),
    "fold-v3": folded(lambda: torchvision.models.mobilenet_v3_small(num_classes=5)),
}
pairs = pytest.mark.parametrize("name", PAIRS)
# torchvision's MobileNetV3 and EfficientNet add in place to what a layer gave: torch forbids full backward hooks there.
BACKWARD = ["FusedMobileNetV2", "tv-mobilenet_v2", "tv-mnasnet0_5", "timm-mobilenetv1", "timm-mobilenetv3"]


def hooked(model, x, backward=False):
    """Totals of hooks on all leaf modules and all with parameters of their own: {class: calls}, multiply-adds, elements
    of activations and parameters seen, and the names in the order of the calls."""
    calls, totals, order, handles = collections.Counter(), collections.Counter(), [], []

    def count(module, inputs, out, name):
        kind = next(cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith(("torch.", "timm.")))
        calls[kind] += 1
        order.append(name)
        if isinstance(out, torch.Tensor):
            totals["elements"] += out.numel()
            if isinstance(module, nn.Conv2d):
                totals["madds"] += out.numel() * module.weight[0].numel()
            elif isinstance(module, nn.Linear):
                totals["madds"] += out.numel() * module.in_features
        totals["parameters"] += sum(p.numel() for p in module.parameters(recurse=False))

    for name, module in model.named_modules():
        if not module._modules or any(p is not None for p in module._parameters.values()):
            if backward:
                handle = module.register_full_backward_hook(lambda m, i, o, name=name: count(m, o, i[0], name))
            else:
                handle = module.register_forward_hook(lambda m, i, o, name=name: count(m, i, o, name))
            handles.append(handle)
    out = model(x)
    if backward:
        out.square().sum().backward()
    for handle in handles:
        handle.remove()
    return calls, totals, order


@pairs
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_hooks_on_leaves(name, training):
    """The same layers are called, as often and in the same order, and the sums are equal."""
    plain, fused = (m.train(training) for m in PAIRS[name]())
    x = torch.randn(SIZE)
    fused(x)  # a call before the hooks: nothing is kept that passes them by
    with torch.no_grad():
        want, got = hooked(plain, x), hooked(fused, x)
    assert want[1]["madds"] > 1e6 and want[1]["parameters"] == sum(p.numel() for p in plain.parameters())
    assert got[1] == want[1]
    assert got[0] == want[0] and got[2] == want[2]


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_hooks_on_leaves(name):
    plain, fused = (m.train() for m in PAIRS[name]())
    for m in (*plain.modules(), *fused.modules()):
        if hasattr(m, "inplace"):
            m.inplace = False  # torch forbids full backward hooks there
    x = torch.randn(SIZE).requires_grad_()
    fused(x)
    want, got = hooked(plain, x, backward=True), hooked(fused, x, backward=True)
    assert want[1]["elements"] > 1e5
    assert got == want


def flops(model, x, backward):
    with FlopCounterMode(display=False) as counter:
        out = model(x)
        if backward:
            out.square().sum().backward()
    model.zero_grad()
    return counter


@pairs
@pytest.mark.parametrize("what", ["eval", "forward", "backward"])
def test_flop_counter(name, what):
    """torch's FlopCounterMode: totals of forward, and of forward and backward, within 1 %; the first call included."""
    if what != "eval" and name.startswith("fold"):
        pytest.skip("a folded copy does not train")
    plain, fused = (m.train(what != "eval") for m in PAIRS[name]())
    x = torch.randn(SIZE)
    with torch.set_grad_enabled(what == "backward"):
        want = flops(plain, x, what == "backward").get_total_flops()
        for _ in range(2):
            got = flops(fused, x, what == "backward").get_total_flops()
            assert want > 1e6 and got == pytest.approx(want, rel=0.01), f"{got / want:.3f} of {want / 1e6:.1f} M"


class Convolutions(TorchDispatchMode):
    """Multiply-adds of aten's convolutions, as ptflops' ``backend_name="aten"`` and tracers of memory see them."""

    def __init__(self):
        super().__init__()
        self.madds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.madds += out.numel() * args[1][0].numel()
        return out


@pairs
def test_a_dispatch_mode_sees_convolutions(name):
    """Of a mode that knows torch's ops alone no work is hidden."""
    plain, fused = (m.eval() for m in PAIRS[name]())
    x, madds = torch.randn(SIZE), []
    for model in (fused, fused, plain):
        with torch.no_grad(), Convolutions() as mode:
            model(x)
        madds.append(mode.madds)
    assert madds[2] > 1e6 and madds[:2] == [madds[2]] * 2


@pytest.mark.parametrize("name", ["tv-mobilenet_v2", "fold-v3"])
def test_flops_by_module(name):
    """The counter's table has the plain model's rows: operations of every block, by its name."""
    rows = []
    for model in PAIRS[name]():
        with torch.no_grad():
            counts = flops(model.eval(), torch.randn(SIZE), False).get_flop_counts()
        # the first part of a name is the model's class
        rows.append({k.partition(".")[2]: sum(v.values()) for k, v in counts.items() if k != "Global"})
    want, got = rows
    assert len(want) > 20 and got == want


@pairs
def test_totals_of_parameters(name):
    """And of buffers, by name and shape."""
    plain, fused = PAIRS[name]()
    for kind in ("named_parameters", "named_buffers"):
        want, got = ([(k, t.shape, t.dtype) for k, t in getattr(m, kind)()] for m in (plain, fused))
        assert got == want


@pairs
def test_counting_changes_nothing(name):
    """After the hooks are gone the fused model runs as before."""
    plain, fused = (m.eval() for m in PAIRS[name]())
    x = torch.randn(SIZE)
    with torch.no_grad():
        with mk.count_stages() as before:
            first = fused(x)
        hooked(fused, x)
        with mk.count_stages() as after:
            second = fused(x)
    assert torch.equal(first, second)
    ran = [{k for k in counts if not k.startswith("native::") and "pack" not in k} for counts in (before, after)]
    assert ran[0] == ran[1]
    with torch.no_grad():
        torch.testing.assert_close(second, plain(x), rtol=1e-3, atol=1e-3)
