// mnet_cpu::expand_finalize and expand_finalize_backward: small tables, computed in double and rounded once.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../finalize_checks.h"
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

void check_weight(const char* op, const at::Tensor& weight, int64_t c, const at::Tensor& like) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == c && weight.size(2) == 1 && weight.size(3) == 1,
              op, ": weight has shape ", weight.sizes(), ", expected [E, ", c, ", 1, 1] with E of at least 1");
  storage_dtype(op, weight);
  TORCH_CHECK(weight.device() == like.device(), op, ": weight is on ", weight.device(), ", expected ", like.device());
}

Matrix unpack(const at::Tensor& weight) {
  const at::Tensor floats = weight.to(at::kFloat).contiguous();
  return Matrix(weight.size(0), weight.size(1), floats.const_data_ptr<float>());
}

const float* check_gram(const char* op, const at::Tensor& gram, const at::Tensor& like) {
  TORCH_CHECK(gram.dim() == 2 && gram.size(1) > 0 && gram.size(0) == gram.size(1) + 2, op, ": gram has shape ",
              gram.sizes(), ", expected [C + 2, C], the output of gram");
  return check_table(op, "gram", gram, gram.sizes(), like);
}

}  // namespace

static std::tuple<at::Tensor, at::Tensor> expand_finalize(const at::Tensor& gram, const at::Tensor& weight,
                                                          const std::optional<at::Tensor>& gamma,
                                                          const std::optional<at::Tensor>& beta, double eps,
                                                          int64_t count) {
  constexpr auto kOp = "expand_finalize";
  const float* table = check_gram(kOp, gram, gram);
  const int64_t c = gram.size(1);
  check_weight(kOp, weight, c, gram);
  check_count(kOp, count);
  const int64_t e = weight.size(0);
  const float *scales = check_table(kOp, "gamma", gamma, {e}, gram), *shifts = check_table(kOp, "beta", beta, {e}, gram);
  Matrix w = unpack(weight);
  Matrix covariance(c, c, table);
  Matrix spread = product(w, false, covariance);
  const float *mean = table + c * c, *k = mean + c;
  at::Tensor bn = at::empty({5, e}, gram.options()), means = at::empty({e}, gram.options());
  float *out = bn.mutable_data_ptr<float>(), *out_mean = means.mutable_data_ptr<float>();
  const double correction = bessel_correction(count);
  for (int64_t i = 0; i < e; ++i) {
    const double *row = w.row(i), *wide = spread.row(i);
    double var = 0.0, mean_k = 0.0, whole = 0.0;
    for (int64_t j = 0; j < c; ++j) {
      var += row[j] * wide[j];
      mean_k += row[j] * (static_cast<double>(mean[j]) - k[j]);
      whole += row[j] * mean[j];
    }
    var = var < 0.0 ? 0.0 : var;
    const double rstd = 1.0 / std::sqrt(var + eps);
    // shift goes with scale and mean as they are stored, so that act(scale * y + shift) is centred whatever their rounding
    const auto scale = static_cast<float>(scales == nullptr ? rstd : rstd * scales[i]);
    out[i] = scale;
    out[2 * e + i] = static_cast<float>(mean_k);
    out[e + i] = static_cast<float>((shifts == nullptr ? 0.0 : shifts[i]) - static_cast<double>(out[2 * e + i]) * scale);
    out[3 * e + i] = static_cast<float>(rstd);
    out[4 * e + i] = static_cast<float>(var * correction);
    out_mean[i] = static_cast<float>(whole);
  }
  return {bn, means};
}

static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expand_finalize_backward(
    const at::Tensor& gramgrad, const std::optional<at::Tensor>& gram, const at::Tensor& shift, const at::Tensor& bn,
    const at::Tensor& weight, int64_t count) {
  constexpr auto kOp = "expand_finalize_backward";
  TORCH_CHECK(shift.dim() == 1 && shift.size(0) > 0, kOp, ": shift has shape ", shift.sizes(), ", expected [C]");
  const int64_t c = shift.size(0);
  check_weight(kOp, weight, c, gramgrad);
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
