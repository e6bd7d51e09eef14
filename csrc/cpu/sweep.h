// What the host, the driver and the kernels of one instruction set say to each other. C++ checks only what protects
// memory: arguments have been validated in Python.
#pragma once

#include <cstdint>

enum Dtype : int32_t { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, FLOAT16 = 3 };
enum KindCode : int32_t { EXP = 0, GIBBS = 1, POWER = 2, INVERSE = 3, HINGE = 4, SIGMOID = 5, SQUARE = 6, GAMMA = 7 };
enum Piece : int32_t { F = 0, DF = 1, FT = 2, DFT = 3, DTAU = 4, TERM_COUNT = 5 };
enum WeightCode : int32_t { WEIGHT_F = 0, WEIGHT_DF = 1, WEIGHT_F_DF = 2 };
enum Form : int32_t {
  LOG_SUMS_FIXED = 0,    // base_i is the constant `middle`: one exponential serves both anchors of a pair
  LOG_SUMS_RUNNING = 1,  // base_i follows the row's largest t
  PLAIN_SUMS = 2,
  MAXIMUM = 3,
  GRAD_FIXED = 4,  // g = gain_i·exp(log f − middle), gain rescaled by exp(middle − shift_i)
  GRAD = 5,
};
enum Status : int32_t { OK = 0, NO_MEMORY = 1, INTERRUPTED = 2, UNSUPPORTED = 3 };

// One call of `row_sums` or `pair_grad` (docs/design.md). Row vectors are of the accumulation dtype, double for float64
// and float otherwise; a null pointer stands for zeros (scale: ones). Mirrored field by field in backend/cpu.py.
struct Sweep {
  const void* f;      // (n, dim) rows, row_stride elements apart
  const void* scale;  // (n)
  const void* bias;   // (n)
  const void *center, *gain, *shift, *offset, *level;  // (anchors)
  const int32_t* ids;  // (n) a pair of rows with equal ones does not count; null: ids leave out nothing
  void* out;          // row_sums: (terms, anchors)
  void* df;           // (hi − lo, dim)
  void* weight_sums;  // (n), with a bias
  void* sums;         // pair_grad: (terms, anchors)
  // Python's PyEval_SaveThread, PyEval_RestoreThread and PyErr_CheckSignals, or null: a sweep runs without the interpreter's
  // lock, and the calling thread asks now and then whether a signal (Ctrl-C) has raised an exception, which ends it.
  void* (*release_lock)();
  void (*take_lock)(void*);
  int (*check_signals)();
  int64_t n, dim, row_stride, split, partner, anchors, lo, hi, block;
  double tau, middle;
  double params[3];
  int32_t dtype, kind, form, weight, threads, instruction_set;
  int32_t rows_of_terms[TERM_COUNT];  // row of out (sums) that a term goes to, −1 where it is not wanted
};

// What lies before and after the sweeps for cosine similarity, one pass over the rows each. Rows i and n_pairs + i of f, d,
// inv_norm are a positive pair. Mirrored in backend/cpu.py.
struct PairRows {
  const void *z1, *z2;  // (n_pairs, dim) inputs, stride1 and stride2 elements apart
  void* f;              // (2·n_pairs, dim): unit rows of the accumulation dtype, or for half precision the inputs as they came
  void* inv_norm;       // (2·n_pairs) 1/‖z‖, 0 for an all-zero row
  void* pos;            // (n_pairs) similarity of each positive pair
  void* d;              // (2·n_pairs, dim) in: Σ_j (g_ij + g_ji) F_j; out: the gradient in z
  const void* q;        // (n_pairs) what the positive pair weighs, both anchors together
  int64_t n_pairs, dim, stride1, stride2;
  int32_t dtype, threads, instruction_set;
};

// A block of consecutive rows, packed for one engine. Index r of a row vector is row `first + r`.
struct Block {
  int64_t first, rows, stride, packed;  // global number of its first row, rows, padded rows, offset into the row vectors
  void* left;                   // operands of the matrix products: the engine's own layout
  void* df;                     // accumulator of the gradient, the engine's own layout
  bool anchor, wanted;          // its rows are anchors; the gradient of some of its rows is wanted
};

// Row vectors, padded block by block, zero beyond the rows there are.
struct RowVectors {
  const void *center, *gain, *shift, *offset, *level, *scale, *bias;
  const void* ids;      // integers as wide as a number, or null
  double* sums;         // [TERM_COUNT][padded], accumulated in double
  void *base, *total;   // LOG_SUMS_RUNNING: base and [2][padded] sums relative to it
  double* weight_sums;  // [padded]
  int64_t padded;
};

// Kernels of one instruction set and one kind of operands.
struct Engine {
  const char* instruction_set;
  int32_t operands;  // dtype of the rows it multiplies: FLOAT32, FLOAT64 or BFLOAT16
  int32_t accumulate;  // FLOAT32 or FLOAT64
  int32_t row_multiple;  // blocks are padded to multiples of this …
  int32_t largest_block;  // … and have at most so many rows
  int64_t (*packed_bytes)(int64_t dim, int64_t stride, bool gradient);
  int64_t (*df_bytes)(int64_t dim, int64_t stride);
  int64_t (*scratch_bytes)(int64_t dim, int64_t stride);
  void (*pack)(const Sweep&, const Block&, bool gradient, void* scratch);
  void (*tile)(const Sweep&, const RowVectors&, const Block& i, const Block& j, void* scratch);
  // Whether the accumulator of a full block has the size of its rows of s.df, and may be there until it is unpacked.
  bool (*in_place)(int64_t dim, int64_t stride);
  void (*unpack)(const Sweep&, const Block&, double scale, void* scratch);  // to s.df, times scale
  void (*normalize)(const PairRows&, int64_t begin, int64_t end, void* scratch);  // two rows of scratch
  void (*finish)(const PairRows&, int64_t begin, int64_t end, void* scratch);
  void (*exponential)(const void* x, void* y, int64_t n);  // for tests: the vector functions on their own
  void (*logarithm)(const void* x, void* y, int64_t n);
};
