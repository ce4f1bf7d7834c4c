"""Checks what nvcc made of one .cu file: X.cubin, with the report of `ptxas -v` beside it as X.cubin.log.

No kernel may spill or use local memory.  The SASS is read too where there is a cuobjdump (the toolkit's, or the one in
triton's wheel): a kernel named by --vectorized must load and store 16 bytes at a time, one named by --vector-loads must
load so, and one whose mangled name matches --instructions PATTERN=OPCODE,... must hold each of the opcodes.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path


def find_cuobjdump(nvcc):
    found = shutil.which("cuobjdump", path=str(nvcc.parent)) or shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return found


def resources(report):
    """(kernel, spilled and stack bytes, registers) of every kernel in ptxas -v's report."""
    pattern = (
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    for name, stack, stores, loads, registers in re.findall(pattern, report, re.DOTALL):
        yield name, int(stack) + int(stores) + int(loads), int(registers)


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
    problems = [f"{name}: {spilled} bytes spilled or on the stack" for name, spilled, _ in kernels if spilled]
    problems += check(sass, args.vectorized, args.vector_loads, args.instructions) if cuobjdump else []
    for name, _, registers in kernels:
        print(f"{registers:4} registers  {name}")
    print(f"{args.cubin.name}: {len(kernels)} kernels, SASS {'read' if cuobjdump else 'not read'}")
    if not kernels:
        problems.append("ptxas reported no kernel")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
