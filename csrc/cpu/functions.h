// Primitives of printed formulas that vec.h does not have. A user's function is compiled with this file
// and vec.h alone (alphacl_fast/backend/cpu_functions.py). The library therefore contains their text.
#pragma once

#include <cmath>

#include "vec.h"

namespace {

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

}  // namespace
