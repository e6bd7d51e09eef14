// Matrix products of bfloat16 by AMX tiles of 16 rows × 32 bfloat16, accumulated in float32.
//
// The first operand of a tile product is row-major, the second one in pairs along the summed
// dimension. So a block has a third layout, `rows` [stride][dim], and weights are kept as W and as
// Wᵀ, both row-major.
//
// ALPHACL_AMX_EMULATED replaces the tile instructions by loops that do what Intel's manual says, so
// that these kernels' logic runs in the tests of any machine with AVX512_BF16.
#pragma once

#include "half.h"

namespace {

struct alignas(64) TileConfiguration {  // palette 1: eight tiles of 16 rows of 64 bytes
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64);

#if defined(ALPHACL_AMX_EMULATED)
struct EmulatedTile {
  alignas(64) uint32_t word[16][16];
};
thread_local EmulatedTile emulated[8];
inline void emulated_load(int t, const void* p, int64_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy(emulated[t].word[r], static_cast<const char*>(p) + r * stride, 64);
}
inline void emulated_store(int t, void* p, int64_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy(static_cast<char*>(p) + r * stride, emulated[t].word[r], 64);
}
inline void emulated_product(int c, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        const uint32_t x = emulated[a].word[m][k], y = emulated[b].word[k][n];
        float sum = from_bits32(emulated[c].word[m][n]);
        sum += from_bits32(x << 16) * from_bits32(y << 16);
        sum += from_bits32(x & 0xffff0000u) * from_bits32(y & 0xffff0000u);
        emulated[c].word[m][n] = to_bits32(sum);
      }
}
#define TILE_ZERO(t) std::memset(&emulated[t], 0, sizeof(EmulatedTile))
#define TILE_LOAD(t, p, stride) emulated_load(t, p, stride)
#define TILE_STORE(t, p, stride) emulated_store(t, p, stride)
#define TILE_PRODUCT(c, a, b) emulated_product(c, a, b)
struct UsingTiles {
  UsingTiles() {}
};
#else
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_PRODUCT(c, a, b) _tile_dpbf16ps(c, a, b)
// Configures the tiles and leaves them as they were found: other libraries of the process cache
// what they have set.
struct UsingTiles {
  alignas(64) char before[64];
  UsingTiles() {
    const TileConfiguration mine;
    _tile_storeconfig(before);
    // GCC's intrinsics do not say what memory they read
    __asm__ volatile("" : : "r"(&mine) : "memory");
    _tile_loadconfig(&mine);
  }
  ~UsingTiles() {
    if (before[0]) _tile_loadconfig(before);
    else _tile_release();
  }
};
#endif

// Where a 16 × 16 float tile of the result, or a tile of the second operand, begins.
struct Place {
  void* at;
  int64_t stride;  // bytes
};

// C (32 × 32, four tiles) = [C +] A (32 rows, a_stride bytes apart)·B; step k moves A by 64 bytes
// and B by 16 rows.
template <bool Add>
ALPHACL_INLINE void multiply_tiles(const char* a, int64_t a_stride, Place b0, Place b1, int64_t steps, Place c0, Place c1) {
  char *c00 = static_cast<char*>(c0.at), *c01 = static_cast<char*>(c1.at);
  char *c10 = c00 + 16 * c0.stride, *c11 = c01 + 16 * c1.stride;
  if (Add) {
    TILE_LOAD(0, c00, c0.stride);
    TILE_LOAD(1, c01, c1.stride);
    TILE_LOAD(2, c10, c0.stride);
    TILE_LOAD(3, c11, c1.stride);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  const char *p0 = static_cast<const char*>(b0.at), *p1 = static_cast<const char*>(b1.at);
  for (int64_t k = 0; k < steps; k++) {
    TILE_LOAD(4, a, a_stride);
    TILE_LOAD(6, p0, b0.stride);
    TILE_LOAD(7, p1, b1.stride);
    TILE_LOAD(5, a + 16 * a_stride, a_stride);
    TILE_PRODUCT(0, 4, 6);
    TILE_PRODUCT(1, 4, 7);
    TILE_PRODUCT(2, 5, 6);
    TILE_PRODUCT(3, 5, 7);
    a += 64, p0 += 16 * b0.stride, p1 += 16 * b1.stride;
  }
  TILE_STORE(0, c00, c0.stride);
  TILE_STORE(1, c01, c1.stride);
  TILE_STORE(2, c10, c0.stride);
  TILE_STORE(3, c11, c1.stride);
}

struct AmxProducts : HalfProducts {
  static constexpr bool SCALES = false;
  // multiples of 32 and of 48
  static constexpr int64_t SIMILARITY_ROWS = 32, MULTIPLE = 96, LARGEST = 192;

  // The panels of d for an even number of tiles: the last one may be padding.
  static int64_t wide_dim(int64_t dim) { return padded(FeaturePanels<float>(dim).padded_dim(), 32); }
  static int64_t packed_bytes(int64_t dim, int64_t stride, bool gradient) {
    return (2 * by_feature_size(dim, stride) + (gradient ? stride / 2 * wide_dim(dim) : 0)) * 4;
  }
  static int64_t df_bytes(int64_t dim, int64_t stride) { return stride * wide_dim(dim) * 4; }
  static int64_t workspace_bytes(int64_t dim, int64_t) {
    const int64_t weights = 3 * MAX_BLOCK * LD * 2;
    return weights > row_bytes(dim) ? weights : row_bytes(dim);
  }

  static void pack(const Sweep& s, const Block& block, void* workspace) {
    const int64_t stride = block.stride;
    const int64_t n_pairs = pairs(s.dim);
    auto* by_feature = static_cast<uint32_t*>(block.packed);
    uint32_t* rows = by_feature + by_feature_size(s.dim, stride);
    uint32_t* by_row = s.gradient ? rows + by_feature_size(s.dim, stride) : nullptr;
    auto* some = static_cast<uint16_t*>(workspace);
    for (int64_t r0 = 0; r0 < stride; r0 += PAIR_LANES) {
      pack_pairs(s, block, r0, stride, n_pairs, some, by_feature, by_row);
      std::memcpy(rows + r0 * n_pairs, some, PAIR_LANES * n_pairs * 4);
    }
    if (by_row) {
      const int64_t real = FeaturePanels<float>(s.dim).padded_dim();
      std::memset(by_row + stride / 2 * real, 0, stride / 2 * (wide_dim(s.dim) - real) * 4);
    }
  }

  static void similarities(const Sweep& s, const RowVectors&, const Block& i, const Block& j, int64_t r0, float* out) {
    if (r0 % SIMILARITY_ROWS) return;  // came with the panel before
    const UsingTiles tiles;
    const int64_t n_pairs = pairs(s.dim);
    auto* by_feature = static_cast<uint32_t*>(j.packed);
    const auto* a = static_cast<const uint32_t*>(i.packed) + by_feature_size(s.dim, i.stride) + r0 * n_pairs;
    for (int64_t c = 0; c < j.rows; c += 32) {
      auto second = [&](int64_t col) {
        return Place{by_feature + col / WIDE_PAIRS * WIDE_PAIRS * n_pairs + col % WIDE_PAIRS, WIDE_PAIRS * 4};
      };
      multiply_tiles<false>(reinterpret_cast<const char*>(a), n_pairs * 4, second(c), second(c + 16), n_pairs / 16,
                            {out + c, LD * 4}, {out + c + 16, LD * 4});
    }
  }

  static uint16_t* transposed(void* workspace) { return across(workspace) + 2 * MAX_BLOCK * LD; }

  static void weights(const RowVectors& v, const Block& i, const Block& j, int64_t r0, const float* w, void* workspace) {
    round_weights(v, i, j, r0, w, across(workspace), down(workspace));
    const int64_t end = r0 + PANEL_ROWS;
    if (end % 32 && end < i.rows) return;
    // 32 rows are complete (the rest of the last ones are 0): their transpose, and zeros up to
    // whole tiles.
    const int64_t first = r0 / 32 * 32;
    for (int64_t r = end; r % 32; r += 2) std::memset(down(workspace) + r / 2 * LD, 0, padded(j.rows, 32) * 4);
    if (padded(j.rows, 16) % 32) {
      const int64_t c = padded(j.rows, 16);
      for (int64_t r = first; r < end; r++) std::memset(across(workspace) + r * LD + c, 0, 16 * 2);
      for (int64_t r = first; r < first + 32; r += 2) std::memset(down(workspace) + r / 2 * LD + c, 0, 16 * 4);
    }
    for (int64_t c = 0; c < padded(j.rows, 32); c += 16) {
      Vec<float> square[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++) square[k] = load(reinterpret_cast<float*>(down(workspace) + (first / 2 + k) * LD + c));
      transpose<float>(square);
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++) {
        uint16_t* row = transposed(workspace) + (c + k) * LD + first;
        _mm512_storeu_ps(reinterpret_cast<float*>(row), (__m512)square[k]);
      }
    }
  }

  static void add_product(const Sweep& s, const uint16_t* w, const Block& other, const Block& mine) {
    const FeaturePanels<float> panels(s.dim);
    const int64_t stride = mine.stride, vectors = wide_dim(s.dim) / 16;
    auto* by_row = static_cast<uint32_t*>(other.packed) + 2 * by_feature_size(s.dim, stride);
    auto* df = static_cast<float*>(mine.df);
    // of the 16 columns of vector v; rows from r on
    auto places = [&](int64_t v, int64_t r, Place& b, Place& c) {
      int64_t p = v * panels.count / panels.vectors;
      while (p + 1 < panels.count && panels.first(p + 1) <= v) p++;
      const bool real = v < panels.vectors;
      const int64_t from = real ? panels.first(p) * 16 : panels.padded_dim(), width = real ? panels.width(p) * 16 : 16;
      const int64_t in = real ? v * 16 - from : 0;
      b = {by_row + from * (stride / 2) + in, width * 4};
      c = {df + from * stride + r * width + in, width * 4};
    };
    for (int64_t v = 0; v < vectors; v += 2)
      for (int64_t r = 0; r < mine.rows; r += 32) {
        Place b0, b1, c0, c1;
        places(v, r, b0, c0);
        places(v + 1, r, b1, c1);
        multiply_tiles<true>(reinterpret_cast<const char*>(w + r * LD), LD * 2, b0, b1, padded(other.rows, 32) / 32, c0, c1);
      }
  }

  static void products(const Sweep& s, float*, void* workspace, const Block& i, const Block& j, bool diagonal) {
    const UsingTiles tiles;
    if (i.wanted) add_product(s, across(workspace), j, i);
    if (j.wanted && !diagonal) add_product(s, transposed(workspace), i, j);
  }

  static bool in_place(int64_t dim, int64_t stride) {
    return wide_dim(dim) == dim && NativeProducts<float>::in_place(dim, stride);
  }
};

}  // namespace
