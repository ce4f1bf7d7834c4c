"""What only a card can show: CUDA and Triton stages against the reference in float64, fused blocks, streams, graphs.

The tests that make sense there run on the CPU too, with its own compiled stages, so that no mistake in them waits for a
card.  On a card TF32 is off: torch's own error, which ours is held against, must be float32's.
"""

import pytest
import torch
import torch_stages
from blocks import Case, Inputs, assert_same, fused_modes, step
from precision import Judge
from test_precision import judge, rounded
from test_stages import UTILS, sample
from torch.library import opcheck

import mnet_kernels as mk
from mnet_kernels import backends, schema
from mnet_kernels.backends.triton import configs
from mnet_kernels.bench import shapes, timing, tuning

CARD = torch.cuda.is_available() and torch.cuda.get_device_capability() >= backends.MIN_CAPABILITY
NO_CARD = pytest.mark.skipif(not CARD, reason="no CUDA card of compute capability 8.0 or newer")
ON_CARD = (pytest.mark.gpu, NO_CARD)
HOME = {name: devices[0] for name, devices in backends.DEVICES.items()}  # backend -> the device type it is meant for
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CARD)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DRAWS = 14

# channels not a multiple of 8, one image, one position, several tiles and channel blocks of a kernel
SIZES = {
    "even": dict(n=2, c=16, e=48, o=24, h=14, w=14),
    "odd": dict(n=1, c=13, e=37, o=9, h=7, w=5, stride=1),
    "single": dict(n=3, c=1, e=1, o=1, h=1, w=1, k=5, stride=1),
    "tiles": dict(n=5, c=19, e=200, o=33, h=29, w=37, k=5),
    "wide": dict(n=2, c=24, e=144, o=32, h=56, w=56),
}


def compiled_stages():
    """(backend, stage) of every kernel in this installation, as parameters; those of a card marked as such."""
    return [
        pytest.param(name, stage, marks=ON_CARD if device == "cuda" else (), id=f"{name}-{stage}")
        for name, device in HOME.items()
        for stage in schema.NAMES
        if stage in backends.implemented(name)
    ]


STAGES = compiled_stages() or [pytest.param("", "", marks=pytest.mark.skip(reason="no compiled stage"))]


@pytest.fixture(autouse=True)
def _float32_is_float32():
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [where.allow_tf32 for where in settings]
    for where in settings:
        where.allow_tf32 = False
    yield
    for where, value in zip(settings, before, strict=True):
        where.allow_tf32 = value


def converted(args, device, dtype=None):
    """Fresh arguments on a device, floating ones in ``dtype`` if given."""

    def convert(a):
        if not isinstance(a, torch.Tensor):
            return a
        to = dtype if dtype is not None and a.is_floating_point() else a.dtype
        return torch.empty_like(a, device=device, dtype=to).copy_(a)

    return [convert(a) for a in args]


def results(function, args):
    """What a stage returns as a list; of one that returns nothing, the tensors it changed."""
    out = function(*args)
    if out is None:
        out = args[:2]
    return [out] if isinstance(out, torch.Tensor) else list(out)


def call(namespace, stage, args):
    """The same for a backend's op."""
    return results(getattr(getattr(torch.ops, namespace), stage).default, args)


def draws(stage, size, dtype):
    """How many: more where a few values, or a few masks that rounding of recomputed pre-activations turns, decide."""
    turns_masks = stage == "expand_depthwise_backward" and dtype != torch.float32
    return 3 * DRAWS if turns_masks or size == SIZES["single"] else DRAWS


def judge_stage(backend, stage, size, dtype):
    """The pass rule for every result of a stage, over its optional arguments."""
    device = HOME[backend]
    verdict = Judge(dtype)
    for _ in range(draws(stage, size, dtype)):
        for i, args in enumerate(sample(dtype=dtype, **size)[stage]):
            want = call("mnet_ref", stage, converted(args, device, torch.float64))
            torchs = results(getattr(torch_stages, stage), converted(args, device))
            ours = call(schema.NAMESPACES[backend], stage, converted(args, device))
            for j, (a, b, ref) in enumerate(zip(ours, torchs, want, strict=True)):
                assert a.shape == b.shape == ref.shape
                if a.numel():
                    assert a.isfinite().all(), f"output {j} of arguments {i} is not finite"
                    verdict.add(f"arguments {i}, output {j}", a, b, ref)
    verdict.verdict()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["even", "odd", "single"])
@pytest.mark.parametrize(("backend", "stage"), STAGES)
def test_stage_small(backend, stage, size, dtype):
    judge_stage(backend, stage, SIZES[size], dtype)


@pytest.mark.gpu
@NO_CARD
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["tiles", "wide"])
@pytest.mark.parametrize(("backend", "stage"), STAGES)
def test_stage(backend, stage, size, dtype):
    judge_stage(backend, stage, SIZES[size], dtype)


@pytest.mark.parametrize(("backend", "stage"), STAGES)
def test_opcheck(backend, stage):
    op = getattr(getattr(torch.ops, schema.NAMESPACES[backend]), stage).default
    for args in sample()[stage]:
        opcheck(op, converted(args, HOME[backend]), test_utils=UTILS)


@pytest.mark.parametrize(("backend", "stage"), STAGES)
def test_repeats_bit_for_bit(backend, stage):
    """A result that moves between runs on the same inputs is a race."""
    for args in sample(dtype=torch.bfloat16, **SIZES["tiles"])[stage]:
        device = HOME[backend]
        first = call(schema.NAMESPACES[backend], stage, converted(args, device))
        for _ in range(5):
            again = call(schema.NAMESPACES[backend], stage, converted(args, device))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


BLOCKS = [
    Case("depthwise_conv_bn_act", kernel=5, stride=2, activation="hardswish", n=2, c=21, h=15, w=11),
    Case("pointwise_conv_bn_act", n=1, c=17, o=9, h=13, w=7),
    Case("pointwise_conv_bn_act_pool", activation="hardswish", n=3, c=17, o=21, h=5, w=7),
    Case("separable_conv", stride=2, n=2, c=24, o=40, h=14, w=14),
    Case(residual=True, n=2, c=16, e=96, h=14, w=14),
    Case(stride=2, kernel=5, activation="hardswish", n=3, c=13, e=37, o=21, h=17, w=9),
    Case(excite=True, kernel=5, activation="hardswish", n=2, c=16, e=64, o=24, h=14, w=14),
]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_block(case, dtype, device):
    """Every whole backend of the device, and the reference there: output, gradients, running statistics."""
    storage = dtype or torch.float32
    judge(lambda: rounded(case, storage, device), storage, dtype)


def block_modes(case=None, device="cuda"):
    """Whole (backend, mode) of a device; the reference stands in where there is none."""
    found = [pair for pair in fused_modes(case or Case(), compiled=True, device=device) if pair[0] != "reference"]
    return found or [("reference", "chain"), ("reference", "algebraic")]


@pytest.mark.parametrize("device", DEVICES)
def test_block_runs_its_own_stages(device):
    for backend, mode in block_modes(device=device):
        inputs = Inputs(Case(residual=True, excite=True), torch.float32, device)
        with mk.count_stages() as counts:
            step(inputs, backend, mode)
        assert counts and {label.split("::")[0] for label in counts} == {schema.NAMESPACES[backend]}


@pytest.mark.gpu
@NO_CARD
@pytest.mark.parametrize(("backend", "stage"), STAGES)
def test_stage_on_a_side_stream(backend, stage):
    """The kernels wait for what was enqueued on the current stream before them: the inputs arrive there late."""
    if HOME[backend] != "cuda":
        pytest.skip("a stage of the CPU")
    for args in sample(**SIZES["even"])[stage]:
        source = converted(args, "cuda")
        want = call(schema.NAMESPACES[backend], stage, converted(args, "cuda"))
        late = [torch.full_like(a, 77) if isinstance(a, torch.Tensor) else a for a in source]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            for a, b in zip(late, source, strict=True):
                if isinstance(a, torch.Tensor):
                    a.copy_(b)
            got = call(schema.NAMESPACES[backend], stage, late)
        side.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@NO_CARD
@pytest.mark.parametrize(("backend", "stage"), STAGES)
def test_stage_in_a_graph(backend, stage):
    """Captured once, replayed on other values."""
    if HOME[backend] != "cuda":
        pytest.skip("a stage of the CPU")
    if stage == "update_running_stats":
        pytest.skip("it changes its inputs; test_block_in_a_graph has it")
    first, second = (sample(**SIZES["even"])[stage] for _ in range(2))
    for args, others in zip(first, second, strict=True):
        static = converted(args, "cuda")
        call(schema.NAMESPACES[backend], stage, static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call(schema.NAMESPACES[backend], stage, static)
        fresh = converted(others, "cuda")
        for a, b in zip(static, fresh, strict=True):
            if isinstance(a, torch.Tensor):
                a.copy_(b)
        graph.replay()
        torch.cuda.synchronize()
        want = call(schema.NAMESPACES[backend], stage, fresh)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@NO_CARD
@pytest.mark.parametrize("mode", ["chain", "algebraic"])
def test_block_in_a_graph(mode):
    """Forward, backward and running statistics of a block, captured on a side stream as torch asks."""
    whole = [backend for backend, m in block_modes() if m == mode]
    if not whole:
        pytest.skip(f"no whole backend has mode {mode}")
    for backend in whole:
        inputs = Inputs(Case(residual=True, n=4, c=16, e=48, h=14, w=14), torch.float32, "cuda")
        twin = Inputs(inputs.case, torch.float32, "cuda")
        leaves = list(inputs.leaves.values())
        upstream = torch.randn_like(inputs.x)
        result = {}

        def run(inputs=inputs, leaves=leaves, upstream=upstream, result=result, backend=backend):
            result.clear()  # and with it the last call's autograd graph
            with mk.backend(backend, mode):
                out = inputs.call()
            result["grads"], result["out"] = torch.autograd.grad(out, leaves, upstream), out.detach()

        torch.cuda.synchronize()
        with timing.stream(inputs.x.device):
            run()
        replay = timing.capture(run, inputs.x.device)
        with torch.no_grad():
            for a, b in zip(inputs.leaves.values(), twin.leaves.values(), strict=True):
                a.copy_(b)
            for a, b in zip(inputs.bns, twin.bns, strict=True):
                a.load_state_dict(b.state_dict())
        replay()
        torch.cuda.synchronize()
        with mk.backend(backend, mode):
            out = twin.call()
        want = (out, *torch.autograd.grad(out, list(twin.leaves.values()), upstream))
        for a, b in zip((result["out"], *result["grads"]), want, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(inputs.bns, twin.bns, strict=True):
            for (name, got), expected in zip(a.named_buffers(), b.buffers(), strict=True):
                torch.testing.assert_close(got, expected, msg=name)


@pytest.mark.gpu
@NO_CARD
@pytest.mark.parametrize(("backend", "mode"), block_modes())
def test_reduce_overhead(backend, mode):
    """torch.compile's own CUDA graphs: training steps with moving running statistics as without a compiler."""
    inputs = Inputs(Case(residual=True, n=4, c=16, e=48, h=14, w=14), torch.float32, "cuda")
    twin = Inputs(inputs.case, torch.float32, "cuda")
    with torch.no_grad():
        for a, b in zip(inputs.leaves.values(), twin.leaves.values(), strict=True):
            b.copy_(a)
    upstream = torch.randn_like(inputs.x)
    with mk.backend(backend, mode):
        compiled = torch.compile(inputs.call, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):  # compiled, warmed up, captured, replayed
            torch.compiler.cudagraph_mark_step_begin()
            pairs = []
            for call, leaves in ((compiled, inputs.leaves), (twin.call, twin.leaves)):
                out = call()
                grads = torch.autograd.grad(out, list(leaves.values()), upstream)
                pairs.append([t.detach().clone() for t in (out, *grads)])
            names = ["out", *leaves]
            # to the scale of a tensor: a weight gradient's small values are sums of large ones
            assert_same(*(dict(zip(names, tensors, strict=True)) for tensors in pairs), tolerance=1e-5)
    for a, b in zip(inputs.bns, twin.bns, strict=True):
        assert_same(dict(a.named_buffers()), dict(b.named_buffers()), tolerance=1e-5)


@pytest.mark.gpu
@NO_CARD
@pytest.mark.parametrize(("backend", "stage"), STAGES)
def test_stage_on_another_device(backend, stage):
    """The current device is not the input's: the kernel must run on the input's."""
    if HOME[backend] != "cuda":
        pytest.skip("a stage of the CPU")
    if torch.cuda.device_count() < 2:
        pytest.skip("one card only")
    for args in sample(**SIZES["even"])[stage]:
        want = call(schema.NAMESPACES[backend], stage, converted(args, "cuda:0"))
        with torch.cuda.device(0):
            got = call(schema.NAMESPACES[backend], stage, converted(args, "cuda:1"))
        for a, b in zip(got, want, strict=True):
            assert a.device == torch.device("cuda:1")
            assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.gpu
@NO_CARD
@pytest.mark.skipif(not backends.implemented("triton"), reason="no triton")
@pytest.mark.parametrize("key", [("pointwise", "wide", 4), ("elementwise", "any", 2)], ids=str)
def test_search_for_configurations(key):
    """Candidates launch from graphs that share their memory, and what is chosen computes rightly."""
    layer, dtype = shapes.Layer("pointwise", 24, 28, 28, 72, 1, 1, "relu6"), DTYPES[key[2] == 2]
    card, options = ("cuda:0", backends.triton.card(0)[1]), {"batch": 8, "seconds": 0.1}
    found = tuning.tune(key, [layer], torch.device(card[0]), None, card[1], [dtype], **options)
    assert found.before_us >= found.after_us > 0 and found.failed < found.tried
    with torch.no_grad():
        bench = tuning.Bench(key, [layer], torch.device(card[0]), [dtype], **options)
        assert bench.right(found.before) and bench.right(found.after) and not configs.given()
