// Pair kinds and row steps on vectors: the numbers of a call, the primitives that printed formulas
// use beside vec.h, and the formulas themselves, printed from alphacl_fast/objectives.py.
#pragma once

#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace {

template <class T> struct Numbers {  // one call's constants
  T tau, inv_tau, params[3], middle;
  explicit Numbers(const Sweep& s)
      : tau(T(s.tau)), inv_tau(T(1 / s.tau)), params{T(s.params[0]), T(s.params[1]), T(s.params[2])}, middle(T(s.constant_shift)) {}
};

template <class T> constexpr T SMALLEST_NORMAL = T(sizeof(T) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308);

// keeps NaN
template <class T> ALPHACL_INLINE Vec<T> at_least(Vec<T> x, T least) { return x < least ? broadcast<T>(least) : x; }
template <class T> ALPHACL_INLINE Vec<T> one_where(Mask<T> m) { return m ? broadcast<T>(1) : Vec<T>{}; }

// Applies a scalar function lane by lane, where <cmath> has no vector version of it.
template <class T, class Function, class... Vectors> ALPHACL_INLINE Vec<T> lanewise(Function f, Vectors... x) {
  Vec<T> y;
  for (int i = 0; i < LANES<T>; i++) y[i] = f(x[i]...);
  return y;
}

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
