// Rows of any input dtype as rows of the accumulation dtype.
#pragma once

#include "sweep.h"
#include "vec.h"

namespace {

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
ALPHACL_INLINE float from_float16(uint16_t h) {  // the product also makes numbers of float16's subnormals
  const float magnitude = from_bits32(uint32_t(h & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return from_bits32(to_bits32(magnitude) | special | uint32_t(h & 0x8000) << 16);
}

// y[0 … dim) = row r of f, times its scale
template <class T> void read_row(const Sweep& s, int64_t r, T* y) {
  const int64_t at = r * s.row_stride, dim = s.dim;
  const T scale = s.scale ? static_cast<const T*>(s.scale)[r] : T(1);
  if (s.dtype == BFLOAT16) {
    const auto* x = static_cast<const uint16_t*>(s.f) + at;
    for (int64_t k = 0; k < dim; k++) y[k] = T(from_bfloat16(x[k])) * scale;
  } else if (s.dtype == FLOAT16) {
    const auto* x = static_cast<const uint16_t*>(s.f) + at;
    for (int64_t k = 0; k < dim; k++) y[k] = T(from_float16(x[k])) * scale;
  } else {
    const auto* x = static_cast<const T*>(s.f) + at;
    if (s.scale)
      for (int64_t k = 0; k < dim; k++) y[k] = x[k] * scale;
    else
      std::memcpy(y, x, dim * sizeof(T));
  }
}

}  // namespace
