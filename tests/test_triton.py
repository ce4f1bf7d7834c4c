"""The Triton backend where there is no card: its kernels in the interpreter, compiled ahead of time, and with bugs.

Nothing here launches a kernel on a GPU.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnet_kernels import backends

if backends.triton.why_missing():
    pytest.skip(backends.triton.why_missing(), allow_module_level=True)

triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mnet_kernels.backends.triton import (  # noqa: E402
    combine,
    configs,
    depthwise,
    finalize,
    gram,
    launch,
    normalize,
    pointwise,
    stem,
)  # fmt: skip

TESTS = Path(__file__).parent
CPU = torch.device("cpu")
SLOW = pytest.mark.slow


# ---- availability ---------------------------------------------------------------------------------------------------


def reason(monkeypatch, spec=True, version="3.8.0"):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if spec else None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    return backends.triton.why_missing.__wrapped__()


def test_the_truth_about_the_installation(monkeypatch):
    assert reason(monkeypatch) is None
    assert reason(monkeypatch, version="3.10.0+git1") is None
    assert re.search("not installed.*pip install", reason(monkeypatch, spec=False))
    assert re.search("needs triton 3.6 or newer and 3.5.1 is installed", reason(monkeypatch, version="3.5.1"))
    assert re.search("cannot be read", reason(monkeypatch, version="unknown"))


def test_without_triton_no_stage_is_implemented(monkeypatch):
    monkeypatch.setattr(backends.triton, "why_missing", lambda: "triton is not installed")
    assert backends.implemented("triton") == frozenset()
    assert backends.why_unavailable("triton", torch.device("cuda")) == "triton is not installed"


def test_the_truth_about_the_device(monkeypatch):
    assert backends.implemented("triton") >= backends.MODE_STAGES["chain"] | backends.STEM_STAGES
    assert "runs on cuda tensors" in backends.why_unavailable("triton", CPU)
    cuda = torch.device("cuda", 0)
    for capability, why in (((7, 5), "needs? compute capability 8.0.*7.5"), ((8, 0), None), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        found = backends.why_unavailable("triton", cuda)
        assert found is None if why is None else re.search(why, found)


def test_tf32_where_torchs_convolution_would_use_it(monkeypatch):
    conv, x = torch.backends.cudnn.conv, torch.empty(1)
    before = conv.fp32_precision
    try:
        for precision, hip, want in (("tf32", None, "tf32"), ("tf32", "6.4", "ieee"), ("ieee", None, "ieee")):
            conv.fp32_precision = precision
            monkeypatch.setattr(torch.version, "hip", hip)  # AMD's cards have none
            assert launch.dot_precision(x) == want and launch.dot_precision(x.bfloat16()) == "ieee"
    finally:
        conv.fp32_precision = before


def test_amds_cards_have_rows_of_their_own(monkeypatch):
    """Their capabilities are other numbers."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    for hip, capability in ((None, (9, 4)), ("6.4", configs.AMD)):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert backends.triton.card(0) == ("AMD Instinct MI300X", capability)
        row = configs.lookup("expand_depthwise", "k3", 4, capability)
        assert row == configs.TABLE["expand_depthwise", "k3", 4, configs.AMD if hip else (9, 0)]


# ---- in the interpreter ---------------------------------------------------------------------------------------------


def interpreted(*arguments, package=TESTS.parent, timeout=900):
    environment = os.environ | {"TRITON_INTERPRET": "1", "MNET_NO_EXT": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(package), str(TESTS), os.environ.get("PYTHONPATH", "")])
    # One seed: two draws, all that the interpreter's speed allows, are too few for the pass rule on fresh inputs.
    environment["MNET_TEST_SEED"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(package)]
    command += [str(TESTS / "triton_interpreted.py"), *arguments]
    return subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, timeout=timeout)


def test_interpreted():
    done = interpreted()
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


# (file, what stands there, the bug, the test that must notice it)
PLANTED = {
    "halo": ("depthwise.py", "row * STRIDE - PAD + i, column", "row * STRIDE - PAD + i + 1, column", "depthwise-"),
    "padding": ("depthwise.py", "v = tl.where(valid, z, 0.0)", "v = z", "depthwise-"),
    "twice": ("depthwise.py", "own = tl.where(row >= begin, dy, 0.0)", "own = dy", "depthwise_backward-"),
    "mask": ("device.py", "d = tl.where(valid, v - shift[None, :], 0.0)", "d = v - shift[None, :]", "pointwise-"),
    "border": ("stem.py", "% out_width * STRIDE - 1", "% out_width * STRIDE", "stem-"),
    "tail": ("gram.py", "left = tl.where(valid, v - centre_i[None, :], 0.0)", "left = v - centre_i[None, :]", "gram-"),
    "drift": ("gram.py", "centre_j - mean_j + rest_j", "centre_j - mean_i + rest_j", "gram-"),
    "expanded": ("depthwise.py", "return tl.where(valid, z, 0.0)", "return z", "expand_depthwise-"),
    "chunk": ("device.py", "tl.minimum(begin + rows, (segment", "tl.minimum(begin + rows - 1, (segment", "pointwise-"),
}


@pytest.mark.parametrize("bug", [b if b in ("halo", "mask") else pytest.param(b, marks=SLOW) for b in PLANTED])
def test_a_planted_bug_is_noticed(bug, tmp_path):
    file, right, wrong, test = PLANTED[bug]
    shutil.copytree(TESTS.parent / "mnet_kernels", tmp_path / "mnet_kernels", ignore=shutil.ignore_patterns("*.so"))
    path = tmp_path / "mnet_kernels" / "backends" / "triton" / file
    text = path.read_text()
    assert text.count(right) == 1, f"{right!r} is not in {file} once: adapt the planted bug"
    path.write_text(text.replace(right, wrong))
    done = interpreted("-k", f"test_stage and {test}torch.float32", package=tmp_path)
    assert done.returncode == 1 and "from the reference" in done.stdout, done.stdout[-2000:]


# ---- compiled ahead of time -----------------------------------------------------------------------------------------

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# of a block; 8.0's rows also serve 8.6 and 8.9, which have 99 KiB
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, "gfx942": 64 * 1024}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FLOAT32 = {
    "shift", "expand_shift", "means", "products", "gram", "out_mean",
    "bn", "y_bn", "coef", "gate", "offset", "partials", "sum_partials", "dw_partials", "moments", "gamma", "beta",
    "sums", "running_mean", "running_var", "mean", "var", "dgamma", "dbeta",
}  # fmt: skip
MAPS = {"x", "weight", "expand_weight", "y", "grad", "gx", "dy", "residual"}


def compiled(kernel, constants, dtype, arch, warps, stages):
    """Compile one kernel for one card; its resources (registers, stack = spills, shared memory)."""
    storage, signature = NAMES[dtype], {}
    tables = kernel.fn.__module__.endswith(("finalize", "combine"))
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in MAPS or (name == "out" and not tables):
            signature[name] = f"*{storage}"
        elif name in FLOAT32 or name == "out":
            signature[name] = "*fp32"
        else:
            signature[name] = {"batches": "*i64", "eps": "fp32", "momentum": "fp32"}.get(name, "i32")
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in pointers}
    )
    options = {"num_warps": warps, "num_stages": stages, **launch.FIXED}
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=options)


def check(binary, arch, tmp_path):
    assert binary.metadata.shared <= SHARED_LIMIT[arch]
    if isinstance(arch, str):
        # what is called a spill of scalar registers goes to vector registers' lanes
        usage = dict(re.findall(r"\.(vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", binary.asm["amdgcn"]))
        assert usage == {"vgpr_spill_count": "0", "private_segment_fixed_size": "0"}
        return
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    command = [BIN / "cuobjdump", "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"REG:\d+", usage), usage
    assert re.findall(r"STACK:(\d+)", usage) == ["0"] and re.findall(r"LOCAL:(\d+)", usage) == ["0"], usage


def row_options(row, *names):
    return dict(zip(names, row[:3], strict=False)), row.warps, row.stages


def pointwise_variant(kernel, shape, row, dtype, gated):
    names = {
        "pointwise": ("BLOCK_P", "BLOCK_E", "BLOCK_C"),
        "pointwise_dgrad": ("BLOCK_P", "BLOCK_C", "BLOCK_E"),
        "pointwise_wgrad": ("BLOCK_E", "BLOCK_C", "BLOCK_P"),
    }[kernel]
    if kernel == "pointwise_wgrad":
        row = pointwise.wgrad_row(row, gated, pooled=gated)
    blocks, warps, stages = row_options(row, *names)
    flags = {"ALIGN_IN": 8, "ALIGN_OUT": 16, "ACT": 3, "NORMALIZED": True, "GATED": gated, **blocks}
    flags["PRECISION"] = "tf32" if dtype == torch.float32 and gated else "ieee"
    if not gated and kernel != "pointwise_dgrad":
        flags["gate"] = None
    if kernel == "pointwise":
        flags["MOMENTS"] = True
    else:
        flags |= {"Y_ACT": 2, "OFFSET": gated} | ({"grad": None} if gated else {"offset": None})
    if kernel == "pointwise_dgrad":
        flags |= {"RESIDUAL": False, "residual": None, "STORE": True, "SUMS": True}
    return getattr(pointwise, f"{kernel}_kernel"), flags, warps, stages


def depthwise_variant(kernel, shape, row, dtype, stride):
    blocks, warps, stages = row_options(row, "BLOCK_W", "BLOCK_C")
    flags = {"ALIGN": 8, "ACT": 3, "NORMALIZED": True, "KERNEL": int(shape[1:]), "STRIDE": stride, **blocks}
    if kernel != "depthwise_backward":
        expanded = kernel == "expand_depthwise"
        flags |= {"MOMENTS": True, "EXPANDED": expanded, "ALIGN_IN": 8, "BLOCK_K": row.depth}
        flags["PRECISION"] = "tf32" if dtype == torch.float32 and stride == 1 else "ieee"
        unused = {} if expanded else {"expand_shift": None, "expand_weight": None}
        return depthwise.depthwise_kernel, flags | unused, warps, stages
    flags |= {"Y_ACT": 3, "GATED": True, "OFFSET": True, "RESIDUAL": False, "residual": None}
    return depthwise.depthwise_backward_kernel, flags | {"NEEDS_DX": True, "NEEDS_DW": True}, warps, stages


def stem_variant(kernel, shape, row, dtype, stride):
    names = ("BLOCK_P", "BLOCK_E", "BLOCK_T") if kernel == "stem" else ("BLOCK_E", "BLOCK_T", "BLOCK_P")
    blocks, warps, stages = row_options(row, *names)
    flags = {"ALIGN_OUT": 16, "STRIDE": stride, "PRECISION": "ieee" if dtype != torch.float32 else "tf32", **blocks}
    if kernel == "stem":
        return stem.stem_kernel, flags | {"MOMENTS": True}, warps, stages
    return stem.stem_backward_kernel, flags | {"Y_ACT": 3, "NEEDS_DY": True, "NEEDS_DW": True}, warps, stages


def gram_variant(kernel, shape, row, dtype, normalized):
    blocks, warps, stages = row_options(row, "BLOCK_P", "BLOCK_C")
    flags = {"ALIGN": 8, "ACT": 3 if normalized else 0, "NORMALIZED": normalized, "RESIDUAL": normalized, **blocks}
    # one block is what occurs (up to 64 channels); of several, the variant that reads a map
    unused = {} if normalized else {"bn": None, "residual": None, "out": None}
    return gram.gram_kernel, flags | {"ONE_BLOCK": normalized, "PRECISION": "tf32x3"} | unused, warps, stages


def elementwise_variant(kernel, shape, row, dtype, function):
    blocks, warps, stages = row_options(row, "BLOCK_P", "BLOCK_C")
    flags = {"ALIGN": 8, "ACT": 3, **blocks}
    return function, flags | ({"RESIDUAL": True} if function is normalize.normalize_kernel else {}), warps, stages


VARIANTS = {
    "pointwise": (pointwise_variant, (False, True)),
    "depthwise": (depthwise_variant, (1, 2)),
    "expand": (depthwise_variant, (1, 2)),
    "stem": (stem_variant, (1, 2)),
    "gram": (gram_variant, (False, True)),
    "elementwise": (
        elementwise_variant,
        (normalize.normalize_kernel, normalize.normalize_backward_kernel, normalize.squeeze_kernel),
    ),
}
ARCHITECTURES = {(8, 0): 80, (9, 0): 90, configs.AMD: "gfx942"}
# A row serves both 16-bit dtypes; of float16 the oldest cards' are enough.
ROWS = [
    (kernel, shape, dtype, ARCHITECTURES[capability], i)
    for kernel, shape, size, capability in configs.TABLE
    for dtype in NAMES
    for i in range(len(VARIANTS[kernel.split("_")[0]][1]))
    if capability > (0, 0) and size == dtype.itemsize and (dtype != torch.float16 or capability == (8, 0))
]
# By default one variant of every kernel in bfloat16; everything else is slow.
DEFAULT = [
    row for row in ROWS
    if row[2] == torch.bfloat16 and (row[1], row[3], row[4]) in {("wide", 90, 0), ("k5", 80, 0), ("any", 90, 2)}
]  # fmt: skip


def mark(row):
    name = "-".join(str(part).removeprefix("torch.") for part in row)
    return pytest.param(*row, id=name, marks=() if row in DEFAULT else SLOW)


@pytest.mark.parametrize("kernel, shape, dtype, arch, variant", [mark(row) for row in ROWS])
def test_every_row_of_the_table_compiles_without_spills(kernel, shape, dtype, arch, variant, tmp_path):
    if arch == "gfx942" and "amd" not in triton.backends.backends:
        pytest.skip("this triton does not compile for AMD's cards")
    capability = next(key for key, value in ARCHITECTURES.items() if value == arch)
    make, variants = VARIANTS[kernel.split("_")[0]]
    row = configs.lookup(kernel, shape, dtype.itemsize, capability)
    function, flags, warps, stages = make(kernel, shape, row, dtype, variants[variant])
    if kernel == "gram" and arch == "gfx942":
        flags["PRECISION"] = "ieee"
    check(compiled(function, flags, dtype, arch, warps, stages), arch, tmp_path)


TABLES = {
    "finalize": (finalize.finalize_kernel, {"HAS_GAMMA": True, "HAS_BETA": True, "BLOCK": 256}),
    "finalize_backward": (finalize.finalize_backward_kernel, {"BATCH_STATS": True, "BLOCK": 256}),
    "update_running_stats": (finalize.update_running_stats_kernel, {"AVERAGE": True, "BLOCK": 256}),
    "expand_finalize": (
        finalize.expand_finalize_kernel,
        {"HAS_GAMMA": True, "HAS_BETA": True, "BLOCK": finalize._EXPANDED, "BLOCK_C": finalize._INPUTS},
    ),
    "combine_gram": (combine.combine_gram_kernel, {"DTYPE": tl.bfloat16, "BLOCK_K": 16, "BLOCK_C": 64}),
    "combine_sums": (combine.combine_sums_kernel, {"BLOCK_K": 16, "BLOCK_C": 64}),
    "combine_moments": (combine.combine_moments_kernel, {"BLOCK_K": 16, "BLOCK_C": 64}),
}


@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=SLOW), pytest.param("gfx942", marks=SLOW)])
@pytest.mark.parametrize("name", TABLES)
def test_the_kernels_of_tables_compile(name, arch, tmp_path):
    if arch == "gfx942" and "amd" not in triton.backends.backends:
        pytest.skip("this triton does not compile for AMD's cards")
    function, flags = TABLES[name]
    check(compiled(function, flags, torch.float32, arch, 4, 1), arch, tmp_path)


def test_the_table_serves_every_card():
    for (kernel, shape, size, _), capability in itertools.product(configs.TABLE, [(8, 0), (8, 9), (9, 0), (12, 0)]):
        assert configs.lookup(kernel, shape, size, capability) in configs.TABLE.values()
    assert configs.lookup("pointwise", "wide", 2, (8, 9)) == configs.TABLE["pointwise", "wide", 2, (8, 0)]


def test_chunks_cover_the_positions():
    for segments, rows, block, blocks in itertools.product((1, 3), (1, 127, 128, 129, 10**6), (16, 128), (1, 40)):
        cut = launch.chunks(segments, rows, block, blocks, (9, 0))
        assert cut.count == segments * cut.per_segment and cut.rows % block == 0
        assert (cut.per_segment - 1) * cut.rows < rows <= cut.per_segment * cut.rows
