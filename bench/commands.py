"""The phases around the measurements: build, test, sanitize, tune."""

import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from mnet_kernels import backends
from mnet_kernels.backends.triton import measured
from mnet_kernels.bench import tune_problems, tuning
from mnet_kernels.bench.environment import ROOT

TOOLS = ("memcheck", "racecheck")
SANITIZER_FOUND = 86  # compute-sanitizer's exit code for errors that it found


def _run(session, command, log, env=None):
    """Run a command within the session's time, its output into ``log``; returns (exit code or None, seconds)."""
    start = time.perf_counter()
    with open(log, "wb") as file:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=dict(os.environ, **(env or {})), stdout=file, stderr=subprocess.STDOUT,
                timeout=max(1.0, session.remaining()),
            )  # fmt: skip
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    return code, time.perf_counter() - start


def _tail(log, lines=40):
    return "\n".join(Path(log).read_text(errors="replace").splitlines()[-lines:])


def _log(session, name):
    return Path(session.args.out) / f"{name}.log"


def _extensions():
    return list((ROOT / "mnet_kernels").glob("_C*.so"))


def build(session):
    """Compile the extension in place; the row tells what it holds, how long it took and how large it is."""
    log = _log(session, "build")
    # The module of an earlier build must not answer for this one.
    for old in _extensions():
        old.unlink()
    code, seconds = _run(session, [sys.executable, "setup.py", "build_ext", "--inplace"], log)
    key = {"part": "build"}
    if code != 0:
        print(_tail(log))
        session.results.add(key, error=f"exit code {code}", seconds=seconds)
        session.fail("build", f"exit code {code} after {seconds:.0f} s; see {log}")
        return
    program = "import json, mnet_kernels; print(json.dumps(mnet_kernels.build_info()))"
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    info = json.loads(told.stdout) if told.returncode == 0 else {"error": told.stderr.strip()[-500:]}
    size = sum(path.stat().st_size for path in _extensions())
    built = info.get("extension", {})
    if not built.get("extension") or (session.device.type == "cuda" and not built.get("arch_list")):
        reason = built.get("reason") or info.get("error") or "the extension holds no CUDA kernels; was nvcc found?"
        print(_tail(log))
        session.results.add(key, error=reason, seconds=seconds, build_info=info)
        session.fail("build", reason)
        return
    # A second build is worth its own time: not kept from the first.
    session.results.rows = [row for row in session.results.rows if row["key"] != key]
    session.results.add(key, seconds=seconds, bytes=size, build_info=info)
    stages = {name: len(b["stages"]) for name, b in info["backends"].items()}
    session.say(f"built in {seconds:.0f} s, {size / 1e6:.1f} MB; stages: {stages}; {built}")


def _summary(report):
    """Counts and failures of a JUnit report."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failures, skips = [], {}
    for case in suite.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        for child in case:
            if child.tag in ("failure", "error"):
                failures.append({"test": name, "message": (child.get("message") or "")[:500]})
            elif child.tag == "skipped":
                skips[child.get("message")] = skips.get(child.get("message"), 0) + 1
    return {**counts, "failed": failures, "skipped_because": skips}


def test(session):
    """``pytest -m gpu``; on the CPU (a rehearsal) the same files without the card's tests."""
    marker = "gpu" if session.device.type == "cuda" else "not gpu"
    where = "tests" if session.device.type == "cuda" else "tests/test_gpu.py"
    log, report = _log(session, "test"), Path(session.args.out) / "test.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", where, "-m", marker, "-q", f"--junitxml={report.resolve()}"]
    code, seconds = _run(session, [*command, "--continue-on-collection-errors", "-p", "no:cacheprovider"], log)
    print(_tail(log))
    values = {"seconds": seconds, "exit_code": code} | (_summary(report) if report.exists() else {})
    if code is None:
        session.unfinished.append("the test run, which must fit one call")
        values["error"] = "out of time"
    elif code != 0:
        failed = ", ".join(f["test"] for f in values.get("failed", [])[:5])
        values["error"] = f"exit code {code}: {failed or _tail(log, 1)}"
        session.fail("test", values["error"])
    key = {"part": "test"}
    session.results.rows = [row for row in session.results.rows if row["key"] != key]
    session.results.add(key, **values)


def sanitize(session):
    """The stages' small cases (tests/test_gpu.py, ``small``) under each of compute-sanitizer's tools."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None or session.device.type != "cuda":
        why = "compute-sanitizer is not installed" if program is None else "it needs a CUDA card"
        session.say(f"sanitize is skipped: {why}")
        session.results.add({"part": "sanitize"}, skipped=why)
        return
    for tool in TOOLS:
        key = {"part": tool}
        if session.results.find(key):
            continue
        if not session.time_for(tool, 60):
            return
        log = _log(session, tool)
        prefix = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), "--target-processes", "all"]
        command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-k", "small", "-q", "-x"]
        # torch's allocator would hide accesses beyond a tensor inside its large blocks
        code, seconds = _run(session, prefix + command, log, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if code == 0:
            session.say(f"{tool}: nothing found, {seconds:.0f} s: {_tail(log, 2)}")
            session.results.add(key, seconds=seconds, summary=_tail(log, 3))
            continue
        print(_tail(log))
        found = {None: "out of time", SANITIZER_FOUND: "errors found"}.get(code, f"exit code {code}")
        session.results.add(key, error=found, seconds=seconds, summary=_tail(log, 10))
        session.fail(tool, f"{found}; see {log}")


def tune(session):
    """What ``python -m mnet_kernels.tune`` does, into OUT_DIR/tune: with MNET_TUNE_DIR=OUT_DIR/tune it is used."""
    device, args = session.device, session.args
    why = backends.why_unavailable("triton", device)
    if why or device.type != "cuda":
        why = why or "it needs a CUDA card"
        session.say(f"tune is skipped: {why}")
        session.results.add({"part": "tune"}, skipped=why)
        return
    card, capability = backends.triton.card(device)
    file = Path(args.out) / "tune" / measured.path(card).name
    known = tune_problems.layers(args.models, args.resolution)
    for kernel, shape, size in tuning.table_keys():
        key = {"part": "tune", "kernel": kernel, "shape": shape, "bytes": size}
        if session.results.find(key):
            continue
        name = f"{kernel} {shape} {size}"
        if not session.time_for(name, 30):
            return

        def search(key=key, row=(kernel, shape, size)):
            dtypes = [torch.float32 if row[2] == 4 else torch.bfloat16]
            layers = tune_problems.of_class(*row[:2], known)
            outcome = tuning.tune(row, layers, device, card, capability, dtypes, batch=args.batch, seconds=args.seconds)
            tuning.write(file, {row: outcome}, card, capability)
            session.say(tuning.table({row: outcome}).splitlines()[-1])
            found = outcome._asdict() | {k: getattr(outcome, k)._asdict() for k in ("before", "after")}
            session.results.add(key, **found)

        session.part(name, search)
