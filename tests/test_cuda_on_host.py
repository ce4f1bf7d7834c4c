"""The CUDA stages without a card (cuda_on_host.py): the suites of a card and of the CPU, schedules and failures."""

import pytest
import test_cpu_finalize as tables
import test_cpu_stages as elementwise
import test_cpu_stem as stems
import test_gpu as suite
import torch
from cuda_on_host import (  # noqa: F401
    DTYPES,
    FORWARD,
    LAUNCH_FAILURE,
    NO_IMAGE,
    RANDOM_THREADS,
    RANDOM_WARPS,
    REVERSE,
    STAGES,
    backend_of_the_cpu,
    load_library,
    pytestmark,
)
from test_stages import UTILS, sample
from torch.library import opcheck

from mnet_kernels import backends


def test_chain_mode_is_whole():
    assert backends.whole("cuda", "chain") and backends.has_stem("cuda")


def test_algebraic_mode_is_whole_but_for_the_backward():
    assert backends.implemented("cuda") == set(STAGES)
    assert not backends.missing_stages("cuda", "algebraic", trains=False) and not backends.whole("cuda", "algebraic")


# ---- stages ---------------------------------------------------------------------------------------------------------

SIZES = {
    "even": dict(n=2, c=16, e=40, o=24, h=10, w=9),
    "odd": dict(n=1, c=13, e=37, o=9, h=7, w=5, stride=1),
    "single": dict(n=3, c=1, e=1, o=1, h=1, w=1, k=5, stride=1),
    "tails": dict(n=2, c=21, e=75, o=11, h=13, w=17, k=5),  # of a tile's channels, rows and columns
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_stage(stage, size, dtype):
    suite.judge_stage("cuda", stage, SIZES[size], dtype)


@pytest.mark.parametrize("stage", STAGES)
def test_opcheck(stage):
    op = getattr(torch.ops.mnet_cuda, stage).default
    for args in sample()[stage]:
        assert set(opcheck(op, suite.converted(args, "cpu"), test_utils=UTILS).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_the_order_of_threads_and_blocks_changes_no_bit(stage, dtype, library):
    for args in sample(dtype=dtype, **SIZES["odd"])[stage]:
        outcomes = []
        for schedule in (FORWARD, REVERSE, RANDOM_THREADS, RANDOM_WARPS):
            library.mnet_host_schedule(schedule)
            outcomes.append(suite.call("mnet_cuda", stage, suite.converted(args, "cpu")))
        for others in outcomes[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outcomes[0], others, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_every_launch_that_fails_is_reported(stage, library):
    for args in sample()[stage]:
        for good in range(10):
            library.mnet_host_fail(good, LAUNCH_FAILURE)
            try:
                suite.call("mnet_cuda", stage, suite.converted(args, "cpu"))
            except RuntimeError as error:
                assert f"CUDA error {LAUNCH_FAILURE}" in str(error)
            else:
                break  # there were no more launches than good ones
        assert 0 < good < 9
        library.mnet_host_fail(0, NO_IMAGE)
        with pytest.raises(
            RuntimeError, match=f"{stage}: the extension was not built for this card.*TORCH_CUDA_ARCH_LIST"
        ):
            suite.call("mnet_cuda", stage, suite.converted(args, "cpu"))


@pytest.mark.parametrize("stage", STAGES)
def test_older_cards_are_refused(stage, library):
    library.mnet_host_capability(7, 5)
    with pytest.raises(RuntimeError, match=f"{stage}: .* compute capability 7.5, expected 8.0 .* native or the triton"):
        suite.call("mnet_cuda", stage, suite.converted(sample()[stage][0], "cpu"))


# ---- the suite of the CPU's stages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 5, 1, 7), (1, 37, 9, 1)], ids=str)
def test_every_flag_as_the_reference(size, dtype):
    elementwise.test_normalize_as_reference(size, dtype)
    elementwise.test_depthwise_as_reference(size, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_flag_of_the_backward_as_the_reference(dtype):
    elementwise.test_depthwise_backward_as_reference((2, 5, 3, 4), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_values(dtype):
    for name in elementwise.KINKS:
        elementwise.test_derivatives_exactly_at_kinks(name, dtype)
    for value in (0.0, 55.5, -3008.0):
        elementwise.test_constant_channels(dtype, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(bad, dtype):
    for act in elementwise.ACTS:
        elementwise.test_nan_and_infinity(bad, dtype, act)


def test_tables():
    for affine in ((True, True), (True, False), (False, False)):
        for count in (0, 1, 1000):
            tables.test_finalize(affine, count)
    for batch_stats in (True, False):
        tables.test_finalize_backward(batch_stats)
    for dtype in (*DTYPES, torch.float64):
        for momentum in (0.1, None):
            tables.test_update_running_stats(dtype, momentum, strided=True)
    tables.test_update_running_stats_in_inference_mode()


def test_strides_batches_and_errors():
    elementwise.test_weight_strides("transposed")
    elementwise.test_weight_strides("expanded")
    elementwise.test_gate_and_offset_are_independent("gate")
    elementwise.test_gate_and_offset_are_independent("offset")
    elementwise.test_large_means(torch.bfloat16)
    elementwise.test_empty_batch()
    elementwise.test_errors()


# ---- the suite of the CPU's stem -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stem_as_the_cpus(dtype):
    for size in ((1, 1, 1, 1, 1), (2, 3, 32, 17, 22), (1, 8, 70, 9, 5), (5, 2, 33, 31, 1)):
        for stride in (1, 2):
            stems.test_every_call_agrees_with_the_reference(size, stride, dtype)
    for layout in stems.LAYOUTS:
        stems.test_the_layout_of_the_image_does_not_change_a_bit(layout, dtype)
    stems.test_moments_of_constant_and_distant_channels(dtype)
    for value in (float("nan"), float("inf")):
        stems.test_what_is_not_finite_goes_where_it_goes_in_torch(value, dtype)


def test_stem_batches_strides_and_errors():
    stems.test_empty_batch()
    stems.test_weight_of_any_strides()
    for message in stems.BAD:
        stems.test_bad_input_is_refused(message)
    stems.test_bad_upstream_is_refused()


@pytest.fixture
def algebraic(monkeypatch):
    """The suite of the CPU's stages of algebraic mode."""
    import test_cpu_expand  # here: it is skipped where the CPU's kernels were not built

    monkeypatch.setattr(test_cpu_expand, "ours", lambda name: getattr(torch.ops.mnet_cuda, name))
    return test_cpu_expand


# n, c, e, o, h, w
EXPANDED = [
    (1, 1, 1, 1, 1, 1),
    (2, 5, 13, 3, 1, 7),
    (2, 17, 40, 3, 9, 13),
    (1, 64, 70, 3, 7, 11),
    (1, 33, 65, 3, 18, 5),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", EXPANDED, ids=str)
def test_algebraic_stages_as_the_reference(size, dtype, algebraic):
    for i, (k, stride) in enumerate(((3, 1), (3, 2), (5, 1), (5, 2))):
        args = algebraic.Args(
            dtype, *size, k, stride, (i + size[1]) % 5, shifted=i % 2 == 0, clear=size[4] * size[5] > 1
        )
        if i == 3:
            args.weight, args.depthwise = (
                t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in (args.weight, args.depthwise)
            )
        for name in ("gram", "expand_finalize", "expand_depthwise"):
            algebraic.same_as_reference(name, args.of(name), dtype)
        y, none = torch.ops.mnet_cuda.expand_depthwise(*args.of("expand_depthwise", moments=False))
        assert torch.equal(y, torch.ops.mnet_cuda.expand_depthwise(*args.of("expand_depthwise"))[0])
        assert none.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_of_constant_and_distant_channels(dtype, algebraic):
    for value in (0.0, 55.5, -3008.0):
        algebraic.test_constant_channels(dtype, value)
    algebraic.test_only_distant_channels_are_shifted(dtype)


def test_what_algebraic_stages_refuse(algebraic):
    args = algebraic.Args(torch.float32, c=65, e=8)
    for name in ("gram", "expand_depthwise"):
        with pytest.raises(RuntimeError, match=f"{name}: x has 65 channels, expected at most 64.*chain"):
            algebraic.ours(name)(*args.of(name))
    algebraic.same_as_reference("expand_finalize", args.of("expand_finalize"), torch.float32)
    args = algebraic.Args(torch.float32, n=1)
    args.x = args.x[:0]
    assert (algebraic.ours("gram")(args.x) == 0).all()
    y, moments = algebraic.ours("expand_depthwise")(*args.of("expand_depthwise"))
    assert y.shape == (0, *args.y.shape[1:]) and (moments == 0).all()
