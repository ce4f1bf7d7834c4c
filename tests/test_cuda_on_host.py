"""The CUDA backend whole, without a card: its launchers for torch and its kernels, compiled for the CPU.

CMake builds csrc/cuda with its launches run by csrc/tests/cuda_host.h and c10's CUDA headers replaced
(csrc/tests/support/torch_on_host), as a library that registers the ops of ``mnet_cuda`` for CPU tensors.  So checks,
allocation, dispatch and kernels are the real ones, and the suites written for a card and for the CPU run on them.
"""

import ctypes
import fcntl
import re
import shutil
import sys
from pathlib import Path

import pytest
import test_cpu_stages as elementwise
import test_cpu_stem as stems
import test_gpu as suite
import test_gram_hand_over as rows
import test_precision
import torch
from blocks import Case, Inputs, step, upstream_of
from kinks import clear_model
from precision import Judge, errors
from test_choice import ALGEBRAIC_FORWARD
from test_ctest import BUILD, COMPILERS, ROOT, run
from test_models_v2 import NARROW, training_step, twins
from test_stages import UTILS, sample
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import mnet_kernels as mk
from mnet_kernels import backends, choice, schema, stages
from mnet_kernels.backends import compiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake"),
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason=f"no C++ compiler: {', '.join(COMPILERS)}"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the library is linked as on Linux"),
]

STAGES = [
    name for name in schema.NAMES if name in backends.MODE_STAGES["chain"] | backends.STEM_STAGES | ALGEBRAIC_FORWARD
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD, REVERSE, RANDOM_THREADS, RANDOM_WARPS = range(4)  # the schedules of csrc/tests/launch_host.h
NO_IMAGE, LAUNCH_FAILURE = 209, 719  # cudaErrorNoKernelImageForDevice, cudaErrorLaunchFailure


@pytest.fixture(scope="module")
def library():
    """The library, loaded."""
    folder, torchs = BUILD / "torch", Path(torch.__file__).parent
    options = "-DMNET_PLAIN=OFF", "-DMNET_SANITIZE=OFF", "-DMNET_NVCC=OFF", f"-DMNET_TORCH={torchs}"
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "torch.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist's processes want the same folder at the same time
        configured = run("cmake", "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", *options)
        if "No CUDA headers" in configured:
            pytest.skip("no CUDA headers: neither a toolkit nor triton's")
        run("cmake", "--build", folder, "--parallel", 2)
    path = folder / "libmnet_cuda_on_host.so"
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


@pytest.fixture(autouse=True)
def _backend_of_the_cpu(library, monkeypatch):
    """Backend ``cuda`` takes CPU tensors, in the package and in the suites."""
    monkeypatch.setitem(backends.DEVICES, "cuda", ("cpu",))
    monkeypatch.setitem(compiled._DISPATCH_KEYS, "mnet_cuda", "CPU")
    monkeypatch.setattr(compiled, "_extension", compiled._extension or object())
    monkeypatch.setitem(suite.HOME, "cuda", "cpu")
    monkeypatch.setattr(elementwise, "ours", lambda name: getattr(torch.ops.mnet_cuda, name))
    monkeypatch.setattr(stems, "CPU", torch.ops.mnet_cuda)
    # As on a card: torch's own error, which ours is held against, is float32's.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    choice._decide.cache_clear()
    stages.bind()
    library.mnet_host_schedule(RANDOM_WARPS)
    yield
    library.mnet_host_schedule(FORWARD)
    library.mnet_host_fail(-1, 0)
    library.mnet_host_capability(9, 0)
    monkeypatch.undo()
    choice._decide.cache_clear()
    stages.bind()


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
            elementwise.test_finalize(affine, count)
    for batch_stats in (True, False):
        elementwise.test_finalize_backward(batch_stats)
    for dtype in (*DTYPES, torch.float64):
        for momentum in (0.1, None):
            elementwise.test_update_running_stats(dtype, momentum, strided=True)
    elementwise.test_update_running_stats_in_inference_mode()


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


# ---- blocks and a network -------------------------------------------------------------------------------------------

BLOCKS = [
    Case("depthwise_conv_bn_act", kernel=5, stride=2, activation="hardswish", n=2, c=21, h=15, w=11),
    Case("pointwise_conv_bn_act", n=1, c=17, o=9, h=13, w=7),
    Case("pointwise_conv_bn_act_pool", activation="hardswish", n=3, c=17, o=21, h=5, w=7),
    Case("stem_conv_bn_act", stride=2, n=3, c=3, o=21, h=19, w=23),
    Case("stem_conv_bn_act", stride=1, activation="hardswish", n=2, c=4, o=40, h=9, w=18),
    Case("separable_conv", stride=2, n=2, c=24, o=40, h=14, w=14),
    Case(residual=True, n=2, c=16, e=40, h=14, w=14),
    Case(residual=True, excite=True, activation="silu", n=2, c=13, e=37, h=9, w=9),
    Case(stride=2, kernel=5, activation="hardswish", n=3, c=13, e=37, o=21, h=17, w=9),
    Case(stride=2, excite=True, kernel=5, activation="relu", n=2, c=16, e=40, o=24, h=14, w=14),
]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_block(case, dtype, monkeypatch):
    """Output, every gradient and running statistics against native float64, by the pass rule (the cosine is in it)."""
    monkeypatch.setattr(test_precision, "fused_modes", lambda *args, **kwargs: [("cuda", "chain")])
    storage = dtype or torch.float32
    test_precision.judge(lambda: test_precision.rounded(case, storage), storage, dtype)


def frozen(*both):
    for inputs in both:
        for bn in inputs.bns:
            bn.eval()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_block_in_eval_mode(case, dtype, monkeypatch):
    """The same with running statistics: output and every gradient."""
    monkeypatch.setattr(test_precision, "fused_modes", lambda *args, **kwargs: [("cuda", "chain")])
    storage = dtype or torch.float32
    test_precision.judge(lambda: test_precision.rounded(case, storage), storage, dtype, frozen)


class Calls(TorchDispatchMode):
    """Whether each convolution stage was asked for moments."""

    def __init__(self):
        super().__init__()
        self.moments = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mnet_cuda" and func._schema.arguments[-1].name == "moments":
            self.moments.setdefault(func._opname, []).append(args[-1])
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mode", ["chain", "algebraic"])
def test_moments_are_of_training_alone(mode, training):
    """Eval mode runs the same kernels with batch norm folded into scale and shift, and their moments off."""
    inputs = Inputs(Case(residual=True, excite=True), torch.float32)
    if not training:
        frozen(inputs)
    with torch.no_grad(), mk.backend("cuda", mode), Calls() as calls:
        inputs.call()
    first = {"pointwise": [training] * 2, "depthwise": [training]}
    if mode == "algebraic":
        first = {"expand_depthwise": [training], "pointwise": [training]}
    assert calls.moments == first


def test_launchers_call_nothing_that_a_capture_forbids():
    """Of CUDA's runtime they use only what may be called while a CUDA graph is captured: no allocation, copy or wait.

    What is above them reads no value of a tensor, or torch.compile could not make one graph of it (the next test).
    """
    allowed = {"cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetLastError"}
    sources = [p for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in (".cu", ".cuh", ".cpp", ".h")]
    text = "\n".join(re.sub(r"//.*", "", p.read_text()) for p in sources)
    assert set(re.findall(r"\b(cuda[A-Z]\w+)\s*\(", text)) == allowed
    assert not re.search(r"\.item\(|\.cpu\(|at::_local_scalar|synchronize", text)


@pytest.mark.parametrize("case", BLOCKS[::2], ids=str)
def test_one_graph(case):
    """torch.compile, forward and backward in one graph each, to the bit what runs without it."""
    inputs = Inputs(case, torch.float32)
    upstream = upstream_of(inputs.call())
    torch._dynamo.reset()
    results = []
    with mk.backend("cuda", "chain"):
        for call in (inputs.call, torch.compile(inputs.call, fullgraph=True, backend="aot_eager")):
            for bn in inputs.bns:
                bn.reset_running_stats()
            out = call()
            grads = torch.autograd.grad(out, list(inputs.leaves.values()), upstream.to(out.dtype))
            results.append([out.detach(), *grads, *(b.clone() for bn in inputs.bns for b in bn.buffers())])
    assert all(map(torch.equal, *results))


def test_block_runs_its_own_stages():
    inputs = Inputs(Case(residual=True, excite=True), torch.float32)
    with mk.count_stages() as counts:
        step(inputs, "cuda", "chain")
    assert counts and {label.split("::")[0] for label in counts} == {"mnet_cuda"}


EXPANDING = [case for case in BLOCKS if case.op == "inverted_residual"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", EXPANDING, ids=str)
def test_forward_in_algebraic_mode(case, training, dtype):
    """Without gradients, with running and with batch statistics, which move."""
    verdict = Judge(dtype)
    for _ in range(5):
        exact, low = test_precision.rounded(case, dtype)
        for inputs in (exact, low):
            for bn in inputs.bns:
                bn.train(training)
        outcomes = []
        for inputs, path in ((exact, ("native", None)), (low, ("native", None)), (low, ("cuda", "algebraic"))):
            states = [{k: v.clone() for k, v in bn.state_dict().items()} for bn in inputs.bns]
            autocast = torch.autocast("cpu", dtype, enabled=inputs is low and dtype != torch.float32)
            with torch.no_grad(), mk.backend(*path), mk.count_stages() as counts, autocast:
                out = inputs.call()
            outcomes.append(
                {
                    "out": out,
                    **{f"{i}.{k}": b.clone() for i, bn in enumerate(inputs.bns) for k, b in bn.named_buffers()},
                }
            )
            for bn, state in zip(inputs.bns, states, strict=True):
                bn.load_state_dict(state)
        assert counts["mnet_cuda::expand_depthwise"] == 1 and {k.split("::")[0] for k in counts} == {"mnet_cuda"}
        want, torchs, ours = outcomes
        for key, ref in want.items():
            if key.endswith("tracked"):
                assert torch.equal(ours[key], ref)
            else:
                verdict.add(key, ours[key], torchs[key], ref)
    verdict.verdict()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_hands_on_its_grams(dtype):
    """Each block's output and running statistics as of blocks called one by one, to the bit."""
    x = torch.randn(2, 4, 9, 7)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32), mk.backend("cuda", "algebraic"):
        blocks = rows.row()
        got, counts = rows.results(blocks, rows.in_a_row, x)
        want, others = rows.results(blocks, rows.one_by_one, x)
    assert all(map(torch.equal, got, want))
    assert counts["mnet_cuda::normalize_gram"] == others["mnet_cuda::gram"] == 3
    assert counts["mnet_cuda::gram"] == others["mnet_cuda::normalize_gram"] == 0


def test_a_training_step_in_algebraic_mode_is_chain(caplog):
    inputs = Inputs(Case(residual=True), torch.float32)
    with mk.count_stages() as counts:
        step(inputs, "cuda", "algebraic")
    assert counts["mnet_cuda::depthwise"] == 1 and {label.split("::")[0] for label in counts} == {"mnet_cuda"}
    assert "mode 'chain'" in caplog.text and "without gradients" in caplog.text


def test_training_step():
    """A narrow V2 at 32x32 against native float64: every gradient by its cosine, and by the pass rule all results of a
    kind together (of a single one of its layers, in a network so small, the rounding errors of both paths scatter)."""
    verdict = Judge(torch.float32)
    for _ in range(3):
        exact, model = twins(**NARROW)
        x, labels = torch.randn(8, 3, 32, 32), torch.randint(NARROW["num_classes"], (8,))
        clear_model(exact, x.double())
        low = type(model)(**NARROW, dropout=0.0)
        low.load_state_dict(exact.state_dict())
        exact.load_state_dict(low.state_dict())  # rounded to float32
        want = training_step(exact, x.double(), labels)
        with mk.backend("native"):
            torchs = training_step(low, x, labels)
        with mk.backend("cuda", "chain"), mk.count_stages() as counts:
            ours = training_step(low, x, labels)
        assert {label.split("::")[0] for label in counts} == {"mnet_cuda"}
        assert counts["mnet_cuda::depthwise_backward"] == 17 and counts["mnet_cuda::stem_backward"] == 1
        for name, ref in want.items():
            if name.endswith("num_batches_tracked"):
                assert torch.equal(ours[name], ref)
                continue
            if ref.abs().max() < 1e-8:  # a batch norm further on takes the shift out again: both are rounding errors
                assert name.endswith(".bias") and ours[name].abs().max() < 1e-4, name
                continue
            relative, _, cosine = errors(ours[name], ref)
            assert relative < 1e-3 and cosine < 1e-6, name
            if name != "loss":
                gradient = name.removeprefix("d_") != name
                verdict.add(f"{'d_' * gradient}{name.split('.')[-1]}", ours[name], torchs[name], ref)
    verdict.verdict()
