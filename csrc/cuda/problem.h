// What the host tells a kernel. Row vectors are of the accumulation type T: double for float64 rows, float otherwise.
#pragma once

#include <cstdint>

enum Dtype : int32_t { BFLOAT16 = 0, FLOAT16 = 1, TFLOAT32 = 2, FLOAT32 = 3, FLOAT64 = 4 };  // rows and how they are multiplied
enum KindCode : int32_t { EXP = 0, GIBBS = 1, POWER = 2, INVERSE = 3, HINGE = 4, SIGMOID = 5, SQUARE = 6, GAMMA = 7 };
enum Term : int32_t { TERM_F = 0, TERM_DF = 1, TERM_FT = 2, TERM_DFT = 3, TERM_DTAU = 4, TERM_COUNT = 5 };
enum WeightCode : int32_t { WEIGHT_F = 0, WEIGHT_DF = 1, WEIGHT_F_DF = 2 };
enum Form : int32_t { FIXED = 0, RUNNING = 1, PLAIN = 2, MAXIMUM = 3 };  // docs/design.md
enum Gradient : int32_t { NO_GRADIENT = 0, PRODUCT = 1, WEIGHTS = 2 };
enum Flag : int32_t {
  EXCLUDE = 1,       // rows of the same pair do not count
  TRIANGLE = 2,      // both sides are the same rows
  BOTH = 4,          // a tile serves its columns too
  ROWS_PAIRED = 8,   // a block holds rows of one view and then their partners
  COLS_PAIRED = 16,
  ROWS_ANCHOR = 32,
  COLS_ANCHOR = 64,
  IN_CHUNKS = 128,   // rows are longer than a tile holds, or than the device has shared memory for: chunks of features pass by
  ALIGNED = 256,     // every row of f begins at a multiple of 16 bytes and its features end at one
};

// One launch of a sweep: a group of rows against the columns they meet (docs/design.md). Null pointers are absent vectors.
struct Sweep {
  const void* f;  // (rows, dim) features, `stride` elements apart
  const void *scale, *bias, *center, *gain, *shift, *offset, *level;  // (anchors), scale and bias (rows)
  const void *tau, *unit;  // scalars; weights are divided by `unit` before they are rounded, gradients multiplied by it
  void* out;     // row_sums: (slots, [base,] terms, anchors)
  void* df;      // pair_grad: (parts, n_out, dim) for the rows from `lo` on
  void* w_sums;  // (parts, n)
  void* sums;    // (parts, terms, anchors)
  void* w;       // (row blocks of the launch · 64, n_cols): weights instead of their product with the rows
  int64_t stride, n_rows, n_cols, row_start, col_start, half, anchors, n, n_out, lo;
  double middle, params[3];
  int32_t dim, first_block, begin, end, col_slot, parts, kind, form, weight, gradient, flags, terms;
  int32_t row_of_term[TERM_COUNT];  // among the terms, −1 where it is not wanted
};

// What lies before and after the sweeps for cosine similarity. Rows i and n_pairs + i of f, d, inv_norm are a positive pair.
struct PairRows {
  const void *z1, *z2;  // (n_pairs, dim) inputs, stride1 and stride2 elements apart
  void* f;              // (2·n_pairs, dim) unit rows of the accumulation type, or for half precision the inputs as they came
  void* inv_norm;       // (2·n_pairs) 1/‖z‖, 0 for an all-zero row
  void* pos;            // (2·n_pairs) similarity of each row's positive pair
  void* d;              // (2·n_pairs, dim) in: Σ_j (g_ij + g_ji) F_j; out: the gradient in z
  const void* q;        // what the positive pair weighs: (n_pairs), or (2·n_pairs) where each of its rows is an anchor
  int64_t n_pairs, stride1, stride2;
  int32_t dim, dtype, anchors;  // of a pair: 1 or 2
};
