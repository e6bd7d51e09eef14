// Normalisation with the positives' similarities before the sweeps, and its derivative after them:
// a warp per positive pair.
#pragma once

#include "pairs.h"

namespace alphacl {

constexpr int ROW_WARPS = 4;

template <class X> struct Wide {
  using T = float;
};
template <> struct Wide<double> {
  using T = double;
};
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
DEVICE float wide(Bfloat16 x) { return device::from_bits(uint32_t(x.bits) << 16); }
DEVICE float wide(Float16 x) { return device::from_f16(x.bits); }
DEVICE float wide(float x) { return x; }
DEVICE double wide(double x) { return x; }

template <class T> DEVICE T warp_sum(T x) {
  for (int lanes = 1; lanes < 32; lanes *= 2) x += device::shuffle_xor(x, lanes);
  return x;
}
template <class T> DEVICE T warp_max(T x) {
  for (int lanes = 1; lanes < 32; lanes *= 2) x = larger(x, device::shuffle_xor(x, lanes));
  return x;
}

// X is what a row is made of. Unit rows of the accumulation type; half precision rows stay as they
// are.
template <class X> struct UnitRows {
  using Args = PairRows;
  using T = typename Wide<X>::T;
  static constexpr int THREADS = 32 * ROW_WARPS, BLOCKS = 1;
  static constexpr bool SAME = sizeof(X) == sizeof(T);
  static constexpr T LARGEST = T(sizeof(T) == 4 ? 3.402823466e38 : 1.7976931348623157e308);

  static DEVICE void body(const PairRows& a) {
    const int lane = device::thread() % 32;
    const int64_t i = int64_t(device::block_x()) * ROW_WARPS + device::thread() / 32;
    if (i >= a.n_pairs) return;
    const X* z[2] = {static_cast<const X*>(a.z1) + i * a.stride1, static_cast<const X*>(a.z2) + i * a.stride2};
    T safe[2], norm[2], inverse[2];
    // squares of the rows themselves could leave the range of the type
    for (int v = 0; v < 2; ++v) {
      T largest = 0;
      for (int d = lane; d < a.dim; d += 32) {
        const T x = wide(z[v][d]);
        largest = larger(largest, x < 0 ? -x : x);
        if (x != x) largest = x;
      }
      largest = warp_max(largest);
      const bool zero = largest == 0;
      safe[v] = zero ? T(1) : largest;
      T squares = 0;
      for (int d = lane; d < a.dim; d += 32) {
        const T x = T(wide(z[v][d])) / safe[v];
        squares += x * x;
      }
      norm[v] = zero ? T(1) : root(warp_sum(squares));
      inverse[v] = 1 / norm[v] / safe[v];
      inverse[v] = zero ? T(0) : inverse[v] > LARGEST ? LARGEST : inverse[v];
    }
    X* f[2] = {static_cast<X*>(a.f) + i * a.dim, static_cast<X*>(a.f) + (a.n_pairs + i) * a.dim};
    T product = 0;
    for (int d = lane; d < a.dim; d += 32) {
      T unit[2];
      for (int v = 0; v < 2; ++v) {
        unit[v] = T(wide(z[v][d])) / safe[v] / norm[v];
        if constexpr (SAME) f[v][d] = unit[v];
        else f[v][d] = z[v][d];
      }
      product += unit[0] * unit[1];
    }
    product = warp_sum(product);
    if (lane == 0) {
      static_cast<T*>(a.pos)[i] = static_cast<T*>(a.pos)[a.n_pairs + i] = product;
      static_cast<T*>(a.inv_norm)[i] = inverse[0], static_cast<T*>(a.inv_norm)[a.n_pairs + i] = inverse[1];
    }
  }
};

// d ← (g − F⟨F, g⟩)/‖z‖ with g = d − q·F_p, of both rows of a pair.
template <class X> struct FinishRows {
  using Args = PairRows;
  using T = typename Wide<X>::T;
  static constexpr int THREADS = 32 * ROW_WARPS, BLOCKS = 1;
  static constexpr bool SAME = sizeof(X) == sizeof(T);

  static DEVICE void body(const PairRows& a) {
    const int lane = device::thread() % 32;
    const int64_t i = int64_t(device::block_x()) * ROW_WARPS + device::thread() / 32;
    if (i >= a.n_pairs) return;
    const int64_t row[2] = {i, a.n_pairs + i};
    const auto* weights = static_cast<const T*>(a.q);
    const T q = a.anchors == 2 ? weights[row[0]] + weights[row[1]] : weights[i];
    const T inverse[2] = {static_cast<const T*>(a.inv_norm)[row[0]], static_cast<const T*>(a.inv_norm)[row[1]]};
    const auto unit = [&](int v, int d) {
      const T x = wide(static_cast<const X*>(a.f)[row[v] * a.dim + d]);
      return SAME ? x : x * inverse[v];
    };
    T* out[2] = {static_cast<T*>(a.d) + row[0] * a.dim, static_cast<T*>(a.d) + row[1] * a.dim};
    T along[2] = {};
    for (int d = lane; d < a.dim; d += 32) {
      const T f0 = unit(0, d), f1 = unit(1, d);
      along[0] += f0 * (out[0][d] - q * f1), along[1] += f1 * (out[1][d] - q * f0);
    }
    along[0] = warp_sum(along[0]), along[1] = warp_sum(along[1]);
    for (int d = lane; d < a.dim; d += 32) {
      const T f0 = unit(0, d), f1 = unit(1, d);
      const T g0 = out[0][d] - q * f1, g1 = out[1][d] - q * f0;
      out[0][d] = (g0 - f0 * along[0]) * inverse[0], out[1][d] = (g1 - f1 * along[1]) * inverse[1];
    }
  }
};

}  // namespace alphacl
