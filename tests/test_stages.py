"""The stage ops themselves: opcheck of schema, fake and dispatch; the gram's gate; the order of namespaces."""

import pytest
import torch
from kinks import clear_table
from torch.library import opcheck

from mnet_kernels import schema
from mnet_kernels.stages import reference

UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def layout(t, how):
    if how == "nchw":
        return t.contiguous()
    if how == "sliced":
        return torch.cat([t, t], 1)[:, : t.shape[1]]
    return t.contiguous(memory_format=torch.channels_last)


def sample(n=2, c=3, e=5, o=4, h=7, w=6, k=3, stride=2, dtype=torch.float32, how="channels_last"):
    """Arguments for every stage op, with and without its optional ones: {name: [args, ...]}; no pre-activation is near
    a kink, as far as float32 is concerned."""
    acc = schema.accumulate_dtype(dtype)
    oh, ow = schema.depthwise_size(h, stride), schema.depthwise_size(w, stride)

    def map_(channels, height=h, width=w):
        return layout(torch.randn(n, channels, height, width).to(dtype), how)

    def table(*shape):
        return torch.rand(*shape, dtype=acc)

    x, xe, ye, y3 = map_(c), map_(e), map_(e, oh, ow), map_(o, oh, ow)
    image, w0 = map_(min(c, 3)), torch.randn(e, min(c, 3), 3, 3).to(dtype)
    w1, w2, w3 = (torch.randn(s).to(dtype) for s in ((e, c, 1, 1), (e, 1, k, k), (o, e, 1, 1)))
    bn_c, bn_e, bn_y, bn_o = (clear_table(table(5, t.shape[1]), t) for t in (x, xe, ye, y3))
    gate, count = table(n, e), n * h * w
    gram, shift = reference.gram(x), table(c)
    bn_w = reference.expand_finalize(gram, w1, table(e), table(e), 1e-5, x.numel() // c)[0]
    bn_r = clear_table(table(5, e), reference._matmul(w1.double(), x.double() - shift.view(-1, 1, 1)))
    up_y = (ye, ye, bn_y, table(2, e), 0)
    up_y3 = (y3, y3, bn_o, table(2, o), 2)
    return {
        "pointwise": [(x, w1, None, 0, None, True), (ye, w3, bn_y, 3, gate, False), (ye, w3, bn_y, 2, None, True)],
        "depthwise": [(xe, w2, bn_e, 2, stride, True), (xe, w2, None, 0, 1, False)],
        "stem": [(image, w0, stride, True), (image, w0, 1, False)],
        "finalize": [(table(2, c), table(c), table(c), 1e-5, count), (table(2, c), None, None, 1e-3, 1)],
        "update_running_stats": [
            (table(c), table(c), torch.tensor(3), table(c), table(c), None),
            (table(c), table(c), None, table(c), table(c), 0.1),
        ],
        "normalize": [(x, bn_c, 2, None), (x, bn_c, 0, map_(c))],
        "normalize_gram": [(x, bn_c, 2, None), (x, bn_c, 0, map_(c))],
        "squeeze": [(xe, bn_e, 3)],
        "normalize_backward": [(x, x, bn_c, 2)],
        "finalize_backward": [(table(2, c), bn_c, count, True), (table(2, c), bn_c, count, False)],
        "depthwise_backward": [
            (*up_y, None, None, xe, w2, bn_e, 2, stride, None, True, True),
            (*up_y[:4], 3, gate, gate, xe, w2, bn_e, 3, stride, None, True, False),
            (*up_y, None, None, xe, w2, None, 0, stride, map_(e), True, True),
            (*up_y, None, None, xe, w2, None, 0, stride, None, False, True),
        ],
        "pointwise_backward": [
            (*up_y3, None, ye, w3, bn_y, 2, None, None, True, True, True),
            (*up_y3, None, ye, w3, bn_y, 3, gate, None, True, True, False),
            (*up_y3, None, ye, w3, bn_y, 3, gate, None, False, True, True),
            (*up_y3, None, ye, w3, None, 0, None, map_(e, oh, ow), True, False, True),
            (*up_y3, None, ye, w3, bn_y, 2, None, None, False, False, True),
            (None, *up_y3[1:], table(n, o), ye, w3, None, 0, None, None, True, False, True),
            (None, *up_y3[1:], table(n, o), ye, w3, bn_y, 2, gate, None, True, True, False),
        ],
        "stem_backward": [
            (*up_y, image, stride, True, True),
            (*up_y[:4], 2, image, stride, False, True),
            (*up_y[:4], 3, image, stride, True, False),
        ],
        "gram": [(x,)],
        "expand_finalize": [(gram, w1, table(e), table(e), 1e-5, count), (gram, w1, None, None, 1e-5, count)],
        "expand_depthwise": [(x, shift, w1, bn_r, 2, w2, stride, True), (x, shift, w1, bn_r, 3, w2, 1, False)],
        "expand_depthwise_backward": [
            (*up_y3, w3, None, None, ye, bn_y, table(2, e), 2, x, shift, w1, bn_r, 2, w2, stride, True, True),
            (*up_y3, w3, gate, gate, ye, bn_y, table(2, e), 3, x, shift, w1, bn_r, 3, w2, stride, False, False),
        ],
        "expand_finalize_backward": [
            # tables that belong together: the mean of W (x - k) is given twice, by bn and by gram
            (table(e, c + 1), gram, gram[-1], bn_w, w1, count),
            (table(e, c + 1), None, shift, bn_e, w1, count),
        ],
        "expand_mix": [(x, x, shift, table(c + 1, c), None), (x, x, shift, table(c + 1, c), map_(c))],
    }


def test_every_stage_has_samples():
    assert set(sample()) == set(schema.NAMES)


@pytest.mark.parametrize("name", schema.NAMES)
def test_opcheck(name):
    op = getattr(torch.ops.mnet_ref, name).default
    for args in sample()[name]:
        assert set(opcheck(op, args, test_utils=UTILS).values()) == {"SUCCESS"}


@pytest.mark.parametrize("how", ["nchw", "sliced"])
@pytest.mark.parametrize("name", schema.NAMES)
def test_opcheck_layouts(name, how):
    """The fake must promise the right strides whatever the input's."""
    op = getattr(torch.ops.mnet_ref, name).default
    opcheck(op, sample(how=how)[name][0], test_utils=("test_schema", "test_faketensor"))


ODD = [
    dict(n=1, c=1, e=1, o=1, h=1, w=1),
    dict(c=1, h=7, w=1),
    dict(n=1, c=13, e=17, o=3, h=2, w=9, k=5),
    dict(stride=1),
]


@pytest.mark.parametrize("odd", ODD, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_opcheck_odd_shapes_and_dtypes(odd, dtype):
    for name, calls in sample(dtype=dtype, **odd).items():
        for args in calls:
            opcheck(getattr(torch.ops.mnet_ref, name).default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("namespace", schema.NAMESPACES.values())
def test_every_namespace_has_every_op(namespace):
    for name in schema.NAMES:
        assert getattr(getattr(torch.ops, namespace), name).default


def test_gram_shifts_only_where_it_is_exact():
    """|mean| <= 4 std is left alone; above, k is a storage value and x - k is exact."""
    x = torch.randn(4, 3, 16, 16)
    x[:, 1] += 100
    x[:, 2] = 7.3
    x = x.bfloat16()
    table = reference.gram(x)
    k = table[4]
    assert k[0] == 0 and k[1] != 0 and k[2] == x[0, 2, 0, 0]
    assert (k == k.bfloat16()).all()
    exact = x.double() - k.double().view(1, -1, 1, 1)
    assert ((exact.bfloat16().double() == exact)[:, 1:]).all()


def test_gram_survives_large_means():
    """mean/std = 100 in float32: the variance of y = W x is right where raw sums would lose it."""
    x = torch.randn(4, 6, 16, 16, dtype=torch.float64) + 100
    x = x.float()
    w = torch.randn(9, 6, 1, 1)
    want = torch.einsum("oi,nihw->nohw", w.double().flatten(1), x.double()).var((0, 2, 3), correction=0)
    bn, _ = reference.expand_finalize(reference.gram(x), w, None, None, 0.0, 1024)
    torch.testing.assert_close(bn[3].double(), want.rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_survive_large_means(dtype):
    x = (torch.randn(4, 3, 16, 16) + 300).to(dtype)
    weight = torch.zeros(3, 1, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = 1
    y, moments = torch.ops.mnet_ref.depthwise(x, weight, None, 0, 1, True)
    want = torch.stack([y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)])
    torch.testing.assert_close(moments.double(), want, rtol=1e-5, atol=0)
