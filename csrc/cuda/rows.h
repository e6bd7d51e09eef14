// Normalisation with the positives' similarities before the sweeps, and its derivative after them:
// a warp per positive pair. Rounding to TF32: a warp per row.
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

// |x| as an unsigned number: ordered as magnitudes are, with NaN above infinity.
DEVICE uint32_t magnitude(float x) { return device::to_bits(x) & 0x7fffffffu; }
DEVICE uint64_t magnitude(double x) { return device::to_bits(x) & 0x7fffffffffffffffull; }

// The power of two by which a bfloat16 row is stored, given its largest magnitude. It is 1 from 2⁻³⁰
// up to 2³⁰, where products of two rows stay in the range of float; float16 rows never need it.
DEVICE float lift_of(uint32_t largest) {
  const uint32_t exponent = largest >> 23, bias = 127;
  if (exponent == 255 || (exponent >= bias - 30 && exponent < bias + 30)) return 1;
  const uint32_t normal = exponent < 1 ? 1 : exponent > 2 * bias - 1 ? 2 * bias - 1 : exponent;
  return device::from_bits((2 * bias - normal) << 23);
}
DEVICE Bfloat16 lifted(Bfloat16 x, float lift) { return {uint16_t(device::pack_bf16(wide(x) * lift, 0.0f))}; }
DEVICE Float16 lifted(Float16 x, float) { return x; }

// X is the element type. Rows of the accumulation type are stored as unit rows. Half-precision rows
// are stored as given, and extreme ones are multiplied by a power of two.
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
    T safe[2], norm[2], inverse[2], lift[2] = {1, 1};
    // squares of the rows themselves could leave the range of the type
    for (int v = 0; v < 2; ++v) {
      decltype(magnitude(T())) largest = 0;
      for (int d = lane; d < a.dim; d += 32) largest = larger(largest, magnitude(wide(z[v][d])));
      largest = warp_max(largest);
      const bool zero = largest == 0;
      safe[v] = zero ? T(1) : T(device::from_bits(largest));
      T squares = 0;
      for (int d = lane; d < a.dim; d += 32) {
        const T x = T(wide(z[v][d])) / safe[v];
        squares += x * x;
      }
      squares = warp_sum(squares);  // all lanes take part: whether a collective runs must not depend on data
      norm[v] = zero ? T(1) : root(squares);
      inverse[v] = zero ? T(0) : 1 / norm[v] / safe[v];
      if (inverse[v] > LARGEST) inverse[v] = LARGEST;
      if constexpr (!SAME) {
        lift[v] = lift_of(largest);
        if (lane == 0) static_cast<T*>(a.scale)[i + v * a.n_pairs] = zero ? T(0) : 1 / norm[v] / (safe[v] * lift[v]);
      }
    }
    X* f[2] = {static_cast<X*>(a.f) + i * a.stride, static_cast<X*>(a.f) + (a.n_pairs + i) * a.stride};
    T product = 0;
    for (int d = lane; d < a.dim; d += 32) {
      T unit[2];
      for (int v = 0; v < 2; ++v) {
        unit[v] = T(wide(z[v][d])) / safe[v] / norm[v];
        if constexpr (SAME) f[v][d] = unit[v];
        else f[v][d] = lift[v] == 1 ? z[v][d] : lifted(z[v][d], lift[v]);
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
    const auto* given = static_cast<const T*>(a.scale);
    const T scale[2] = {SAME ? T(1) : given[row[0]], SAME ? T(1) : given[row[1]]};
    const auto unit = [&](int v, int d) {
      const T x = wide(static_cast<const X*>(a.f)[row[v] * a.stride + d]);
      return SAME ? x : x * scale[v];
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

// Products of warpgroups take their columns from shared memory as a tensor copy leaves them there,
// so that no thread could round them on the way.
struct RoundRows {
  using Args = RoundedRows;
  static constexpr int THREADS = 32 * ROW_WARPS, BLOCKS = 1;

  static DEVICE void body(const RoundedRows& a) {
    const int64_t i = int64_t(device::block_x()) * ROW_WARPS + device::thread() / 32;
    if (i >= a.n) return;
    const float* from = static_cast<const float*>(a.f) + i * a.stride;
    auto* to = static_cast<uint32_t*>(a.rounded) + i * a.rounded_stride;
    for (int d = device::thread() % 32; d < a.dim; d += 32) to[d] = device::rounded_to_tf32(from[d]);
  }
};

}  // namespace alphacl
