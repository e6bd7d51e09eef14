// Converts rows of any input dtype to the accumulation dtype.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "vec.h"

namespace {

template <class T> ALPHACL_INLINE int64_t padded_dim(int64_t dim) { return (dim + LANES<T> - 1) / LANES<T> * LANES<T>; }

ALPHACL_INLINE float from_bits32(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
ALPHACL_INLINE uint32_t to_bits32(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
ALPHACL_INLINE float from_bfloat16(uint16_t h) { return from_bits32(uint32_t(h) << 16); }
// Subnormals are converted through an integer, because a thread may flush subnormal floats to zero.
ALPHACL_INLINE float from_float16(uint16_t h) {
  const float magnitude =
      h & 0x7c00 ? from_bits32(uint32_t(h & 0x7fff) << 13) * 0x1p112f : float(int32_t(h & 0x3ff)) * 0x1p-24f;
  const uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return from_bits32(to_bits32(magnitude) | special | uint32_t(h & 0x8000) << 16);
}

// y[0 … dim) = x, in the accumulation dtype and times a scale
template <class T> void widen(const void* from, int32_t dtype, int64_t at, int64_t dim, T scale, T* y) {
  if (dtype == BFLOAT16) {
    const auto* x = static_cast<const uint16_t*>(from) + at;
    for (int64_t k = 0; k < dim; k++) y[k] = T(from_bfloat16(x[k])) * scale;
  } else if (dtype == FLOAT16) {
    const auto* x = static_cast<const uint16_t*>(from) + at;
    for (int64_t k = 0; k < dim; k++) y[k] = T(from_float16(x[k])) * scale;
  } else {
    const auto* x = static_cast<const T*>(from) + at;
    if (scale == 1)
      std::memcpy(y, x, dim * sizeof(T));
    else
      for (int64_t k = 0; k < dim; k++) y[k] = x[k] * scale;
  }
}

// Row r of the stacked rows, times its scale.
template <class T> void read_row(const Sweep& s, int64_t r, T* y) {
  widen<T>(s.f, s.dtype, r * s.row_stride, s.dim, s.scale ? static_cast<const T*>(s.scale)[r] : T(1), y);
}

// --- before and after the sweeps -----------------------------------------------------------------

template <class T> T dot(const T* a, const T* b, int64_t dim) {
  constexpr int L = LANES<T>;
  Vec<T> sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * L <= dim; k += 4 * L)
    for (int v = 0; v < 4; v++) sums[v] += load_unaligned(a + k + v * L) * load_unaligned(b + k + v * L);
  for (; k + L <= dim; k += L) sums[0] += load_unaligned(a + k) * load_unaligned(b + k);
  T rest = 0;
  for (; k < dim; k++) rest += a[k] * b[k];
  return sum_of<T>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

ALPHACL_INLINE float root(float x) { return __builtin_sqrtf(x); }
ALPHACL_INLINE double root(double x) { return __builtin_sqrt(x); }

// Makes y a unit row and returns 1/‖y‖; an all-zero row stays and returns 0.
template <class T> T normalize_row(T* y, int64_t dim) {
  T square = dot(y, y, dim);
  T largest = 1;
  // If squares left the range of the dtype or came near its end, sum again for the row divided by
  // its largest element. Squares that then underflow are far below the last place of the sum.
  if (!(square > T(0x1p-60) && square < T(0x1p60))) {
    largest = 0;
    for (int64_t k = 0; k < dim; k++) {
      const T size = y[k] < 0 ? -y[k] : y[k];
      largest = size > largest || size != size ? size : largest;
    }
    if (largest == 0) return 0;
    for (int64_t k = 0; k < dim; k++) y[k] /= largest;
    square = dot(y, y, dim);
  }
  const T norm = root(square);
  for (int64_t k = 0; k < dim; k++) y[k] /= norm;
  const T inverse = 1 / norm / largest, most = T(sizeof(T) == 4 ? 3.4028234e38 : 1.7976931348623157e308);
  return inverse > most ? most : inverse;
}

// The power of two by which a half-precision row is stored. It is 1 for a largest element from 2⁻³⁰
// up to 2³⁰, where products of two rows stay in the range of float; float16 rows never need it.
inline float lift_of(const uint16_t* x, int32_t dtype, int64_t dim) {
  if (dtype != BFLOAT16) return 1;
  int largest = 0;
  for (int64_t k = 0; k < dim; k++) largest = std::max(largest, int(x[k] & 0x7fff));
  const int exponent = largest >> 7, bias = 127;
  if (exponent == 255 || (exponent >= bias - 30 && exponent < bias + 30)) return 1;
  return from_bits32(uint32_t(2 * bias - std::clamp(exponent, 1, 2 * bias - 1)) << 23);
}

// Adds the rows of both views to the sums of their columns.
template <class T> void add_columns(const PairRows& p, int64_t begin, int64_t end, void* workspace, double* sums) {
  T* row = static_cast<T*>(workspace);
  for (int view = 0; view < 2; view++)
    for (int64_t i = begin; i < end; i++) {
      widen<T>(view ? p.z2 : p.z1, p.dtype, i * (view ? p.stride2 : p.stride1), p.dim, T(1), row);
      for (int64_t k = 0; k < p.dim; k++) sums[k] += double(row[k]);
    }
}

// Rows of a similarity that does not normalise them, and that of the positive pair.
template <class T> void place_pair(const PairRows& p, int64_t i, T* const rows[2]) {
  const bool half = (p.dtype == BFLOAT16 || p.dtype == FLOAT16) && p.similarity == DOT;
  for (int view = 0; view < 2; view++) {
    const int64_t at = i * (view ? p.stride2 : p.stride1), row = i + view * p.n_pairs;
    const void* z = view ? p.z2 : p.z1;
    T* const y = rows[view];
    widen<T>(z, p.dtype, at, p.dim, T(1), y);
    if (half) {
      std::memcpy(static_cast<uint16_t*>(p.f) + row * p.stride, static_cast<const uint16_t*>(z) + at, p.dim * 2);
      continue;
    }
    if (p.similarity == EUCLIDEAN) {
      const T* mean = static_cast<const T*>(p.mean);
      for (int64_t k = 0; k < p.dim; k++) y[k] -= mean[k];
      static_cast<T*>(p.bias)[row] = dot(y, y, p.dim) / -2;
    }
    std::memcpy(static_cast<T*>(p.f) + row * p.stride, y, p.dim * sizeof(T));
  }
  T* const pos = static_cast<T*>(p.pos) + i;
  if (p.similarity == DOT) {
    *pos = dot(rows[0], rows[1], p.dim);
  } else {
    for (int64_t k = 0; k < p.dim; k++) rows[1][k] -= rows[0][k];
    *pos = dot(rows[1], rows[1], p.dim) / -2;
  }
}

template <class T> void normalize_pairs(const PairRows& p, int64_t begin, int64_t end, void* workspace) {
  T* rows[2] = {static_cast<T*>(workspace), static_cast<T*>(workspace) + padded_dim<T>(p.dim)};
  const bool half = p.dtype == BFLOAT16 || p.dtype == FLOAT16;
  for (int64_t i = begin; i < end; i++) {
    if (p.similarity != COSINE) {
      place_pair<T>(p, i, rows);
      continue;
    }
    for (int view = 0; view < 2; view++) {
      const int64_t at = i * (view ? p.stride2 : p.stride1), row = i + view * p.n_pairs;
      const void* z = view ? p.z2 : p.z1;
      if (!half) {
        widen<T>(z, p.dtype, at, p.dim, T(1), rows[view]);
        static_cast<T*>(p.inv_norm)[row] = normalize_row(rows[view], p.dim);
        std::memcpy(static_cast<T*>(p.f) + row * p.stride, rows[view], p.dim * sizeof(T));
        continue;
      }
      const auto* given = static_cast<const uint16_t*>(z) + at;
      auto* stored = static_cast<uint16_t*>(p.f) + row * p.stride;
      const T lift = lift_of(given, p.dtype, p.dim), most = T(3.4028234e38);
      widen<T>(z, p.dtype, at, p.dim, lift, rows[view]);
      if (lift == 1)
        std::memcpy(stored, given, p.dim * 2);
      else  // exact, but for what is 2⁻¹²⁶ of the largest element
        for (int64_t k = 0; k < p.dim; k++) stored[k] = uint16_t(to_bits32(float(rows[view][k])) >> 16);
      const T scale = normalize_row(rows[view], p.dim), inverse = scale * lift;
      static_cast<T*>(p.scale)[row] = scale;
      static_cast<T*>(p.inv_norm)[row] = inverse > most ? most : inverse;
    }
    static_cast<T*>(p.pos)[i] = dot(rows[0], rows[1], p.dim);
  }
}

// Rows [begin, end) of unit length or, with `d`, the gradient through them: (d − f⟨f, d⟩)/‖z‖.
template <class T> void unit_rows(const UnitRows& u, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    T* f = static_cast<T*>(u.f) + i * u.dim;
    T& inverse = static_cast<T*>(u.inv_norm)[i];
    if (!u.d) {
      widen<T>(u.z, u.dtype, i * u.z_stride, u.dim, T(1), f);
      inverse = normalize_row(f, u.dim);
      continue;
    }
    const T* d = static_cast<const T*>(u.d) + i * u.d_stride;
    T* dz = static_cast<T*>(u.dz) + i * u.dim;
    const T along = dot<T>(f, d, u.dim);
    for (int64_t k = 0; k < u.dim; k++) dz[k] = (d[k] - f[k] * along) * inverse;
  }
}

// Cosine: d ← (g − F⟨F, g⟩)/‖z‖ with g = d − q·F of the partner; DOT: d ← g; EUCLIDEAN, whose t
// holds −½‖F‖²: d ← d + q·(F − F of the partner) − weight_sums·F
template <class T> void finish_pairs(const PairRows& p, int64_t begin, int64_t end, void* workspace) {
  const bool half = (p.dtype == BFLOAT16 || p.dtype == FLOAT16) && p.similarity != EUCLIDEAN;
  for (int64_t i = begin; i < end; i++) {
    const T* rows[2];
    for (int view = 0; view < 2; view++) {
      const int64_t row = i + view * p.n_pairs;
      T* unit = static_cast<T*>(workspace) + view * padded_dim<T>(p.dim);
      if (half) widen<T>(p.f, p.dtype, row * p.stride, p.dim, p.scale ? static_cast<const T*>(p.scale)[row] : T(1), unit);
      rows[view] = half ? unit : static_cast<const T*>(p.f) + row * p.stride;
    }
    const T q = static_cast<const T*>(p.q)[i];
    for (int view = 0; view < 2; view++) {
      const int64_t row = i + view * p.n_pairs;
      if (row < p.lo || row >= p.hi) continue;
      T* d = static_cast<T*>(p.d) + (row - p.lo) * p.dim;
      if (row >= p.swept) std::fill_n(d, p.dim, T(0));
      const T *mine = rows[view], *partner = rows[1 - view];
      if (p.similarity == EUCLIDEAN) {
        const T weight = row < p.swept ? static_cast<const T*>(p.weight_sums)[row] : T(0);
        for (int64_t k = 0; k < p.dim; k++) d[k] += q * (mine[k] - partner[k]) - weight * mine[k];
        continue;
      }
      for (int64_t k = 0; k < p.dim; k++) d[k] -= q * partner[k];
      if (p.similarity == DOT) continue;
      const T along = dot(mine, d, p.dim), inverse = static_cast<const T*>(p.inv_norm)[row];
      for (int64_t k = 0; k < p.dim; k++) d[k] = (d[k] - mine[k] * along) * inverse;
    }
  }
}

}  // namespace
