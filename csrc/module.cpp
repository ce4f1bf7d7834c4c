// The Python module mnet_kernels._C.  Importing it registers the compiled stages with torch's dispatcher (the
// TORCH_LIBRARY_IMPL blocks of the *_torch.cpp files); the module itself only says what was built.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#include "cpu/capability.h"
#include "cpu/map_pool.h"
#include "module_tiles.h"
#if defined(MNET_WITH_CUDA)
#include "cuda/toolkit.h"
#endif

namespace py = pybind11;

static std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

static py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = compiler();
  info["cpu_capability"] = mnet::cpu::capability_name(mnet::cpu::capability());
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(MNET_WITH_CUDA)
  info["cuda"] = mnet::cuda::toolkit_version();
  py::list architectures;
  for (const int arch : mnet::cuda::compiled_architectures()) architectures.append(arch);
  info["arch_list"] = architectures;
#else
  info["cuda"] = py::none();
  info["arch_list"] = py::list();
#endif
  return info;
}

static py::dict map_pool() {
  const mnet::cpu::PoolUse use = mnet::cpu::pool_use();
  py::dict info;
  info["in_use"] = use.in_use;
  info["peak"] = use.peak;
  info["kept"] = use.kept;
  info["reserved"] = use.reserved;
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled stages of mnet_kernels.";
  m.def("build_info", &build_info,
        "What this extension was built with: torch, compiler, cuda (None without), arch_list (e.g. [800, 900]), openmp; "
        "and cpu_capability, the instruction set chosen on this machine.");
  m.def("map_pool", &map_pool,
        "Bytes of the maps that the CPU kernels wrote and that live (in_use), the most of them since the start or a reset "
        "(peak), of memory kept for the next ones (kept), and of address space (reserved; 0 where there is no pool).");
  m.def("reset_map_pool_peak", &mnet::cpu::pool_reset_peak, "The peak starts anew at what is in use.");
  m.def("trim_map_pool", &mnet::cpu::pool_trim, "Returns what is kept to the system; returns how many bytes that was.");
  m.def("tiles", &mnet::tiles, "The rows of the CUDA kernels' tile table, overrides first; the first that fits is taken.");
  m.def("override_tiles", &mnet::override_tiles,
        "Replace the overrides by these rows (dicts as tiles() gives them).  Not while another thread calls a kernel.");
}
