"""The last 1x1 layer and the pool as one op: the module, and the models, whose features stay a map for who looks."""

import pytest
import torch
from blocks import assert_same
from networks import takes_raw_stem
from torch import nn

import mnet_kernels as mk
from mnet_kernels.nn import FusedPointwiseConvBNAct, FusedPointwiseConvBNActPool, FusedSequential

POOLED = "mnet_ref::squeeze"


def layer(cls=FusedPointwiseConvBNActPool, channels=5, out=7, **kwargs):
    torch.manual_seed(3)
    found = cls(channels, out, **kwargs).double()
    if isinstance(found[1], nn.BatchNorm2d):
        nn.init.uniform_(found[1].weight, 0.5, 1.5)
        nn.init.normal_(found[1].bias)
    return found


def image(n=3, channels=5, size=(6, 7)):
    return torch.randn(n, channels, *size, dtype=torch.float64)


def training_step(module, x):
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    return {"out": out.detach(), "d_x": x.grad} | {n: p.grad.clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("norm_layer", [None, lambda c: nn.GroupNorm(1, c), nn.InstanceNorm2d])
@pytest.mark.parametrize("activation_layer", [nn.ReLU6, nn.Hardswish, None])
@pytest.mark.parametrize("training", [True, False])
def test_module(training, activation_layer, norm_layer):
    ours = layer(norm_layer=norm_layer, activation_layer=activation_layer).train(training)
    torchs = nn.Sequential(*ours, nn.AdaptiveAvgPool2d(1), nn.Flatten()).train(training)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    x = image()
    want = training_step(torchs, x)
    for name, pooled in (("native", 0), ("reference", 1)):
        with mk.backend(name), mk.count_stages() as counts:
            assert_same(training_step(ours, x), want)
        assert counts[POOLED] == (pooled if norm_layer is None else 0)


def test_hooks_on_the_modules_children_are_called():
    ours, x, seen = layer(), image(), []
    ours[2].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with mk.backend("reference"):
        torch.testing.assert_close(ours(x), nn.Sequential(*ours)(x).mean((2, 3)))
    assert seen == [(3, 7, 6, 7)] * 2


def test_the_folded_module_pools():
    ours, x = layer().eval(), image()
    folded = mk.fold(ours)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), ours(x))


def v2():
    return mk.FusedMobileNetV2(5, width_mult=0.1, dropout=0.0).double()


def v3():
    return mk.fused_mobilenet_v3_small(num_classes=5, width_mult=0.35, dropout=0.0).double()


models = pytest.mark.parametrize("make", [v2, v3])


@models
def test_features_are_still_a_map(make):
    model, x = make(), image(channels=3, size=(64, 65))
    with mk.backend("reference"), mk.count_stages() as counts:
        features = model.features(x)
    written = len(model.features) - takes_raw_stem(model)
    assert features.shape[2:] == (2, 3) and counts["mnet_ref::normalize"] == written
    with mk.backend("reference"), mk.count_stages() as counts:
        out = model(x)
    assert counts["mnet_ref::normalize"] == len(model.features) - 1 - takes_raw_stem(model)
    torch.testing.assert_close(out, model.classifier(features.mean((2, 3))), rtol=1e-9, atol=1e-9)


WATCHED = {
    "features": lambda model: model.features,
    "last layer": lambda model: model.features[-1],
    "last convolution": lambda model: model.features[-1][0],
}


@models
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("where", WATCHED)
def test_hooks_see_the_map(make, where, kind):
    model, seen = make(), []
    x = image(channels=3, size=(64, 65))
    with mk.backend("reference"):
        want = training_step(model, x)
        getattr(WATCHED[where](model), f"register_{kind}")(lambda module, *args: seen.append(args))
        got = training_step(model, x)
    assert_same(got, want, 1e-7)
    assert len(seen) == 1
    if kind == "forward_hook":
        assert seen[0][-1].shape[2:] == (2, 3)


@models
def test_hooks_on_the_blocks_before_do_not_matter(make):
    model, seen = make(), []
    model.features[3].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with mk.backend("reference"), mk.count_stages() as counts:
        model(image(channels=3, size=(64, 65)))
    assert len(seen) == 1
    assert counts["mnet_ref::normalize"] == len(model.features) - 1 - takes_raw_stem(model)


def test_hooks_on_the_pool_are_called():
    model, seen = v3(), []
    model.avgpool.register_forward_hook(lambda module, args, out: seen.append((args[0].dim(), out.dim())))
    with mk.backend("reference"):
        model(image(channels=3, size=(64, 65)))
    assert seen == [(4, 4)]


class Doubled(FusedPointwiseConvBNAct):
    def forward(self, x):
        return 2 * super().forward(x)


class Reversed(FusedSequential):
    def forward(self, x):
        for module in reversed(self):
            x = module(x)
        return x


def replaced(module):
    module.forward = lambda x: x.new_ones(2, 4, 1, 1)
    return module


def network(features, pool):
    """A network with these features and this pool (None: torch's function), and no classifier."""
    model = v2() if pool is None else v3()
    model.features, model.classifier = features, nn.Identity()
    if pool is not None:
        model.avgpool = pool
    return model


OTHERS = {
    "a subclass of the last layer": (lambda: FusedSequential(layer(Doubled)), None),
    "another order": (lambda: Reversed(layer(FusedPointwiseConvBNAct), layer(FusedPointwiseConvBNAct, 5, 5)), None),
    "no layer at the end": (lambda: FusedSequential(layer(FusedPointwiseConvBNAct), nn.Dropout(0.0)), None),
    "nothing": (FusedSequential, None),
    "a larger pool": (lambda: FusedSequential(layer(FusedPointwiseConvBNAct)), nn.AdaptiveAvgPool2d(2)),
    "another pool": (lambda: FusedSequential(layer(FusedPointwiseConvBNAct)), nn.AdaptiveMaxPool2d(1)),
    "a replaced forward": (lambda: replaced(FusedSequential(layer(FusedPointwiseConvBNAct))), None),
    "one of the last layer's": (lambda: FusedSequential(replaced(layer(FusedPointwiseConvBNAct))), None),
    "one of the pool's": (lambda: FusedSequential(layer(FusedPointwiseConvBNAct)), replaced(nn.AdaptiveAvgPool2d(1))),
    "a sequence that is not fused": (lambda: nn.Sequential(layer(FusedPointwiseConvBNAct)), None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_is_called(name):
    make, pool = OTHERS[name]
    features, x = make(), image()
    model = network(features, pool)
    with mk.backend("reference"), mk.count_stages() as counts:
        got = model(x)
    assert counts[POOLED] == 0
    torch.testing.assert_close(got, (pool or nn.AdaptiveAvgPool2d(1))(features(x)).flatten(1))


@pytest.mark.parametrize("pool", [None, nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 1))], ids=str)
def test_the_mean_is_pooled_within_the_op(pool):
    features, x = FusedSequential(nn.ReLU(), layer(FusedPointwiseConvBNAct)), image()
    model = network(features, pool)
    with mk.backend("reference"), mk.count_stages() as counts:
        got = model(x)
    assert counts[POOLED] == 1
    torch.testing.assert_close(got, features(x).mean((2, 3)))
