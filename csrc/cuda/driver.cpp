// The plain C interface, which backend/cuda.py calls through ctypes. Python checks dtypes, devices
// and strides; this file checks that no launch reads or writes beyond its buffers.
#include "launch.h"

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#define ALPHACL_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t SIDE = 64, MOST = INT64_MAX;  // SIDE: rows and columns of a tile, as in engine.h

template <class... Parts> [[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// The product of sizes that are not negative; MOST if it is larger.
int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(result, size, &result)) return MOST;
  return result;
}

void within(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) refuse(name, " must lie in [", least, ", ", most, "], got ", value);
}

// Checks that a buffer, where it is present, has `least` elements or more.
void holds(const char* name, const void* data, int64_t elements, int64_t least, bool needed) {
  if (!data && needed) refuse(name, " is missing");
  if (data && elements < least)
    refuse(name, " must have ", least, " elements or more, got ", elements);
}
void holds(const Sweep& a, Buffer buffer, const char* name, const void* data, int64_t least, bool needed = false) {
  holds(name, data, a.elements[int(buffer)], least, needed);
}

// Elements of a matrix from its first one to its last one; MOST if they are more.
int64_t extent(int64_t rows, int64_t stride, int64_t columns) {
  int64_t result = product({rows - 1, stride});
  return __builtin_add_overflow(result, columns, &result) ? MOST : result;
}

// Checks that the rows of one side of a launch exist.
void side(const Sweep& a, const char* name, int64_t start, int64_t count, bool paired) {
  if (paired && (a.half > MOST / 2 || count != 2 * a.half))
    refuse("paired ", name, "s must be 2·half in number, got ", count, " with half = ", a.half);
  if (count > a.n || start > a.n - count)
    refuse(name, "s must lie within the ", a.n, " rows of f, got ", count, " from ", start);
}

void check(const Sweep& a) {
  within("n_rows", a.n_rows, 1, MOST), within("n_cols", a.n_cols, 1, MOST), within("dim", a.dim, 1, INT32_MAX);
  for (const int64_t x : {a.row_start, a.col_start, a.half, a.anchors, a.n, a.n_out, a.lo, a.stride, int64_t(a.first_block)})
    within("starts and sizes", x, 0, MOST);
  within("splits", a.splits, 1, INT32_MAX), within("row_blocks", a.row_blocks, 1, INT32_MAX);
  within("begin", a.begin, 0, INT32_MAX), within("end", a.end, a.begin, INT32_MAX);
  within("column_slice", a.column_slice, -int64_t(a.begin), INT32_MAX);
  within("terms", a.terms, 0, SUM_COUNT), within("side", a.side, SIDE, 2 * SIDE);
  for (const int32_t row : a.row_of_term) within("row_of_term", row, -1, a.terms - 1);
  within("kind", a.kind, 0, KIND_COUNT - 1), within("weight", a.weight, 0, WEIGHT_COUNT - 1);
  within("form", int(a.form), 0, FORM_COUNT - 1);
  within("gradient", int(a.gradient), 0, GRADIENT_COUNT - 1);

  side(a, "row", a.row_start, a.n_rows, a.rows_paired), side(a, "column", a.col_start, a.n_cols, a.cols_paired);
  holds(a, Buffer::FEATURES, "f", a.f, extent(a.n, a.stride, a.dim), true);
  const int64_t row_end = a.row_start + a.n_rows, column_end = a.col_start + a.n_cols, read = std::max(row_end, column_end);
  const int64_t anchors = std::max(a.rows_anchor ? row_end : 0, a.cols_anchor ? column_end : 0);
  holds(a, Buffer::SCALE, "scale", a.scale, read), holds(a, Buffer::BIAS, "bias", a.bias, read);
  holds(a, Buffer::MOMENT_ORIGIN, "moment_origin", a.moment_origin, anchors);
  holds(a, Buffer::ROW_WEIGHT, "row_weight", a.row_weight, anchors), holds(a, Buffer::SHIFT, "shift", a.shift, anchors);
  holds(a, Buffer::ARGUMENT_OFFSET, "argument_offset", a.argument_offset, anchors);
  holds(a, Buffer::BASELINE, "baseline", a.baseline, anchors);
  holds(a, Buffer::LARGEST_T, "largest_t", a.largest_t, anchors), holds(a, Buffer::IDS, "ids", a.ids, read);
  holds(a, Buffer::TAU, "tau", a.tau, 1, true), holds(a, Buffer::UNIT, "unit", a.unit, 1);

  // Results for rows of f in [from, to), and for the columns too where a tile serves both sides.
  const auto results = [&](const char* name, int64_t from, int64_t to, bool of_columns) {
    if (a.row_start < from || row_end > to || (of_columns && (a.col_start < from || column_end > to)))
      refuse(name, " hold results for rows ", from, " to ", to, " of f, but the launch has some for others");
  };
  const bool wanted = std::any_of(a.row_of_term, a.row_of_term + SUM_COUNT, [](int32_t row) { return row >= 0; });
  const int64_t shifts = !a.pair_grad && (a.form == Form::ONLINE || a.form == Form::T_MAX);
  const int64_t slices = std::max<int64_t>(a.splits, a.symmetric ? int64_t(a.column_slice) + a.end : 0);
  if (!a.pair_grad || (wanted && a.rows_anchor)) {
    holds(a, Buffer::SUMS, "sums", a.sums, product({slices, shifts + a.terms, a.anchors}), true);
    results("sums", 0, a.anchors, a.symmetric);
  }
  if (!a.pair_grad) return;
  if (a.gradient == Gradient::PRODUCT) {
    holds(a, Buffer::DF, "df", a.df, product({a.splits, a.n_out, a.dim}), true);
    results("df", a.lo, a.n_out > MOST - a.lo ? MOST : a.lo + a.n_out, false);
  }
  if (a.gradient == Gradient::WEIGHTS) {
    const int64_t columns = (a.n_cols + SIDE - 1) / SIDE * SIDE;
    within("weight_columns", a.weight_columns, columns, columns);
    holds(a, Buffer::WEIGHTS, "weights", a.weights, product({a.row_blocks, SIDE, columns}), true);
  }
  holds(a, Buffer::WEIGHT_SUMS, "weight_sums", a.weight_sums, product({a.splits, a.n}));
}

void check(const PairRows& a, bool finish) {
  within("n_pairs", a.n_pairs, 1, MOST / 2), within("dim", a.dim, 1, INT32_MAX);
  for (const int64_t stride : {a.stride1, a.stride2, a.stride}) within("strides", stride, 0, MOST);
  const auto holds = [&](RowBuffer buffer, const char* name, const void* data, int64_t least) {
    ::holds(name, data, a.elements[int(buffer)], least, true);
  };
  const int64_t rows = 2 * a.n_pairs, all = product({rows, a.dim});
  holds(RowBuffer::F, "f", a.f, extent(rows, a.stride, a.dim));
  holds(RowBuffer::INV_NORM, "inv_norm", a.inv_norm, rows);
  if (alphacl::is_half(Dtype(a.dtype))) holds(RowBuffer::SCALE, "scale", a.scale, rows);
  if (finish) {
    within("anchors", a.anchors, 1, 2);
    holds(RowBuffer::D, "d", a.d, all), holds(RowBuffer::Q, "q", a.q, a.anchors * a.n_pairs);
  } else {
    holds(RowBuffer::Z1, "z1", a.z1, extent(a.n_pairs, a.stride1, a.dim));
    holds(RowBuffer::Z2, "z2", a.z2, extent(a.n_pairs, a.stride2, a.dim));
    holds(RowBuffer::POS, "pos", a.pos, rows);
  }
}

void check(const RoundedRows& a) {
  within("n", a.n, 1, INT32_MAX), within("dim", a.dim, 1, INT32_MAX);
  within("stride", a.stride, 0, MOST), within("rounded_stride", a.rounded_stride, a.dim, MOST);
  holds("f", a.f, a.elements[0], extent(a.n, a.stride, a.dim), true);
  holds("rounded", a.rounded, a.elements[1], extent(a.n, a.rounded_stride, a.dim), true);
}

// Runs a check; returns null, or its message, which stays until this thread's next call.
template <class Check> const char* refused(Check&& run) {
  static thread_local std::string error;
  try {
    run();
  } catch (const std::exception& found) {
    error = found.what();
    return error.c_str();
  }
  return nullptr;
}

const char* start(const Sweep& a, void* stream) {
  using namespace alphacl;
  switch (a.dtype) {
    case BFLOAT16: return sweep<BFLOAT16>(a, stream);
    case FLOAT16: return sweep<FLOAT16>(a, stream);
    case TFLOAT32: return sweep<TFLOAT32>(a, stream);
    case FLOAT32: return sweep<FLOAT32>(a, stream);
    case FLOAT64: return sweep<FLOAT64>(a, stream);
    default: return "unknown dtype";
  }
}

}  // namespace

// Compiler, flags and architectures; the sources' fingerprint; sizes of the structs, which Python
// compares with its own.
ALPHACL_EXPORT const char* alphacl_cuda_build() { return ALPHACL_BUILD; }
ALPHACL_EXPORT const char* alphacl_cuda_sources() { return ALPHACL_SOURCES; }
ALPHACL_EXPORT int32_t alphacl_cuda_sweep_size() { return sizeof(Sweep); }
ALPHACL_EXPORT int32_t alphacl_cuda_rows_size() { return sizeof(PairRows); }
ALPHACL_EXPORT int32_t alphacl_cuda_rounded_rows_size() { return sizeof(RoundedRows); }
ALPHACL_EXPORT int32_t alphacl_cuda_codes() { return CODES_CHECKSUM; }

// All launch on the current device and return null, or an error message that stays until this
// thread's next call.
ALPHACL_EXPORT const char* alphacl_cuda_sweep(const Sweep* given, void* stream) {
  Sweep a = *given;
  if (const char* error = refused([&] { check(a); })) return error;
  const int64_t itemsize = alphacl::is_half(Dtype(a.dtype)) ? 2 : a.dtype == FLOAT64 ? 8 : 4;
  a.aligned = reinterpret_cast<uintptr_t>(a.f) % 16 == 0 && a.stride * itemsize % 16 == 0;
  return start(a, stream);
}

ALPHACL_EXPORT const char* alphacl_cuda_rows(int32_t finish, const PairRows* a, void* stream) {
  using namespace alphacl;
  if (const char* error = refused([&] { check(*a, finish); })) return error;
  switch (a->dtype) {
    case BFLOAT16: return rows<BFLOAT16>(finish, *a, stream);
    case FLOAT16: return rows<FLOAT16>(finish, *a, stream);
    case FLOAT32: return rows<FLOAT32>(finish, *a, stream);
    case FLOAT64: return rows<FLOAT64>(finish, *a, stream);
    default: return "unknown dtype";
  }
}

ALPHACL_EXPORT const char* alphacl_cuda_rounded_rows(const RoundedRows* a, void* stream) {
  if (const char* error = refused([&] { check(*a); })) return error;
  return alphacl::rounded_rows<TFLOAT32>(*a, stream);
}

// Why the current device cannot run the kernels, or null.
ALPHACL_EXPORT const char* alphacl_cuda_why_not() { return alphacl::why_not<FLOAT32>(); }

ALPHACL_EXPORT int32_t alphacl_cuda_largest_features(int32_t dtype) { return alphacl::largest_features(Dtype(dtype)); }

// Sets hopper_mode (launch.h) and returns the one before.
ALPHACL_EXPORT int32_t alphacl_cuda_hopper(int32_t mode) { return alphacl::hopper_mode.exchange(mode); }

// Whether launches on the current device go to the kernels of hopper.h, where they serve one.
ALPHACL_EXPORT int32_t alphacl_cuda_has_hopper() { return alphacl::hopper_mode && alphacl::has_hopper<BFLOAT16>(); }

#ifdef ALPHACL_EMULATED
#include "device.h"

ALPHACL_EXPORT void alphacl_cuda_schedule(int32_t seed) { device::schedule(seed); }
#endif
