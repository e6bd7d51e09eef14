// Pair kinds for one pair: the numbers of a call, the primitives that printed formulas use, and the
// formulas themselves, printed from alphacl_fast/objectives.py.
#pragma once

#include <cmath>

#include "device.h"
#include "problem.h"

namespace alphacl {

template <class T> constexpr T INFINITE = T(__builtin_huge_val());
template <class T> constexpr T SMALLEST_NORMAL = T(sizeof(T) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308);
constexpr float LOG2_E = 1.4426950408889634f;

DEVICE float exponential(float x) { return device::exp2_approx(x * LOG2_E); }
DEVICE double exponential(double x) { return exp(x); }
DEVICE float logarithm(float x) { return logf(x); }
DEVICE double logarithm(double x) { return log(x); }
DEVICE float logarithm_of_1_plus(float x) { return log1pf(x); }
DEVICE double logarithm_of_1_plus(double x) { return log1p(x); }
DEVICE float power_of(float x, float q) { return powf(x, q); }
DEVICE double power_of(double x, double q) { return pow(x, q); }
DEVICE float root(float x) { return sqrtf(x); }
DEVICE double root(double x) { return sqrt(x); }
// In all of these NaN stays NaN.
template <class T> DEVICE T at_least(T x, T least) { return x < least ? least : x; }
template <class T> DEVICE T larger(T a, T b) { return a > b || a != a ? a : b; }
template <class T> DEVICE T positive(T x) { return x < 0 ? T(0) : x; }

// One call's constants.
template <class T> struct Numbers {
  T tau, inv_tau, params[3];
  DEVICE Numbers(const Sweep& s)
      : tau(*static_cast<const T*>(s.tau)), inv_tau(1 / tau), params{T(s.params[0]), T(s.params[1]), T(s.params[2])} {}
};

}  // namespace alphacl

#include "../generated/cuda_pairs.h"
