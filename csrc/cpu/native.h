// Matrix products of float and double by multiply-add: register tiles of REGISTER_ROWS × 3 vectors.
//
// Packed block: `left`  [stride/WIDE][dim][WIDE]   k-major panels: both operands of S = F_I·F_Jᵀ
//               `right` [panel of d][stride][width] row-major panels: F in dF_I += W·F_J and dF_J += Wᵀ·F_I
// The gradient's accumulator has the layout of `right`.
#pragma once

#include "rows.h"
#include "tile.h"

namespace {

// C (R × V vectors, ldc) = [C +] Σ_k a_k ⊗ b_k; a of row r and step k is at a[r·A_ROW + k·A_STEP].
template <class T, int R, int V, int64_t A_ROW, int64_t A_STEP, bool Add>
__attribute__((noinline)) void multiply(const T* __restrict a, const T* __restrict b, int64_t ldb, int64_t steps, T* __restrict c, int64_t ldc) {
  constexpr int L = LANES<T>;
  Vec<T> acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) acc[r][v] = Vec<T>{};
  if (Add)  // the accumulator is not in the cache, and is needed only at the end
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) __builtin_prefetch(c + r * ldc + v * L, 1);
  for (int64_t k = 0; k < steps; k++) {
    Vec<T> bv[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) bv[v] = load(b + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const T x = a[r * A_ROW];
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) acc[r][v] += x * bv[v];
    }
    a += A_STEP, b += ldb;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) store(c + r * ldc + v * L, Add ? acc[r][v] + load(c + r * ldc + v * L) : acc[r][v]);
}

// Terms of a similarity that are added in a row. One long chain rounds in the same direction for
// rows that are nearly equal: at D = 4096 it would be off by 3e-6, ten times as much as a vendor's
// product.
constexpr int64_t CHAIN = 128;

// The columns of F, split as evenly as possible into panels of one to three vectors.
template <class T> struct FeaturePanels {
  int64_t vectors, count;
  explicit FeaturePanels(int64_t dim) : vectors(padded(dim, LANES<T>) / LANES<T>), count((vectors + 2) / 3) {}
  ALPHACL_INLINE int64_t first(int64_t p) const { return vectors * p / count; }  // in vectors
  ALPHACL_INLINE int64_t width(int64_t p) const { return first(p + 1) - first(p); }
  ALPHACL_INLINE int64_t padded_dim() const { return vectors * LANES<T>; }
};

template <class Scalar> struct NativeProducts {
  using T = Scalar;
  static constexpr int L = LANES<T>;
  static constexpr int WIDE = 3 * L;
#if ALPHACL_VECTOR_BYTES == 64
  static constexpr int REGISTER_ROWS = 8;
#else
  static constexpr int REGISTER_ROWS = WIDE % 4 == 0 ? 4 : 2;
#endif
  static_assert(WIDE % REGISTER_ROWS == 0 && ROW_MULTIPLE % WIDE == 0 && PANEL_ROWS % REGISTER_ROWS == 0);
  using Factors = ExactFactors<T>;
  // weights stay in the tile; scales are applied
  static constexpr bool WEIGHTS_IN_PLACE = true, SCALES = true;
  static constexpr int64_t SIMILARITY_ROWS = PANEL_ROWS, MULTIPLE = ROW_MULTIPLE, LARGEST = MAX_BLOCK, FEWEST = 16;

  static int64_t left_size(int64_t dim, int64_t stride) { return stride * dim; }
  static int64_t packed_bytes(int64_t dim, int64_t stride, bool gradient) {
    const int64_t right = gradient ? stride * FeaturePanels<T>(dim).padded_dim() : 0;
    return padded((left_size(dim, stride) + right) * sizeof(T), 64);
  }
  static int64_t df_bytes(int64_t dim, int64_t stride) { return stride * FeaturePanels<T>(dim).padded_dim() * sizeof(T); }
  static int64_t workspace_bytes(int64_t dim, int64_t) { return L * FeaturePanels<T>(dim).padded_dim() * sizeof(T); }

  static void pack(const Sweep& s, const Block& block, void* workspace) {
    const int64_t stride = block.stride;
    const FeaturePanels<T> panels(s.dim);
    const int64_t wide_dim = panels.padded_dim();
    T* rows = static_cast<T*>(workspace);  // (L, wide_dim)
    T* left = static_cast<T*>(block.packed);
    T* right = left + left_size(s.dim, stride);
    for (int64_t r0 = 0; r0 < stride; r0 += L) {
      for (int64_t r = 0; r < L; r++) {
        T* row = rows + r * wide_dim;
        const bool real = r0 + r < block.rows;
        if (real) read_row<T>(s, block.first + r0 + r, row);
        std::memset(row + (real ? s.dim : 0), 0, (wide_dim - (real ? s.dim : 0)) * sizeof(T));
        if (s.gradient)
          for (int64_t p = 0; p < panels.count; p++) {
            const int64_t from = panels.first(p) * L, width = panels.width(p) * L;
            std::memcpy(right + from * stride + (r0 + r) * width, row + from, width * sizeof(T));
          }
      }
      T* out = left + r0 / WIDE * WIDE * s.dim + r0 % WIDE;
      for (int64_t k0 = 0; k0 < s.dim; k0 += L) {
        Vec<T> square[L];
#pragma GCC unroll 16
        for (int r = 0; r < L; r++) square[r] = load(rows + r * wide_dim + k0);
        transpose<T>(square);
        const int64_t steps = s.dim - k0 < L ? s.dim - k0 : L;
        if (steps == L) {
#pragma GCC unroll 16
          for (int k = 0; k < L; k++) store(out + (k0 + k) * WIDE, square[k]);
        } else {
          for (int64_t k = 0; k < steps; k++) store(out + (k0 + k) * WIDE, square[k]);
        }
      }
    }
  }

  // s (PANEL_ROWS, LD) = F_I[r0 …]·F_Jᵀ
  static ALPHACL_INLINE void similarities(const Sweep& s, const RowVectors&, const Block& i, const Block& j, int64_t r0, T* out) {
    panel(i.packed, j.packed, s.dim, j.rows, r0, out);
  }
  // The same from the `left` layouts of two blocks of rows of any kind.
  static ALPHACL_INLINE void panel(const void* of_rows, const void* of_columns, int64_t dim, int64_t cols, int64_t r0, T* out) {
    const T *left = static_cast<const T*>(of_rows), *right = static_cast<const T*>(of_columns);
    for (int64_t c = 0; c < cols; c += WIDE)
      for (int64_t r = r0; r < r0 + PANEL_ROWS; r += REGISTER_ROWS) {
        const T *a = left + r / WIDE * WIDE * dim + r % WIDE, *b = right + c * dim;
        T* t = out + (r - r0) * LD + c;
        switch ((cols - c + L - 1) / L) {  // vectors of columns: a small batch has few whole panels
          case 1: similarities_of<1>(a, b, dim, t); break;
          case 2: similarities_of<2>(a, b, dim, t); break;
          default: similarities_of<3>(a, b, dim, t);
        }
      }
  }
  template <int V> static ALPHACL_INLINE void similarities_of(const T* a, const T* b, int64_t dim, T* out) {
    multiply<T, REGISTER_ROWS, V, 1, WIDE, false>(a, b, WIDE, dim < CHAIN ? dim : CHAIN, out, LD);
    for (int64_t k = CHAIN; k < dim; k += CHAIN)
      multiply<T, REGISTER_ROWS, V, 1, WIDE, true>(a + k * WIDE, b + k * WIDE, WIDE, dim - k < CHAIN ? dim - k : CHAIN, out, LD);
  }

  // dF (of `rows` rows) += W·F, W of row r and step k at w[r·A_ROW + k·A_STEP]
  template <int64_t A_ROW, int64_t A_STEP>
  static void add_product(const Sweep& s, const T* w, int64_t rows, const Block& other, const Block& mine) {
    const int64_t stride = mine.stride;
    const FeaturePanels<T> panels(s.dim);
    const T* right = static_cast<const T*>(other.packed) + left_size(s.dim, stride);
    T* df = static_cast<T*>(mine.df);
    for (int64_t p = 0; p < panels.count; p++) {
      const int64_t at = panels.first(p) * L * stride, width = panels.width(p) * L;
      for (int64_t r = 0; r < rows; r += REGISTER_ROWS) {
        T* c = df + at + r * width;
        const T* a = w + r * A_ROW;
        switch (panels.width(p)) {
          case 1: multiply<T, REGISTER_ROWS, 1, A_ROW, A_STEP, true>(a, right + at, width, other.rows, c, width); break;
          case 2: multiply<T, REGISTER_ROWS, 2, A_ROW, A_STEP, true>(a, right + at, width, other.rows, c, width); break;
          default: multiply<T, REGISTER_ROWS, 3, A_ROW, A_STEP, true>(a, right + at, width, other.rows, c, width);
        }
      }
    }
  }

  static void products(const Sweep& s, T* tile, void*, const Block& i, const Block& j, bool diagonal) {
    if (i.wanted) add_product<LD, 1>(s, tile, i.rows, j, i);
    if (j.wanted && !diagonal) add_product<1, LD>(s, tile, j.rows, i, j);
  }

  static bool in_place(int64_t dim, int64_t stride) {
    return FeaturePanels<T>(dim).padded_dim() == dim && stride * dim <= TILE_SIZE;
  }

  // `tile` has room for TILE_SIZE numbers
  static void unpack(const Sweep& s, const Block& block, double scale, T* tile) {
    const FeaturePanels<T> panels(s.dim);
    const T* df = static_cast<const T*>(block.df);
    // in place: panels become rows
    if (df == static_cast<const T*>(s.df) + (block.first - s.lo) * s.dim) {
      std::memcpy(tile, df, df_bytes(s.dim, block.stride));
      df = tile;
    }
    for (int64_t r = 0; r < block.rows; r++) {
      const int64_t row = block.first + r;
      if (row < s.lo || row >= s.hi) continue;
      T* out = static_cast<T*>(s.df) + (row - s.lo) * s.dim;
      const T factor = T(scale);
      for (int64_t p = 0; p < panels.count; p++) {
        const int64_t from = panels.first(p) * L, width = panels.width(p) * L;
        const int64_t used = s.dim - from < width ? s.dim - from : width;
        const T* in = df + from * block.stride + r * width;
        for (int64_t k = 0; k < used; k++) out[from + k] = in[k] * factor;
      }
    }
  }
};

}  // namespace
