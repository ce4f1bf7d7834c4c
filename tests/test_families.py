"""accelerate and fold on every family of torchvision's and timm's that has depthwise or 1x1 layers: the same model.

One small member a family; MNET_TEST_FAMILIES=all runs the long list (tests/families.py).
"""

import copy

import pytest
import torch
from networks import randomise
from precision import Judge
from torch import nn

import mnet_kernels as mk
from mnet_kernels import backends

pytest.importorskip("timm")

from families import FAMILIES, build, images, is_norm, leaves, outputs, settle, step  # noqa: E402

TOLERANCE = 1e-9  # of float64, relative to a tensor's largest value
families = pytest.mark.parametrize("name", FAMILIES)


def assert_close(got, want, tolerance=TOLERANCE):
    """Every tensor equal, relative to its largest value.

    A gradient that a batch norm further on takes out again is rounding alone: below 1e-10 of the largest one of all,
    it is compared with that.
    """
    assert got.keys() == want.keys(), set(got) ^ set(want)
    largest = max((t.abs().max().item() for k, t in want.items() if k.startswith("d_")), default=0.0)
    wrong = {}
    for name, b in want.items():
        a, b = got[name].double(), b.double()
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)}, expected {tuple(b.shape)}"
        if b.numel():
            scale = b.abs().max().item()
            if name.startswith("d_") and scale < 1e-10 * largest:
                scale = largest
            error = (a - b).abs().max().item()
            if not error <= tolerance * scale:
                wrong[name] = error / max(scale, 1e-300)
    worst = sorted(wrong, key=wrong.get)[-3:]
    assert not wrong, f"{len(wrong)} of {len(want)} differ, most {', '.join(f'{k} by {wrong[k]:.1e}' for k in worst)}"


def fused_calls(counts):
    return sum(n for stage, n in counts.items() if stage.startswith(("mnet_ref::", "mnet_cpu::")))


def assert_ran(name, counts):
    """Whether fused kernels ran where they must, and none where they must not."""
    wanted = FAMILIES[name].fused
    if wanted is not None:
        assert (fused_calls(counts) > 0) == wanted, dict(counts)


@families
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_accelerated(name, training):
    """Outputs, gradients by name and buffers."""
    original = build(name).train(training)
    model = copy.deepcopy(original)
    mk.accelerate(model)
    x = images(name)
    want = step(original, x)
    with mk.count_stages() as counts, mk.backend("reference"):
        got = step(model, x)
    assert_close(got, want)
    assert_ran(name, counts)


@families
def test_accelerated_and_restored(name):
    """Module names, state_dict and parameters as they were, and after ``restore`` the types."""
    model = FAMILIES[name].make()
    modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
    types = {k: type(m) for k, m in modules.items()}
    children = {k: list(m._modules) for k, m in modules.items()}
    report = mk.accelerate(model)
    assert list(dict(model.named_modules())) == list(types)
    assert all(isinstance(m, types[k]) for k, m in model.named_modules()), "a block is no longer what it was"
    now = model.state_dict(keep_vars=True)
    assert list(now) == list(state) and all(now[k] is t for k, t in state.items())
    if FAMILIES[name].fused is not None:
        assert bool(report.replaced) == FAMILIES[name].fused, report
    restored = mk.restore(model)
    assert sorted(restored) == sorted({row[0] for row in (*report.replaced, *report.joined, *report.guarded)})
    assert {k: type(m) for k, m in model.named_modules()} == types
    assert {k: list(m._modules) for k, m in model.named_modules()} == children
    assert dict(model.named_modules()) == modules, "restore put other objects back"


def folds(name, exact, fused):
    """Folded copies of one model, or a skip where there are no CPU kernels."""
    if fused and backends.why_unavailable("cpu", torch.device("cpu")) is not None:
        pytest.skip("no compiled CPU kernels")
    return mk.fold(exact, fused=fused)


both = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


@families
def test_folded(name):
    """In float64, against the model in eval mode, which is left as it is."""
    model = build(name).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = images(name)
    with torch.no_grad():
        folded, fused = mk.fold(model), mk.fold(model, fused=True)
        assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        want = outputs(model.eval(), x)
        assert_close(outputs(folded, x), want)
        assert_close(outputs(fused, x), want)


@families
def test_folded_fused(name):
    """In float32 on the CPU kernels, by the pass rule: torch's error is the plain copy's, against float64."""
    verdict, ran = Judge(torch.float32), 0
    model = FAMILIES[name].make().eval()
    for _ in range(3):
        randomise(model)
        settle(model, images(name, 4).float())
        exact, plain, fused = copy.deepcopy(model).double(), mk.fold(model), folds(name, model, True)
        x = images(name, 2).float()
        with torch.no_grad():
            with mk.count_stages() as counts:
                ours = outputs(fused, x)
            ran += sum(n for stage, n in counts.items() if stage.startswith("mnet_cpu::"))
            theirs, want = outputs(plain, x), outputs(exact, x.double())
        assert ours.keys() == want.keys()
        for key in want:
            assert ours[key].shape == want[key].shape
            verdict.add(key, ours[key], theirs[key], want[key])
    verdict.verdict()
    if FAMILIES[name].fused:
        assert ran, "no CPU kernel ran"


def shown(model):
    """{name: module} of what a folded copy must have: all but the batch norms and what is inside them."""
    norms = [k for k, m in model.named_modules() if is_norm(m)]
    inside = tuple(f"{k}." for k in norms)
    return {k: m for k, m in model.named_modules() if k not in norms and not k.startswith(inside)}


@families
@both
def test_names_of_the_folded(name, fused):
    """Every child has its name and place; where a batch norm was, something stands that is one no longer, or it still
    does."""
    model = FAMILIES[name].make()
    folded = dict(folds(name, model, fused).named_modules())
    missing = [k for k in shown(model) if k not in folded]
    assert not missing, f"{len(missing)} names are gone: {missing[:4]}"
    for k, m in shown(model).items():
        assert list(folded[k]._modules) == list(m._modules), f"{k or 'the model'} has other children"
        if not isinstance(m, nn.Conv2d):  # a padding "same" may become one of numbers
            assert isinstance(folded[k], type(m)), f"{k or 'the model'} is a {type(folded[k]).__name__}"


def maps(model, names, x):
    """{name, call: what hooks on these modules saw}."""
    seen, handles = {}, []
    by_name = dict(model.named_modules())

    def record(name):
        def hook(module, inputs, out):
            calls[name] = calls.get(name, 0) + 1
            for i, t in enumerate(leaves(out)):
                # a copy: activations in place write over what came before them
                seen[f"{name} call {calls[name]} output {i}"] = t.detach().clone()

        return hook

    calls = {}
    for name in names:
        if name in by_name:
            handles.append(by_name[name].register_forward_hook(record(name)))
    with torch.no_grad():
        outputs(model, x)
    for handle in handles:
        handle.remove()
    return seen


def tapped(model):
    """Names whose maps folding must keep: all but convolutions and what holds nothing else, whose batch norm comes
    after them."""
    found = []
    for k, m in model.named_modules():
        ends = [leaf for leaf in m.modules() if not leaf._modules]
        if not all(isinstance(leaf, nn.Conv2d) for leaf in ends):
            found.append(k)
    inside = tuple(f"{k}." for k, m in model.named_modules() if is_norm(m))
    return [k for k in found if not k.startswith(inside)]


@families
@both
def test_maps_of_the_folded(name, fused):
    """Hooks by name, on activations, blocks and where the batch norms were, see the plain model's maps."""
    model = build(name).eval()
    folded, x = folds(name, model, fused), images(name, 2)
    want, got = maps(model, tapped(model), x), maps(folded, tapped(model), x)
    missing = [k for k in want if k not in got]
    assert not missing, f"{len(missing)} maps of {len(want)} are not seen: {missing[:4]}"
    assert_close(got, want)


@pytest.mark.parametrize("name", ["tv-mobilenet_v2", "tv-mobilenet_v3_small", "tv-efficientnet_b0"])
@both
def test_features_by_index(name, fused):
    """Children of ``features`` called one by one, and slices of it, give the plain model's maps (float32 for the
    kernels' sake)."""
    model = build(name).eval()
    folded = folds(name, model.float(), fused)
    x = images(name, 2).float()
    got = want = x
    with torch.no_grad():
        assert len(folded.features) == len(model.features)
        for i, layer in enumerate(model.features):
            got, want = folded.features[i](got), layer(want)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
            got = want  # errors of one layer at a time
        torch.testing.assert_close(folded.features[2:5](folded.features[:2](x)), model.features[:5](x), rtol=1e-3,
                                   atol=1e-3)  # fmt: skip
