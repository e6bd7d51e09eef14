// The data passed from Python to C++: one struct for a sweep, one for the passes over the rows
// before and after the sweeps. backend/cpu.py mirrors both field by field, and makes or
// checks every buffer: C++ trusts the sizes.
#pragma once

#include "../generated/codes.h"

enum Status : int32_t { OK, NO_MEMORY, INTERRUPTED, UNSUPPORTED };

// One call of `row_sums` or, with `gradient`, of `pair_grad` (docs/design.md). Row vectors have the
// accumulation dtype: double for float64, float otherwise. A null pointer stands for zeros (scale:
// ones).
struct Sweep {
  const void* f;      // (n, dim) rows, row_stride elements apart
  const void* scale;  // (n)
  const void* bias;   // (n)
  const void *moment_origin, *row_weight, *shift, *argument_offset, *baseline;  // (anchors)
  const int32_t* ids;  // (n) rows with the same id do not meet; null: no pair is left out
  void* df;            // (hi − lo, dim)
  void* weight_sums;   // (n), with a bias
  void* sums;          // (terms, anchors)
  // Python's PyEval_SaveThread, PyEval_RestoreThread and PyErr_CheckSignals, or null: a sweep runs
  // without the interpreter's lock. From time to time the calling thread asks whether a signal
  // (Ctrl-C) has raised an exception, which ends the sweep.
  void* (*release_lock)();
  void (*take_lock)(void*);
  int (*check_signals)();
  int64_t n, dim, row_stride, split, partner, anchors, lo, hi, block;
  double tau, constant_shift;
  double params[3];
  int32_t dtype, kind;
  Form form;
  int32_t gradient, weight, threads, instruction_set;
  // row of `sums` in which a term ends up, −1: the term is not wanted
  int32_t rows_of_terms[TERM_COUNT];
};

// The passes for cosine similarity. Rows i and n_pairs + i of f, d and inv_norm are a positive
// pair.
struct PairRows {
  const void *z1, *z2;  // (n_pairs, dim) inputs, stride1 and stride2 elements apart
  // (2·n_pairs, dim) unit rows in the accumulation dtype; half precision: the inputs, extreme ones
  // times a power of two
  void* f;
  void* scale;     // (2·n_pairs) 1/‖f‖, of half precision only
  void* inv_norm;  // (2·n_pairs) 1/‖z‖, 0 for an all-zero row
  void* pos;       // (n_pairs) similarity of each positive pair
  void* d;         // (2·n_pairs, dim) in: Σ_j (g_ij + g_ji) F_j; out: the gradient in z
  const void* q;   // (n_pairs) weight of the positive pair, summed over both anchors
  int64_t n_pairs, dim, stride1, stride2, stride;  // stride: elements from row to row of f
  int32_t dtype, threads, instruction_set;
};
