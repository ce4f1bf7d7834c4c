"""fold(fused=True) in every use that the plain fold serves: edits, hooks, transforms, counters, copies, exports."""

import copy
import functools
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from networks import randomise
from rows import only_kernels
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.mobilenetv2 import InvertedResidual as V2Block
from torchvision.models.mobilenetv3 import InvertedResidual as V3Block
from torchvision.models.mobilenetv3 import InvertedResidualConfig

import mnet_kernels as mk
from mnet_kernels import backends

pytestmark = pytest.mark.skipif(
    backends.why_unavailable("cpu", torch.device("cpu")) is not None, reason="no compiled CPU kernels"
)


class Net(nn.Module):
    """A stem, a residual block, one with squeeze-excite, a pointwise layer, a classifier."""

    def __init__(self):
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            V2Block(8, 8, 1, 4),
            V3Block(InvertedResidualConfig(8, 5, 24, 16, True, "HS", 2, 1, 1.0), norm),
            nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.Hardswish(),
        )  # fmt: skip
        self.classifier = nn.Linear(32, 7)
        for m in self.modules():
            if hasattr(m, "inplace"):
                m.inplace = False  # full backward hooks on a layer forbid it to write over its input

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def folds():
    """The plain and the fused copy of one model in float32, and the model."""
    model = Net().eval()
    randomise(model)
    return mk.fold(model), mk.fold(model, fused=True), model


def image(n=2):
    return torch.randn(n, 3, 19, 18)


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def runs_kernels(model, x):
    with torch.no_grad(), mk.count_stages() as counts:
        model(x)
    return any(label.startswith("mnet_cpu::") for label in counts)


def same(fused, plain, x):
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


def test_names():
    plain, fused, model = folds()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [k for k, _ in fused.named_modules()] == [k for k, _ in plain.named_modules()]
    norms = [k for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(type(plain.get_submodule(k)) is nn.Identity for k in norms)
    fused.load_state_dict(plain.state_dict())
    assert runs_kernels(fused, image())


def double_in_place(model):
    with torch.no_grad():
        for m in convolutions(model):
            m.weight.mul_(1.25)
            if m.bias is not None:
                m.bias.add_(0.25)


def assign_data(model):
    for m in convolutions(model):
        m.weight.data = m.weight.data * 1.25


def assign_parameters(model):
    for m in convolutions(model):
        m.weight = nn.Parameter(m.weight.detach() * 1.25, requires_grad=False)


def assign_a_bias(model):
    for m in convolutions(model):
        m.bias = nn.Parameter(m.bias.detach() + 0.5, requires_grad=False)


def optimise(model):
    parameters = list(model.parameters())
    for i, p in enumerate(parameters):
        p.requires_grad_(True)
        p.grad = torch.full_like(p, 0.1 * (-1) ** i)
    torch.optim.SGD(parameters, lr=0.5).step()
    for p in parameters:
        p.requires_grad_(False)


def load(model):
    model.load_state_dict({k: 1.25 * v for k, v in model.state_dict().items()})


def assigned_load(model):
    model.load_state_dict({k: 1.25 * v for k, v in model.state_dict().items()}, assign=True)


def vector(model):
    nn.utils.vector_to_parameters(1.25 * nn.utils.parameters_to_vector(model.parameters()), model.parameters())


def replace_a_convolution(model):
    """Each depthwise layer by one without a bias."""
    for parent in list(model.modules()):
        for name, m in list(parent._modules.items()):
            if isinstance(m, nn.Conv2d) and m.groups > 1:
                new = nn.Conv2d(
                    m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, groups=m.groups, bias=False
                )
                new.weight = nn.Parameter(m.weight.detach() * 0.5, requires_grad=False)
                setattr(parent, name, new)


def replace_activations(model):
    for parent in list(model.modules()):
        for name, m in list(parent._modules.items()):
            if isinstance(m, (nn.ReLU6, nn.Hardswish)):
                setattr(parent, name, nn.LeakyReLU(0.3))


def other_strides(model):
    for m in convolutions(model):
        if m.groups > 1 and m.stride == (2, 2):
            m.stride = (1, 1)


def parametrise(model):
    class Half(nn.Module):
        def forward(self, w):
            return 0.5 * w

    for m in convolutions(model):
        nn.utils.parametrize.register_parametrization(m, "weight", Half())


def replace_a_forward(model):
    m = convolutions(model)[1]
    forward = m.forward
    m.forward = lambda x: 2 * forward(x)


EDITS = [double_in_place, assign_data, assign_parameters, assign_a_bias, optimise, load, assigned_load, vector,
         replace_a_convolution, replace_activations, other_strides, parametrise, replace_a_forward]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_edits_after_a_call(edit):
    """Whatever is changed after the kernels packed their weights: as on the plain copy."""
    plain, fused, _ = folds()
    x = image()
    assert runs_kernels(fused, x)
    before = fused(x)
    for model in (plain, fused):
        edit(model)
    same(fused, plain, x)
    with torch.no_grad():
        assert not torch.allclose(fused(x), before, rtol=1e-2), "the edit changes nothing: the test shows nothing"


def test_slices_and_children():
    """A Sequential's slices, deletions and additions after a call."""
    plain, fused, model = folds()
    x = image()
    fused(x)
    with torch.no_grad():
        for part in (slice(0, 1), slice(0, 2), slice(0, 5)):
            torch.testing.assert_close(fused.features[part](x), model.features[part](x), rtol=1e-4, atol=1e-4)
        maps = fused.features[:3](x)
        torch.testing.assert_close(fused.features[3:](maps), model.features[3:](maps), rtol=1e-4, atol=1e-4)
    for m in (plain, fused, model):
        del m.features[5]
        m.features.append(nn.Sigmoid())
    same(fused, model, x)


def pruned(model):
    """Half of the expanded channels of the first inverted residual: tensors alone, attributes left as they were."""
    expand, depthwise, project, _ = model.features[1].conv
    keep = torch.arange(0, 32, 2)
    for conv, norm in ((expand[0], expand[1]), (depthwise[0], depthwise[1])):
        conv.weight.data = conv.weight.data[keep]
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            t.data = t.data[keep]
    depthwise[0].groups = len(keep)  # torch reads this one
    project.weight.data = project.weight.data[:, keep]


def larger_kernel(model):
    """5x5 where ``kernel_size`` says 3x3: torch reads the weight, and the padding."""
    conv = model.features[1].conv[1][0]
    conv.weight.data = torch.randn(32, 1, 5, 5) / 5
    conv.padding = (2, 2)


@pytest.mark.parametrize("change", [pruned, larger_kernel], ids=lambda f: f.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_attributes_that_lie(change, when):
    """torch reads the weight: so does the fold."""
    model, x = Net().eval(), image()
    randomise(model)
    if when == "after":  # a pruned copy, by the same edit of the folded
        plain, fused = mk.fold(model), mk.fold(model, fused=True)
        fused(x)
        for m in (plain, fused):
            convs = convolutions(m)
            if change is pruned:
                keep = torch.arange(0, 32, 2)
                for conv in convs[1:3]:
                    conv.weight.data, conv.bias.data = conv.weight.data[keep], conv.bias.data[keep]
                convs[2].groups = 16
                convs[3].weight.data = convs[3].weight.data[:, keep]
            else:
                torch.manual_seed(1)
                convs[2].weight.data, convs[2].padding = torch.randn(32, 1, 5, 5) / 5, (2, 2)
        same(fused, plain, x)
        return
    change(model)
    same(mk.fold(model), model, x)
    same(mk.fold(model, fused=True), model, x)


@pytest.mark.parametrize("called", [False, True])
def test_functional_call(called):
    plain, fused, _ = folds()
    x = image()
    if called:
        fused(x)
    got, want = (
        torch.func.functional_call(m, {k: 1.25 * t for k, t in m.state_dict().items()}, (x,)) for m in (fused, plain)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    same(fused, plain, x)  # with its own weights again


@pytest.mark.parametrize("some", [False, True], ids=["all", "biases"])
def test_gradients(some):
    """Parameters that require a gradient get the plain copy's."""
    plain, fused, _ = folds()
    x, grads = image(), []
    fused(x)
    for m in (fused, plain):
        for k, p in m.named_parameters():
            p.requires_grad_(not some or k.endswith("bias"))
        m(x).square().sum().backward()
        grads.append([p.grad for p in m.parameters()])
    assert any(g is not None for g in grads[1]) and len(grads[0]) == len(grads[1])
    for got, want in zip(*grads, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert got.shape == want.shape and got.stride() == want.stride()
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
    fused.requires_grad_(False)
    assert runs_kernels(fused, x)


def test_gradient_of_the_image():
    plain, fused, _ = folds()
    x = image()
    got, want = (
        torch.autograd.grad(m(leaf).sum(), leaf)[0] for m in (fused, plain) for leaf in [x.clone().requires_grad_()]
    )
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert want.abs().max() > 0


HOOKS = ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_pre_hook",
         "register_full_backward_hook"]  # fmt: skip


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("called", [False, True])
def test_hooks_on_children(register, called):
    """The same calls of the same children in the same order; removed, the kernels run again."""
    plain, fused, _ = folds()
    x, seen = image(), []
    backward = "backward" in register
    if called:
        fused(x)
    for m in (fused, plain):
        names = []
        handles = [
            getattr(child, register)(lambda *args, name=name, names=names: names.append(name))
            for name, child in m.named_modules()
        ]
        leaf = x.clone().requires_grad_(backward)
        out = m(leaf)
        if backward:
            out.sum().backward()
        for handle in handles:
            handle.remove()
        seen.append(names)
    assert len(seen[1]) > 15 and seen[0] == seen[1]
    assert runs_kernels(fused, x)


def test_a_hook_on_each_child_alone():
    """One hook on one child: it is called with the child's maps, wherever it is, and what it returns counts."""
    plain, fused, _ = folds()
    x = image()
    fused(x)
    names = [k for k, m in plain.named_modules() if k and not m._modules]
    missed = []
    for name in names:
        maps = []
        for m in (fused, plain):
            child = dict(m.named_modules()).get(name)
            if child is None:
                break
            handle = child.register_forward_hook(lambda m, i, out, maps=maps: maps.append(out.clone()) or 0.5 * out)
            with torch.no_grad():
                maps.append(m(x))
            handle.remove()
        if len(maps) != 4 or not all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(maps[:2], maps[2:], strict=True)
        ):
            missed.append(name)
    assert len(names) > 15 and not missed, f"{len(missed)} of {len(names)}: {missed}"


GLOBAL_HOOKS = [
    "register_module_forward_pre_hook",
    "register_module_forward_hook",
    "register_module_full_backward_hook",
]


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_global_hooks(register):
    plain, fused, _ = folds()
    x, seen = image(), []
    fused(x)
    for m in (fused, plain):
        names, by_id = [], {id(child): name for name, child in m.named_modules()}
        handle = getattr(torch_module, register)(
            lambda child, *args, names=names, by_id=by_id: names.append(by_id[id(child)])
        )
        try:
            m(x.clone().requires_grad_("backward" in register)).sum().backward() if "backward" in register else m(x)
        finally:
            handle.remove()
        seen.append(names)
    assert len(seen[1]) > 15 and seen[0] == seen[1]
    assert runs_kernels(fused, x)


def test_flops():
    """torch's own counter sees as many as in the plain copy, also at the first call."""
    plain, fused, _ = folds()
    x, totals = image(), []
    for m in (fused, fused, plain):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            m(x)
        totals.append(counter.get_total_flops())
    assert totals[2] > 0
    assert totals[0] == pytest.approx(totals[2], rel=0.02) and totals[1] == pytest.approx(totals[2], rel=0.02)
    same(fused, plain, x)


@pytest.mark.parametrize("default", ["float64", "bfloat16", "meta"])
def test_other_defaults_at_the_first_call(default):
    """Neither a default dtype nor a default device changes what the kernels keep."""
    plain, fused, _ = folds()
    x = image()
    with torch.no_grad():
        want = plain(x)
        if default == "meta":
            with torch.device("meta"):
                during = fused(x)
        else:
            before = torch.get_default_dtype()
            torch.set_default_dtype(getattr(torch, default))
            try:
                during = fused(x)
            finally:
                torch.set_default_dtype(before)
        for got in (during, fused(x)):
            assert got.dtype == torch.float32 and got.device.type == "cpu"
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("wrong", [(2, 4, 19, 18), (2, 1, 19, 18), (3, 19), (2, 3, 19, 18, 1)], ids=str)
def test_survives_a_failed_call(called, wrong):
    """An error where the plain copy gives one; the next call is right."""
    plain, fused, _ = folds()
    x = image()
    if called:
        fused(x)
    with pytest.raises(RuntimeError):
        plain(torch.randn(wrong))
    with pytest.raises(RuntimeError):
        fused(torch.randn(wrong))
    same(fused, plain, x)
    assert runs_kernels(fused, x)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved],
                         ids=["deepcopy", "copy", "pickle", "save"])  # fmt: skip
def test_copies(called, again):
    """They run on the kernels; a deep one has its own weights."""
    plain, fused, _ = folds()
    x = image()
    if called:
        fused(x)
    other = again(fused)
    with torch.no_grad():
        assert torch.equal(other(x), fused(x))
    assert runs_kernels(other, x)
    if again is not copy.copy:
        for m in (other, plain):
            double_in_place(m)
        same(other, plain, x)
        with torch.no_grad():
            assert not torch.allclose(fused(x), plain(x), rtol=1e-2)


def test_a_pickle_in_another_process(tmp_path):
    """Which has never folded anything."""
    model = nn.Sequential(V2Block(8, 8, 1, 4), V2Block(8, 12, 2, 4)).eval()
    randomise(model)
    fused = mk.fold(model, fused=True)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        torch.save((fused, x, fused(x)), tmp_path / "fused.pt")
    program = (
        "import sys, torch\n"
        "fused, x, want = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(fused(x), want)\n"
        "import mnet_kernels as mk\n"
        "with mk.count_stages() as counts: fused(x)\n"
        "assert any(k.startswith('mnet_cpu::') for k in counts), counts\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "fused.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_traced_and_saved(tmp_path):
    plain, fused, _ = folds()
    x = image()
    torch.jit.trace(fused, x).save(tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")
    assert "mnet_cpu::" not in str(traced.inlined_graph)
    same(traced, plain, x)
    same(traced, plain, image(3))


def test_scripted(tmp_path):
    plain, fused, _ = folds()
    torch.jit.script(plain)
    torch.jit.script(fused).save(tmp_path / "scripted.pt")
    same(torch.jit.load(tmp_path / "scripted.pt"), plain, image())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    plain, fused, _ = folds()
    x, path = image(), tmp_path / "model.onnx"
    options = {"verbose": False} if dynamo else {}
    torch.onnx.export(fused, (x,), path, dynamo=dynamo, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), plain(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    plain, fused, _ = folds()
    x = image()
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},), strict=strict)
    assert not any("mnet" in str(node.target) for node in program.graph.nodes)
    assert set(program.state_dict) == set(plain.state_dict())
    same(program.module(), plain, image(5))


def test_compiled():
    plain, fused, _ = folds()
    torch._dynamo.reset()
    same(torch.compile(fused, fullgraph=True, backend="aot_eager"), plain, image())
    same(fused, plain, image())


def test_symbolically_traced():
    """torch.fx sees the layers inside."""
    plain, fused, _ = folds()
    graphs = [torch.fx.symbolic_trace(m) for m in (fused, plain)]
    calls = [[n.target for n in g.graph.nodes if n.op == "call_module"] for g in graphs]
    assert calls[0] == calls[1] and len(calls[1]) > 15
    same(graphs[0], plain, image())


def test_vmap():
    plain, fused, _ = folds()
    x = torch.randn(3, 2, 3, 19, 18)
    fused(x[0])
    with torch.no_grad():
        got, want = torch.func.vmap(fused)(x), torch.func.vmap(plain)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_vmap_over_models():
    """An ensemble: weights have one dimension more."""
    pairs = [folds()[:2] for _ in range(3)]
    x, outs = image(), []
    for at in (1, 0):
        models = [pair[at] for pair in pairs]
        params, buffers = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0])
        outs.append(torch.func.vmap(lambda p, b, m=base: torch.func.functional_call(m, (p, b), (x,)))(params, buffers))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[1][2], pairs[2][0](x), rtol=1e-4, atol=1e-4)


def test_jvp_and_grad():
    plain, fused, _ = folds()
    x, direction = image(), image()
    fused(x)
    results = []
    for m in (fused, plain):
        with torch.no_grad():
            out, tangent = torch.func.jvp(m, (x,), (direction,))
        grads = torch.func.grad(lambda p, m=m: torch.func.functional_call(m, p, (x,)).square().sum())(
            {k: t.detach() for k, t in m.named_parameters()}
        )
        image_grad = torch.func.grad(lambda x, m=m: m(x).square().sum())(x)
        results.append([out, tangent, image_grad, *grads.values()])
    assert len(results[0]) == len(results[1]) > 10
    for got, want in zip(*results, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_forward_mode():
    from torch.autograd import forward_ad

    plain, fused, _ = folds()
    x, direction, tangents = image(), image(), []
    for m in (fused, plain):
        with torch.no_grad(), forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(m(forward_ad.make_dual(x, direction))).tangent)
    torch.testing.assert_close(tangents[0], tangents[1], rtol=1e-3, atol=1e-3)


def test_a_first_call_in_inference_mode():
    """Tensors made there must not stay with the model: it goes on outside, with gradients too."""
    plain, fused, _ = folds()
    x = image()
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    same(fused, plain, x)
    fused.requires_grad_(True)
    fused(x).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


def test_first_calls_of_several_threads():
    plain, fused, _ = folds()
    xs, outs, start = [image() for _ in range(4)], {}, threading.Barrier(4)

    def call(i):
        start.wait()
        with torch.no_grad():
            outs[i] = fused(xs[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    with torch.no_grad():
        for i, x in enumerate(xs):
            torch.testing.assert_close(outs[i], plain(x), rtol=1e-4, atol=1e-4)


def test_other_dtypes_and_back():
    plain, fused, _ = folds()
    x = image()
    assert runs_kernels(fused, x)
    for dtype in (torch.float64, torch.float32):
        with torch.no_grad():
            got = fused.to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), plain(x), rtol=1e-4, atol=1e-4)
    assert runs_kernels(fused, x)


def test_only_kernels_where_all_layers_have_them():
    model = nn.Sequential(V2Block(8, 8, 1, 4), V2Block(8, 12, 2, 4)).eval()
    fused = mk.fold(model, fused=True)
    with torch.no_grad(), mk.count_stages() as counts:
        fused(torch.randn(2, 8, 9, 9))
    assert only_kernels(counts), dict(counts)
