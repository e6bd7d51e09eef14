// Supervised losses of anchors and the rows of their own ids: the formulas of alphacl_fast/supcon.py
// in a few passes over a row that is in the first-level cache.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

// What a row of a block is made of: g = (t − origin)/τ of the positives, one after the other.
template <class T> struct Positives {
  T* g;           // (count) and zeros up to a whole vector
  int64_t count;
  T log_sum;      // log Σ_N exp((t − origin)/τ)
  bool bounded;   // no exponential of g overflows
};
// The loss, and its derivatives: |P|·∂loss/∂g in the place of g, ∂loss/∂log_sum, Σ_p |P|·∂loss/∂g·g.
template <class T> struct RowOutcome {
  T loss, of_log_sum, moment;
};

template <class T> ALPHACL_INLINE T one(Vec<T> (*function)(Vec<T>), T x) { return function(broadcast<T>(x))[0]; }
template <class T> ALPHACL_INLINE Vec<T> sigmoid(Vec<T> x) { return 1 / (1 + vexp<T>(-x)); }
// log(1 + e^x)
template <class T> ALPHACL_INLINE Vec<T> softplus(Vec<T> x) {
  const Vec<T> size = x < 0 ? -x : x;
  return relu<T>(x) + vlog1p_unit(vexp<T>(-size));
}
// e^x − 1 to the last digits of a small x
template <class T> ALPHACL_INLINE Vec<T> vexpm1(Vec<T> x) {
  return (x < T(0.34)) & (x > T(-0.34)) ? expm1_polynomial(x) : vexp<T>(x) - 1;
}

// f(g, mask of the lanes that hold a positive) for every vector of a row
template <class T, class Function> ALPHACL_INLINE void for_positives(const Positives<T>& p, Function f) {
  const Mask<T> lanes = lane_numbers<T>();
  for (int64_t c = 0; c < p.count; c += LANES<T>) f(p.g + c, lanes < Int<T>(p.count - c));
}
template <class T> T mean_of(const Positives<T>& p) {
  Vec<T> sum{};
  for_positives<T>(p, [&](const T* g, Mask<T>) { sum += load(g); });
  return sum_of<T>(sum) / T(p.count);
}
template <class T> T largest_of(const Positives<T>& p) {
  Vec<T> most = broadcast<T>(-__builtin_inf());
  for_positives<T>(p, [&](const T* g, Mask<T> real) { most = largest<T>(real ? load(g) : most, most); });
  return max_of<T>(most);
}
// log of the mean of exp(g), relative to `top`, from which no exponential overflows
template <class T> T log_mean_exp(const Positives<T>& p, T top) {
  Vec<T> sum{};
  for_positives<T>(p, [&](const T* g, Mask<T> real) {
    const Vec<T> e = vexp<T>(load(g) - top);
    sum += real ? e : Vec<T>{};
  });
  return top + one<T>(vlog<T>, sum_of<T>(sum) / T(p.count));
}
// Replaces every g by derivative(g) and returns the sum of their products.
template <class T, class Derivative> T differentiate(const Positives<T>& p, Derivative derivative) {
  Vec<T> sum{};
  for_positives<T>(p, [&](T* g, Mask<T> real) {
    const Vec<T> x = load(g), y = derivative(x);
    store(g, y);
    sum += real ? x * y : Vec<T>{};
  });
  return sum_of<T>(sum);
}

template <class T> RowOutcome<T> outer_form(const Positives<T>& p) {
  const T mean = mean_of(p), log_count = one<T>(vlog<T>, T(p.count));
  // from the mean or the maximum on, equal g have the log_mean that they should have exactly
  const T log_mean = log_mean_exp(p, p.bounded ? mean : largest_of(p));
  const T ratio = p.log_sum - log_mean - log_count;
  const T among = one<T>(sigmoid<T>, -ratio), others = one<T>(sigmoid<T>, ratio);
  const T loss = log_count + (log_mean - mean) + one<T>(softplus<T>, ratio);
  return {loss, others, differentiate(p, [&](Vec<T> g) { return vexpm1<T>(g - log_mean) * among - others; })};
}
template <class T> RowOutcome<T> inner_form(const Positives<T>& p) {
  const T top = p.bounded ? T(0) : largest_of(p), log_count = one<T>(vlog<T>, T(p.count));
  const T log_mean = log_mean_exp(p, top), ratio = p.log_sum - log_mean - log_count;
  const T others = one<T>(sigmoid<T>, ratio), factor = -others * one<T>(vexp<T>, top - log_mean);
  return {log_count + one<T>(softplus<T>, ratio), others,
          differentiate(p, [&](Vec<T> g) { return vexp<T>(g - top) * factor; })};
}
template <class T> RowOutcome<T> sincere_form(const Positives<T>& p) {
  Vec<T> loss{}, pull{};
  for_positives<T>(p, [&](const T* g, Mask<T> real) {
    const Vec<T> ratio = p.log_sum - load(g);
    loss += real ? softplus<T>(ratio) : Vec<T>{}, pull += real ? sigmoid<T>(ratio) : Vec<T>{};
  });
  const T moment = differentiate(p, [&](Vec<T> g) { return -sigmoid<T>(p.log_sum - g); });
  return {sum_of<T>(loss) / T(p.count), sum_of<T>(pull) / T(p.count), moment};
}

// Rows [begin, end) of a block; `workspace` has room for a row and a vector.
template <class T> void same_id_rows(const SameIdBlock& b, int64_t begin, int64_t end, void* workspace) {
  T* const g = static_cast<T*>(workspace);
  const T inv_tau = T(1 / b.tau), tau = T(b.tau);
  auto at = [](const void* vector, int64_t r) { return static_cast<const T*>(vector)[r]; };
  for (int64_t r = begin; r < end; r++) {
    T* const t = static_cast<T*>(b.t) + r * b.cols;
    const int64_t own = b.own ? b.own[r] : -1, first = b.first[r], last = b.last[r];
    const bool inside = own >= first && own < last;
    const int64_t middle = inside ? own : last, rest = inside ? last - own - 1 : 0;
    const Positives<T> p{g, middle - first + rest, at(b.log_sums, r), bool(b.bounded)};
    std::memcpy(g, t + first, size_t(middle - first) * sizeof(T));
    std::memcpy(g + middle - first, t + middle + 1, size_t(rest) * sizeof(T));
    const T origin = at(b.origin, r);
    for (int64_t k = 0; k < p.count; k++) g[k] = (g[k] - origin) * inv_tau;
    for (int64_t k = p.count; k % LANES<T>; k++) g[k] = 0;
    RowOutcome<T> y{};
    if (p.count) y = b.form == 0 ? outer_form(p) : b.form == 1 ? inner_form(p) : sincere_form(p);
    const T weight = b.weight ? at(b.weight, r) : T(1);
    const T scale = p.count ? weight / (tau * T(p.count)) : T(0);
    for (int64_t k = 0; k < p.count; k++) g[k] *= scale;
    std::memset(t, 0, size_t(b.cols) * sizeof(T));
    std::memcpy(t + first, g, size_t(middle - first) * sizeof(T));
    std::memcpy(t + middle + 1, g + middle - first, size_t(rest) * sizeof(T));
    static_cast<T*>(b.loss)[r] = y.loss, static_cast<T*>(b.of_log_sums)[r] = y.of_log_sum;
    static_cast<T*>(b.of_tau)[r] = p.count ? y.moment / (-tau * T(p.count)) : T(0);
  }
}

}  // namespace
