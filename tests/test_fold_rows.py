"""fold(fused=True) on every row of layers: against the plain fold, whatever their order, activations and geometry."""

import functools
import itertools
import random
import zlib

import pytest
import torch
from rows import ACTIVATIONS, FORMS, KERNEL_ACTIVATIONS, KINDS, Layer, dressed, judge, row, rows_of_all_pairs
from torch import nn
from torchvision.models.efficientnet import MBConv, MBConvConfig
from torchvision.models.mnasnet import _InvertedResidual as MNASNetBlock
from torchvision.models.mobilenetv2 import InvertedResidual as V2Block
from torchvision.models.mobilenetv3 import InvertedResidual as V3Block
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.ops import SqueezeExcitation

from mnet_kernels import backends

pytestmark = pytest.mark.skipif(
    backends.why_unavailable("cpu", torch.device("cpu")) is not None, reason="no compiled CPU kernels"
)
blocks = pytest.importorskip("timm.models._efficientnet_blocks")

SEED = 20  # of the structures, the same in every run; values are fresh
PARTS = 12


def named(case):
    """A case in few words."""
    if isinstance(case, functools.partial):
        return f"{case.func.__name__}{case.args}{case.keywords}"
    return " ".join(map(named, case)) if isinstance(case, (tuple, list)) and not isinstance(case, Layer) else str(case)


def judged(cases, check):
    """Runs ``check`` on every case and names all those that fail, not the first one alone."""
    failed = []
    for case in cases:
        try:
            check(case)
        except Exception as error:
            failed.append(f"{named(case)}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    assert not failed, "\n".join([f"{len(failed)} of {len(cases)} rows", *failed[:5]])


def test_the_walk_has_all_pairs_and_places():
    rows = rows_of_all_pairs(SEED)
    letters = set(itertools.product(KINDS, ACTIVATIONS))
    assert {pair for r in rows for pair in itertools.pairwise(r)} == set(itertools.product(letters, letters))
    assert all({r[place] for r in rows if len(r) > place} == letters for place in range(5))


@pytest.mark.parametrize("part", range(PARTS))
def test_rows_of_five(part):
    """Every pair of neighbours, every layer at every place."""
    rng = random.Random(part)
    cases = [(dressed(letters, rng), FORMS[at % 3]) for at, letters in enumerate(rows_of_all_pairs(SEED)[part::PARTS])]
    judged(cases, lambda case: judge(row(*case), draws=3))


@pytest.mark.parametrize("part", range(PARTS // 2))
def test_random_rows(part):
    """Of one to five layers, most of them depthwise and pointwise and with an activation that has kernels."""
    rng = random.Random(100 + part)
    cases = []
    for _ in range(20):
        letters = [
            (rng.choice(("pointwise", "depthwise", "pointwise", "depthwise", "dense")),
             rng.choice([*KERNEL_ACTIVATIONS] * 4 + [*ACTIVATIONS]))
            for _ in range(rng.randint(1, 5))
        ]  # fmt: skip
        cases.append((dressed(letters, rng), rng.choice(FORMS)))
    judged(
        cases, lambda case: judge(row(*case), size=(rng.randint(1, 3), rng.randint(5, 15), rng.randint(5, 15)), draws=3)
    )


ROWS = {
    "pointwise": ["pointwise"],
    "depthwise": ["depthwise"],
    "dense": ["dense"],
    "depthwise-pointwise": ["depthwise", "pointwise"],
    "pointwise-depthwise-pointwise": ["pointwise", "depthwise", "pointwise"],
    "dense-depthwise-pointwise": ["dense", "depthwise", "pointwise"],
}
FIRST = [(name, act) for name in ROWS for act in KERNEL_ACTIVATIONS]


@pytest.mark.parametrize(("name", "first"), FIRST, ids=lambda v: v)
def test_rows_that_have_kernels(name, first):
    """All activations at all places; the kernels, and nothing else, run them."""
    kinds, cases = ROWS[name], []
    for at, rest in enumerate(itertools.product(KERNEL_ACTIVATIONS, repeat=len(kinds) - 1)):
        kernel, stride = ((3, 1), (5, 2), (3, 2), (5, 1))[at % 4]
        layers = [
            # a stem takes an image at stride 2; of the others the depthwise layer has the stride
            Layer(kind, act, 3 if kind == "dense" else kernel, stride if kind == "depthwise" else 1 + (kind == "dense"))
            for kind, act in zip(kinds, (first, *rest), strict=True)
        ]
        cases.append((layers, FORMS[at % 3]))
    image = 3 if kinds[0] == "dense" else None
    judged(cases, lambda case: judge(row(*case, image=image), size=(2, 12, 11), draws=3, must_run=True))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("end", [False, True], ids=["middle", "end"])
def test_activations_between_rows(act, end):
    """A row that kernels run, next to a layer whose activation may have none: each keeps its own."""
    cases = []
    for other in KERNEL_ACTIVATIONS:
        fused = [Layer("pointwise", other), Layer("depthwise", other), Layer("pointwise", "identity")]
        for kind in KINDS:
            cases.append(([*fused, Layer(kind, act)] if end else [Layer(kind, act), *fused], "flat"))
    judged(cases, lambda case: judge(row(*case), draws=3))


def v2(stride=1, ratio=4, o=8):
    return V2Block(8, o, stride, ratio)


def v3(stride=1, kernel=3, excite=True, hard=True, o=8, expanded=24, dilation=1):
    config = InvertedResidualConfig(8, kernel, expanded, o, excite, "HS" if hard else "RE", stride, dilation, 1.0)
    return V3Block(config, functools.partial(nn.BatchNorm2d, eps=1e-3))


def mbconv(stride=1, kernel=3, ratio=4, o=8):
    return MBConv(MBConvConfig(ratio, kernel, stride, 8, o, 1), 0.0, functools.partial(nn.BatchNorm2d, eps=1e-3))


TORCHVISION = [
    *(functools.partial(v2, s, t, o) for s in (1, 2) for t in (1, 4) for o in (8, 11)),
    *(functools.partial(v3, s, k, e, h, o) for s in (1, 2) for k in (3, 5) for e in (0, 1) for h in (0, 1)
      for o in (8, 11)),
    functools.partial(v3, expanded=8), functools.partial(v3, expanded=8, excite=False),
    functools.partial(v3, dilation=2),
    *(functools.partial(mbconv, s, k, t, o) for s in (1, 2) for k in (3, 5) for t in (1, 4) for o in (8, 11)),
    *(functools.partial(MNASNetBlock, 8, o, k, s, 3) for s in (1, 2) for k in (3, 5) for o in (8, 11)),
]  # fmt: skip


def test_blocks_of_torchvision():
    judged(
        TORCHVISION,
        lambda make: judge(nn.Sequential(make()), must_run=getattr(make, "keywords", {}).get("dilation", 1) == 1),
    )


def put(block, acts):
    """Other activations after the block's layers."""
    places = [(parent, name) for parent in block.modules() for name, m in parent._modules.items()
              if type(m) in (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)]  # fmt: skip
    places = [place for place in places if not isinstance(place[0], SqueezeExcitation)]
    for (parent, name), act in zip(places, acts, strict=True):
        parent._modules[name] = nn.Identity() if ACTIVATIONS[act] is None else ACTIVATIONS[act]()


@pytest.mark.parametrize(
    "make", [v2, functools.partial(v3, excite=False), v3, mbconv], ids=["v2", "v3", "v3-se", "mbconv"]
)
def test_activations_of_blocks(make):
    """All pairs: a depthwise layer's own activation, not the expand layer's, before squeeze-excite too."""

    def check(acts):
        block = make()
        put(block, acts)
        judge(nn.Sequential(block), draws=3, must_run=set(acts) <= set(KERNEL_ACTIVATIONS))

    judged(list(itertools.product(ACTIVATIONS, repeat=2)), check)


class Odd(nn.Hardtanh):
    """timm gives activations ``inplace``."""

    def __init__(self, inplace=False):
        super().__init__(-0.7, 1.3, inplace)


class Gelu(nn.GELU):
    def __init__(self, inplace=False):
        super().__init__()


TIMM_ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Identity, Gelu, Odd]


def timm_blocks():
    """{what: make} of timm's blocks; a string where the kernels must run."""
    excite = functools.partial(blocks.SqueezeExcite, rd_ratio=0.25)
    hard = functools.partial(excite, gate_layer=nn.Hardsigmoid, force_act_layer=nn.ReLU)
    for act, k, s, se, o in itertools.product(TIMM_ACTIVATIONS, (3, 5), (1, 2), (None, excite, hard), (8, 11)):
        if zlib.crc32(repr((act.__name__, k, s, se is None, o)).encode()) % 2:
            continue  # every second one is enough
        options = dict(dw_kernel_size=k, stride=s, act_layer=act, se_layer=se)
        yield functools.partial(blocks.InvertedResidual, 8, o, exp_ratio=3.0, **options)
        yield functools.partial(blocks.DepthwiseSeparableConv, 8, o, **options)
        yield functools.partial(blocks.DepthwiseSeparableConv, 8, o, pw_act=True, **options)
    for act, s in itertools.product(TIMM_ACTIVATIONS, (1, 2)):
        yield functools.partial(blocks.ConvBnAct, 8, 11, 1, s, act_layer=act)
        yield functools.partial(blocks.ConvBnAct, 8, 8, 3, s, act_layer=act, skip=True)
        yield functools.partial(blocks.EdgeResidual, 8, 8, 3, s, act_layer=act, se_layer=excite)
        yield functools.partial(blocks.InvertedResidual, 8, 8, 3, s, pad_type="same", act_layer=act)
        yield functools.partial(blocks.InvertedResidual, 8, 8, 3, s, noskip=True, act_layer=act)
        for start, middle in ((0, 3), (5, 0), (3, 5), (0, 0))[: 3 + (s == 1)]:
            yield functools.partial(blocks.UniversalInvertedResidual, 8, 8, start, middle, stride=s, act_layer=act)


TIMM = list(timm_blocks())


@pytest.mark.parametrize("part", range(4))
def test_blocks_of_timm(part):
    judged(TIMM[part::4], lambda make: judge(nn.Sequential(make()), draws=3))


@pytest.mark.parametrize("gate", [nn.Hardsigmoid, nn.Sigmoid, nn.Tanh], ids=lambda c: c.__name__)
def test_squeeze_excite(gate):
    """At every place of a row, with every activation of its own; where kernels do it, they run."""

    def check(case):
        place, hidden, act = case
        layers = list(row([Layer("pointwise", act), Layer("depthwise", act), Layer("pointwise", "identity")], "nested"))
        width = layers[min(place, 1)][0].weight.shape[0] if place else 5
        layers.insert(
            place, SqueezeExcitation(width, 4, activation=ACTIVATIONS[hidden] or nn.Identity, scale_activation=gate)
        )
        must_run = (
            place == 2 and hidden not in ("identity", "gelu", "sigmoid", "hardtanh", "leaky") and gate is not nn.Tanh
        )
        judge(nn.Sequential(*layers), draws=3, must_run=must_run)

    judged(list(itertools.product((0, 1, 2), ACTIVATIONS, ("relu6", "silu"))), check)
