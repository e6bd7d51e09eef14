// Matrix products of bfloat16 by AVX512_BF16's dot product of pairs, accumulated in float32.
#pragma once

#include "half.h"

namespace {

// C (R × V vectors) = [C +] Σ_k a_k ⊗ b_k over pairs, the whole times the scales of rows and
// columns if there are any; a of row r and pair k is at a[r·A_ROW + k·A_STEP].
template <int R, int V, int64_t A_ROW, int64_t A_STEP, bool Add>
__attribute__((noinline)) void multiply_pairs(const uint32_t* __restrict a, const uint32_t* __restrict b, int64_t ldb,
                                              int64_t steps, float* __restrict c, int64_t ldc,
                                              const float* row_scale = nullptr, const float* col_scale = nullptr) {
  __m512 acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) {
      acc[r][v] = _mm512_setzero_ps();
      if (Add) __builtin_prefetch(c + r * ldc + v * PAIR_LANES, 1);
    }
  for (int64_t k = 0; k < steps; k++) {
    __m512bh bv[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) bv[v] = (__m512bh)_mm512_load_si512(b + v * PAIR_LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[r * A_ROW]));
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, bv[v]);
    }
    a += A_STEP, b += ldb;
  }
  if (Add) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) acc[r][v] += _mm512_load_ps(c + r * ldc + v * PAIR_LANES);
  }
  if (row_scale) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
      // the product of the scales first: t_ij and t_ji must be the same number
      for (int v = 0; v < V; v++)
        acc[r][v] *= _mm512_set1_ps(row_scale[r]) * _mm512_load_ps(col_scale + v * PAIR_LANES);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) _mm512_store_ps(c + r * ldc + v * PAIR_LANES, acc[r][v]);
}

struct DotProducts : HalfProducts {
  // Products of bfloat16 are so fast that passes over the accumulators count: larger blocks earlier.
  static constexpr int64_t FEWEST = 10;

  static int64_t packed_bytes(int64_t dim, int64_t stride, bool gradient) {
    const int64_t by_row = gradient ? stride / 2 * FeaturePanels<float>(dim).padded_dim() : 0;
    return (by_feature_size(dim, stride) + by_row) * 4;
  }
  static int64_t workspace_bytes(int64_t dim, int64_t) {
    const int64_t weights = MAX_BLOCK * LD * 2 + MAX_BLOCK / 2 * LD * 4;
    return weights > row_bytes(dim) ? weights : row_bytes(dim);
  }

  static void pack(const Sweep& s, const Block& block, void* workspace) {
    const int64_t stride = block.stride;
    auto* by_feature = static_cast<uint32_t*>(block.packed);
    uint32_t* by_row = s.gradient ? by_feature + by_feature_size(s.dim, stride) : nullptr;
    for (int64_t r0 = 0; r0 < stride; r0 += PAIR_LANES)
      pack_pairs(s, block, r0, stride, pairs(s.dim), static_cast<uint16_t*>(workspace), by_feature, by_row);
  }

  static ALPHACL_INLINE void similarities(const Sweep& s, const RowVectors& v, const Block& i, const Block& j, int64_t r0, float* out) {
    const int64_t steps = pairs(s.dim), used = (s.dim + 1) / 2;
    const auto* left = static_cast<const uint32_t*>(i.packed) + r0 / WIDE_PAIRS * WIDE_PAIRS * steps + r0 % WIDE_PAIRS;
    const auto* right = static_cast<const uint32_t*>(j.packed);
    const auto* scale = static_cast<const float*>(v.scale);
    const float *rows = scale ? scale + i.at + r0 : nullptr, *cols = scale ? scale + j.at : nullptr;
    for (int64_t c = 0; c < j.rows; c += WIDE_PAIRS) {
      const uint32_t* b = right + c * steps;
      const float* col_scale = cols ? cols + c : nullptr;
      const int64_t first = used < CHAIN ? used : CHAIN;
      multiply_pairs<REGISTER_ROWS, 3, 1, WIDE_PAIRS, false>(left, b, WIDE_PAIRS, first, out + c, LD,
                                                             first < used ? nullptr : rows, col_scale);
      for (int64_t k = CHAIN; k < used; k += CHAIN) {
        const int64_t last = used - k < CHAIN ? used - k : CHAIN;
        multiply_pairs<REGISTER_ROWS, 3, 1, WIDE_PAIRS, true>(left + k * WIDE_PAIRS, b + k * WIDE_PAIRS, WIDE_PAIRS, last,
                                                              out + c, LD, k + last < used ? nullptr : rows, col_scale);
      }
    }
  }

  static void weights(const RowVectors& v, const Block& i, const Block& j, int64_t r0, const float* w, void* workspace) {
    round_weights(v, i, j, r0, w, across(workspace), down(workspace));
  }

  template <int64_t A_ROW, int64_t A_STEP>
  static void add_product(const Sweep& s, const uint32_t* w, int64_t rows, const Block& other, const Block& mine) {
    const int64_t stride = mine.stride;
    const FeaturePanels<float> panels(s.dim);
    const auto* by_row = static_cast<const uint32_t*>(other.packed) + by_feature_size(s.dim, stride);
    const int64_t steps = (other.rows + 1) / 2;
    for (int64_t p = 0; p < panels.count; p++) {
      const int64_t from = panels.first(p) * PAIR_LANES, width = panels.width(p) * PAIR_LANES;
      const uint32_t* b = by_row + from * (stride / 2);
      for (int64_t r = 0; r < rows; r += REGISTER_ROWS) {
        float* c = static_cast<float*>(mine.df) + from * stride + r * width;
        const uint32_t* a = w + r * A_ROW;
        switch (panels.width(p)) {
          case 1: multiply_pairs<REGISTER_ROWS, 1, A_ROW, A_STEP, true>(a, b, width, steps, c, width); break;
          case 2: multiply_pairs<REGISTER_ROWS, 2, A_ROW, A_STEP, true>(a, b, width, steps, c, width); break;
          default: multiply_pairs<REGISTER_ROWS, 3, A_ROW, A_STEP, true>(a, b, width, steps, c, width);
        }
      }
    }
  }

  static void products(const Sweep& s, float*, void* workspace, const Block& i, const Block& j, bool diagonal) {
    if (i.wanted) add_product<LD / 2, 1>(s, reinterpret_cast<const uint32_t*>(across(workspace)), i.rows, j, i);
    if (j.wanted && !diagonal) add_product<1, LD>(s, down(workspace), j.rows, i, j);
  }
};

}  // namespace
