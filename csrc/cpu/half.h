// What the two sets of bfloat16 products share: packing of pairs, weights rounded to bfloat16, the
// gradient's accumulator.
//
// Rows are multiplied unnormalised (rounding a normalised row would cost 2⁻⁹ of each similarity),
// except for a power of two: row r of an operand is 2^e·f_r, and the rest of its scale, in
// [½, 1), multiplies similarities and weights in float32. Instructions take pairs of
// bfloat16 that are neighbours along the summed dimension:
//   `by_feature` [stride/48][pairs of d][48]      S = F_I·F_Jᵀ
//   `by_row`     [panel of d][stride/2][width]    dF += W·F: pairs of rows
#pragma once

#include "native.h"

#include <immintrin.h>

namespace {

constexpr int PAIR_LANES = 16;  // 32-bit pairs in a vector
constexpr int WIDE_PAIRS = 3 * PAIR_LANES;

ALPHACL_INLINE __m512i interleave_halves(__m512i v) {  // (a0 … a15 | b0 … b15) → (a0 b0 a1 b1 …)
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), v);
}

// Row r as bfloat16, times the power of two of its scale; 0 for a row of scale 0.
ALPHACL_INLINE void read_bfloat16(const Sweep& s, int64_t r, uint16_t* y) {
  const auto* x = static_cast<const uint16_t*>(s.f) + r * s.row_stride;
  if (!s.scale) {
    std::memcpy(y, x, s.dim * 2);
    return;
  }
  int exponent = 0;
  const float scale = static_cast<const float*>(s.scale)[r];
  if (scale != 0) (void)__builtin_frexpf(scale, &exponent);
  const int half = exponent / 2;  // 2^128 is no float
  const float once = scale == 0 ? 0.f : __builtin_ldexpf(1.f, half), again = __builtin_ldexpf(1.f, exponent - half);
  for (int64_t k = 0; k < s.dim; k++)  // exact but for what leaves the range of bfloat16
    y[k] = uint16_t(to_bits32(from_bfloat16(x[k]) * once * again) >> 16);
}

// Packs rows [r0, r0 + 16) of both layouts; `rows` is (16, 2·pairs) and receives them row by row.
ALPHACL_INLINE void pack_pairs(const Sweep& s, const Block& block, int64_t r0, int64_t stride, int64_t pairs, uint16_t* rows,
                               uint32_t* by_feature, uint32_t* by_row) {
  const int64_t width = 2 * pairs;
  for (int64_t r = 0; r < PAIR_LANES; r++) {
    uint16_t* row = rows + r * width;
    const bool real = r0 + r < block.rows;
    if (real) read_bfloat16(s, block.first + r0 + r, row);
    std::memset(row + (real ? s.dim : 0), 0, (width - (real ? s.dim : 0)) * 2);
  }
  uint32_t* out = by_feature + r0 / WIDE_PAIRS * WIDE_PAIRS * pairs + r0 % WIDE_PAIRS;
  for (int64_t k0 = 0; k0 < pairs; k0 += PAIR_LANES) {  // `pairs` is a multiple of 16
    Vec<float> square[PAIR_LANES];
#pragma GCC unroll 16
    for (int r = 0; r < PAIR_LANES; r++)
      square[r] = load_unaligned(reinterpret_cast<const float*>(rows + r * width) + k0);
    transpose<float>(square);
#pragma GCC unroll 16
    for (int k = 0; k < PAIR_LANES; k++) store(reinterpret_cast<float*>(out + (k0 + k) * WIDE_PAIRS), square[k]);
  }
  if (!by_row) return;
  const FeaturePanels<float> panels(s.dim);
  for (int64_t p = 0; p < panels.count; p++) {
    const int64_t from = panels.first(p) * PAIR_LANES, w = panels.width(p) * PAIR_LANES;
    for (int64_t r = 0; r < PAIR_LANES; r += 2) {
      uint32_t* to = by_row + from * (stride / 2) + (r0 + r) / 2 * w;
      const uint16_t *a = rows + r * width + from, *b = a + width;
      for (int64_t k = 0; k < w; k++) to[k] = from + k < width ? a[k] | uint32_t(b[k]) << 16 : 0;
    }
  }
}

// Weights of one panel as bfloat16: `across` (row, column), for W·F_J and so times the scales of J,
// and `down` (row pair, column, 2), for Wᵀ·F_I and so times the scales of I.
ALPHACL_INLINE void round_weights(const RowVectors& v, const Block& i, const Block& j, int64_t r0, const float* w,
                                  uint16_t* across, uint32_t* down) {
  const float* scale = static_cast<const float*>(v.scale);
  for (int64_t r = 0; r < PANEL_ROWS; r += 2) {
    const __m512 up = _mm512_set1_ps(scale ? scale[i.at + r0 + r] : 1.f);
    const __m512 low = _mm512_set1_ps(scale ? scale[i.at + r0 + r + 1] : 1.f);
    for (int64_t c = 0; c < j.rows; c += PAIR_LANES) {
      const __m512 a = _mm512_load_ps(w + r * LD + c), b = _mm512_load_ps(w + (r + 1) * LD + c);
      const __m512 s = scale ? _mm512_load_ps(scale + j.at + c) : _mm512_set1_ps(1.f);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(across + (r0 + r) * LD + c), (__m256i)_mm512_cvtneps_pbh(a * s));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(across + (r0 + r + 1) * LD + c), (__m256i)_mm512_cvtneps_pbh(b * s));
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b * low, a * up);
      _mm512_store_si512(down + (r0 + r) / 2 * LD + c, interleave_halves(both));
    }
  }
}

// A shorter exponential than ExactFactors': 2^k·2^r with |r| <= ½ and a polynomial of degree 5 for 2^r.
// Its relative error is below 2e-6; bfloat16 rounds the factors to 4e-3 anyway.
struct ShortFactors {
  static ALPHACL_INLINE Vec<float> exponential(Vec<float> x) {
    using C = ExpConstants<float>;
    constexpr float biased = C::magic + 127;
    // both fused, in every function: a tile that is computed again has the same factors
    const __m512 log2e = _mm512_set1_ps(C::log2e);
    const Vec<float> shifted = (Vec<float>)_mm512_fmadd_ps((__m512)x, log2e, _mm512_set1_ps(biased));
    const Vec<float> r = (Vec<float>)_mm512_fmsub_ps((__m512)x, log2e, (__m512)(shifted - biased));
    Vec<float> p = r * 1.3264727e-3f + 9.671513e-3f;
    p = p * r + 5.5507336e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.9314700e-1f;
    p = p * r + 1;
    return p * from_bits<float>((Mask<float>)((Word<float>)bits<float>(shifted) << C::mantissa));
  }
};

struct HalfProducts : NativeProducts<float> {
  using Factors = ShortFactors;
  static constexpr bool WEIGHTS_IN_PLACE = false;

  static int64_t pairs(int64_t dim) { return padded(dim, 2 * PAIR_LANES) / 2; }
  static int64_t by_feature_size(int64_t dim, int64_t stride) { return stride * pairs(dim); }
  static int64_t row_bytes(int64_t dim) { return PAIR_LANES * pairs(dim) * 4; }  // for pack_pairs
  static uint16_t* across(void* workspace) { return static_cast<uint16_t*>(workspace); }
  static uint32_t* down(void* workspace) { return reinterpret_cast<uint32_t*>(across(workspace) + MAX_BLOCK * LD); }
};

}  // namespace
