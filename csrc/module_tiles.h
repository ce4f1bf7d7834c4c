// The CUDA kernels' tile table (cuda/tiles.h) in Python: rows as dicts.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cuda/tiles.h"

namespace mnet {

inline pybind11::dict row_dict(const cuda::TileRow& row, bool overrides) {
  pybind11::dict d;
  d["kernel"] = cuda::kKernelNames[static_cast<int>(row.kernel)];
  d["bits"] = row.bits;
  d["architecture"] = row.architecture;
  d["channels"] = row.channels;
  d["tile"] = row.tile.index;
  d["blocks"] = row.tile.blocks;
  d["enough"] = row.tile.enough;
  d["runs"] = row.tile.runs;
  d["least"] = row.tile.least;
  d["reason"] = row.reason;
  d["override"] = overrides;
  d["measured"] = pybind11::none();
  if (row.measured != nullptr) {
    pybind11::dict m;
    m["card"] = row.measured->card;
    m["commit"] = row.measured->commit;
    m["date"] = row.measured->date;
    m["microseconds"] = row.measured->microseconds;
    d["measured"] = m;
  }
  return d;
}

// In the order of the rule: overrides first.
inline pybind11::list tiles() {
  pybind11::list rows;
  for (const cuda::TileRow& row : cuda::tile_overrides()) rows.append(row_dict(row, true));
  for (const cuda::TileRow& row : cuda::kTileTable) rows.append(row_dict(row, false));
  return rows;
}

inline void override_tiles(const pybind11::list& rows) {
  std::vector<cuda::TileRow> found;
  for (const pybind11::handle item : rows) {
    const auto d = item.cast<pybind11::dict>();
    const auto name = d["kernel"].cast<std::string>();
    int kernel = 0;
    while (kernel < cuda::kKernels && name != cuda::kKernelNames[kernel]) ++kernel;
    if (kernel == cuda::kKernels) throw pybind11::value_error("no kernel is called " + name);
    cuda::TileRow row{static_cast<cuda::Kernel>(kernel), d["bits"].cast<int>(), d["architecture"].cast<int>(),
                      d["channels"].cast<int>(), {}, "given", nullptr};
    row.tile = {d["tile"].cast<int>(), d["blocks"].cast<int64_t>(), d["enough"].cast<int64_t>(), d["runs"].cast<int64_t>(),
                d["least"].cast<int64_t>()};
    if (!cuda::valid(row)) {
      throw pybind11::value_error(
          name + ": bits must be 0, 16 or 32, blocks and least positive, channels, enough and runs not negative, and tile one "
                 "of the " + std::to_string(cuda::compiled_tiles(row.kernel, row.bits == 0 ? 32 : row.bits)) +
          " that are compiled for it (from 0)");
    }
    found.push_back(row);
  }
  cuda::tile_overrides() = found;
}

}  // namespace mnet
