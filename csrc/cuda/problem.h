// The data passed from Python to CUDA: one struct for a launch of a sweep, one for the passes over
// the rows before and after the sweeps. backend/cuda.py mirrors both field by field.
// Row vectors have the accumulation type T: double for float64 rows, float otherwise. A null
// pointer is an absent vector.
#pragma once

#include <cstdint>

#include "../generated/codes.h"

// The buffers of a launch, in the order in which `Sweep` points to them.
enum class Buffer : int32_t {
  FEATURES, SCALE, BIAS, MOMENT_ORIGIN, ROW_WEIGHT, SHIFT, ARGUMENT_OFFSET, BASELINE, LARGEST_T, IDS, TAU, UNIT,
  SUMS, DF, WEIGHT_SUMS, WEIGHTS, COUNT
};

// A region of rows against the columns that they meet (docs/design.md).
struct Sweep {
  const void* f;  // (rows, dim), `stride` elements apart
  const void *scale, *bias;  // (rows)
  const void *moment_origin, *row_weight, *shift, *argument_offset, *baseline;  // (anchors)
  const void* largest_t;  // (anchors): a pair with a larger t does not count for the anchor
  const int32_t* ids;     // (rows): two rows with the same id do not meet
  // (): weights are divided by `unit` before they are rounded, gradients multiplied by it
  const void *tau, *unit;
  void* sums;         // (splits [+ ring distances], [shift,] terms, anchors)
  void* df;           // (splits, n_out, dim) for the rows from `lo` on
  void* weight_sums;  // (splits, n)
  // (row_blocks·64, weight_columns) weights, in place of their product with the rows. They cover
  // whole tiles; with two views the first halves of all tiles come before the second halves.
  void* weights;
  int64_t elements[int(Buffer::COUNT)];  // in each buffer; f counts all its rows
  int64_t stride, n_rows, n_cols, row_start, col_start, half, anchors, n, n_out, lo;
  int64_t weight_columns;
  double constant_shift, params[3];
  int32_t dtype, dim, row_blocks, first_block, splits;
  int32_t begin, end;    // column tiles of a block's schedule
  // symmetric: the sums of the columns at ring distance t go to slice column_slice + t
  int32_t column_slice;
  int32_t kind;
  Form form;
  int32_t pair_grad;  // which sweep: 1 pair_grad, 0 row_sums
  Gradient gradient;
  int32_t weight, terms;
  int32_t row_of_term[SUM_COUNT];  // among the terms, −1: the term is not wanted
  int32_t exclude;      // rows of the same pair do not meet
  int32_t triangle;     // both sides are the same rows
  int32_t symmetric;    // row_sums: a tile serves its columns too
  int32_t side;         // rows and columns of a tile: 64, or 128 in hopper.h
  int32_t rows_paired;  // a block holds rows of one view, then their partners
  int32_t cols_paired, rows_anchor, cols_anchor;
  int32_t in_chunks;  // rows do not fit into a tile: chunks of their features pass by
  int32_t weighted;   // the bias holds log-weights: largest_t is compared without it
  int32_t aligned;    // set by the library: every row of f begins at a multiple of 16 bytes
};

// Rows rounded to TF32, as the kernels of hopper.h take them.
struct RoundedRows {
  const void* f;          // (n, dim) floats, `stride` elements apart
  void* rounded;          // (n, dim), `rounded_stride` elements apart
  int64_t elements[2];    // in each buffer
  int64_t n, stride, rounded_stride;
  int32_t dim;
};

// The buffers of the passes over rows, in the order in which `PairRows` points to them.
enum class RowBuffer : int32_t { Z1, Z2, F, SCALE, INV_NORM, POS, D, Q, COUNT };

// The passes for cosine similarity. Rows i and n_pairs + i of f, d and inv_norm are a positive
// pair.
struct PairRows {
  const void *z1, *z2;  // (n_pairs, dim) inputs, stride1 and stride2 elements apart
  // (2·n_pairs, dim) unit rows in the accumulation type, `stride` elements apart; half precision:
  // the inputs, extreme ones times a power of two
  void* f;
  void* scale;          // (2·n_pairs) 1/‖f‖, of half precision only
  void* inv_norm;       // (2·n_pairs) 1/‖z‖, 0 for an all-zero row
  void* pos;            // (2·n_pairs) similarity of each row's positive pair
  void* d;              // (2·n_pairs, dim) in: Σ_j (g_ij + g_ji) F_j; out: the gradient in z
  // weight of the positive pair: (n_pairs), or (2·n_pairs) where both of its rows are anchors
  const void* q;
  int64_t elements[int(RowBuffer::COUNT)];  // in each buffer
  int64_t n_pairs, stride1, stride2, stride;
  int32_t dim, dtype, anchors;  // anchors of a pair: 1 or 2
};
