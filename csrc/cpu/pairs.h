// Pair kinds and row steps on vectors: the numbers of a call, and the formulas, printed from
// alphacl_fast/objectives.py.
#pragma once

#include "functions.h"
#include "kernels.h"

namespace {

template <class T> struct Numbers {  // one call's constants
  T tau, inv_tau, params[3], middle;
  explicit Numbers(const Sweep& s)
      : tau(T(s.tau)), inv_tau(T(1 / s.tau)), params{T(s.params[0]), T(s.params[1]), T(s.params[2])}, middle(T(s.constant_shift)) {}
};

template <class T> struct RowNumbers {  // one row step's constants
  T tau, divisor, params[4];
  const T* n_neg;
  explicit RowNumbers(const RowStepCall& c)
      : tau(T(c.tau)), divisor(T(c.divisor)),
        params{T(c.params[0]), T(c.params[1]), T(c.params[2]), T(c.params[3])}, n_neg(static_cast<const T*>(c.n_neg)) {}
};

}  // namespace

#include "../generated/cpu_pairs.h"
#include "../generated/cpu_rows.h"
