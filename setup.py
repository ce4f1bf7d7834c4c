"""Builds mnet_kernels._C when it can; says what it built.

The decisions are plain functions (tests/test_packaging.py calls them); ``main`` carries them out.  Environment:

    MNET_NO_EXT=1         pure Python, no compiled extension (also what happens, with a notice, without a C++ compiler)
    MNET_NO_CUDA=1        CPU kernels only
    CUDA_HOME, CUDA_PATH  the CUDA toolkit; otherwise the one nvcc on PATH belongs to, otherwise /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  architectures, default "8.0;9.0+PTX"; those below 8.0 are left out
    MAX_JOBS              parallel compilations, default min(cores, free memory / 4 GB)
    CXX                   the C++ compiler

The CUDA kernels are built whenever torch is a CUDA build and a toolkit is found: no GPU is needed to build them.  A
compile error fails the installation.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = "mnet_kernels"
DEFAULT_TOOLKIT = Path("/usr/local/cuda")
DEFAULT_ARCH_LIST = "8.0;9.0+PTX"
NO_BUILD_ISOLATION = "pip install --no-build-isolation ."
BUILD_REQUIREMENTS = ("'setuptools>=77'", "wheel", "pybind11", "ninja")

MIN_ARCHITECTURE = (8, 0)  # as backends/__init__.py: on older cards the CUDA kernels are not used


def sources(*patterns):
    """Paths relative to the project, as setuptools wants them, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


CPU_SOURCES = ["csrc/module.cpp", *sources("csrc/cpu/*.cpp")]
CUDA_SOURCES = sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp")


class BuildError(SystemExit):
    """A build that cannot go on: setuptools prints the message instead of a traceback."""


@dataclass(frozen=True)
class Plan:
    """What is going to be built, and why not more."""

    extension: bool
    cuda: bool
    reason: str = ""  # why there is no extension, or no CUDA in it
    compiler: str | None = None
    toolkit: Path | None = None
    arch_list: str = ""
    torch_version: str | None = None
    torch_cuda: str | None = None


def version():
    text = (ROOT / PACKAGE / "_version.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text).group(1)


def find_compiler(env):
    """The C++ compiler's path, or None.  CXX may carry a launcher or flags ("ccache g++")."""
    if env.get("CXX"):
        words = env["CXX"].split()
        return (
            env["CXX"] if all(shutil.which(w, path=env.get("PATH")) for w in words if not w.startswith("-")) else None
        )
    found = (shutil.which(name, path=env.get("PATH")) for name in ("c++", "g++", "clang++"))
    return next(filter(None, found), None)


def is_toolkit(root):
    """Whether root is a CUDA toolkit: nvcc and the runtime's header (pip's nvidia/cu13/include alone is none)."""
    headers = [root / "include", *root.glob("targets/*/include")]
    return (root / "bin" / "nvcc").exists() and any((h / "cuda_runtime.h").exists() for h in headers)


def nvcc_root(nvcc):
    """The toolkit an nvcc belongs to by its own word: the one on PATH may be a wrapper that lies elsewhere."""
    try:
        done = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr + done.stdout, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else None


def find_toolkit(env):
    """The CUDA toolkit's root, or None."""
    candidates = [Path(env[name]) for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    nvcc = shutil.which("nvcc", path=env.get("PATH"))
    if nvcc and not any(is_toolkit(c) for c in candidates):
        candidates += [root for root in (nvcc_root(nvcc), Path(nvcc).resolve().parent.parent) if root]
    candidates.append(DEFAULT_TOOLKIT)
    return next((c for c in candidates if is_toolkit(c)), None)


def nvcc_version(toolkit):
    """ "13.0" for a toolkit of CUDA 13.0."""
    text = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def check_cuda_version(nvcc, torch_cuda):
    if nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        raise BuildError(
            f"mnet-kernels: nvcc is CUDA {nvcc}, but torch was built with CUDA {torch_cuda}; their major versions must "
            f"agree. Point CUDA_HOME to a CUDA {torch_cuda.split('.')[0]} toolkit, or set MNET_NO_CUDA=1 to build "
            "without the CUDA kernels."
        )


def max_jobs(env, cores, free_bytes):
    wish = env.get("MAX_JOBS")
    if wish:
        if not wish.isdecimal() or int(wish) < 1:
            raise BuildError(f"mnet-kernels: MAX_JOBS must be a positive whole number, got {wish!r}.")
        return int(wish)
    return max(1, min(cores, free_bytes // (4 << 30)))


def free_memory():
    """Bytes of memory available now; where that cannot be read, enough not to be the limit."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(re.search(r"MemAvailable:\s+(\d+) kB", text).group(1)) * 1024
    except (OSError, AttributeError):
        return 1 << 40


def architectures(env):
    """TORCH_CUDA_ARCH_LIST, or the default, without the architectures the kernels are not written for."""
    wish = env.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCH_LIST
    kept = []
    for item in re.split(r"[;,\s]+", wish.strip(" ;,")):
        number = re.match(r"(\d+)\.(\d)", item)  # torch also knows names, such as Ampere
        if number is None or (int(number[1]), int(number[2])) >= MIN_ARCHITECTURE:
            kept.append(item)
    if not kept:
        raise BuildError(
            f"mnet-kernels: TORCH_CUDA_ARCH_LIST={wish!r} names no architecture of 8.0 or higher, which the CUDA "
            "kernels need. Add one, or set MNET_NO_CUDA=1 to build without the CUDA kernels."
        )
    return ";".join(kept)


def extra_cuda_includes(toolkit, site_packages):
    """Header folders of torch's own nvidia wheels, for a toolkit installed without the math libraries' headers."""
    if any((h / "cusparse.h").exists() for h in [toolkit / "include", *toolkit.glob("targets/*/include")]):
        return []
    nvidia = Path(site_packages) / "nvidia"
    return sorted(str(p) for p in [*nvidia.glob("cu*/include"), *nvidia.glob("*/include")] if p.is_dir())


def decide(env, torch_version, torch_cuda):
    """What to build for this environment and this torch."""
    plan = Plan(extension=False, cuda=False, torch_version=torch_version, torch_cuda=torch_cuda)
    if env.get("MNET_NO_EXT") == "1":
        return replace(plan, reason="MNET_NO_EXT=1")
    compiler = find_compiler(env)
    if compiler is None:
        return replace(
            plan, reason=f"no C++ compiler found ({'CXX=' + env['CXX'] if env.get('CXX') else 'c++, g++, clang++'})"
        )
    if torch_version is None:
        raise BuildError(
            "mnet-kernels: torch cannot be imported, and the extension must be built with the torch it will run with. "
            f"Install torch, then: {NO_BUILD_ISOLATION} (or set MNET_NO_EXT=1 for pure Python)."
        )
    plan = replace(plan, extension=True, compiler=compiler)
    if env.get("MNET_NO_CUDA") == "1":
        return replace(plan, reason="MNET_NO_CUDA=1")
    if torch_cuda is None:
        return replace(plan, reason="torch is not a CUDA build")
    toolkit = find_toolkit(env)
    if toolkit is None:
        return replace(plan, reason="no CUDA toolkit found; set CUDA_HOME")
    check_cuda_version(nvcc_version(toolkit), torch_cuda)
    return replace(plan, cuda=True, toolkit=toolkit, arch_list=architectures(env))


def openmp_flags(compiler):
    """Compile and link flags for at::parallel_for.

    GCC's code is compiled for OpenMP but not linked with its runtime: the symbols come from the one torch has loaded,
    so that there are never two thread pools.  clang's runtime is another one and must be linked.
    """
    if sys.platform != "linux":
        return [], []
    probe = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True)
    if "clang" not in probe.stdout:
        return ["-fopenmp"], []
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
    command = [*compiler.split(), "-fopenmp", "-x", "c++", "-", "-o", os.devnull]
    works = subprocess.run(command, input=program, capture_output=True, text=True).returncode == 0
    return (["-fopenmp"], ["-fopenmp"]) if works else ([], [])


def manifest(plan):
    """The contents of _build.json, which compiled.py reads before it dares to load the extension."""
    fields = asdict(plan)
    fields["toolkit"] = plan.toolkit and nvcc_version(plan.toolkit)
    fields["version"] = version()
    return fields


def summary(plan):
    if not plan.extension:
        return f"mnet-kernels {version()}: pure Python, no compiled extension ({plan.reason})."
    cuda = f"CUDA kernels for {plan.arch_list}" if plan.cuda else f"no CUDA kernels ({plan.reason})"
    return f"mnet-kernels {version()}: compiled CPU kernels, {cuda}; torch {plan.torch_version}, {plan.compiler}."


def write_manifest(plan, folder):
    path = Path(folder) / PACKAGE / "_build.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest(plan), indent=2, sort_keys=True) + "\n")


def import_torch():
    """(version, CUDA version) of the torch to build against; (None, None) without one."""
    try:
        import torch
    except ImportError:
        return None, None
    return torch.__version__, torch.version.cuda


def extension(plan):
    """The setuptools Extension of a plan.  CUDA_HOME must be set: torch's module reads it when first imported."""
    try:
        import pybind11
    except ImportError:
        raise BuildError(
            "mnet-kernels: pybind11 is missing, which a build without isolation expects to find installed. "
            f"pip install {' '.join(BUILD_REQUIREMENTS)}, then: {NO_BUILD_ISOLATION}"
        ) from None
    from torch.utils import cpp_extension

    openmp_compile, openmp_link = openmp_flags(plan.compiler)
    # -ffp-contract: the prologue scale*x + shift is one fused multiply-add wherever the processor has it.
    cxx = ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi", *openmp_compile]
    common = {
        "include_dirs": [pybind11.get_include()],  # before torch's own copy
        "define_macros": [("MNET_WITH_CUDA", None)] if plan.cuda else [],
        "extra_link_args": openmp_link,
    }
    name = f"{PACKAGE}._C"
    if not plan.cuda:
        return cpp_extension.CppExtension(name, CPU_SOURCES, extra_compile_args={"cxx": cxx}, **common)
    flags = {"cxx": cxx, "nvcc": ["-O3", "-lineinfo", "-Xcompiler", "-fvisibility=hidden"]}
    return cpp_extension.CUDAExtension(name, [*CPU_SOURCES, *CUDA_SOURCES], extra_compile_args=flags, **common)


def build_commands(plan):
    """setuptools commands that leave _build.json beside what they build."""
    from setuptools.command.build_py import build_py

    class BuildPy(build_py):
        def run(self):
            if not self.editable_mode:  # what an earlier build left there would be installed too
                shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)
            super().run()
            write_manifest(plan, ROOT if self.editable_mode else self.build_lib)
            if not plan.extension:
                print(summary(plan), flush=True)

    commands = {"build_py": BuildPy}
    if plan.extension:
        from torch.utils.cpp_extension import BuildExtension

        class BuildExt(BuildExtension):
            def finalize_options(self):
                super().finalize_options()
                self.force = True  # headers, torch and the choices above count as well as the sources' dates

            def run(self):
                super().run()
                write_manifest(plan, ROOT if self.inplace else self.build_lib)
                print(summary(plan), flush=True)

        commands["build_ext"] = BuildExt
    return commands


def prepare_environment(plan, env):
    """What torch's build helper takes from the environment."""
    env["MAX_JOBS"] = str(max_jobs(env, os.cpu_count() or 1, free_memory()))
    if not plan.cuda:
        return
    env["CUDA_HOME"] = str(plan.toolkit)
    env["TORCH_CUDA_ARCH_LIST"] = plan.arch_list
    import torch

    extra = extra_cuda_includes(plan.toolkit, Path(torch.__file__).resolve().parent.parent)
    if extra:  # CPATH is searched after -I: the toolkit's own headers win
        env["CPATH"] = os.pathsep.join(filter(None, [env.get("CPATH"), *extra]))


def main():
    from setuptools import setup

    if {"egg_info", "dist_info", "sdist"} & set(sys.argv):  # only metadata: nothing is compiled, torch is not needed
        setup()
        return
    plan = decide(os.environ, *import_torch())
    if not plan.extension:
        setup(cmdclass=build_commands(plan))
        return
    prepare_environment(plan, os.environ)
    setup(ext_modules=[extension(plan)], cmdclass=build_commands(plan))


if __name__ == "__main__":
    main()
