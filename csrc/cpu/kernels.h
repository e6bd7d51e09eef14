// The data that the driver passes to the kernels of one instruction set. This header defines no
// functions: it is compiled for every instruction set, and the linker would keep one copy for all.
#pragma once

#include "sweep.h"

// Consecutive rows, packed for one table of kernels. Row r of the block is row `first + r` of the
// sweep and element `at + r` of the padded row vectors.
struct Block {
  int64_t first, rows, stride, at;  // `rows` rows, padded to `stride`
  void* packed;                     // operands of the matrix products, in the kernels' own layout
  // accumulator of the gradient, in the kernels' own layout; null: not wanted
  void* df;
  void* guide;                      // the guide's rows, packed as an operand; null: there is no guide
  bool anchor, wanted;              // its rows are anchors; the gradient of some of them is wanted
};

// Row vectors, padded block by block, zero in the padding.
struct RowVectors {
  const void *moment_origin, *row_weight, *shift, *argument_offset, *baseline, *scale, *bias;
  const void* ids;      // integers as wide as a number, or null
  const void *largest_t, *largest_guide;  // or null
  void* running_max;    // Form::ONLINE: of log f; Form::T_MAX: of t
  double* sums;         // [SUM_COUNT][padded]
  double* weight_sums;  // [padded], or null
  int64_t padded;
  double df_scale;  // the accumulators hold the gradient divided by this
};

// What a sweep does with a tile whose results are kept for the next sweep.
enum class Keep { NOTHING, SIMILARITIES, FACTORS };
struct KeptTile {
  void* at = nullptr;     // [stride][stride], or null
  void* marks = nullptr;  // which of the pairs count; null where all do
  Keep what = Keep::NOTHING;
  bool filled = false;  // by an earlier sweep
};

// Anchors and the other rows that hold all their positives, for one form of a supervised loss
// (alphacl_fast/supcon.py, in the order of its `FORMS`). backend/cpu_groups.py mirrors it.
struct SameIdBlock {
  void* t;  // (rows, cols) in: inner products; out: ∂loss/∂t, times the weights
  const int64_t *first, *last;  // (rows) the columns [first, last) have the anchor's id …
  const int64_t* own;           // … and this one is the anchor itself; null: none is
  const void *log_sums, *origin, *weight;  // (rows); no weight: 1
  void *loss, *of_log_sums, *of_tau;       // (rows) out: the loss and its derivatives, without weights
  int64_t rows, cols;
  double tau;
  int32_t form, bounded, dtype, threads, instruction_set;
};

// Rows [begin, end) of a row step, in whole vectors.
struct RowStepCall {
  const void* const* inputs;
  void* const* outputs;
  const void* n_neg;
  const double* params;
  double tau, divisor;
  int32_t step;
  int64_t begin, end;
};

// The functions of one instruction set for operands of one dtype.
struct TileKernels {
  const char* instruction_set;
  Dtype operands;         // FLOAT32, FLOAT64 or BFLOAT16
  Dtype accumulate;       // FLOAT32 or FLOAT64
  int64_t row_multiple;   // blocks are padded to multiples of this …
  int64_t largest_block;  // … and have at most so many rows;
  int64_t fewest_blocks;  // larger ones than a row_multiple pay if there are so many of them
  int64_t (*packed_bytes)(int64_t dim, int64_t stride, bool gradient);
  int64_t (*df_bytes)(int64_t dim, int64_t stride);
  int64_t (*guide_bytes)(int64_t dim, int64_t stride);  // of a block's rows of the guide
  int64_t (*mark_bytes)(int64_t stride);                // of a tile
  int64_t (*workspace_bytes)(int64_t dim, int64_t guide_dim, int64_t stride);  // of one thread
  void (*pack)(const Sweep&, const Block&, void* workspace);
  void (*tile)(const Sweep&, const RowVectors&, const Block& i, const Block& j, void* workspace, const KeptTile&);
  // Whether the accumulator of a full block has the size of its rows of df and may lie there until
  // unpacked.
  bool (*in_place)(int64_t dim, int64_t stride);
  void (*unpack)(const Sweep&, const Block&, double scale, void* workspace);  // to df, times scale
  void (*add_columns)(const PairRows&, int64_t begin, int64_t end, void* workspace, double* sums);  // of all inputs
  void (*normalize)(const PairRows&, int64_t begin, int64_t end, void* workspace);  // of two rows
  void (*finish)(const PairRows&, int64_t begin, int64_t end, void* workspace);
  void (*unit_rows)(const UnitRows&, int64_t begin, int64_t end);
  void (*row_step)(const RowStepCall&);
  void (*same_id)(const SameIdBlock&, int64_t begin, int64_t end, void* workspace);
  // for tests: the vector functions by themselves
  void (*exponential)(const void* x, void* y, int64_t n);
  void (*logarithm)(const void* x, void* y, int64_t n);
  void (*factor)(const void* x, void* y, int64_t n);
};
