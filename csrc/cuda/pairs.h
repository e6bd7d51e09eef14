// The pair kinds of alphacl_fast/objectives.py (KINDS) for one pair: f, its derivative in x and in τ; of log f for log kinds.
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
DEVICE float power_of(float x, float q) { return powf(x, q); }
DEVICE double power_of(double x, double q) { return pow(x, q); }
DEVICE float root(float x) { return sqrtf(x); }
DEVICE double root(double x) { return sqrt(x); }
template <class T> DEVICE T larger(T a, T b) { return a > b ? a : b; }
template <class T> DEVICE T positive(T x) { return x < 0 ? T(0) : x; }  // NaN stays NaN

// One call's constants.
template <class T> struct Numbers {
  T tau, inv_tau, p0, p1, p2, middle;
  DEVICE Numbers(const Sweep& s)
      : tau(*static_cast<const T*>(s.tau)), inv_tau(1 / tau), p0(T(s.params[0])), p1(T(s.params[1])), p2(T(s.params[2])),
        middle(T(s.middle)) {}
};

// max(d, 0)^q and its derivative, 0 at d <= 0 for every q.
template <class T> DEVICE T power(T d, T q) {
  if (q == 1) return positive(d);
  if (q == 2) return positive(d) * positive(d);
  if (!(d > 0)) return positive(d);
  d = larger(d, SMALLEST_NORMAL<T>);
  return q == T(0.5) ? root(d) : q == T(1.5) ? d * root(d) : power_of(d, q);
}
template <class T> DEVICE T power_slope(T d, T q) {
  if (!(d > 0)) return positive(d);
  if (q == 1) return 1;
  if (q == 2) return 2 * d;
  d = larger(d, SMALLEST_NORMAL<T>);
  return q == T(0.5) ? T(0.5) / root(d) : q == T(1.5) ? T(1.5) * root(d) : q * power_of(d, q - 1);
}

template <class T> struct Exp {  // t/τ
  static constexpr bool LOG = true, LINEAR = true;
  static DEVICE T f(T t, const Numbers<T>& n) { return t * n.inv_tau; }
  static DEVICE T df(T, const Numbers<T>& n) { return n.inv_tau; }
  static DEVICE T dtau(T t, const Numbers<T>& n) { return t * (-n.inv_tau * n.inv_tau); }
};
template <class T> struct Gibbs {  // (t − c)/τ
  static constexpr bool LOG = true, LINEAR = false;
  static DEVICE T f(T t, const Numbers<T>& n) { return (t - n.p0) * n.inv_tau; }
  static DEVICE T df(T, const Numbers<T>& n) { return n.inv_tau; }
  static DEVICE T dtau(T t, const Numbers<T>& n) { return (n.p0 - t) * (n.inv_tau * n.inv_tau); }
};
template <class T> struct Power {  // −max(c − t, 0)^q/τ
  static constexpr bool LOG = true, LINEAR = false;
  static DEVICE T f(T t, const Numbers<T>& n) { return power(n.p0 - t, n.p1) * -n.inv_tau; }
  static DEVICE T df(T t, const Numbers<T>& n) { return power_slope(n.p0 - t, n.p1) * n.inv_tau; }
  static DEVICE T dtau(T t, const Numbers<T>& n) { return power(n.p0 - t, n.p1) * (n.inv_tau * n.inv_tau); }
};
template <class T> struct Inverse {  // −k·log(max(c − t, 0)^q + τ)
  static constexpr bool LOG = true, LINEAR = false;
  static DEVICE T inside(T t, const Numbers<T>& n) { return power(n.p0 - t, n.p1) + n.tau; }
  static DEVICE T f(T t, const Numbers<T>& n) { return logarithm(inside(t, n)) * -n.p2; }
  static DEVICE T df(T t, const Numbers<T>& n) { return power_slope(n.p0 - t, n.p1) / inside(t, n) * n.p2; }
  static DEVICE T dtau(T t, const Numbers<T>& n) { return -n.p2 / inside(t, n); }
};
template <class T> struct Hinge {  // max(x + m, 0); the kink has derivative 0
  static constexpr bool LOG = false, LINEAR = false;
  static DEVICE T f(T x, const Numbers<T>& n) { return positive(x + n.p0); }
  static DEVICE T df(T x, const Numbers<T>& n) { return x + n.p0 > 0 ? T(1) : T(0); }
  static DEVICE T dtau(T, const Numbers<T>&) { return 0; }
};
template <class T> struct Sigmoid {  // sigmoid(s·x)
  static constexpr bool LOG = false, LINEAR = false;
  static DEVICE T f(T x, const Numbers<T>& n) { return 1 / (1 + exponential(x * -n.p0)); }
  static DEVICE T df(T x, const Numbers<T>& n) {
    const T y = f(x, n);
    return n.p0 * y * (1 - y);
  }
  static DEVICE T dtau(T, const Numbers<T>&) { return 0; }
};
template <class T> struct Square {  // max(x, 0)/τ
  static constexpr bool LOG = false, LINEAR = false;
  static DEVICE T f(T x, const Numbers<T>& n) { return positive(x) * n.inv_tau; }
  static DEVICE T df(T x, const Numbers<T>& n) { return x > 0 ? n.inv_tau : T(0); }
  static DEVICE T dtau(T x, const Numbers<T>& n) { return positive(x) * (-n.inv_tau * n.inv_tau); }
};
template <class T> struct Gamma {  // (τ/−x)^{1/γ}, x < 0
  static constexpr bool LOG = false, LINEAR = false;
  static DEVICE T f(T x, const Numbers<T>& n) {
    const T ratio = n.tau / -x;
    return n.p0 == 2 ? root(ratio) : power_of(ratio, 1 / n.p0);
  }
  static DEVICE T df(T x, const Numbers<T>& n) { return f(x, n) / (-n.p0 * x); }
  static DEVICE T dtau(T x, const Numbers<T>& n) { return f(x, n) / (n.p0 * n.tau); }
};

// Calls `use` with the kind of a code.
template <class T, class Use> DEVICE void with_kind(int32_t kind, Use&& use) {
  switch (kind) {
    case EXP: return use(Exp<T>{});
    case GIBBS: return use(Gibbs<T>{});
    case POWER: return use(Power<T>{});
    case INVERSE: return use(Inverse<T>{});
    case HINGE: return use(Hinge<T>{});
    case SIGMOID: return use(Sigmoid<T>{});
    case SQUARE: return use(Square<T>{});
    default: return use(Gamma<T>{});
  }
}

}  // namespace alphacl
