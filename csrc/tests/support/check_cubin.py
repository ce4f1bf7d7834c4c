"""Checks what nvcc made of one .cu file: X.cubin, with the report of `ptxas -v` beside it as X.cubin.log.

No kernel may spill, use local memory or exceed its bounds of registers and shared memory (kernel_bounds.txt).  The SASS
is read too where there is a cuobjdump (the toolkit's, or the one in triton's wheel): one named by --vectorized must
load and store 16 bytes at a time, one named by --vector-loads must load so, and one whose mangled name matches
--instructions PATTERN=OPCODE,... must hold each of the opcodes.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

BOUNDS = Path(__file__).with_name("kernel_bounds.txt")


def find_cuobjdump(nvcc):
    found = shutil.which("cuobjdump", path=str(nvcc.parent)) or shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return found


def resources(report):
    """(kernel, spilled and stack bytes, registers, bytes of shared memory) of every kernel in ptxas -v's report."""
    pattern = (
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?"
    )
    # Every kernel by itself: one without shared memory must not be given that of the next.
    for part in re.split(r"(?=Function properties for )", report):
        for name, stack, stores, loads, registers, shared in re.findall(pattern, part, re.DOTALL):
            yield name, int(stack) + int(stores) + int(loads), int(registers), int(shared or 0)


def read_bounds(path):
    """kernel -> (registers, bytes of shared memory)."""
    rows = (line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#"))
    return {name: (int(registers), int(shared)) for name, registers, shared in rows}


def beyond_bounds(kernels, bounds):
    for name, _, registers, shared in kernels:
        # A mangled name holds the kernel's own after its length.
        found = [kernel for kernel in bounds if re.search(rf"(?<!\d){len(kernel)}{kernel}", name)]
        if len(found) != 1:
            yield f"{name}: {len(found)} bounds in {BOUNDS.name}, expected one; add the kernel there"
            continue
        most_registers, most_shared = bounds[found[0]]
        if registers > most_registers:
            yield f"{name}: {registers} registers, at most {most_registers} are allowed"
        if shared > most_shared:
            yield f"{name}: {shared} bytes of shared memory, at most {most_shared} are allowed"


def instructions(sass):
    """kernel -> its SASS text."""
    parts = re.split(r"^\s*Function : (\w+)\s*$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def check(sass, vectorized, vector_loads, required):
    for name, text in sass.items():
        local = re.findall(r"\b(?:LDL|STL)\b[.\w]*", text)
        if local:
            yield f"{name}: {len(local)} accesses to local memory"
        for opcode, kernels in (("LDG", vectorized + vector_loads), ("STG", vectorized)):
            wanted = any(kernel in name for kernel in kernels)
            if wanted and not re.search(rf"\b{opcode}\.E\.(?:\w+\.)*128\b", text):
                yield f"{name}: no 128-bit {opcode}"
        for pattern, opcodes in required:
            if re.search(pattern, name):
                for opcode in opcodes:
                    if not re.search(rf"\b{opcode}\b", text):
                        yield f"{name}: no {opcode}"
    for kernel in [*vectorized, *vector_loads, *(pattern for pattern, _ in required)]:
        if not any(re.search(kernel, name) for name in sass):
            yield f"{kernel}: no such kernel"


def rule(text):
    pattern, _, opcodes = text.rpartition("=")
    return pattern, opcodes.split(",")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nvcc", type=Path, required=True)
    parser.add_argument("--vectorized", nargs="*", default=[], help="kernels that must move 16 bytes at a time")
    parser.add_argument("--vector-loads", nargs="*", default=[], help="kernels that must load 16 bytes at a time")
    parser.add_argument("--instructions", nargs="*", default=[], type=rule, metavar="PATTERN=OPCODE,...")
    parser.add_argument("cubin", type=Path)
    args = parser.parse_args()
    cuobjdump = find_cuobjdump(args.nvcc)
    sass = {}
    if cuobjdump:
        text = subprocess.run([cuobjdump, "-sass", args.cubin], capture_output=True, text=True, check=True).stdout
        sass = instructions(text)
    report = args.cubin.with_name(args.cubin.name + ".log").read_text()
    kernels = list(resources(report))
    problems = [f"{name}: {spilled} bytes spilled or on the stack" for name, spilled, _, _ in kernels if spilled]
    problems += beyond_bounds(kernels, read_bounds(BOUNDS))
    problems += check(sass, args.vectorized, args.vector_loads, args.instructions) if cuobjdump else []
    for name, _, registers, shared in kernels:
        print(f"{registers:4} registers {shared:6} bytes  {name}")
    print(f"{args.cubin.name}: {len(kernels)} kernels, SASS {'read' if cuobjdump else 'not read'}")
    if not kernels:
        problems.append("ptxas reported no kernel")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
