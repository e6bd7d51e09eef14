// The CUDA kernels on the emulated GPU, against plain loops written from the definitions in
// docs/design.md. pytest compares far more (tests/test_cuda.py); this program is for sanitizers:
// every tensor is an allocation of exactly its size, and with ThreadSanitizer each thread of a
// block is one to it, so that a missing barrier is a reported race.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/launch.h"

using namespace alphacl;

namespace {

constexpr double NONE = std::numeric_limits<double>::quiet_NaN();
int failures = 0;
std::mt19937 generator(1);
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }

double from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// A batch of two views in the terms of the operators; T is the accumulation type.
template <Dtype DTYPE> struct Batch {
  using T = std::conditional_t<DTYPE == FLOAT64, double, float>;
  using Element = std::conditional_t<DTYPE == BFLOAT16, uint16_t, T>;
  int half, n, dim;
  bool cross;
  std::vector<Element> f;
  std::vector<double> x;  // (n, dim) the features' values
  std::vector<T> scale, moment_origin, row_weight, shift;
  T tau = T(0.4), unit = 1;

  Batch(int half, int dim, bool cross) : half(half), n(2 * half), dim(dim), cross(cross) {
    for (int i = 0; i < n * dim; ++i) {
      const float value = float(uniform(-1, 1)) / std::sqrt(float(dim));
      if constexpr (DTYPE == BFLOAT16) {
        f.push_back(uint16_t(device::pack_bf16(value, 0.0f)));
        x.push_back(from_bfloat16(f.back()));
      } else if constexpr (DTYPE == TFLOAT32) {
        const float short_value = float(int(value * 1024)) / 1024;  // exact in TF32
        f.push_back(short_value), x.push_back(short_value);
      } else {
        f.push_back(value), x.push_back(value);
      }
    }
    for (int i = 0; i < n; ++i) {
      scale.push_back(T(uniform(0.5, 1.5))), moment_origin.push_back(T(uniform(-1, 1)));
      row_weight.push_back(T(uniform(0.1, 1))), shift.push_back(T(uniform(-1, 1)));
    }
  }

  double similarity(int i, int j) const {
    double t = 0;
    for (int d = 0; d < dim; ++d) t += x[i * dim + d] * x[j * dim + d];
    return t * (DTYPE == BFLOAT16 ? double(scale[i]) * double(scale[j]) : 1.0);
  }
  bool counts(int i, int j) const { return i % half != j % half && (!cross || (i < half) != (j < half)); }

  Sweep arguments() const {
    Sweep a{};
    a.f = f.data(), a.stride = a.dim = dim, a.n = n, a.half = half, a.anchors = n, a.tau = &tau;
    if (DTYPE == BFLOAT16) a.scale = scale.data();
    a.moment_origin = moment_origin.data(), a.splits = 2, a.side = 64, a.params[0] = 0.2, a.params[1] = 2, a.params[2] = 1;
    for (int& row : a.row_of_term) row = -1;
    const bool aligned = reinterpret_cast<uintptr_t>(a.f) % 16 == 0 && dim * sizeof(Element) % 16 == 0;
    a.exclude = a.rows_anchor = a.cols_anchor = 1, a.aligned = aligned, a.in_chunks = dim > largest_features(DTYPE);
    return a;
  }
  // Calls use(arguments) for each region.
  void each_region(Sweep a, const std::function<void(Sweep&)>& use) const {
    for (int side = 0; side < (cross ? 2 : 1); ++side) {
      a.n_rows = a.n_cols = cross ? half : n;
      a.row_start = side * half, a.col_start = cross ? half - side * half : 0;
      a.triangle = a.rows_paired = a.cols_paired = !cross, a.row_blocks = int((a.n_rows + a.side - 1) / a.side);
      use(a);
    }
  }
};

void expect(const std::string& what, double got, double wanted, double bound) {
  if (std::abs(got - wanted) <= bound * std::max(1.0, std::abs(wanted))) return;
  if (++failures < 20) std::printf("%s: %.9g, expected %.9g\n", what.c_str(), got, wanted);
}
void fine(const std::string& what, const char* error) {
  if (error && ++failures < 20) std::printf("%s: %s\n", what.c_str(), error);
}

double log_f(int kind, double t, double tau) { return kind == EXP ? t / tau : -std::log(std::pow(std::max(0.2 - t, 0.0), 2) + tau); }

// Rows and columns of a tile: the kernels of hopper.h have larger ones.
template <Dtype DTYPE> int side_of(const Batch<DTYPE>& b, int kind, Form form) {
  const bool served = DTYPE == BFLOAT16 || DTYPE == TFLOAT32;
  const bool hopper = hopper_mode == 1 && served && b.dim <= largest_features(DTYPE);
  return hopper && kind == EXP && form == Form::CONSTANT ? 128 : 64;
}

// Sums of f and, with `moment`, of f·(t − moment_origin), of log kinds and of max(x + 0.2, 0).
template <Dtype DTYPE> void sums(const Batch<DTYPE>& b, int kind, Form form, bool symmetric, double bound, bool moment = true) {
  using T = typename Batch<DTYPE>::T;
  const std::string name = "row_sums dtype " + std::to_string(DTYPE) + " kind " + std::to_string(kind) + " form " +
                           std::to_string(int(form)) + (symmetric ? " symmetric" : "") + (b.cross ? " cross" : "");
  const int shifts = form == Form::ONLINE || form == Form::T_MAX, terms = form == Form::T_MAX ? 0 : 1 + moment;
  const int side = symmetric && moment ? 64 : side_of(b, kind, form);
  const int tiles = int(((b.cross ? b.half : b.n) + side - 1) / side), slices = 2 + (symmetric ? tiles : 0);
  std::vector<T> out(size_t(slices) * (shifts + terms) * b.n, T(NONE));
  Sweep a = b.arguments();
  a.sums = out.data(), a.kind = kind, a.form = form, a.terms = terms, a.constant_shift = 0.1;
  if (form == Form::PLAIN) a.shift = b.shift.data();
  if (terms) a.row_of_term[F] = terms - 1, a.row_of_term[F_MOMENT] = moment ? 0 : -1;
  a.side = side;
  int regions = 0;
  b.each_region(a, [&](Sweep& s) {
    if (symmetric && regions++) return;  // one launch serves symmetric sides
    s.end = symmetric && !b.cross ? tiles / 2 + 1 : tiles, s.column_slice = 2;
    s.symmetric = symmetric;
    fine(name, sweep<DTYPE>(s, nullptr));
  });
  const auto at = [&](int slice, int k, int i) { return double(out[(size_t(slice) * (shifts + terms) + k) * b.n + i]); };
  for (int i = 0; i < b.n; ++i) {
    double f = 0, ft = 0, largest = -INFINITY;
    for (int j = 0; j < b.n; ++j) {
      if (!b.counts(i, j)) continue;
      const double t = b.similarity(i, j);
      const double value = kind == HINGE ? std::max(t - b.shift[i] + 0.2, 0.0) : std::exp(log_f(kind, t, b.tau) - (form == Form::CONSTANT ? 0.1 : 0.0));
      f += value, ft += value * (t - b.moment_origin[i]), largest = std::max(largest, t);
    }
    double got_f = 0, got_ft = 0, got_max = -INFINITY;
    for (int slice = 0; slice < slices; ++slice) {
      // Distance 0 of a triangle serves rows only. Half way round an even ring the first half of
      // the blocks serves the columns of the second half.
      const bool half_way = tiles % 2 == 0 && slice == 2 + tiles / 2 && i % b.half / (side / 2) < tiles / 2;
      const bool of_triangle = slice == 2 || slice > 2 + tiles / 2 || half_way;
      if (symmetric && (b.cross ? (slice < 2) != (i < b.half) : of_triangle)) continue;
      const double factor = shifts && terms ? std::exp(at(slice, 0, i)) : 1.0;
      if (shifts) got_max = std::max(got_max, at(slice, 0, i));
      if (terms && factor > 0) got_ft += at(slice, shifts, i) * factor, got_f += at(slice, shifts + terms - 1, i) * factor;
    }
    if (form == Form::T_MAX) expect(name, got_max, largest, bound);
    if (terms) expect(name, got_f, f, bound);
    if (terms && moment) expect(name, got_ft, ft, bound * std::max(1.0, f));
  }
}

template <Dtype DTYPE> void gradients(const Batch<DTYPE>& b, int kind, Form form, double bound) {
  using T = typename Batch<DTYPE>::T;
  const std::string name = "pair_grad dtype " + std::to_string(DTYPE) + " kind " + std::to_string(kind) + " form " +
                           std::to_string(int(form)) + (b.cross ? " cross" : "");
  const bool product = b.dim <= largest_features(DTYPE);
  const int splits = 2, terms = form == Form::CONSTANT ? 0 : 1;
  std::vector<T> df(product ? size_t(splits) * b.n * b.dim : 0, T(NONE));
  std::vector<T> term_sums(size_t(splits) * terms * b.n, T(NONE));
  std::vector<double> total(size_t(b.n) * b.dim, 0.0);
  using W = std::conditional_t<DTYPE == BFLOAT16, uint16_t, T>;
  Sweep a = b.arguments();
  a.kind = kind, a.form = form, a.row_weight = b.row_weight.data(), a.unit = &b.unit, a.n_out = b.n, a.constant_shift = 0.1, a.splits = splits;
  a.df = df.data(), a.terms = terms, a.pair_grad = 1, a.gradient = product ? Gradient::PRODUCT : Gradient::WEIGHTS, a.weight = WEIGHT_F;
  if (terms) a.sums = term_sums.data(), a.row_of_term[F] = 0;
  if (form == Form::PLAIN) a.shift = b.shift.data();
  a.side = side_of(b, kind, form);
  b.each_region(a, [&](Sweep& s) {
    s.end = int((s.n_cols + s.side - 1) / s.side);
    const int columns = s.end * 64;
    std::vector<W> w(product ? 0 : size_t(s.row_blocks) * 64 * columns);
    s.weights = w.data(), s.weight_columns = columns;
    fine(name, sweep<DTYPE>(s, nullptr));
    for (size_t k = 0; k < w.size(); ++k) {  // the cuBLAS product's place
      const int block = int(k / columns) / 64, l = int(k / columns) % 64, c = int(k % columns);
      const int pair_j = b.cross ? c : c % (columns / 2);
      const int j = int(s.col_start) + pair_j + (!b.cross && c >= columns / 2 ? b.half : 0);
      const int pair = b.cross ? block * 64 + l : block * 32 + l % 32;
      if (pair >= b.half) continue;
      const int i = int(s.row_start) + pair + (!b.cross && l >= 32 ? b.half : 0);
      const double value = DTYPE == BFLOAT16 ? from_bfloat16(uint16_t(w[k])) : double(w[k]);
      if (pair_j >= b.half) {
        expect(name + ", column that does not exist", value, 0, 0);
        continue;
      }
      for (int d = 0; d < b.dim; ++d) total[size_t(i) * b.dim + d] += value * b.x[j * b.dim + d];
    }
  });
  for (size_t k = 0; k < total.size() && product; ++k)
    for (int split = 0; split < splits; ++split) total[k] += double(df[split * total.size() + k]);
  for (int i = 0; i < b.n; ++i) {
    std::vector<double> row(b.dim, 0.0);
    double sum = 0, size = 0;
    for (int j = 0; j < b.n; ++j) {
      if (!b.counts(i, j)) continue;
      const double t = b.similarity(i, j);
      const auto g = [&](int side) {
        if (kind == HINGE) return std::max(t - b.shift[side] + 0.2, 0.0);
        return std::exp(log_f(kind, t, b.tau) - (form == Form::CONSTANT ? 0.1 : double(b.shift[side])));
      };
      const double w = g(i) * b.row_weight[i] + g(j) * b.row_weight[j];
      sum += g(i), size += w;
      for (int d = 0; d < b.dim; ++d) row[d] += w * b.x[j * b.dim + d] * (DTYPE == BFLOAT16 ? double(b.scale[j]) : 1.0);
    }
    for (int d = 0; d < b.dim; ++d) expect(name, total[size_t(i) * b.dim + d], row[d], bound * std::max(1.0, size));
    double got = 0;
    for (int split = 0; split < splits && terms; ++split) got += double(term_sums[size_t(split) * b.n + i]);
    if (terms) expect(name, got, sum, std::min(bound, 1e-3));
  }
}

template <Dtype DTYPE> void all(std::initializer_list<int> dims, double sum_bound, double gradient_bound) {
  for (int dim : dims)
    for (bool cross : {false, true}) {
      const Batch<DTYPE> b(cross ? 70 : 67, dim, cross);
      for (bool symmetric : {false, true}) {
        if (symmetric && DTYPE != BFLOAT16) continue;
        sums(b, EXP, Form::CONSTANT, symmetric, sum_bound);
        sums(b, EXP, Form::CONSTANT, symmetric, sum_bound, false);
        sums(b, INVERSE, Form::CONSTANT, symmetric, sum_bound);
        sums(b, HINGE, Form::PLAIN, symmetric, sum_bound);
        sums(b, EXP, Form::T_MAX, symmetric, sum_bound);
      }
      gradients(b, EXP, Form::CONSTANT, gradient_bound);
      gradients(b, EXP, Form::PLAIN, gradient_bound);
      gradients(b, HINGE, Form::PLAIN, gradient_bound);
      sums(b, EXP, Form::ONLINE, false, sum_bound);
    }
}

}  // namespace

int main(int count, char** arguments) {
  const int seed = count > 1 ? std::atoi(arguments[1]) : 0;
  device::schedule(seed);
  hopper_mode = 1;
  all<BFLOAT16>({24, 300}, 1e-5, 4e-3);
  // so many that the stages of the Hopper kernels go round
  const Batch<BFLOAT16> many_tiles(260, 136, false);
  sums(many_tiles, EXP, Form::CONSTANT, false, 1e-5);
  sums(many_tiles, EXP, Form::CONSTANT, true, 1e-5, false);
  gradients(many_tiles, EXP, Form::CONSTANT, 4e-3);
  const Batch<TFLOAT32> turned(230, 104, false);  // eight tiles of the gradient
  sums(turned, EXP, Form::CONSTANT, false, 1e-3);
  sums(turned, EXP, Form::CONSTANT, true, 1e-3, false);
  gradients(turned, EXP, Form::CONSTANT, 2e-3);
  hopper_mode = 0;
  for (bool cross : {false, true}) {
    const Batch<BFLOAT16> b(cross ? 70 : 67, 24, cross);
    sums(b, EXP, Form::CONSTANT, false, 1e-5);
    gradients(b, EXP, Form::CONSTANT, 4e-3);
  }
  all<TFLOAT32>({20, 140}, 1e-3, 2e-3);
  all<FLOAT64>({20, 40}, 1e-12, 1e-12);
  std::printf("%s\n", failures ? "FAILED" : "all good");
  return failures ? 1 : 0;
}
