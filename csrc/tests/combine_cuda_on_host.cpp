// The second level of the CUDA reductions, run on the CPU (cuda_host.h) under every schedule, against sums in double.
#include <cmath>
#include <cstdio>

#include "../cuda/combine.cu"
#include "stage_data.h"

using namespace mnet;
using namespace mnet::test;

static void check_moments(int64_t chunks, int c, uint64_t seed) {
  Data data(seed);
  std::vector<float> workspace = data.table(chunks * 3 * c), moments(2 * c, -1.f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int i = 0; i < c; ++i) {
      float* partial = workspace.data() + chunk * 3 * c + i;
      partial[0] = static_cast<float>((chunk + i) % 5);  // counts, some of them 0
      partial[c] += 50.f;
      partial[2 * c] *= partial[2 * c];
    }
  }
  char label[80];
  std::snprintf(label, sizeof label, "moments of %ld chunks, %d channels", static_cast<long>(chunks), c);
  Check check(label);
  for (const host::Schedule schedule : host::kSchedules) {
    host::schedule = schedule;
    if (cuda::combine_moments(workspace.data(), chunks, c, moments.data(), nullptr) != cudaSuccess) ++failures;
    for (int i = 0; i < c; ++i) {
      double count = 0, sum = 0, squares = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* partial = workspace.data() + chunk * 3 * c + i;
        count += partial[0];
        sum += double{partial[0]} * partial[c];
      }
      const double mean = count > 0 ? sum / count : 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* partial = workspace.data() + chunk * 3 * c + i;
        squares += partial[2 * c] + partial[0] * (partial[c] - mean) * (partial[c] - mean);
      }
      const double variance = count > 0 ? squares / count : 0;
      check("mean", i, moments[i], mean, 1e-7 * std::fabs(mean));
      check("variance", i, moments[c + i], variance, 1e-6 * variance);
    }
  }
}

static void check_sums(int64_t segments, int64_t parts, int rows, int c, bool transposed, uint64_t seed) {
  Data data(seed);
  const int64_t table = int64_t{rows} * c, pitch = table + 3, results = segments * table;
  const std::vector<float> partials = data.table(segments * parts * pitch);
  std::vector<float> out(results, -1.f);
  cuda::PartialSums p{partials.data(), segments, parts, pitch, rows, c, out.data(), 0, 0, 0};
  p.row_stride = transposed ? 1 : segments * c;  // [c, rows] of a segment, or [rows, segments, c]
  p.channel_stride = transposed ? rows : 1;
  p.segment_stride = transposed ? table : c;
  char label[120];
  std::snprintf(label, sizeof label, "sums of %ld segments, %ld parts, %d rows, %d channels", static_cast<long>(segments),
                static_cast<long>(parts), rows, c);
  Check check(label);
  for (const host::Schedule schedule : host::kSchedules) {
    host::schedule = schedule;
    if (cuda::combine_sums(p, nullptr) != cudaSuccess) ++failures;
    for (int64_t i = 0; i < results; ++i) {
      const int64_t segment = i / table, row = i % table / c, channel = i % c;
      double want = 0;
      for (int64_t part = 0; part < parts; ++part) want += partials[(segment * parts + part) * pitch + i % table];
      const int64_t at = transposed ? (segment * c + channel) * rows + row : (row * segments + segment) * c + channel;
      check("sum", i, out[at], want, 1e-7 * std::fabs(want));
    }
  }
}

int main() try {
  uint64_t seed = 1;
  int checks = 0;
  for (const int c : {1, 32, 45}) {
    for (const int64_t chunks : {0, 1, 3, 16, 35, 150}) {
      check_moments(chunks, c, seed + checks++);
      check_sums(1, chunks, 2, c, false, seed + checks++);
      check_sums(chunks % 4, chunks, 3, c, chunks % 2 == 0, seed + checks++);
    }
  }
  std::printf("%d problems, %d failures\n", checks, failures);
  return failures != 0;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
