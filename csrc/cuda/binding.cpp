// torch's operators over the plain C interface, through libtorch's stable ABI alone: one binary serves torch 2.10 and later,
// and any Python. Checked here is what protects memory; that the numbers make sense is Python's business
// (alphacl_fast/backend/cuda.py). ALPHACL_EMULATED: for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "problem.h"

#ifndef ALPHACL_NAMESPACE
#define ALPHACL_NAMESPACE alphacl_fast_cuda
#endif
#ifdef ALPHACL_EMULATED
#define ALPHACL_DEVICE CPU
#else
#define ALPHACL_DEVICE CUDA
#endif
#define ALPHACL_EXPORT extern "C" __attribute__((visibility("default")))

// driver.cpp
extern "C" const char* alphacl_cuda_sweep(int32_t gradient, int32_t dtype, const Sweep* a, int32_t row_blocks, void* stream);
extern "C" const char* alphacl_cuda_rows(int32_t finish, const PairRows* a, void* stream);

ALPHACL_EXPORT const char* alphacl_cuda_build() { return ALPHACL_BUILD; }  // compiler, flags and architectures
ALPHACL_EXPORT const char* alphacl_cuda_sources() { return ALPHACL_SOURCES; }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t SIDE = 64, MOST = INT64_MAX;  // rows and columns of a tile, as in engine.h

template <class... Parts> [[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// Of sizes that are not negative; MOST where the product is larger.
int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(result, size, &result)) return MOST;
  return result;
}

const char* name_of(ScalarType type) { return torch::headeronly::toString(type); }

// What every tensor of a call has to do with.
struct Call {
  const char* name;
  int32_t device;
  ScalarType wide;  // type of sums, row vectors and gradients

  Call(const char* name, const Tensor& f) : name(name), device(f.get_device_index()), wide(ScalarType::Float) {
#ifdef ALPHACL_EMULATED
    if (!f.is_cpu()) refuse(name, ": f must be on the CPU");
#else
    if (!f.is_cuda()) refuse(name, ": f must be on a CUDA device");
#endif
    if (f.dim() != 2) refuse(name, ": f must be 2-D, got ", f.dim(), " dimensions");
    if (f.scalar_type() == ScalarType::Double) wide = ScalarType::Double;
  }

  void same_device(const char* what, const Tensor& x) const {
#ifdef ALPHACL_EMULATED
    if (!x.is_cpu()) refuse(name, ": ", what, " must be on the CPU, as f is");
#else
    if (!x.is_cuda() || x.get_device_index() != device) refuse(name, ": ", what, " must be on f's device, cuda:", device);
#endif
  }

  void type(const char* what, const Tensor& x, ScalarType wanted) const {
    if (x.scalar_type() != wanted) refuse(name, ": ", what, " must be ", name_of(wanted), ", got ", name_of(x.scalar_type()));
  }

  // Checks a contiguous tensor of `least` elements or more.
  void block(const char* what, const Tensor& x, ScalarType wanted, int64_t least) const {
    same_device(what, x);
    type(what, x, wanted);
    if (!x.is_contiguous()) refuse(name, ": ", what, " must be contiguous");
    if (x.numel() < least) refuse(name, ": ", what, " must have ", least, " elements or more, got ", x.numel());
  }

  // Checks rows that lie in memory at one stride.
  void matrix(const char* what, const Tensor& x, ScalarType wanted) const {
    same_device(what, x);
    type(what, x, wanted);
    if (x.dim() != 2) refuse(name, ": ", what, " must be 2-D, got ", x.dim(), " dimensions");
    if (x.size(1) < 1 || x.size(1) > INT32_MAX) refuse(name, ": ", what, " must have 1 to 2³¹ − 1 columns, got ", x.size(1));
    if (x.stride(1) != 1 && x.size(1) > 1) refuse(name, ": columns of ", what, " must have stride 1, got ", x.stride(1));
  }

  // Null for an absent tensor; `least` is what a present one must have.
  const void* input(const char* what, const Maybe& x, int64_t least) const {
    if (!x) return nullptr;
    block(what, *x, wide, least);
    return x->const_data_ptr();
  }
  void* output(const char* what, const Maybe& x, ScalarType type, int64_t least) const {
    if (!x) return nullptr;
    block(what, *x, type, least);
    return x->mutable_data_ptr();
  }
  const Tensor& present(const char* what, const Maybe& x) const {
    if (!x) refuse(name, ": ", what, " is missing");
    return *x;
  }

  // Calls run(stream) on the device of the call.
  template <class Run> void launch(Run&& run) const {
#ifdef ALPHACL_EMULATED
    const char* error = run(nullptr);
#else
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const char* error = run(stream);
#endif
    if (error) refuse("alphacl_fast: ", name, ": ", error);
  }
};

// Takes `numbers` one after the other.
struct Numbers {
  const std::vector<int64_t>& values;
  size_t at = 0;
  int64_t next(const char* what, int64_t least, int64_t most) {
    const int64_t value = values[at++];
    if (value < least || value > most) refuse("sweep: ", what, " must lie in [", least, ", ", most, "], got ", value);
    return value;
  }
  int64_t count(const char* what, int64_t least = 0) { return next(what, least, MOST); }
  int32_t small(const char* what, int64_t least = 0, int64_t most = INT32_MAX) { return int32_t(next(what, least, most)); }
};

// Checks that the rows of one side of a launch exist.
void check_side(const Sweep& a, const char* side, int64_t start, int64_t count, bool paired, int64_t rows) {
  if (paired && (a.half > MOST / 2 || count != 2 * a.half))
    refuse("sweep: paired ", side, "s must be 2·half in number, got ", count, " with half = ", a.half);
  if (count > rows || start > rows - count)
    refuse("sweep: ", side, "s must lie within the ", rows, " rows of f, got ", count, " from ", start);
}

void sweep(
    Tensor f, Maybe scale, Maybe bias, Maybe center, Maybe gain, Maybe shift, Maybe offset, Maybe level, Tensor tau,
    Maybe unit, Maybe out, Maybe df, Maybe w_sums, Maybe sums, Maybe w, std::vector<int64_t> numbers,
    std::vector<double> constants) {
  if (numbers.size() != 28) refuse("sweep: numbers must be 28, got ", numbers.size());
  if (constants.size() != 4) refuse("sweep: constants must be 4, got ", constants.size());
  const Call call("sweep", f);
  Sweep a = {};
  Numbers next{numbers};
  const bool gradient = next.small("gradient", 0, 1);
  const int32_t dtype = next.small("dtype", 0, FLOAT64), row_blocks = next.small("row_blocks", 1);
  a.n_rows = next.count("n_rows", 1), a.n_cols = next.count("n_cols", 1);
  a.row_start = next.count("row_start"), a.col_start = next.count("col_start");
  a.half = next.count("half"), a.anchors = next.count("anchors"), a.n = next.count("n"), a.n_out = next.count("n_out");
  a.lo = next.count("lo"), a.first_block = next.small("first_block"), a.begin = next.small("begin");
  a.end = next.small("end", a.begin), a.col_slot = next.small("col_slot", -int64_t(a.begin)), a.parts = next.small("parts", 1);
  a.kind = next.small("kind", 0, GAMMA), a.form = next.small("form", 0, MAXIMUM);
  a.weight = next.small("weight", 0, WEIGHT_F_DF), a.gradient = next.small("gradient_mode", 0, WEIGHTS);
  a.flags = next.small("flags", 0, ALIGNED - 1), a.terms = next.small("terms", 0, TERM_COUNT);
  for (int32_t& row : a.row_of_term) row = next.small("row_of_term", -1, a.terms - 1);
  a.middle = constants[0];
  for (int k = 0; k < 3; ++k) a.params[k] = constants[1 + k];

  constexpr ScalarType ELEMENTS[] = {
      ScalarType::BFloat16, ScalarType::Half, ScalarType::Float, ScalarType::Float, ScalarType::Double};
  call.matrix("f", f, ELEMENTS[dtype]);
  a.f = f.const_data_ptr();
  a.stride = f.stride(0), a.dim = int32_t(f.size(1));
  const int64_t itemsize = int64_t(f.element_size());
  if (reinterpret_cast<uintptr_t>(a.f) % 16 == 0 && a.stride * itemsize % 16 == 0) a.flags |= ALIGNED;

  const bool both = a.flags & BOTH, rows_anchor = a.flags & ROWS_ANCHOR, cols_anchor = a.flags & COLS_ANCHOR;
  check_side(a, "row", a.row_start, a.n_rows, a.flags & ROWS_PAIRED, f.size(0));
  check_side(a, "column", a.col_start, a.n_cols, a.flags & COLS_PAIRED, f.size(0));
  const int64_t row_end = a.row_start + a.n_rows, column_end = a.col_start + a.n_cols;
  // Results for rows of f in [from, to), and for the columns too where a tile serves both sides.
  const auto within = [&](const char* what, int64_t from, int64_t to, bool of_rows = true, bool of_columns = true) {
    if ((of_rows && (a.row_start < from || row_end > to)) || (of_columns && both && (a.col_start < from || column_end > to)))
      refuse("sweep: ", what, " hold results for rows ", from, " to ", to, " of f, but the launch has some for others");
  };

  const int64_t read = std::max(row_end, column_end);
  const int64_t anchors_read = std::max(rows_anchor ? row_end : 0, cols_anchor ? column_end : 0);
  a.scale = call.input("scale", scale, read), a.bias = call.input("bias", bias, read);
  a.center = call.input("center", center, anchors_read), a.gain = call.input("gain", gain, anchors_read);
  a.shift = call.input("shift", shift, anchors_read), a.offset = call.input("offset", offset, anchors_read);
  a.level = call.input("level", level, anchors_read);
  a.tau = call.input("tau", tau, 1), a.unit = call.input("unit", unit, 1);

  const bool wants_sums = std::any_of(a.row_of_term, a.row_of_term + TERM_COUNT, [](int32_t row) { return row >= 0; });
  if (!gradient) {
    const int64_t bases = a.form == RUNNING || a.form == MAXIMUM;
    const int64_t slots = std::max<int64_t>(a.parts, both ? int64_t(a.col_slot) + a.end : 0);
    call.present("out", out);
    a.out = call.output("out", out, call.wide, product({slots, bases + a.terms, a.anchors}));
    within("out", 0, a.anchors);
  } else {
    if (a.gradient == PRODUCT) {
      call.present("df", df);
      a.df = call.output("df", df, call.wide, product({a.parts, a.n_out, a.dim}));
      within("df", a.lo, a.n_out > MOST - a.lo ? MOST : a.lo + a.n_out);
    }
    if (a.gradient == WEIGHTS) {
      const ScalarType weights = dtype == BFLOAT16 ? ScalarType::BFloat16 : call.wide;
      call.present("w", w);
      a.w = call.output("w", w, weights, product({row_blocks, SIDE, a.n_cols}));
    }
    a.w_sums = call.output("w_sums", w_sums, call.wide, product({a.parts, a.n}));
    if (a.w_sums) within("w_sums", 0, a.n);
    if (wants_sums) {
      call.present("sums", sums);
      a.sums = call.output("sums", sums, call.wide, product({a.parts, a.terms, a.anchors}));
      within("sums", 0, a.anchors, rows_anchor, cols_anchor);
    }
  }
  call.launch([&](void* stream) { return alphacl_cuda_sweep(gradient, dtype, &a, row_blocks, stream); });
}

void rows(bool finish, Maybe z1, Maybe z2, Tensor f, Tensor inv_norm, Maybe pos, Maybe d, Maybe q) {
  const Call call("rows", f);
  const ScalarType type = f.scalar_type();
  PairRows a = {};
  switch (type) {
    case ScalarType::BFloat16: a.dtype = BFLOAT16; break;
    case ScalarType::Half: a.dtype = FLOAT16; break;
    case ScalarType::Float: a.dtype = FLOAT32; break;
    case ScalarType::Double: a.dtype = FLOAT64; break;
    default: refuse("rows: f must be BFloat16, Half, Float or Double, got ", name_of(type));
  }
  call.matrix("f", f, type);
  if (f.size(0) < 2 || f.size(0) % 2) refuse("rows: f must have an even number of rows, got ", f.size(0));
  a.n_pairs = f.size(0) / 2, a.dim = int32_t(f.size(1));
  a.f = call.output("f", f, type, f.numel());
  a.inv_norm = call.output("inv_norm", inv_norm, call.wide, 2 * a.n_pairs);
  if (finish) {
    call.present("d", d);
    a.d = call.output("d", d, call.wide, f.numel());
    a.anchors = call.present("q", q).numel() == 2 * a.n_pairs ? 2 : 1;
    a.q = call.input("q", q, a.anchors * a.n_pairs);
  } else {
    call.present("pos", pos);
    a.pos = call.output("pos", pos, call.wide, 2 * a.n_pairs);
    const auto input = [&](const char* what, const Maybe& z, int64_t& stride) {
      const Tensor& x = call.present(what, z);
      call.matrix(what, x, type);
      if (x.size(0) != a.n_pairs || x.size(1) != a.dim)
        refuse("rows: ", what, " must be (", a.n_pairs, ", ", a.dim, "), got (", x.size(0), ", ", x.size(1), ")");
      stride = x.stride(0);
      return x.const_data_ptr();
    };
    a.z1 = input("z1", z1, a.stride1), a.z2 = input("z2", z2, a.stride2);
  }
  call.launch([&](void* stream) { return alphacl_cuda_rows(finish, &a, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY(ALPHACL_NAMESPACE, m) {
  // numbers: gradient, dtype, row_blocks, n_rows, n_cols, row_start, col_start, half, anchors, n, n_out, lo, first_block,
  // begin, end, col_slot, parts, kind, form, weight, gradient mode, flags, terms, rows of the five terms (problem.h).
  // constants: middle and the kind's three.
  m.def(
      "sweep(Tensor f, Tensor? scale, Tensor? bias, Tensor? center, Tensor? gain, Tensor? shift, Tensor? offset, "
      "Tensor? level, Tensor tau, Tensor? unit, Tensor(a!)? out, Tensor(b!)? df, Tensor(c!)? w_sums, Tensor(d!)? sums, "
      "Tensor(e!)? w, int[] numbers, float[] constants) -> ()");
  m.def(
      "rows(bool finish, Tensor? z1, Tensor? z2, Tensor(a!) f, Tensor(b!) inv_norm, Tensor(c!)? pos, Tensor(d!)? d, "
      "Tensor? q) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ALPHACL_NAMESPACE, ALPHACL_DEVICE, m) {
  m.impl("sweep", TORCH_BOX(&sweep));
  m.impl("rows", TORCH_BOX(&rows));
}
