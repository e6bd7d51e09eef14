// The two sweeps. Fast kernels serve the constant form of kinds whose log f is affine in t or a
// square, with one exponential a pair, all in registers; general kernels serve every kind, form and
// term, pair by pair from shared memory.
#pragma once

#include <type_traits>

#include "walk.h"

namespace alphacl {

// A slice of a workspace (slices, [shift,] terms, anchors).
template <class T> DEVICE T* slice(const Sweep& a, int64_t number, int shifts) {
  return static_cast<T*>(a.sums) + number * (shifts + a.terms) * a.anchors;
}

template <class T> DEVICE T unit_of(const Sweep& a) {
  const T unit = a.unit ? *static_cast<const T*>(a.unit) : T(1);
  return unit > 0 ? unit : T(1);
}

DEVICE bool wants(const Sweep& a, Term term) { return a.row_of_term[term] >= 0; }

// Whether a tile serves its columns too. Tile 0 of a triangle holds the rows themselves.
DEVICE bool serves_columns(const Sweep& a, int position) { return !(a.triangle && position == 0); }

// Whether a tile is masked, or log f affine, as types: each is compiled without branches.
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

// exp(log f − constant_shift) by one exponential, of log f = (t − c)/τ or −max(c − t, 0)²/τ.
struct FastExponential {
  bool affine;
  float c, slope, constant;
  DEVICE FastExponential(const Sweep& a) {
    const float inv_tau = 1 / *static_cast<const float*>(a.tau);
    affine = a.kind != POWER;
    slope = (affine ? inv_tau : -inv_tau) * LOG2_E;
    constant = -float(a.constant_shift) * LOG2_E;
    c = a.kind == EXP ? 0.0f : float(a.params[0]);
  }
  template <bool AFFINE> DEVICE float operator()(float t) const {
    if constexpr (AFFINE) return device::exp2_approx((t - c) * slope + constant);
    const float d = positive(c - t);
    return device::exp2_approx(d * d * slope + constant);
  }
};
// Called on the host, where nvcc turns a device function into one that ends the process.
inline bool is_fast(const Sweep& a) { return a.kind == EXP || a.kind == GIBBS || (a.kind == POWER && a.params[1] == 2); }

// A thread's two rows as the fast kernels want them: their scales and the second scalars.
struct FastRows {
  float scale[2], second[2];
  DEVICE FastRows(const float* scalars, const Fragment& fragment) {
#pragma unroll
    for (int r = 0; r < Fragment::ROWS; ++r)
      scale[r] = scalars[fragment.row(r)], second[r] = scalars[SECOND * SIDE + fragment.row(r)];
  }
};

// --- sweep 1 -------------------------------------------------------------------------------------

template <class E, bool CHUNKS, bool SYMMETRIC> struct FastRowSums {
  using Args = Sweep;
  using M = Memory<E, CHUNKS, FAST_SCALARS>;
  static constexpr int THREADS = alphacl::THREADS, BLOCKS = 2;
  static constexpr int SHARED = M::REST + (SYMMETRIC ? WARPS * 2 * SIDE * int(sizeof(float)) : 0);

  static DEVICE void body(const Sweep& a) {
    const Fragment fragment;
    const int64_t block = device::block_x();
    const Schedule schedule(a, block, device::block_y());
    const FastExponential exponential(a);
    const bool moment = wants(a, F_MOMENT);
    float total[2][2] = {}, comp[2][2] = {};  // of each row: Σf, Σf·(t − moment_origin)

    const auto tile_sums = [&](auto affine, auto masked, float(&s)[8][4], const TileAt<float>& tile) {
      const Meeting meet = masked.value ? Meeting::of(a, block, tile.tile) : Meeting{};
      const FastRows rows(M::row_scalars(), fragment);
      float sums[2][2] = {}, column[2][Fragment::COLUMNS];
#pragma unroll
      for (int q = 0; q < Fragment::COLUMNS; ++q) {
        const int j = fragment.column(q);
        const float scale_j = tile.cols[j], origin_j = SYMMETRIC ? tile.cols[SECOND * SIDE + j] : 0.0f;
        float f[2], moment_j[2];
#pragma unroll
        for (int r = 0; r < Fragment::ROWS; ++r) {
          const bool counts = !masked.value || meet(r, q);
          const float t = counts ? Fragment::at(s, r, q) * (rows.scale[r] * scale_j) : 0.0f;
          f[r] = counts ? exponential.template operator()<affine.value>(t) : 0.0f;
          sums[r][0] += f[r];
          if (moment) sums[r][1] += f[r] * (t - rows.second[r]);
          if (SYMMETRIC) moment_j[r] = f[r] * (t - origin_j);
        }
        if (SYMMETRIC) column[0][q] = f[0] + f[1], column[1][q] = moment_j[0] + moment_j[1];
      }
#pragma unroll
      for (int r = 0; r < Fragment::ROWS; ++r) {
        add(total[r][0], comp[r][0], sums[r][0]);
        if (moment) add(total[r][1], comp[r][1], sums[r][1]);
      }
      if constexpr (SYMMETRIC) write_columns(a, tile, fragment, moment, column);
    };
    walk<E, CHUNKS, FAST_SCALARS>(a, schedule, block, 0.0f, 1.0f, [&](float(&s)[8][4], const TileAt<float>& tile) {
      with_choices(exponential.affine, tile.masked, [&](auto affine, auto masked) { tile_sums(affine, masked, s, tile); });
    });
    float* out = slice<float>(a, device::block_y(), 0);
#pragma unroll
    for (int r = 0; r < Fragment::ROWS; ++r) {
      const Place place = row_place(a, block, fragment.row(r));
      const float f = row_sum(total[r][0]), f_moment = row_sum(total[r][1]);
      if (place.keep && fragment.quad == 0) {
        out[a.row_of_term[F] * a.anchors + place.row] = f;
        if (moment) out[a.row_of_term[F_MOMENT] * a.anchors + place.row] = f_moment;
      }
    }
  }

  // Adds a tile's column sums up over the warps and writes them to the slice of their ring
  // distance.
  static DEVICE void write_columns(
      const Sweep& a, const TileAt<float>& tile, const Fragment& fragment, bool moment, float (&column)[2][Fragment::COLUMNS]) {
    auto* spread = reinterpret_cast<float*>(M::rest());  // (warps, 2, columns)
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (k == 0 || moment) {
        column_sums(column[k]);
        float* to = spread + (2 * fragment.warp + k) * SIDE + 8 * fragment.group + 2 * fragment.quad;
        to[0] = column[k][0], to[1] = column[k][1];
      }
    device::sync();
    const int j = device::thread() % SIDE, k = device::thread() / SIDE;
    const Place place = column_place(a, tile.tile, j);
    if (place.keep && serves_columns(a, tile.position) && (k == 0 || moment)) {
      float sum = 0;
      for (int w = 0; w < WARPS; ++w) sum += spread[(2 * w + k) * SIDE + j];
      const int row = a.row_of_term[k == 0 ? F : F_MOMENT];
      slice<float>(a, a.column_slice + tile.position, 0)[row * a.anchors + place.row] = sum;
    }
  }
};

// Called on the host. Only the general kernels know ids and limits.
inline bool all_meet(const Sweep& a) { return !a.ids && !a.largest_t; }

// The row scalars of one side of a pair.
template <class T> struct Side {
  T scale, bias, moment_origin, row_weight, shift, argument_offset, baseline, largest_t;
  DEVICE Side(const T* v, int i)
      : scale(v[SCALE * SIDE + i]), bias(v[BIAS * SIDE + i]), moment_origin(v[MOMENT_ORIGIN * SIDE + i]),
        row_weight(v[ROW_WEIGHT * SIDE + i]), shift(v[SHIFT * SIDE + i]), argument_offset(v[ARGUMENT_OFFSET * SIDE + i]),
        baseline(v[BASELINE * SIDE + i]), largest_t(v[LARGEST_T * SIDE + i]) {}
  // Whether a pair is not too similar to count for this side; NaN counts.
  DEVICE bool takes(T t) const { return !(t > largest_t); }
};

// t_ij, and the similarity that limits are compared with, which has no log-weights.
template <class T> struct Similarity {
  T t, compared;
};
// Row scalars are combined first: t_ij and t_ji must agree to the last bit.
template <class T> DEVICE Similarity<T> similarity(T product, const Side<T>& i, const Side<T>& j, bool weighted) {
  const T unbiased = product * (i.scale * j.scale), t = unbiased + (i.bias + j.bias);
  return {t, weighted ? unbiased : t};
}

template <class T> struct Pair {
  // The t that moments use: τ·log f for the exp kind, because where |t|/τ is large both must have
  // been rounded together.
  T t, log_f;
  bool counts;
  // for one side alone
  DEVICE Pair of(bool taken) const { return {t, log_f, counts && taken}; }
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

// f, ∂f/∂x and ∂f/∂τ of a pair with one side's row scalars.
template <class T> struct Values {
  T f, df, dtau;
};
template <class Kind, class T>
DEVICE Values<T> values(const Pair<T>& x, T shift, T argument_offset, bool need_df, bool need_dtau, const Numbers<T>& n) {
  Values<T> y{0, 0, 0};
  if (!x.counts) return y;
  if constexpr (Kind::LOG) {
    y.f = exponential(x.log_f - shift);
    if (need_df) y.df = y.f * Kind::df(x.t, n);
    if (need_dtau) y.dtau = y.f * Kind::dtau(x.t, n);
  } else {
    const T argument = (x.t - shift) + argument_offset;
    y.f = Kind::f(argument, n);
    if (need_df) y.df = Kind::df(argument, n);
    if (need_dtau) y.dtau = Kind::dtau(argument, n);
  }
  return y;
}
template <class T> DEVICE void add_terms(T (&sums)[SUM_COUNT], const Values<T>& y, T t, const Side<T>& side) {
  const T moment = t - side.moment_origin;
  sums[F] += y.f;
  sums[DF] += y.df;
  sums[F_MOMENT] += y.f * moment;
  sums[DF_MOMENT] += y.df * moment;
  sums[DTAU] += y.dtau * (moment - side.baseline);
}

// Kahan sums of a thread's two rows, in words of shared memory that it alone uses: a tile leaves no
// registers for them.
template <class T, int COUNT> struct Totals {
  static constexpr int BYTES = 4 * COUNT * THREADS * int(sizeof(T));
  T* x;
  DEVICE explicit Totals(int offset) : x(reinterpret_cast<T*>(device::shared() + offset) + device::thread()) {
    for (int k = 0; k < 4 * COUNT; ++k) x[k * THREADS] = 0;
  }
  DEVICE T& total(int r, int k) const { return x[(r * COUNT + k) * THREADS]; }
  DEVICE T& comp(int r, int k) const { return x[((2 + r) * COUNT + k) * THREADS]; }
  DEVICE void add(int r, int k, T value) const { alphacl::add(total(r, k), comp(r, k), value); }
  DEVICE void scale(int r, T factor) const {
    for (int k = 0; k < COUNT; ++k) total(r, k) *= factor, comp(r, k) *= factor;
  }
};

template <class E, bool CHUNKS> struct RowSums {
  using Args = Sweep;
  using T = typename E::T;
  using M = Memory<E, CHUNKS, ALL_SCALARS>;
  static constexpr int THREADS = alphacl::THREADS, BLOCKS = 1;
  static constexpr int SPREAD = M::REST + SharedTile<T>::BYTES;  // (warps, terms + 1, columns)
  static constexpr int TOTALS_AT = SPREAD + WARPS * (SUM_COUNT + 1) * SIDE * int(sizeof(T));
  static constexpr int SHARED = TOTALS_AT + Totals<T, SUM_COUNT>::BYTES;

  static DEVICE T& spread(int warp, int k, int j) {
    return reinterpret_cast<T*>(device::shared() + SPREAD)[(warp * (SUM_COUNT + 1) + k) * SIDE + j];
  }

  static DEVICE void body(const Sweep& a) {
    const Fragment fragment;
    const int64_t block = device::block_x();
    const Schedule schedule(a, block, device::block_y());
    const Numbers<T> n(a);
    const SharedTile<T> products{reinterpret_cast<T*>(M::rest())};
    const bool need_df = wants(a, DF) || wants(a, DF_MOMENT), need_dtau = wants(a, DTAU);
    const int shifts = a.form == Form::ONLINE || a.form == Form::T_MAX;
    T shift[2] = {-INFINITE<T>, -INFINITE<T>};  // largest log f (online), or largest t
    const Totals<T, SUM_COUNT> totals(TOTALS_AT);

    const auto row_scalars = [&](int r) { return Side<T>(M::row_scalars(), fragment.row(r)); };
    const auto similarity_of = [&](int r, int q, const Side<T>& i, const Side<T>& j) {
      return similarity(products.at(r, q), i, j, a.weighted);
    };

    const auto maxima = [&](const Meeting& meet, const T* cols) {
      T largest[2] = {-INFINITE<T>, -INFINITE<T>};
#pragma unroll 1
      for (int q = 0; q < Fragment::COLUMNS; ++q) {
        const int j = fragment.column(q);
        const Side<T> side_j(cols, j);
        T column = -INFINITE<T>;
#pragma unroll
        for (int r = 0; r < Fragment::ROWS; ++r) {
          const Side<T> side_i = row_scalars(r);
          if (!meet(r, q)) continue;
          const auto [t, compared] = similarity_of(r, q, side_i, side_j);
          if (side_i.takes(compared)) largest[r] = larger(largest[r], t);
          if (side_j.takes(compared)) column = larger(column, t);
        }
        if (a.symmetric) {
          column = column_max(column);
          if (fragment.group == 0) spread(fragment.warp, 0, j) = column;
        }
      }
#pragma unroll
      for (int r = 0; r < Fragment::ROWS; ++r) shift[r] = larger(shift[r], row_max(largest[r]));
    };

    // Online softmax: makes the sums so far relative to the largest log f of the rows with this
    // tile.
    const auto rescale = [&](auto kind, const Meeting& meet, const T* cols, T(&finite)[2]) {
      T largest[2] = {-INFINITE<T>, -INFINITE<T>};
#pragma unroll 1
      for (int q = 0; q < Fragment::COLUMNS; ++q) {
        const Side<T> side_j(cols, fragment.column(q));
#pragma unroll
        for (int r = 0; r < Fragment::ROWS; ++r) {
          const Side<T> side_i = row_scalars(r);
          const auto [t, compared] = similarity_of(r, q, side_i, side_j);
          largest[r] = larger(largest[r], pair<decltype(kind)>(t, meet(r, q) && side_i.takes(compared), n).log_f);
        }
      }
#pragma unroll
      for (int r = 0; r < Fragment::ROWS; ++r) {
        const T after = larger(shift[r], row_max(largest[r]));
        finite[r] = after > -INFINITE<T> ? after : T(0);  // no pair of the row counted yet
        totals.scale(r, exponential(shift[r] - finite[r]));
        shift[r] = after;
      }
    };

    const auto sums_of = [&](auto kind, const Meeting& meet, const T* cols) {
      using Kind = decltype(kind);
      T subtracted[2] = {row_scalars(0).shift, row_scalars(1).shift};  // from log f, or from t
      if constexpr (Kind::LOG) {
        if (a.form == Form::ONLINE) rescale(kind, meet, cols, subtracted);
      }
      T sums[2][SUM_COUNT] = {};
#pragma unroll 1
      for (int q = 0; q < Fragment::COLUMNS; ++q) {
        const int j = fragment.column(q);
        const Side<T> side_j(cols, j);
        T column[SUM_COUNT] = {};
#pragma unroll
        for (int r = 0; r < Fragment::ROWS; ++r) {
          const Side<T> side_i = row_scalars(r);
          const auto [t, compared] = similarity_of(r, q, side_i, side_j);
          const Pair<T> x = pair<Kind>(t, meet(r, q), n), x_i = x.of(side_i.takes(compared));
          add_terms(sums[r], values<Kind>(x_i, subtracted[r], side_i.argument_offset, need_df, need_dtau, n), x.t, side_i);
          if (a.symmetric) {
            const Pair<T> x_j = x.of(side_j.takes(compared));
            add_terms(column, values<Kind>(x_j, side_j.shift, side_j.argument_offset, need_df, need_dtau, n), x.t, side_j);
          }
        }
        if (a.symmetric) {
#pragma unroll
          for (int k = 0; k < SUM_COUNT; ++k)
            if (a.row_of_term[k] >= 0) {
              const T sum = column_sum(column[k]);
              if (fragment.group == 0) spread(fragment.warp, k, j) = sum;
            }
        }
      }
#pragma unroll
      for (int r = 0; r < Fragment::ROWS; ++r)
#pragma unroll
        for (int k = 0; k < SUM_COUNT; ++k) totals.add(r, k, sums[r][k]);
    };

    const T no_shift = T(a.form == Form::CONSTANT ? a.constant_shift : 0);
    walk<E, CHUNKS, ALL_SCALARS>(a, schedule, block, no_shift, T(1), [&](const T(&s)[8][4], const TileAt<T>& tile) {
      const Meeting meet = Meeting::of(a, block, tile.tile, tile.masked);
      products.put(s);  // each lane reads its own elements only
      if (a.form == Form::T_MAX) maxima(meet, tile.cols);
      else with_kind<T>(a.kind, [&](auto kind) { sums_of(kind, meet, tile.cols); });
      if (a.symmetric) write_columns(a, tile, shifts);
    });

    T* out = slice<T>(a, device::block_y(), shifts);
#pragma unroll
    for (int r = 0; r < Fragment::ROWS; ++r) {
      const Place place = row_place(a, block, fragment.row(r));
      const bool writes = place.keep && fragment.quad == 0;
      if (shifts && writes) out[place.row] = shift[r];
#pragma unroll
      for (int k = 0; k < SUM_COUNT; ++k) {
        const T sum = row_sum(totals.total(r, k));
        if (writes && a.row_of_term[k] >= 0) out[(shifts + a.row_of_term[k]) * a.anchors + place.row] = sum;
      }
    }
  }

  // Adds a tile's column results up over the warps and writes them to the slice of their ring
  // distance.
  static DEVICE void write_columns(const Sweep& a, const TileAt<T>& tile, int shifts) {
    device::sync();
    const int j = device::thread();
    if (j >= SIDE) return;
    const Place place = column_place(a, tile.tile, j);
    if (!place.keep || !serves_columns(a, tile.position)) return;
    T* out = slice<T>(a, a.column_slice + tile.position, shifts);
    if (a.form == Form::T_MAX) {
      T largest = spread(0, 0, j);
      for (int w = 1; w < WARPS; ++w) largest = larger(largest, spread(w, 0, j));
      out[place.row] = largest;
    }
    for (int k = 0; k < SUM_COUNT; ++k)
      if (a.row_of_term[k] >= 0) {
        T sum = 0;
        for (int w = 0; w < WARPS; ++w) sum += spread(w, k, j);
        out[a.row_of_term[k] * a.anchors + place.row] = sum;
      }
  }
};

// --- sweep 2 -------------------------------------------------------------------------------------

template <class T> struct alignas(2 * sizeof(T)) Neighbours {
  T x[2];
};

// Writes a block's weights w (already times the columns' scales) for a cuBLAS product. The columns
// are in the order of the tiles, with those that do not exist, whose weight is 0: so two neighbours
// are one aligned store.
template <class E> DEVICE void write_weights(const Sweep& a, int64_t tile, typename E::T (&w)[8][4]) {
  using Stored = std::conditional_t<E::IS_BF16, uint16_t, typename E::T>;
  const Fragment fragment;
  const int64_t columns = a.weight_columns, half = a.cols_paired ? SIDE / 2 : SIDE;
  auto* to = static_cast<Stored*>(a.weights) + int64_t(device::block_x()) * SIDE * columns + tile * half;
#pragma unroll
  for (int r = 0; r < Fragment::ROWS; ++r)
#pragma unroll
    for (int q = 0; q < Fragment::COLUMNS; q += 2) {
      const int j = fragment.column(q);
      const int64_t at = fragment.row(r) * columns + (j < half ? j : columns / 2 + j - half);
      const auto first = Fragment::at(w, r, q), second = Fragment::at(w, r, q + 1);
      if constexpr (E::IS_BF16) {
        *reinterpret_cast<uint32_t*>(to + at) = device::pack_bf16(first, second);
      } else {
        Neighbours<Stored> both{{first, second}};
        if constexpr (E::TENSOR_CORES)
          for (auto& x : both.x) x = device::from_bits(rounded_to_tf32(x));
        *reinterpret_cast<Neighbours<Stored>*>(to + at) = both;
      }
    }
}

// Writes acc·unit, rows of the gradient, to `df`.
template <class E> DEVICE void write_gradient(const Sweep& a, int64_t block, const typename E::T (&acc)[E::K / 8][4]) {
  using T = typename E::T;
  const Fragment fragment;
  const T unit = unit_of<T>(a);
#pragma unroll
  for (int r = 0; r < Fragment::ROWS; ++r) {
    const Place place = row_place(a, block, fragment.row(r));
    if (!place.keep) continue;
    T* row = static_cast<T*>(a.df) + (device::block_y() * a.n_out + place.row - a.lo) * a.dim;
#pragma unroll
    for (int q = 0; q < E::K / 4; ++q) {
      const int feature = fragment.column(q);
      if (feature < a.dim) row[feature] = acc[q / 2][2 * r + q % 2] * unit;
    }
  }
}

template <class E, bool CHUNKS> struct FastPairGrad {
  using Args = Sweep;
  using M = Memory<E, CHUNKS, FAST_SCALARS>;
  static constexpr int THREADS = alphacl::THREADS, BLOCKS = E::K <= 128 ? 2 : 1, SHARED = M::REST;

  static DEVICE void body(const Sweep& a) {
    const Fragment fragment;
    const int64_t block = int64_t(device::block_x()) + a.first_block;
    const Schedule schedule(a, block, device::block_y());
    const FastExponential exponential(a);
    float acc[CHUNKS ? 1 : E::K / 8][4] = {};

    // Turns products into weights times the columns' scales.
    const auto weigh = [&](auto affine, auto masked, float(&s)[8][4], const TileAt<float>& tile) {
      const Meeting meet = masked.value ? Meeting::of(a, block, tile.tile) : Meeting{};
      const FastRows rows(M::row_scalars(), fragment);
#pragma unroll
      for (int q = 0; q < Fragment::COLUMNS; ++q) {
        const int j = fragment.column(q);
        const float scale_j = tile.cols[j], weight_j = tile.cols[SECOND * SIDE + j];
#pragma unroll
        for (int r = 0; r < Fragment::ROWS; ++r) {
          const bool counts = !masked.value || meet(r, q);
          float& x = Fragment::at(s, r, q);
          const float t = counts ? x * (rows.scale[r] * scale_j) : 0.0f;
          x = counts ? exponential.template operator()<affine.value>(t) * (rows.second[r] + weight_j) : 0.0f;
          x *= scale_j;
        }
      }
    };
    walk<E, CHUNKS, FAST_SCALARS>(a, schedule, block, 0.0f, 1 / unit_of<float>(a), [&](float(&s)[8][4], const TileAt<float>& tile) {
      with_choices(exponential.affine, tile.masked, [&](auto affine, auto masked) { weigh(affine, masked, s, tile); });
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
  // the totals' last: Σ_j (g_ij + g_ji)
  static constexpr int THREADS = alphacl::THREADS, BLOCKS = 1, OF_WEIGHTS = SUM_COUNT;
  static constexpr int TOTALS_AT = M::REST + SharedTile<T>::BYTES;
  static constexpr int SHARED = TOTALS_AT + Totals<T, SUM_COUNT + 1>::BYTES;

  static DEVICE void body(const Sweep& a) {
    const Fragment fragment;
    const int64_t block = int64_t(device::block_x()) + a.first_block;
    const Schedule schedule(a, block, device::block_y());
    const Numbers<T> n(a);
    const SharedTile<T> elements{reinterpret_cast<T*>(M::rest())};  // products, then weights
    const bool need_dtau = wants(a, DTAU);
    const bool need_df = a.weight != WEIGHT_F || wants(a, DF) || wants(a, DF_MOMENT);
    T acc[CHUNKS ? 1 : E::K / 8][4] = {};
    const Totals<T, SUM_COUNT + 1> totals(TOTALS_AT);

    const auto weigh = [&](const Values<T>& y, T t, const Side<T>& side) {
      const T g = a.weight == WEIGHT_F    ? y.f
                  : a.weight == WEIGHT_DF ? y.df
                                          : y.f + y.df * ((t - side.moment_origin) - side.baseline);
      return g * side.row_weight;
    };
    const auto weights_of = [&](auto kind, const Meeting& meet, const TileAt<T>& tile) {
      using Kind = decltype(kind);
      T sums[2][SUM_COUNT] = {}, weight_sums[2] = {};
#pragma unroll 1
      for (int q = 0; q < Fragment::COLUMNS; ++q) {
        const Side<T> side_j(tile.cols, fragment.column(q));
#pragma unroll
        for (int r = 0; r < Fragment::ROWS; ++r) {
          const Side<T> side_i(M::row_scalars(), fragment.row(r));
          T& element = elements.at(r, q);
          const auto [t, compared] = similarity(element, side_i, side_j, a.weighted);
          const Pair<T> x = pair<Kind>(t, meet(r, q), n);
          T w = 0;
          if (a.rows_anchor && side_i.takes(compared)) {
            const Values<T> y = values<Kind>(x, side_i.shift, side_i.argument_offset, need_df, need_dtau, n);
            add_terms(sums[r], y, x.t, side_i);
            w += weigh(y, x.t, side_i);
          }
          if (a.cols_anchor && side_j.takes(compared)) {
            const Values<T> y = values<Kind>(x, side_j.shift, side_j.argument_offset, need_df, need_dtau, n);
            w += weigh(y, x.t, side_j);
          }
          if (!x.counts) w = 0;  // 0·∞ where a row weight or a baseline is infinite
          weight_sums[r] += w;
          element = w * side_j.scale;
        }
      }
#pragma unroll
      for (int r = 0; r < Fragment::ROWS; ++r) {
        totals.add(r, OF_WEIGHTS, weight_sums[r]);
#pragma unroll
        for (int k = 0; k < SUM_COUNT; ++k) totals.add(r, k, sums[r][k]);
      }
    };

    const T no_shift = a.form == Form::CONSTANT ? T(a.constant_shift) : T(0);
    walk<E, CHUNKS, ALL_SCALARS>(a, schedule, block, no_shift, 1 / unit_of<T>(a), [&](T(&s)[8][4], const TileAt<T>& tile) {
      const Meeting meet = Meeting::of(a, block, tile.tile, tile.masked);
      elements.put(s);
      with_kind<T>(a.kind, [&](auto kind) { weights_of(kind, meet, tile); });
      if (a.gradient == Gradient::NONE) return;
      if constexpr (CHUNKS) {
        elements.get(s);
        write_weights<E>(a, tile.tile, s);
      } else if constexpr (E::TENSOR_CORES) {
        elements.get(s);
        E::gradient(acc, s, tile.features);
      } else {
        device::sync_warp();  // the weights of a row are in four lanes
        E::gradient(acc, elements.x, tile.features);
      }
    });
    if constexpr (!CHUNKS) {
      if (a.gradient == Gradient::PRODUCT) write_gradient<E>(a, block, acc);
    }
    const T unit = unit_of<T>(a);
#pragma unroll
    for (int r = 0; r < Fragment::ROWS; ++r) {
      const Place place = row_place(a, block, fragment.row(r));
      const bool writes = place.keep && fragment.quad == 0;
      const T weights = row_sum(totals.total(r, OF_WEIGHTS)) * unit;
      if (writes && a.weight_sums) static_cast<T*>(a.weight_sums)[device::block_y() * a.n + place.row] = weights;
#pragma unroll
      for (int k = 0; k < SUM_COUNT; ++k) {
        const T sum = row_sum(totals.total(r, k));
        if (writes && a.row_of_term[k] >= 0 && a.rows_anchor)
          slice<T>(a, device::block_y(), 0)[a.row_of_term[k] * a.anchors + place.row] = sum;
      }
    }
  }
};

}  // namespace alphacl
