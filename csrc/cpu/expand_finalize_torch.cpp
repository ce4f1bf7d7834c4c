// mnet_cpu::expand_finalize and expand_finalize_backward: small tables, computed in double and rounded once.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../expand_checks.h"
#include "expand.h"

namespace mnet::cpu {

namespace {

constexpr int64_t kGrain = 64 << 10;  // multiplications worth a thread

int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// A matrix in double, its rows padded with zeros as multiply_double wants them.
struct Matrix {
  int64_t rows, columns, pitch;
  std::vector<double> values;
  Matrix(int64_t r, int64_t c) : rows(r), columns(c), pitch(padded(c)), values(static_cast<size_t>(r * padded(c)), 0.0) {}
  Matrix(int64_t r, int64_t c, const float* from) : Matrix(r, c) {
    for (int64_t i = 0; i < r; ++i) std::copy(from + i * c, from + (i + 1) * c, row(i));
  }
  double* row(int64_t i) { return values.data() + i * pitch; }
};

// a b, or a^T b.
Matrix product(Matrix& a, bool transposed, Matrix& b) {
  const int64_t rows = transposed ? a.columns : a.rows, depth = b.rows;
  Matrix out(rows, b.columns);
  const Capability isa = capability();
  const int64_t row_stride = transposed ? 1 : a.pitch, depth_stride = transposed ? a.pitch : 1;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / (depth * b.pitch + 1)), [&](int64_t begin, int64_t end) {
    multiply_double(a.values.data() + begin * row_stride, row_stride, depth_stride, b.values.data(),
                    static_cast<int>(end - begin), static_cast<int>(depth), b.pitch, out.row(begin), isa);
  });
  return out;
}

Matrix unpack(const at::Tensor& weight) {
  const at::Tensor floats = weight.to(at::kFloat).contiguous();
  return Matrix(weight.size(0), weight.size(1), floats.const_data_ptr<float>());
}

}  // namespace

static std::tuple<at::Tensor, at::Tensor> expand_finalize(const at::Tensor& gram, const at::Tensor& weight,
                                                          const std::optional<at::Tensor>& gamma,
                                                          const std::optional<at::Tensor>& beta, double eps,
                                                          int64_t count) {
  const ExpandFinalizeCall call = prepare_expand_finalize(gram, weight, gamma, beta, eps, count);
  const ExpandFinalizeParams& p = call.params;
  const int64_t c = p.c;
  Matrix w = unpack(weight);
  Matrix covariance(c, c, p.gram);
  Matrix spread = product(w, false, covariance);
  const float* mean = p.gram + c * c;
  for (int64_t i = 0; i < p.e; ++i) {
    ExpandedMoments sums{};
    for (int64_t j = 0; j < c; ++j) add_channel(sums, w.row(i)[j], spread.row(i)[j], mean[j], mean[c + j]);
    write_expanded(p, i, sums);
  }
  return {call.bn, call.mean};
}

static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expand_finalize_backward(
    const at::Tensor& gramgrad, const std::optional<at::Tensor>& gram, const at::Tensor& shift, const at::Tensor& bn,
    const at::Tensor& weight, int64_t count) {
  constexpr auto kOp = "expand_finalize_backward";
  TORCH_CHECK(shift.dim() == 1 && shift.size(0) > 0, kOp, ": shift has shape ", shift.sizes(), ", expected [C]");
  const int64_t c = shift.size(0);
  check_expand_weight(kOp, weight, c, gramgrad);
  check_count(kOp, count);
  const int64_t e = weight.size(0);
  const float* g = check_table(kOp, "gramgrad", gramgrad, {e, c + 1}, gramgrad);
  const float* k = check_table(kOp, "shift", shift, {c}, gramgrad);
  const float* scale = check_table(kOp, "bn", bn, {5, e}, gramgrad);
  const float* table = gram.has_value() ? check_gram(kOp, *gram, gramgrad) : nullptr;
  TORCH_CHECK(table == nullptr || gram->size(1) == c, kOp, ": gram has shape ", gram->sizes(), ", expected [", c + 2, ", ",
              c, "]");
  const float *mean_k = scale + 2 * e, *rstd = scale + 3 * e, *mean = table == nullptr ? nullptr : table + c * c;
  const auto options = gramgrad.options();
  at::Tensor dw = at::empty(weight.sizes(), options), dgamma = at::empty({e}, options), dbeta = at::empty({e}, options);
  at::Tensor mix = at::empty({c + 1, c}, options);
  float *out_dw = dw.mutable_data_ptr<float>(), *out_mix = mix.mutable_data_ptr<float>();
  std::fill_n(out_mix, (c + 1) * c, 0.f);

  Matrix w = unpack(weight);
  std::vector<double> sy(e);
  for (int64_t i = 0; i < e; ++i) {
    const float* row = g + i * (c + 1);
    // sum g1 (y1 - mean), about the mean of x channel by channel where it is known: bn's own is rounded
    double sum = table == nullptr ? -static_cast<double>(row[c]) * mean_k[i] : 0.0;
    for (int64_t j = 0; j < c; ++j) {
      const double centre = table == nullptr ? 0.0 : static_cast<double>(mean[j]) - k[j];
      sum += w.row(i)[j] * (row[j] - row[c] * centre);
    }
    sy[i] = sum;
    dgamma.mutable_data_ptr<float>()[i] = static_cast<float>(rstd[i] * sy[i]);
    dbeta.mutable_data_ptr<float>()[i] = row[c];
  }
  if (table == nullptr) {  // the statistics were constants
    for (int64_t i = 0; i < e; ++i) {
      const float* row = g + i * (c + 1);
      for (int64_t j = 0; j < c; ++j) {
        out_dw[i * c + j] = static_cast<float>(scale[i] * (row[j] + static_cast<double>(row[c]) * k[j]));
      }
    }
    return {dw, dgamma, dbeta, mix};
  }

  Matrix covariance(c, c, table);
  Matrix spread = product(w, false, covariance);
  // per = -rstd^2 sy / n: M = W~^T diag(per) W
  std::vector<double> per(e);
  for (int64_t i = 0; i < e; ++i) {
    const float* row = g + i * (c + 1);
    per[i] = -static_cast<double>(rstd[i]) * rstd[i] * sy[i] / static_cast<double>(count);
    const double b = scale[i] * per[i] * static_cast<double>(count);
    for (int64_t j = 0; j < c; ++j) {
      const double centred = row[j] - static_cast<double>(row[c]) * (static_cast<double>(mean[j]) - k[j]);
      out_dw[i * c + j] = static_cast<float>(scale[i] * centred + b * spread.row(i)[j]);
    }
  }
  // The rounded weights that dx' was made with.
  at::Tensor rounded = at::empty({e, c}, options);
  Matrix weighted(e, c);
  for (int64_t i = 0; i < e; ++i) {
    for (int64_t j = 0; j < c; ++j) {
      rounded.mutable_data_ptr<float>()[i * c + j] = scale[i] * static_cast<float>(w.row(i)[j]);
      weighted.row(i)[j] = per[i] * w.row(i)[j];
    }
  }
  rounded = rounded.to(weight.scalar_type()).to(at::kFloat);
  Matrix scaled(e, c, rounded.const_data_ptr<float>());
  Matrix m = product(scaled, true, weighted);
  std::vector<double> v(c, 0.0);
  for (int64_t i = 0; i < e; ++i) {
    const double factor = -static_cast<double>(g[i * (c + 1) + c]) / static_cast<double>(count);
    for (int64_t j = 0; j < c; ++j) v[j] += scaled.row(i)[j] * factor;
  }
  for (int64_t i = 0; i < c; ++i) {
    double moved = 0.0;
    for (int64_t j = 0; j < c; ++j) {
      out_mix[i * c + j] = static_cast<float>(m.row(i)[j]);
      moved += static_cast<double>(out_mix[i * c + j]) * (static_cast<double>(mean[j]) - k[j]);
    }
    out_mix[c * c + i] = static_cast<float>(v[i] - moved);
  }
  return {dw, dgamma, dbeta, mix};
}

}  // namespace mnet::cpu

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) {
  m.impl("expand_finalize", &mnet::cpu::expand_finalize);
  m.impl("expand_finalize_backward", &mnet::cpu::expand_finalize_backward);
}
