// The pair kinds of alphacl_fast/objectives.py (KINDS) on vectors: f, its derivative in x and in τ; of log f for log kinds.
#pragma once

#include "sweep.h"
#include "vec.h"

namespace {

template <class T> struct Numbers {  // one call's constants
  T tau, inv_tau, p0, p1, p2, middle;
  explicit Numbers(const Sweep& s)
      : tau(T(s.tau)), inv_tau(T(1 / s.tau)), p0(T(s.params[0])), p1(T(s.params[1])), p2(T(s.params[2])), middle(T(s.constant_shift)) {}
};

template <class T> constexpr T SMALLEST_NORMAL = T(sizeof(T) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308);

// max(d, 0)^q and its derivative, 0 at d <= 0 for every q, NaN at NaN. Q is q where it is known when compiling, else 0.
template <class T, int Q> ALPHACL_INLINE Vec<T> power(Vec<T> d, T q) {
  if (Q == 1 || q == 1) return relu<T>(d);
  if (Q == 2 || q == 2) {
    const Vec<T> r = relu<T>(d);
    return r * r;
  }
  const Vec<T> positive = vmax<T>(d, broadcast<T>(SMALLEST_NORMAL<T>));
  Vec<T> y;
  if (q == T(0.5)) y = vsqrt<T>(positive);
  else if (q == T(1.5)) y = positive * vsqrt<T>(positive);
  else y = vpow(positive, double(q));
  return d > 0 ? y : relu<T>(d);
}
template <class T, int Q> ALPHACL_INLINE Vec<T> power_slope(Vec<T> d, T q) {
  if (Q == 1 || q == 1) return d > 0 ? broadcast<T>(1) : relu<T>(d);
  if (Q == 2 || q == 2) return 2 * relu<T>(d);
  const Vec<T> positive = vmax<T>(d, broadcast<T>(SMALLEST_NORMAL<T>));
  Vec<T> y;
  if (q == T(0.5)) y = T(0.5) / vsqrt<T>(positive);
  else if (q == T(1.5)) y = T(1.5) * vsqrt<T>(positive);
  else y = q * vpow(positive, double(q) - 1);
  return d > 0 ? y : relu<T>(d);
}

template <class T> struct Exp {  // t/τ
  static constexpr bool log = true, linear_in_t = true;
  static ALPHACL_INLINE Vec<T> f(Vec<T> t, const Numbers<T>& n) { return t * n.inv_tau; }
  static ALPHACL_INLINE Vec<T> df(Vec<T>, const Numbers<T>& n) { return broadcast<T>(n.inv_tau); }
  static ALPHACL_INLINE Vec<T> dtau(Vec<T> t, const Numbers<T>& n) { return t * (-n.inv_tau * n.inv_tau); }
};
template <class T> struct Gibbs {  // (t − c)/τ
  static constexpr bool log = true, linear_in_t = false;
  static ALPHACL_INLINE Vec<T> f(Vec<T> t, const Numbers<T>& n) { return (t - n.p0) * n.inv_tau; }
  static ALPHACL_INLINE Vec<T> df(Vec<T>, const Numbers<T>& n) { return broadcast<T>(n.inv_tau); }
  static ALPHACL_INLINE Vec<T> dtau(Vec<T> t, const Numbers<T>& n) { return (n.p0 - t) * (n.inv_tau * n.inv_tau); }
};
template <class T, int Q> struct Power {  // −max(c − t, 0)^q/τ
  static constexpr bool log = true, linear_in_t = false;
  static ALPHACL_INLINE Vec<T> f(Vec<T> t, const Numbers<T>& n) { return power<T, Q>(n.p0 - t, n.p1) * -n.inv_tau; }
  static ALPHACL_INLINE Vec<T> df(Vec<T> t, const Numbers<T>& n) { return power_slope<T, Q>(n.p0 - t, n.p1) * n.inv_tau; }
  static ALPHACL_INLINE Vec<T> dtau(Vec<T> t, const Numbers<T>& n) {
    return power<T, Q>(n.p0 - t, n.p1) * (n.inv_tau * n.inv_tau);
  }
};
template <class T> struct Inverse {  // −k·log(max(c − t, 0)^q + τ)
  static constexpr bool log = true, linear_in_t = false;
  static ALPHACL_INLINE Vec<T> inside(Vec<T> t, const Numbers<T>& n) { return power<T, 0>(n.p0 - t, n.p1) + n.tau; }
  static ALPHACL_INLINE Vec<T> f(Vec<T> t, const Numbers<T>& n) { return vlog<T>(inside(t, n)) * -n.p2; }
  static ALPHACL_INLINE Vec<T> df(Vec<T> t, const Numbers<T>& n) {
    return power_slope<T, 0>(n.p0 - t, n.p1) / inside(t, n) * n.p2;
  }
  static ALPHACL_INLINE Vec<T> dtau(Vec<T> t, const Numbers<T>& n) { return -n.p2 / inside(t, n); }
};
template <class T> struct Hinge {  // max(x + m, 0); the kink has derivative 0
  static constexpr bool log = false, linear_in_t = false;
  static ALPHACL_INLINE Vec<T> f(Vec<T> x, const Numbers<T>& n) { return relu<T>(x + n.p0); }
  static ALPHACL_INLINE Vec<T> df(Vec<T> x, const Numbers<T>& n) { return x + n.p0 > 0 ? broadcast<T>(1) : Vec<T>{}; }
  static ALPHACL_INLINE Vec<T> dtau(Vec<T>, const Numbers<T>&) { return Vec<T>{}; }
};
template <class T> struct Sigmoid {  // sigmoid(s·x)
  static constexpr bool log = false, linear_in_t = false;
  static ALPHACL_INLINE Vec<T> f(Vec<T> x, const Numbers<T>& n) { return 1 / (1 + vexp<T>(x * -n.p0)); }
  static ALPHACL_INLINE Vec<T> df(Vec<T> x, const Numbers<T>& n) {
    const Vec<T> y = f(x, n);
    return n.p0 * y * (1 - y);
  }
  static ALPHACL_INLINE Vec<T> dtau(Vec<T>, const Numbers<T>&) { return Vec<T>{}; }
};
template <class T> struct Square {  // max(x, 0)/τ
  static constexpr bool log = false, linear_in_t = false;
  static ALPHACL_INLINE Vec<T> f(Vec<T> x, const Numbers<T>& n) { return relu<T>(x) * n.inv_tau; }
  static ALPHACL_INLINE Vec<T> df(Vec<T> x, const Numbers<T>& n) { return x > 0 ? broadcast<T>(n.inv_tau) : Vec<T>{}; }
  static ALPHACL_INLINE Vec<T> dtau(Vec<T> x, const Numbers<T>& n) { return relu<T>(x) * (-n.inv_tau * n.inv_tau); }
};
template <class T> struct Gamma {  // (τ/−x)^{1/γ}, x < 0
  static constexpr bool log = false, linear_in_t = false;
  static ALPHACL_INLINE Vec<T> f(Vec<T> x, const Numbers<T>& n) {
    const Vec<T> ratio = n.tau / -x;
    if (n.p0 == 2) return vsqrt<T>(ratio);
    return n.p0 == 1 ? ratio : vpow(ratio, 1 / double(n.p0));
  }
  static ALPHACL_INLINE Vec<T> df(Vec<T> x, const Numbers<T>& n) { return f(x, n) / (-n.p0 * x); }
  static ALPHACL_INLINE Vec<T> dtau(Vec<T> x, const Numbers<T>& n) { return f(x, n) / (n.p0 * n.tau); }
};

}  // namespace
