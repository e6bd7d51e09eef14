// Matrix products of a tile of 64 × 64 pairs by four warps, for every dtype of the rows.
//
// An engine multiplies K features at a time. `Fragment` says which pairs of a tile a thread holds.
//
//   similarities(s, a, b)    s += A·Bᵀ for tiles a, b of rows in shared memory
//   gradient(acc, w, b)      acc += W·B; w is already scaled and is rounded here, as the engine needs it
//   place(i)                 bytes from a tile to its row i
//   prepare(p)               rounds 16 bytes of a tile as the engine needs them, once after their arrival
//
// Places spread the rows that one instruction reads over all banks of shared memory.
#pragma once

#include "device.h"

namespace alphacl {

constexpr int SIDE = 64, WARPS = 4, THREADS = 32 * WARPS;

// Which of a tile's 64 × 64 pairs this thread holds: two rows of sixteen columns, in the m16n8
// fragments of the PTX manual. Warp w holds the rows 16w … 16w + 15; the four lanes of a group
// share two of them.
struct Fragment {
  static constexpr int ROWS = 2, COLUMNS = 16;
  int warp, group, quad;  // lane = 4·group + quad
  DEVICE Fragment() : warp(device::thread() / 32), group(device::thread() % 32 / 4), quad(device::thread() % 4) {}
  DEVICE int row(int r) const { return 16 * warp + group + 8 * r; }
  DEVICE int column(int q) const { return 8 * (q / 2) + 2 * quad + q % 2; }
  // The register of a pair: x[m][e], or number 4m + e of 32.
  template <class T> static DEVICE T& at(T (&x)[8][4], int r, int q) { return x[q / 2][2 * r + q % 2]; }
  static DEVICE int number(int r, int q) { return 4 * (q / 2) + 2 * r + q % 2; }
  // An ldmatrix.x4 of 16-bit elements reads four 8 × 8 matrices; this lane gives the address of row
  // `matrix_row` of matrix `matrix`. The matrices are stacked in rows first (as A of mma.sync wants
  // them) or in columns first (as B does).
  static DEVICE int matrix() { return device::thread() % 32 / 8; }
  static DEVICE int matrix_row() { return device::thread() % 8; }
  static DEVICE int rows_first(int pitch) { return (matrix() % 2 * 8 + matrix_row()) * pitch + matrix() / 2 * 16; }
  static DEVICE int columns_first(int pitch) { return (matrix() / 2 * 8 + matrix_row()) * pitch + matrix() % 2 * 16; }
};

// Tensor cores cut float32 off where TF32 ends: every product would be too small.
using device::rounded_to_tf32;

DEVICE uint32_t word(const unsigned char* p) { return *reinterpret_cast<const uint32_t*>(p); }

// bfloat16 and float16 rows. Weights of float16 rows may leave float16's range, so their product
// with the rows is TF32, in which float16 is exact.
template <int FEATURES, bool BF16> struct Half {
  using T = float;
  using Element = uint16_t;
  static constexpr int K = FEATURES, PITCH = 2 * K + 16;
  static constexpr bool PREPARES = false;
  static DEVICE constexpr int place(int i) { return i * PITCH; }
  static constexpr bool TENSOR_CORES = true, IS_BF16 = BF16;
  static constexpr auto FACTORS = BF16 ? device::Factors::BF16 : device::Factors::F16;  // in hopper.h

  static DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (BF16) device::mma_bf16(c, a, b0, b1);
    else device::mma_f16(c, a, b0, b1);
  }

  static DEVICE void similarities(float (&s)[8][4], const unsigned char* a, const unsigned char* b) {
    a += 16 * Fragment().warp * PITCH + Fragment::rows_first(PITCH);
    b += Fragment::columns_first(PITCH);
#pragma unroll
    for (int k = 0; k < K; k += 16) {
      uint32_t x[4], y[4];
      device::load_matrices(x, a + 2 * k);
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        device::load_matrices(y, b + 8 * n * PITCH + 2 * k);
        multiply(s[n], x, y[0], y[1]);
        multiply(s[n + 1], x, y[2], y[3]);
      }
    }
  }

  static DEVICE void gradient(float (&acc)[K / 8][4], const float (&w)[8][4], const unsigned char* b) {
    if constexpr (BF16) {
      b += Fragment::rows_first(PITCH);
#pragma unroll
      // two neighbouring fragments of W are one operand of 16 columns
      for (int j = 0; j < 4; ++j) {
        const uint32_t x[4] = {device::pack_bf16(w[2 * j][0], w[2 * j][1]), device::pack_bf16(w[2 * j][2], w[2 * j][3]),
                               device::pack_bf16(w[2 * j + 1][0], w[2 * j + 1][1]),
                               device::pack_bf16(w[2 * j + 1][2], w[2 * j + 1][3])};
#pragma unroll
        for (int d = 0; d < K / 8; d += 2) {
          uint32_t y[4];
          device::load_matrices_transposed(y, b + 16 * j * PITCH + 16 * d);
          device::mma_bf16(acc[d], x, y[0], y[1]);
          device::mma_bf16(acc[d + 1], x, y[2], y[3]);
        }
      }
    } else {
      const Fragment fragment;
      b += 2 * fragment.quad * PITCH + 2 * fragment.group;
#pragma unroll
      // the order of a product's 8 terms is free: term t is column 2t, term t + 4 column 2t + 1
      for (int j = 0; j < 8; ++j) {
        const uint32_t x[4] = {rounded_to_tf32(w[j][0]), rounded_to_tf32(w[j][2]), rounded_to_tf32(w[j][1]),
                               rounded_to_tf32(w[j][3])};
#pragma unroll
        for (int d = 0; d < K / 8; ++d) {
          const unsigned char* y = b + 8 * j * PITCH + 16 * d;
          const float y0 = device::from_f16(*reinterpret_cast<const uint16_t*>(y));
          const float y1 = device::from_f16(*reinterpret_cast<const uint16_t*>(y + PITCH));
          device::mma_tf32(acc[d], x, device::to_bits(y0), device::to_bits(y1));
        }
      }
    }
  }
};

// float32 rows multiplied as TF32. The order of a product's 8 terms is free: term t is feature 2t,
// term t + 4 feature 2t + 1.
//
// Eight banks, or 32 bytes, hold what one row gives to an instruction. The similarities read four
// neighbouring rows at once, the gradient the even or the odd ones of eight. Both find different
// banks, because a row begins 8 banks after the one before, and every fourth row 16.
template <int FEATURES> struct Tf32 {
  using T = float;
  using Element = float;
  static constexpr int K = FEATURES, PITCH = 4 * K + 32, EIGHT_ROWS = 8 * PITCH + 64;
  static constexpr bool PREPARES = true;
  static DEVICE constexpr int place(int i) { return i * PITCH + i / 4 * 32; }
  static constexpr bool TENSOR_CORES = true, IS_BF16 = false;
  static constexpr auto FACTORS = device::Factors::TF32;

  template <int COUNT> struct alignas(4 * COUNT) Words {  // which one instruction loads
    uint32_t x[COUNT];
    static DEVICE Words at(const unsigned char* p) { return *reinterpret_cast<const Words*>(p); }
  };
  // Every feature is read by four warps, and by more than one of their lanes: rounding at each load
  // would cost more than the products.
  static DEVICE void prepare(unsigned char* p) {
    Words<4> x = Words<4>::at(p);
    for (uint32_t& feature : x.x) feature = rounded_to_tf32(device::from_bits(feature));
    *reinterpret_cast<Words<4>*>(p) = x;
  }

  static DEVICE void similarities(float (&s)[8][4], const unsigned char* a, const unsigned char* b) {
    const Fragment fragment;
    a += place(fragment.row(0)) + 8 * fragment.quad;
    b += place(fragment.group) + 8 * fragment.quad;
    // more steps at once would take the gradient's registers
#pragma unroll 4
    for (int k = 0; k < K; k += 8) {
      const auto upper = Words<2>::at(a + 4 * k), lower = Words<2>::at(a + EIGHT_ROWS + 4 * k);
      const uint32_t operand[4] = {upper.x[0], lower.x[0], upper.x[1], lower.x[1]};
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const auto y = Words<2>::at(b + n * EIGHT_ROWS + 4 * k);
        device::mma_tf32(s[n], operand, y.x[0], y.x[1]);
      }
    }
  }

  static DEVICE void gradient(float (&acc)[K / 8][4], const float (&w)[8][4], const unsigned char* b) {
    const Fragment fragment;
    b += place(2 * fragment.quad) + 4 * fragment.group;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t x[4] = {rounded_to_tf32(w[j][0]), rounded_to_tf32(w[j][2]), rounded_to_tf32(w[j][1]),
                             rounded_to_tf32(w[j][3])};
#pragma unroll
      for (int d = 0; d < K / 8; ++d) {
        const unsigned char* y = b + j * EIGHT_ROWS + 32 * d;
        device::mma_tf32(acc[d], x, word(y), word(y + PITCH));
      }
    }
  }
};

// float and double rows by multiply-adds. W comes from shared memory (`SharedTile`), because a lane
// needs the weights of its whole row.
template <class Number, int FEATURES> struct Simt {
  using T = Number;
  using Element = Number;
  static constexpr int K = FEATURES, PITCH = K * int(sizeof(T)) + 16, VECTOR = 16 / int(sizeof(T));
  static constexpr bool PREPARES = false;
  static DEVICE constexpr int place(int i) { return i * PITCH; }
  static constexpr bool TENSOR_CORES = false, IS_BF16 = false;
  struct alignas(16) Vector {
    T x[VECTOR];
  };
  static DEVICE Vector vector(const unsigned char* p) { return *reinterpret_cast<const Vector*>(p); }

  // Sums over a chunk of features begin at 0: one long chain would round in one direction where
  // rows are nearly equal.
  static DEVICE void similarities(T (&s)[8][4], const unsigned char* a, const unsigned char* b) {
    const Fragment fragment;
    a += fragment.row(0) * PITCH;
    b += 2 * fragment.quad * PITCH;
    T chunk[8][4] = {};
#pragma unroll 1
    for (int k = 0; k < K; k += VECTOR) {
      const Vector x0 = vector(a + k * sizeof(T)), x1 = vector(a + 8 * PITCH + k * sizeof(T));
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const Vector y0 = vector(b + 8 * n * PITCH + k * sizeof(T)), y1 = vector(b + (8 * n + 1) * PITCH + k * sizeof(T));
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
          chunk[n][0] += x0.x[v] * y0.x[v], chunk[n][1] += x0.x[v] * y1.x[v];
          chunk[n][2] += x1.x[v] * y0.x[v], chunk[n][3] += x1.x[v] * y1.x[v];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] += chunk[n][e];
  }

  static DEVICE void gradient(T (&acc)[K / 8][4], const T* tile, const unsigned char* b) {
    const Fragment fragment;
    b += 2 * fragment.quad * sizeof(T);
    tile += 32 * fragment.warp + 4 * fragment.group;
#pragma unroll 1
    for (int j = 0; j < SIDE; ++j) {  // lane j % 8 / 2 of this group holds column j
      const T* own = tile + Fragment::number(0, j / 8 * 2 + j % 2) * THREADS + j % 8 / 2;
      const T w0 = own[0], w1 = own[2 * THREADS];
#pragma unroll
      for (int d = 0; d < K / 8; ++d) {
        const T* y = reinterpret_cast<const T*>(b + j * PITCH + 8 * d * sizeof(T));
        acc[d][0] += w0 * y[0], acc[d][1] += w0 * y[1];
        acc[d][2] += w1 * y[0], acc[d][3] += w1 * y[1];
      }
    }
  }
};

// A tile in shared memory, for loops that are too long to be unrolled: pair `number` of a thread is
// at number·THREADS + thread, whose bank is the thread's own.
template <class T> struct SharedTile {
  T* x;
  static constexpr int BYTES = SIDE * SIDE * sizeof(T);
  DEVICE T& at(int r, int q) const { return x[Fragment::number(r, q) * THREADS + device::thread()]; }
  DEVICE void put(const T (&s)[8][4]) const {
#pragma unroll
    for (int q = 0; q < Fragment::COLUMNS; ++q)
#pragma unroll
      for (int r = 0; r < Fragment::ROWS; ++r) at(r, q) = Fragment::at(s, r, q);
  }
  DEVICE void get(T (&s)[8][4]) const {
#pragma unroll
    for (int q = 0; q < Fragment::COLUMNS; ++q)
#pragma unroll
      for (int r = 0; r < Fragment::ROWS; ++r) Fragment::at(s, r, q) = at(r, q);
  }
};

}  // namespace alphacl
