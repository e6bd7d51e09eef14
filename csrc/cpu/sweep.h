// The data passed from Python to C++: one struct for a sweep, one for the passes over the rows
// before and after the sweeps, one for a whole step of a loss. backend/cpu.py and
// backend/cpu_step.py mirror them field by field, and make or check every buffer: C++ trusts the
// sizes.
#pragma once

#include "../generated/codes.h"

enum Similarity : int32_t { COSINE, DOT, EUCLIDEAN };
enum Status : int32_t { OK, NO_MEMORY, INTERRUPTED, UNSUPPORTED };

// A user's function of pairs, compiled by alphacl_fast/backend/cpu_functions.py for the vectors of the
// kernels that call it: f and ∂f/∂x at n numbers x. Null: not wanted. Pointers are multiples of 64
// bytes, and so is the size of n numbers. Only the kernels know the accumulation type T.
template <class T> using ValuesFunction = void (*)(const double* constants, const T* x, T* f, T* df, int64_t n);

// One call of `row_sums` or, with `gradient`, of `pair_grad` (docs/design.md). Row vectors have the
// accumulation dtype: double for float64, float otherwise. A null pointer stands for zeros (scale:
// ones).
struct Sweep {
  const void* f;      // (n, dim) rows, row_stride elements apart
  const void* scale;  // (n)
  const void* bias;   // (n)
  const void *moment_origin, *row_weight, *shift, *argument_offset, *baseline;  // (anchors)
  const int32_t* ids;  // (n) rows with the same id do not meet; null: no pair is left out
  const void* largest_t;  // (anchors) pairs that are more similar do not count for the anchor; null: all count
  // (n, guide_dim) unit rows of another model, and (anchors) the largest product of two of them at
  // which a pair counts for the anchor; null: all count
  const void *guide, *largest_guide;
  void* df;            // (hi − lo, dim)
  void* weight_sums;   // (n), with a bias
  void* sums;          // (terms, anchors)
  void* kept;          // of `alphacl_cpu_keep`, for two sweeps over the same pairs; or null
  // Python's PyEval_SaveThread, PyEval_RestoreThread and PyErr_CheckSignals, or null: a sweep runs
  // without the interpreter's lock. From time to time the calling thread asks whether a signal
  // (Ctrl-C) has raised an exception, which ends the sweep.
  void* (*release_lock)();
  void (*take_lock)(void*);
  int (*check_signals)();
  void (*values)();         // a `ValuesFunction` instead of the kind: a user's function; or null
  const double* constants;  // its first argument
  int64_t n, dim, row_stride, guide_dim, split, partner, anchors, lo, hi, block;
  double tau, constant_shift;
  double params[3];
  int32_t dtype, kind;
  Form form;
  int32_t gradient, weight;
  int32_t filled;    // the sweep before has filled `kept`, as this one would
  int32_t weighted;  // the bias holds log-weights: largest_t is compared without it
  int32_t threads, instruction_set;
  // row of `sums` in which a term ends up, −1: the term is not wanted
  int32_t rows_of_terms[TERM_COUNT];
};

// The passes over the rows of two views. Rows i and n_pairs + i of f, d and inv_norm are a positive
// pair.
struct PairRows {
  const void *z1, *z2;  // (n_pairs, dim) inputs, stride1 and stride2 elements apart
  // (2·n_pairs, dim) cosine: unit rows in the accumulation dtype; half precision: the inputs,
  // extreme ones times a power of two. DOT: the inputs. EUCLIDEAN: the inputs minus their mean, in
  // the accumulation dtype
  void* f;
  void* scale;     // (2·n_pairs) 1/‖f‖, of half precision and cosine only
  void* inv_norm;  // (2·n_pairs) 1/‖z‖, 0 for an all-zero row; cosine only
  const void* mean;         // (dim) of all inputs; EUCLIDEAN only, as the next two
  void* bias;               // (2·n_pairs) −½‖f‖²
  const void* weight_sums;  // (2·n_pairs) Σ_j (g_ij + g_ji)
  void* pos;       // (n_pairs) similarity of each positive pair
  void* d;         // (hi − lo, dim) in: Σ_j (g_ij + g_ji) F_j; out: the gradient in z
  const void* q;   // (n_pairs) weight of the positive pair, summed over both anchors
  int64_t n_pairs, dim, stride1, stride2, stride;  // stride: elements from row to row of f
  int64_t lo, hi;  // the rows of d
  int64_t swept;   // the rows from here on meet no pair: what d holds of them is no gradient
  int32_t dtype, threads, instruction_set;
  Similarity similarity;
};

// Rows of unit length, and the gradient through them.
struct UnitRows {
  const void* z;   // (n, dim) inputs, z_stride elements apart
  void* f;         // (n, dim) unit rows in the accumulation dtype; of an all-zero row: zeros
  void* inv_norm;  // (n) 1/‖z‖, 0 for an all-zero row
  const void* d;   // (n, dim) gradient in f, d_stride elements apart; null: f and inv_norm are computed
  void* dz;        // (n, dim) gradient in z, in the accumulation dtype
  int64_t n, dim, z_stride, d_stride;
  int32_t dtype, threads, instruction_set;
};

constexpr int MOST_INSTRUCTIONS = 12, MOST_VECTORS = 8, MOST_SLOPES = 2;

// One instruction of a step's program (alphacl_fast/program.py): a sweep, or with `row_step` >= 0 a
// row step. Vectors are numbered places; place 0 holds zeros, place 1 the positives' similarities.
struct Instruction {
  int32_t row_step;  // -1: a sweep
  Form form;
  int32_t gradient, weight;     // of a sweep
  // Place of each term, -1: not wanted. With T_MAX there may be F, the number of the pairs,
  // F_MOMENT, Σ (t − moment_origin), and DF_MOMENT, Σ (t − moment_origin)².
  int32_t terms[TERM_COUNT];
  int32_t scalars[5];           // places of moment_origin, row_weight, shift, argument_offset, baseline
  int32_t inputs[MOST_VECTORS], outputs[MOST_VECTORS], output_count;  // of a row step
  // A sweep that is repeated with the one row step behind it, at most so often (0: it is not), until
  // the vector in the place `done` is nonzero for every anchor.
  int32_t most, done;
  double constant_shift;
  double params[4];  // of a row step
  // instead of a row step: a `ValuesFunction` of the first input, with two outputs; or null
  void (*values)();
  const double* constants;
};

// A whole step of a loss: from rows to loss and gradient. The rows are two views of n_pairs positive
// pairs or, with `pos`, anchors whose positives' similarities are given.
struct Step {
  // (n_pairs, dim) inputs, stride1 and stride2 elements apart; with `pos` the rows [0, split) and
  // [split, rows), or without a split z1 has all rows
  const void *z1, *z2;
  const void* pos;       // (anchors) similarity of each positive pair; null: of rows i and n_pairs + i
  const void* bias;      // (rows − split) is added to what the rows from `split` on meet; with `pos` only
  void* dpos;            // (anchors) gradient in `pos`; null: not wanted
  void* dbias;           // (rows − split) gradient in `bias`, with one in these rows; null: not wanted
  const int32_t* ids;    // (rows) as in Sweep; with it also:
  const void* n_neg_of;  // (anchors) number of negatives of each anchor, at least 1
  const bool* empty;     // (anchors) whether it has none
  const void *guide, *largest_guide;  // of the swept rows and of the anchors, as in Sweep
  const void* incoming;  // (anchors) gradient of each anchor's loss; null: ones
  void* loss;            // () the sum divided by `divisor`, or (anchors) with `each`; null: not wanted
  void* dz;              // (hi − lo, dim) gradient in the rows [lo, hi) of the stacked views
  void* dtau;            // (slopes) gradient in τ, or in SigLIP's scale and bias; null: not wanted
  void* (*release_lock)();  // as in Sweep
  void (*take_lock)(void*);
  int (*check_signals)();
  void (*values)();
  const double* constants;
  int64_t n_pairs, dim, stride1, stride2, rows, split, partner, anchors, lo, hi, block, guide_dim;
  int64_t workspace;  // bytes in which tiles may be kept from one sweep to the next
  double tau, n_neg, divisor;
  double max_gap;  // with `limited`: pairs whose t exceeds t⁺ by more do not count for the anchor
  double factor;   // the sweeps see the rows [0, split) times this
  double params[3];
  int32_t dtype, kind, each, limited, threads, instruction_set;
  Similarity similarity;
  int32_t instructions, places;   // of the program
  int32_t mass, losses, slopes, dtau_of[MOST_SLOPES];  // places of results
  Instruction program[MOST_INSTRUCTIONS];
};
