// The two sweeps. Fast kernels serve the fixed form of kinds whose log f is affine in t or a square, with one exponential a
// pair, all in registers; general kernels serve every kind, form and term, pair by pair from shared memory.
#pragma once

#include "walk.h"

namespace alphacl {

// One slot of `out` (slots, [base,] terms, anchors).
template <class T> DEVICE T* slot(const Sweep& a, void* out, int64_t number, int bases) {
  return static_cast<T*>(out) + number * (bases + a.terms) * a.anchors;
}

template <class T> DEVICE T unit_of(const Sweep& a) {
  const T unit = a.unit ? *static_cast<const T*>(a.unit) : T(1);
  return unit > 0 ? unit : T(1);
}

// Whether a tile is masked, or log f affine, as types: what is compiled for each is without a choice.
struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};
template <class Use> DEVICE void with_choices(bool affine, bool masked, Use&& use) {
  if (affine && !masked) use(True{}, False{});
  else if (affine) use(True{}, True{});
  else if (!masked) use(False{}, False{});
  else use(False{}, True{});
}

// exp(log f − middle) by one exponential, of log f = (t − c)/τ or −max(c − t, 0)²/τ.
struct FastExponential {
  bool affine;
  float c, slope, constant, to_moment;
  DEVICE FastExponential(const Sweep& a) {
    const Numbers<float> n(a);
    affine = a.kind != POWER;
    slope = (affine ? n.inv_tau : -n.inv_tau) * LOG2_E;
    constant = -n.middle * LOG2_E;
    c = a.kind == EXP ? 0.0f : n.params[0];
  }
  template <bool AFFINE> DEVICE float operator()(float t) const {
    if constexpr (AFFINE) return device::exp2_approx((t - c) * slope + constant);
    const float d = positive(c - t);
    return device::exp2_approx(d * d * slope + constant);
  }
};
// Asked on the host, where nvcc makes of a device function one that ends the process.
inline bool is_fast(const Sweep& a) { return a.kind == EXP || a.kind == GIBBS || (a.kind == POWER && a.params[1] == 2); }

// --- sweep 1 -----------------------------------------------------------------------------------------------------------

template <class E, bool CHUNKS, bool BOTH> struct FastRowSums {
  using Args = Sweep;
  using M = Memory<E, CHUNKS, 2>;
  static constexpr int THREADS = alphacl::THREADS, BLOCKS = 2;
  static constexpr int SHARED = M::REST + (BOTH ? WARPS * 2 * SIDE * int(sizeof(float)) : 0);

  static DEVICE void body(const Sweep& a) {
    const Lane lane;
    const int64_t block = device::block_x();
    const Ring ring(a, block, device::block_y());
    const FastExponential fast(a);
    const bool moment = a.row_of_term[TERM_FT] >= 0;
    float total[2][2] = {}, lost[2][2] = {};  // of rows lane.row, lane.row + 8: Σf, Σf·(t − center)

    const auto tile_sums = [&](auto affine, auto masked, const float(&s)[8][4], const TileAt<float>& tile) {
      const uint32_t keep = masked.value ? counted(a, block, tile.tile) : ~0u;
      const float* rows = M::row_scalars();
      const float scale[2] = {rows[lane.row], rows[lane.row + 8]}, center[2] = {rows[SIDE + lane.row], rows[SIDE + lane.row + 8]};
      float sums[2][2] = {}, column[2][16];
#pragma unroll
      for (int m = 0; m < 8; ++m)
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int j = 8 * m + 2 * lane.t + p;
          const float scale_j = tile.cols[j], center_j = BOTH ? tile.cols[SIDE + j] : 0.0f;
          float f[2], ft[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const bool counts = !masked.value || (keep >> (4 * m + 2 * r + p) & 1);
            const float t = counts ? s[m][2 * r + p] * (scale[r] * scale_j) : 0.0f;
            f[r] = counts ? fast.template operator()<affine.value>(t) : 0.0f;
            sums[r][0] += f[r];
            if (moment) sums[r][1] += f[r] * (t - center[r]);
            if (BOTH) ft[r] = f[r] * (t - center_j);
          }
          if (BOTH) column[0][2 * m + p] = f[0] + f[1], column[1][2 * m + p] = ft[0] + ft[1];
        }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        add(total[r][0], lost[r][0], sums[r][0]);
        if (moment) add(total[r][1], lost[r][1], sums[r][1]);
      }
      if constexpr (BOTH) {
        auto* spread = reinterpret_cast<float*>(M::rest());  // (warps, 2, columns)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if (k == 0 || moment) {
            column_sums(column[k]);
            float* to = spread + (2 * lane.warp + k) * SIDE + 8 * lane.g + 2 * lane.t;
            to[0] = column[k][0], to[1] = column[k][1];
          }
        device::sync();
        const int j = device::thread() % SIDE, k = device::thread() / SIDE;
        const Place place = column_place(a, tile.tile, j);
        if (place.keep && !(has(a, TRIANGLE) && tile.at == 0) && (k == 0 || moment)) {
          float sum = 0;
          for (int w = 0; w < WARPS; ++w) sum += spread[(2 * w + k) * SIDE + j];
          const int row = a.row_of_term[k == 0 ? TERM_F : TERM_FT];
          slot<float>(a, a.out, a.col_slot + tile.at, 0)[row * a.anchors + place.row] = sum;
        }
      }
    };
    walk<E, CHUNKS, 2>(a, ring, block, 0.0f, 1.0f, [&](const float(&s)[8][4], const TileAt<float>& tile) {
      with_choices(fast.affine, tile.masked, [&](auto affine, auto masked) { tile_sums(affine, masked, s, tile); });
    });
    float* out = slot<float>(a, a.out, device::block_y(), 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Place place = row_place(a, block, lane.row + 8 * r);
      const float f = row_sum(total[r][0]), ft = row_sum(total[r][1]);
      if (place.keep && lane.t == 0) {
        out[a.row_of_term[TERM_F] * a.anchors + place.row] = f;
        if (moment) out[a.row_of_term[TERM_FT] * a.anchors + place.row] = ft;
      }
    }
  }
};

// What one side of a pair asks of a kind: t with the side's scalars.
template <class T> struct Side {
  T scale, bias, center, gain, shift, offset, level;
  DEVICE Side(const T* v, int i)
      : scale(v[SCALE * SIDE + i]), bias(v[BIAS * SIDE + i]), center(v[CENTER * SIDE + i]), gain(v[GAIN * SIDE + i]),
        shift(v[SHIFT * SIDE + i]), offset(v[OFFSET * SIDE + i]), level(v[LEVEL * SIDE + i]) {}
};

// Row scalars meet first: t_ij and t_ji must agree to the last bit.
template <class T> DEVICE T similarity(T product, const Side<T>& i, const Side<T>& j) {
  return product * (i.scale * j.scale) + (i.bias + j.bias);
}

template <class T> struct Pair {
  T t, log_f;  // t as moments take it: of the exp kind τ·log f, for where |t|/τ is large both must have been rounded together
  bool counts;
};
template <class Kind, class T> DEVICE Pair<T> pair(T t, bool counts, const Numbers<T>& n) {
  Pair<T> x{counts ? t : T(0), 0, counts};
  if constexpr (Kind::LOG) {
    x.log_f = Kind::f(x.t, n);
    if (Kind::LINEAR) x.t = x.log_f * n.tau;
    if (!counts) x.log_f = -INFINITE<T>;
  }
  return x;
}

template <class T> struct Pieces {
  T f, df, dtau;
};
template <class Kind, class T>
DEVICE Pieces<T> pieces(const Pair<T>& x, T shift, T offset, bool need_df, bool need_dtau, const Numbers<T>& n) {
  Pieces<T> y{0, 0, 0};
  if (!x.counts) return y;
  if constexpr (Kind::LOG) {
    y.f = exponential(x.log_f - shift);
    if (need_df) y.df = y.f * Kind::df(x.t, n);
    if (need_dtau) y.dtau = y.f * Kind::dtau(x.t, n);
  } else {
    const T argument = (x.t - shift) + offset;
    y.f = Kind::f(argument, n);
    if (need_df) y.df = Kind::df(argument, n);
    if (need_dtau) y.dtau = Kind::dtau(argument, n);
  }
  return y;
}
template <class T> DEVICE void add_terms(T (&sums)[TERM_COUNT], const Pieces<T>& y, T t, T center, T level) {
  const T u = t - center;
  sums[TERM_F] += y.f;
  sums[TERM_DF] += y.df;
  sums[TERM_FT] += y.f * u;
  sums[TERM_DFT] += y.df * u;
  sums[TERM_DTAU] += y.dtau * (u - level);
}
DEVICE bool wants(const Sweep& a, Term term) { return a.row_of_term[term] >= 0; }

template <class E, bool CHUNKS> struct RowSums {
  using Args = Sweep;
  using T = typename E::T;
  using M = Memory<E, CHUNKS, ALL_SCALARS>;
  static constexpr int THREADS = alphacl::THREADS, BLOCKS = 1;
  static constexpr int SPREAD = M::REST + Scratch<T>::BYTES;
  static constexpr int TOTALS_AT = SPREAD + WARPS * (TERM_COUNT + 1) * SIDE * int(sizeof(T));
  static constexpr int SHARED = TOTALS_AT + 4 * TERM_COUNT * THREADS * int(sizeof(T));

  static DEVICE void body(const Sweep& a) {
    const Lane lane;
    const int64_t block = device::block_x();
    const Ring ring(a, block, device::block_y());
    const Numbers<T> n(a);
    const Scratch<T> scratch{reinterpret_cast<T*>(M::rest())};
    auto* spread = reinterpret_cast<T*>(device::shared() + SPREAD);  // (warps, terms + 1, columns)
    const bool both = has(a, BOTH), need_df = wants(a, TERM_DF) || wants(a, TERM_DFT), need_dtau = wants(a, TERM_DTAU);
    const int bases = a.form == RUNNING || a.form == MAXIMUM;
    T base[2] = {-INFINITE<T>, -INFINITE<T>};
    // As in PairGrad.
    auto* totals = reinterpret_cast<T*>(device::shared() + TOTALS_AT) + device::thread();
    const auto total = [&](int r, int k) -> T& { return totals[(r * TERM_COUNT + k) * THREADS]; };
    const auto lost = [&](int r, int k) -> T& { return totals[((2 + r) * TERM_COUNT + k) * THREADS]; };
    for (int k = 0; k < 4 * TERM_COUNT; ++k) totals[k * THREADS] = 0;

    const auto maxima = [&](uint32_t keep, const T* cols) {
      T largest[2] = {-INFINITE<T>, -INFINITE<T>};
#pragma unroll 1
      for (int q = 0; q < 16; ++q) {
        const int j = 8 * (q / 2) + 2 * lane.t + q % 2;
        const Side<T> side_j(cols, j);
        T column = -INFINITE<T>;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Side<T> side_i(M::row_scalars(), lane.row + 8 * r);
          const bool counts = keep >> (4 * (q / 2) + 2 * r + q % 2) & 1;
          const T t = counts ? similarity(scratch.at(q / 2, 2 * r + q % 2), side_i, side_j) : -INFINITE<T>;
          largest[r] = larger(largest[r], t), column = larger(column, t);
        }
        if (both) {
          for (int lanes = 4; lanes <= 16; lanes *= 2) column = larger(column, device::shuffle_xor(column, lanes));
          if (lane.g == 0) spread[lane.warp * (TERM_COUNT + 1) * SIDE + j] = column;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) base[r] = larger(base[r], row_max(largest[r]));
    };

    const auto sums_of = [&](auto kind, uint32_t keep, const T* cols) {
      using Kind = decltype(kind);
      T shift[2];  // what is subtracted from log f, or from t
      if constexpr (Kind::LOG) {
        if (a.form == RUNNING) {  // relative to the largest log f so far
          T largest[2] = {-INFINITE<T>, -INFINITE<T>};
#pragma unroll 1
          for (int q = 0; q < 16; ++q) {
            const Side<T> side_j(cols, 8 * (q / 2) + 2 * lane.t + q % 2);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const Side<T> side_i(M::row_scalars(), lane.row + 8 * r);
              const T t = similarity(scratch.at(q / 2, 2 * r + q % 2), side_i, side_j);
              largest[r] = larger(largest[r], pair<Kind>(t, keep >> (4 * (q / 2) + 2 * r + q % 2) & 1, n).log_f);
            }
          }
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const T after = larger(base[r], row_max(largest[r]));
            const T finite = after > -INFINITE<T> ? after : T(0);  // no pair of the row counted yet
            const T factor = exponential(base[r] - finite);
            for (int k = 0; k < TERM_COUNT; ++k) total(r, k) *= factor, lost(r, k) *= factor;
            base[r] = after, shift[r] = finite;
          }
        } else {
          for (int r = 0; r < 2; ++r) shift[r] = M::row_scalars()[SHIFT * SIDE + lane.row + 8 * r];
        }
      } else {
        for (int r = 0; r < 2; ++r) shift[r] = M::row_scalars()[SHIFT * SIDE + lane.row + 8 * r];
      }
      T sums[2][TERM_COUNT] = {};
#pragma unroll 1
      for (int q = 0; q < 16; ++q) {
        const int j = 8 * (q / 2) + 2 * lane.t + q % 2;
        const Side<T> side_j(cols, j);
        T column[TERM_COUNT] = {};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Side<T> side_i(M::row_scalars(), lane.row + 8 * r);
          const T t = similarity(scratch.at(q / 2, 2 * r + q % 2), side_i, side_j);
          const Pair<T> x = pair<Kind>(t, keep >> (4 * (q / 2) + 2 * r + q % 2) & 1, n);
          add_terms(sums[r], pieces<Kind>(x, shift[r], side_i.offset, need_df, need_dtau, n), x.t, side_i.center, side_i.level);
          if (both)
            add_terms(column, pieces<Kind>(x, side_j.shift, side_j.offset, need_df, need_dtau, n), x.t, side_j.center, side_j.level);
        }
        if (both) {
#pragma unroll
          for (int k = 0; k < TERM_COUNT; ++k)
            if (a.row_of_term[k] >= 0) {
              const T sum = column_sum(column[k]);
              if (lane.g == 0) spread[(lane.warp * (TERM_COUNT + 1) + k) * SIDE + j] = sum;
            }
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int k = 0; k < TERM_COUNT; ++k) add(total(r, k), lost(r, k), sums[r][k]);
    };

    // In the fixed form `middle` takes the place of a shift.
    walk<E, CHUNKS, ALL_SCALARS>(a, ring, block, T(a.form == FIXED ? n.middle : 0), T(1), [&](const T(&s)[8][4], const TileAt<T>& tile) {
      const uint32_t keep = tile.masked ? counted(a, block, tile.tile) : ~0u;
      scratch.put(s);  // each lane reads its own elements only
      if (a.form == MAXIMUM) maxima(keep, tile.cols);
      else with_kind<T>(a.kind, [&](auto kind) { sums_of(kind, keep, tile.cols); });
      if (!both) return;
      device::sync();
      const int j = device::thread();
      if (j >= SIDE) return;
      const Place place = column_place(a, tile.tile, j);
      if (!place.keep || (has(a, TRIANGLE) && tile.at == 0)) return;
      T* out = slot<T>(a, a.out, a.col_slot + tile.at, bases);
      if (a.form == MAXIMUM) {
        T largest = spread[j];
        for (int w = 1; w < WARPS; ++w) largest = larger(largest, spread[w * (TERM_COUNT + 1) * SIDE + j]);
        out[place.row] = largest;
      }
      for (int k = 0; k < TERM_COUNT; ++k)
        if (a.row_of_term[k] >= 0) {
          T sum = 0;
          for (int w = 0; w < WARPS; ++w) sum += spread[(w * (TERM_COUNT + 1) + k) * SIDE + j];
          out[a.row_of_term[k] * a.anchors + place.row] = sum;
        }
    });

    T* out = slot<T>(a, a.out, device::block_y(), bases);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Place place = row_place(a, block, lane.row + 8 * r);
      const bool writes = place.keep && lane.t == 0;
      if (bases && writes) out[place.row] = base[r];
#pragma unroll
      for (int k = 0; k < TERM_COUNT; ++k) {
        const T sum = row_sum(total(r, k));
        if (writes && a.row_of_term[k] >= 0) out[(bases + a.row_of_term[k]) * a.anchors + place.row] = sum;
      }
    }
  }
};

// --- sweep 2 -----------------------------------------------------------------------------------------------------------

// Writes a block's weights w (already times the columns' scales) for a vendor product.
template <class E> DEVICE void write_weights(const Sweep& a, int64_t tile, const typename E::T (&w)[8][4]) {
  const Lane lane;
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    const int i = lane.row + 8 * r;
    if (!row_place(a, device::block_x() + a.first_block, i).keep) continue;
    const int64_t row = (int64_t(device::block_x()) * SIDE + i) * a.n_cols;
#pragma unroll
    for (int q = 0; q < 16; ++q) {
      const Place j = column_place(a, tile, 8 * (q / 2) + 2 * lane.t + q % 2);
      if (!j.keep) continue;
      const auto value = r == 0 ? w[q / 2][q % 2] : w[q / 2][2 + q % 2];
      if constexpr (E::TENSOR_CORES && E::BOTH_SIDES) {
        static_cast<uint16_t*>(a.w)[row + j.row - a.col_start] = uint16_t(device::pack_bf16(value, 0.0f));
      } else if constexpr (E::TENSOR_CORES) {
        static_cast<float*>(a.w)[row + j.row - a.col_start] = device::from_bits(rounded_to_tf32(value));
      } else {
        static_cast<typename E::T*>(a.w)[row + j.row - a.col_start] = value;
      }
    }
  }
}

// Writes acc·unit, rows of the gradient, to `df`.
template <class E> DEVICE void write_gradient(const Sweep& a, int64_t block, const typename E::T (&acc)[E::K / 8][4]) {
  using T = typename E::T;
  const Lane lane;
  const T unit = unit_of<T>(a);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Place place = row_place(a, block, lane.row + 8 * r);
    if (!place.keep) continue;
    T* row = static_cast<T*>(a.df) + (device::block_y() * a.n_out + place.row - a.lo) * a.dim;
#pragma unroll
    for (int d = 0; d < E::K / 8; ++d)
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int feature = 8 * d + 2 * lane.t + p;
        if (feature < a.dim) row[feature] = acc[d][2 * r + p] * unit;
      }
  }
}

template <class E, bool CHUNKS> struct FastPairGrad {
  using Args = Sweep;
  using M = Memory<E, CHUNKS, 2>;
  static constexpr int THREADS = alphacl::THREADS, BLOCKS = E::K <= 128 ? 2 : 1;
  static constexpr int SHARED = M::REST;

  static DEVICE void body(const Sweep& a) {
    const Lane lane;
    const int64_t block = int64_t(device::block_x()) + a.first_block;
    const Ring ring(a, block, device::block_y());
    const FastExponential fast(a);
    float acc[CHUNKS ? 1 : E::K / 8][4] = {};

    const auto weights = [&](auto affine, auto masked, float(&s)[8][4], const TileAt<float>& tile) {
      const uint32_t keep = masked.value ? counted(a, block, tile.tile) : ~0u;
      const float* rows = M::row_scalars();
      const float scale[2] = {rows[lane.row], rows[lane.row + 8]}, gain[2] = {rows[SIDE + lane.row], rows[SIDE + lane.row + 8]};
#pragma unroll
      for (int m = 0; m < 8; ++m) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int j = 8 * m + 2 * lane.t + p;
          const float scale_j = tile.cols[j], gain_j = tile.cols[SIDE + j];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const bool counts = !masked.value || (keep >> (4 * m + 2 * r + p) & 1);
            const float t = counts ? s[m][2 * r + p] * (scale[r] * scale_j) : 0.0f;
            s[m][2 * r + p] = counts ? fast.template operator()<affine.value>(t) * (gain[r] + gain_j) : 0.0f;
          }
        }
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const float scale_j = tile.cols[8 * m + 2 * lane.t + p];
          s[m][p] *= scale_j, s[m][2 + p] *= scale_j;
        }
      }
    };
    walk<E, CHUNKS, 2>(a, ring, block, 0.0f, 1 / unit_of<float>(a), [&](float(&s)[8][4], const TileAt<float>& tile) {
      with_choices(fast.affine, tile.masked, [&](auto affine, auto masked) { weights(affine, masked, s, tile); });
      if constexpr (CHUNKS) write_weights<E>(a, tile.tile, s);
      else E::gradient(acc, s, tile.features);
    });
    if constexpr (!CHUNKS) write_gradient<E>(a, block, acc);
  }
};

template <class E, bool CHUNKS> struct PairGrad {
  using Args = Sweep;
  using T = typename E::T;
  using M = Memory<E, CHUNKS, ALL_SCALARS>;
  static constexpr int THREADS = alphacl::THREADS, BLOCKS = 1;
  static constexpr int TOTALS_AT = M::REST + Scratch<T>::BYTES;
  static constexpr int SHARED = TOTALS_AT + 4 * (TERM_COUNT + 1) * THREADS * int(sizeof(T));

  static DEVICE void body(const Sweep& a) {
    const Lane lane;
    const int64_t block = int64_t(device::block_x()) + a.first_block;
    const Ring ring(a, block, device::block_y());
    const Numbers<T> n(a);
    const Scratch<T> scratch{reinterpret_cast<T*>(M::rest())};
    const bool need_dtau = wants(a, TERM_DTAU);
    const bool need_df = a.weight != WEIGHT_F || wants(a, TERM_DF) || wants(a, TERM_DFT);
    T acc[CHUNKS ? 1 : E::K / 8][4] = {};
    // Totals live in shared memory, a thread's own words: beside the gradient there are no registers for them.
    auto* totals = reinterpret_cast<T*>(device::shared() + TOTALS_AT) + device::thread();
    const auto total = [&](int r, int k) -> T& { return totals[(r * (TERM_COUNT + 1) + k) * THREADS]; };
    const auto lost = [&](int r, int k) -> T& { return totals[((2 + r) * (TERM_COUNT + 1) + k) * THREADS]; };
    for (int k = 0; k < 4 * (TERM_COUNT + 1); ++k) totals[k * THREADS] = 0;

    const auto weigh = [&](const Pieces<T>& y, T t, const Side<T>& side) {
      const T g = a.weight == WEIGHT_F ? y.f : a.weight == WEIGHT_DF ? y.df : y.f + y.df * ((t - side.center) - side.level);
      return g * side.gain;
    };
    const auto weights_of = [&](auto kind, uint32_t keep, const TileAt<T>& tile) {
      using Kind = decltype(kind);
      T sums[2][TERM_COUNT] = {}, w_sums[2] = {};
#pragma unroll 1
      for (int q = 0; q < 16; ++q) {
        const int j = 8 * (q / 2) + 2 * lane.t + q % 2;
        const Side<T> side_j(tile.cols, j);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Side<T> side_i(M::row_scalars(), lane.row + 8 * r);
          T& element = scratch.at(q / 2, 2 * r + q % 2);
          const bool counts = keep >> (4 * (q / 2) + 2 * r + q % 2) & 1;
          const Pair<T> x = pair<Kind>(similarity(element, side_i, side_j), counts, n);
          T w = 0;
          if (has(a, ROWS_ANCHOR)) {
            const Pieces<T> y = pieces<Kind>(x, side_i.shift, side_i.offset, need_df, need_dtau, n);
            add_terms(sums[r], y, x.t, side_i.center, side_i.level);
            w += weigh(y, x.t, side_i);
          }
          if (has(a, COLS_ANCHOR)) {
            const Pieces<T> y = pieces<Kind>(x, side_j.shift, side_j.offset, need_df, need_dtau, n);
            w += weigh(y, x.t, side_j);
          }
          if (!counts) w = 0;  // 0·∞ where a gain or a level is infinite
          w_sums[r] += w;
          element = w * side_j.scale;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        add(total(r, TERM_COUNT), lost(r, TERM_COUNT), w_sums[r]);
#pragma unroll
        for (int k = 0; k < TERM_COUNT; ++k) add(total(r, k), lost(r, k), sums[r][k]);
      }
    };

    const T no_shift = a.form == FIXED ? n.middle : T(0);
    walk<E, CHUNKS, ALL_SCALARS>(a, ring, block, no_shift, 1 / unit_of<T>(a), [&](T(&s)[8][4], const TileAt<T>& tile) {
      const uint32_t keep = tile.masked ? counted(a, block, tile.tile) : ~0u;
      scratch.put(s);
      with_kind<T>(a.kind, [&](auto kind) { weights_of(kind, keep, tile); });
      if (a.gradient == NO_GRADIENT) return;
      if constexpr (CHUNKS) {
        scratch.get(s);
        write_weights<E>(a, tile.tile, s);
      } else if constexpr (E::TENSOR_CORES) {
        scratch.get(s);
        E::gradient(acc, s, tile.features);
      } else {
        device::sync_warp();  // the weights of a row are in four lanes
        E::gradient(acc, scratch.x, tile.features);
      }
    });
    if constexpr (!CHUNKS) {
      if (a.gradient == PRODUCT) write_gradient<E>(a, block, acc);
    }
    const T unit = unit_of<T>(a);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Place place = row_place(a, block, lane.row + 8 * r);
      const bool writes = place.keep && lane.t == 0;
      const T w = row_sum(total(r, TERM_COUNT)) * unit;
      if (writes && a.w_sums) static_cast<T*>(a.w_sums)[device::block_y() * a.n + place.row] = w;
#pragma unroll
      for (int k = 0; k < TERM_COUNT; ++k) {
        const T sum = row_sum(total(r, k));
        if (writes && a.row_of_term[k] >= 0 && has(a, ROWS_ANCHOR))
          slot<T>(a, a.sums, device::block_y(), 0)[a.row_of_term[k] * a.anchors + place.row] = sum;
      }
    }
  }
};

}  // namespace alphacl
