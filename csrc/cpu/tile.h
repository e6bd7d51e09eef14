// The work on a panel of similarities: it applies the pair kind, sums over rows and columns, and
// computes the weights of the gradient.
//
// A panel is PANEL_ROWS rows of a tile (I, J), hot in the first-level cache. Rows are anchors of I;
// columns are anchors of J, for which a pair (i, j) is read as (j, i): the similarity is the same,
// the row scalars are not.
#pragma once

#include "pairs.h"

namespace {

constexpr int PANEL_ROWS = 8;
// blocks are padded to it: a multiple of PANEL_ROWS and of every register tile
constexpr int64_t ROW_MULTIPLE = 48;
constexpr int64_t MAX_BLOCK = 240;
// row stride of a tile: rows must not all fall into the same sets of the cache
constexpr int64_t LD = MAX_BLOCK + 32;
constexpr int64_t TILE_SIZE = (MAX_BLOCK + 32) * LD;

ALPHACL_INLINE int64_t padded(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// one side's row vectors, from the panel's first row (column) on
template <class T> struct SideScalars {
  const T *moment_origin, *row_weight, *shift, *argument_offset, *baseline, *online_shift;
  const T *largest_t, *largest_guide;  // or null
};

// Which pairs of a row and a vector of columns count for the row's anchor, and for the columns': a
// bit for each lane.
struct Marks {
  uint16_t of_row, of_cols;
};
template <class T> int64_t mark_bytes(int64_t stride) { return stride * (stride / LANES<T>) * int64_t(sizeof(Marks)); }

template <class T> struct Panel {
  const T* t;  // (PANEL_ROWS, t_stride): similarities in; s, or a kept tile
  int64_t t_stride;
  T* s;  // (PANEL_ROWS, LD): weights out
  T* kept;  // (PANEL_ROWS, kept_stride) of a kept tile, or null
  int64_t kept_stride;
  int64_t rows, cols;
  int excluded;           // diagonals of excluded pairs …
  int64_t diagonals[3];   // … column of the panel's row 0
  const Int<T> *row_ids, *col_ids;  // null without ids
  const bool* clash;                // for each vector of columns: whether a row has the id of one of them
  SideScalars<T> row, col;
  double* row_sums[SUM_COUNT];  // at the panel's first row; null where a term is not wanted
  T* col_sums[SUM_COUNT];       // of this tile
  T* col_max;
  T* row_max;
  bool marked;          // not all pairs count for their anchors; only then there are
  Marks* marks;         // [PANEL_ROWS][marks_stride] those that do
  int64_t marks_stride;
  bool two_sided;   // the columns are anchors of their own
  // … and their terms are summed here (not in a diagonal tile, whose pairs appear twice)
  bool col_terms;
  int weight;
  bool need_f, need_df, need_dtau, terms;
  Numbers<T> numbers;
  ValuesFunction<T> values;  // a user's function, or null
  const double* constants;
  explicit Panel(const Sweep& sweep)
      : numbers(sweep), values(reinterpret_cast<ValuesFunction<T>>(sweep.values)), constants(sweep.constants) {}
};

// Which vectors of columns hold the id of one of the panel's rows. This is determined before the
// loop over the panel, which without ids only tests a flag for each vector of columns.
template <class T> void find_clashes(const Int<T>* rows, const Int<T>* columns, int64_t cols, bool* clash) {
  for (int64_t c = 0; c < cols; c += LANES<T>) {
    const Mask<T> ids = load_mask<T>(columns + c);
    Mask<T> equal{};
    for (int r = 0; r < PANEL_ROWS; r++) equal |= ids == rows[r];
    clash[c / LANES<T>] = any<T>(equal);
  }
}

// Calls op.pair<masked>(r, c, t, mask) for all vectors of the panel, t from rows `stride` apart;
// only vectors that hold an excluded pair or an edge are masked.
template <class T, class Op>
ALPHACL_INLINE void for_pairs(const Panel<T>& p, Op& op, const T* from, int64_t stride) {
  constexpr int L = LANES<T>;
  const Mask<T> lanes = lane_numbers<T>();
  for (int64_t c = 0; c < p.cols; c += L) {
    bool special = p.rows < PANEL_ROWS || c + L > p.cols || (p.row_ids && p.clash[c / L]);
    for (int d = 0; d < p.excluded; d++) special |= p.diagonals[d] < c + L && p.diagonals[d] + PANEL_ROWS > c;
    op.begin(c);
    if (!special) {
#pragma GCC unroll 1
      for (int r = 0; r < PANEL_ROWS; r++) op.template pair<false>(r, c, load(from + r * stride + c), lanes);
    } else {
#pragma GCC unroll 1
      for (int r = 0; r < PANEL_ROWS; r++) {
        using I = Int<T>;
        Mask<T> keep = lanes < I(p.cols - c);
        if (p.row_ids) keep &= load_mask<T>(p.col_ids + c) != p.row_ids[r];
        if (r >= p.rows) keep = Mask<T>{};
        for (int d = 0; d < p.excluded; d++) keep &= lanes != I(r + p.diagonals[d] - c);
        const Vec<T> t = load(from + r * stride + c);
        // an excluded similarity may be infinite, and 0·inf is not 0
        op.template pair<true>(r, c, keep ? t : Vec<T>{}, keep);
      }
    }
    op.end(c);
  }
}

template <class T, class Op> ALPHACL_INLINE void for_pairs(const Panel<T>& p, Op& op) {
  for_pairs<T>(p, op, p.t, p.t_stride);
}

template <class T> ALPHACL_INLINE void add_rows(const Panel<T>& p, int term, const Vec<T>* sums) {
  for (int64_t r = 0; r < p.rows; r++) p.row_sums[term][r] += double(sum_of<T>(sums[r]));
}

template <class T> ALPHACL_INLINE Mask<T> all_lanes() {
  return ~Mask<T>{};
}

// Marks the pairs whose similarity, and that of the guide (PANEL_ROWS, LD), is not above the largest
// one of their anchor. A NaN is not. Every sweep reads the marks: no pair counts in one of them alone.
template <class T> __attribute__((noinline)) void mark_pairs(const Panel<T>& p, const T* guide) {
  constexpr int L = LANES<T>;
  for (int64_t r = 0; r < PANEL_ROWS; r++)
    for (int64_t c = 0; c < p.cols; c += L) {
      Mask<T> above_row{}, above_cols{};
      if (p.row.largest_t) {
        const Vec<T> t = load(p.s + r * LD + c);
        above_row |= t > broadcast<T>(p.row.largest_t[r]), above_cols |= t > load(p.col.largest_t + c);
      }
      if (p.row.largest_guide) {
        const Vec<T> t = load(guide + r * LD + c);
        above_row |= t > broadcast<T>(p.row.largest_guide[r]), above_cols |= t > load(p.col.largest_guide + c);
      }
      p.marks[r * p.marks_stride + c / L] = {bits_of<T>(~above_row), bits_of<T>(~above_cols)};
    }
}

// Which of the pairs to keep count for the anchor of row r, or for the anchors of the columns from c
// on.
template <class T> ALPHACL_INLINE Mask<T> of_row(const Panel<T>& p, int r, int64_t c, Mask<T> keep) {
  return keep & mask_of<T>(p.marks[r * p.marks_stride + c / LANES<T>].of_row);
}
template <class T> ALPHACL_INLINE Mask<T> of_cols(const Panel<T>& p, int r, int64_t c, Mask<T> keep) {
  return keep & mask_of<T>(p.marks[r * p.marks_stride + c / LANES<T>].of_cols);
}

// exp(x), x = log f − constant_shift, with |x| < 87 (float) or 700 (double) or NaN.
template <class T> struct ExactFactors {
  static ALPHACL_INLINE Vec<T> exponential(Vec<T> x) { return vexp_bounded<T>(x); }
};

// Σ exp(log f − constant_shift) and, with Moment, Σ exp(log f − constant_shift)·(t − moment_origin);
// with Kept, each exp(log f − constant_shift) is kept for the gradient
template <class T, class K, class Factors, bool Moment, bool Kept, bool Marked> struct ConstantShiftSums {
  const Panel<T>& p;
  Vec<T> f[PANEL_ROWS] = {}, ft[Moment ? PANEL_ROWS : 1] = {};
  Vec<T> col_f, col_ft, col_origin;
  ALPHACL_INLINE void begin(int64_t c) {
    col_f = load(p.col_sums[F] + c);
    if (Moment) col_ft = load(p.col_sums[F_MOMENT] + c), col_origin = load(p.col.moment_origin + c);
  }
  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> t, Mask<T> keep) {
    Vec<T> e = Factors::exponential(K::f(t, p.numbers) - p.numbers.middle);
    if (Masked) e = keep ? e : Vec<T>{};
    if (Kept) store(p.kept + r * p.kept_stride + c, e);
    Vec<T> of_r = e, of_c = e;
    if (Marked) {
      of_r = of_row<T>(p, r, c, all_lanes<T>()) ? e : Vec<T>{};
      of_c = of_cols<T>(p, r, c, all_lanes<T>()) ? e : Vec<T>{};
    }
    f[r] += of_r;
    col_f += of_c;
    if (Moment) {
      ft[r] += of_r * (t - p.row.moment_origin[r]);
      col_ft += of_c * (t - col_origin);
    }
  }
  ALPHACL_INLINE void end(int64_t c) {
    store(p.col_sums[F] + c, col_f);
    if (Moment) store(p.col_sums[F_MOMENT] + c, col_ft);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    ConstantShiftSums op{p, {}, {}, {}, {}, {}};
    for_pairs<T>(p, op);
    add_rows<T>(p, F, op.f);
    if (Moment) add_rows<T>(p, F_MOMENT, op.ft);
  }
};

// Σ exp(log f − online_shift), with a shift for each row and each column
template <class T, class K> struct OnlineSums {
  const Panel<T>& p;
  Vec<T> f[PANEL_ROWS] = {}, ft[PANEL_ROWS] = {};
  ALPHACL_INLINE void begin(int64_t) {}
  ALPHACL_INLINE void end(int64_t) {}
  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> t, Mask<T> keep) {
    const Vec<T> log_f = rounded<T>(K::f(t, p.numbers));
    Vec<T> e = vexp<T>(log_f - p.row.online_shift[r]);
    if (Masked) e = keep ? e : Vec<T>{};
    if (p.marked) e = of_row<T>(p, r, c, all_lanes<T>()) ? e : Vec<T>{};
    f[r] += e;
    if (p.terms) ft[r] += e * (t - p.row.moment_origin[r]);
    if (!p.two_sided) return;
    e = vexp<T>(log_f - load(p.col.online_shift + c));
    if (Masked) e = keep ? e : Vec<T>{};
    if (p.marked) e = of_cols<T>(p, r, c, all_lanes<T>()) ? e : Vec<T>{};
    store(p.col_sums[F] + c, load(p.col_sums[F] + c) + e);
    if (p.terms) store(p.col_sums[F_MOMENT] + c, load(p.col_sums[F_MOMENT] + c) + e * (t - load(p.col.moment_origin + c)));
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    OnlineSums op{p};
    for_pairs<T>(p, op);
    add_rows<T>(p, F, op.f);
    if (p.terms) add_rows<T>(p, F_MOMENT, op.ft);
  }
};

// max t of every row and column
template <class T> struct Maximum {
  const Panel<T>& p;
  Vec<T> best[PANEL_ROWS];
  Vec<T> col_best;
  ALPHACL_INLINE void begin(int64_t c) { col_best = load(p.col_max + c); }
  ALPHACL_INLINE void end(int64_t c) { store(p.col_max + c, col_best); }
  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> t, Mask<T> keep) {
    const Vec<T> none = broadcast<T>(-__builtin_inf());
    if (Masked) t = keep ? t : none;
    Vec<T> of_r = t, of_c = t;
    if (p.marked) {
      of_r = of_row<T>(p, r, c, all_lanes<T>()) ? t : none;
      if (p.two_sided) of_c = of_cols<T>(p, r, c, all_lanes<T>()) ? t : none;
    }
    best[r] = largest<T>(of_r, best[r]);
    col_best = largest<T>(of_c, col_best);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    Maximum op{p, {}, {}};
    for (auto& b : op.best) b = broadcast<T>(-__builtin_inf());
    for_pairs<T>(p, op);
    for (int64_t r = 0; r < p.rows; r++) p.row_max[r] = max_of<T>(op.best[r]);
  }
};

// The same with F, the number of the pairs that count, F_MOMENT, Σ (t − moment_origin), and
// DF_MOMENT, Σ (t − moment_origin)².
template <class T> struct MaximumAndMoments {
  const Panel<T>& p;
  Maximum<T> largest;
  Vec<T> count[PANEL_ROWS] = {}, first[PANEL_ROWS] = {}, second[PANEL_ROWS] = {};
  ALPHACL_INLINE void begin(int64_t c) { largest.begin(c); }
  ALPHACL_INLINE void end(int64_t c) { largest.end(c); }
  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> t, Mask<T> keep) {
    largest.template pair<Masked>(r, c, t, keep);
    if (!Masked) keep = all_lanes<T>();
    const Mask<T> of_r = p.marked ? of_row<T>(p, r, c, keep) : keep;
    const Vec<T> gap = of_r ? t - p.row.moment_origin[r] : Vec<T>{};
    count[r] += one_where<T>(of_r), first[r] += gap, second[r] += gap * gap;
    if (!p.two_sided) return;
    const Mask<T> of_c = p.marked ? of_cols<T>(p, r, c, keep) : keep;
    const Vec<T> col_gap = of_c ? t - load(p.col.moment_origin + c) : Vec<T>{};
    store(p.col_sums[F] + c, load(p.col_sums[F] + c) + one_where<T>(of_c));
    store(p.col_sums[F_MOMENT] + c, load(p.col_sums[F_MOMENT] + c) + col_gap);
    store(p.col_sums[DF_MOMENT] + c, load(p.col_sums[DF_MOMENT] + c) + col_gap * col_gap);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    MaximumAndMoments op{p, {p, {}, {}}};
    for (auto& b : op.largest.best) b = broadcast<T>(-__builtin_inf());
    for_pairs<T>(p, op);
    for (int64_t r = 0; r < p.rows; r++) p.row_max[r] = max_of<T>(op.largest.best[r]);
    add_rows<T>(p, F, op.count), add_rows<T>(p, F_MOMENT, op.first), add_rows<T>(p, DF_MOMENT, op.second);
  }
};

// Value and derivatives of a pair for one anchor's scalars; those not wanted are left undefined.
template <class T> struct PairValues {
  Vec<T> f, df, dtau;
};
template <class T, class K, bool Masked>
ALPHACL_INLINE PairValues<T> pair_values(const Panel<T>& p, Vec<T> t, Vec<T> log_f, Vec<T> shift, Vec<T> offset, Mask<T> keep) {
  const Vec<T> zero{};
  PairValues<T> y{};
  if constexpr (K::log) {
    y.f = vexp<T>(log_f - shift);
    if (Masked) y.f = keep ? y.f : zero;
    if (p.need_df) y.df = y.f * K::df(t, p.numbers);
    if (p.need_dtau) y.dtau = y.f * K::dtau(t, p.numbers);
  } else {
    const Vec<T> x = (t - shift) + offset;
    if (p.need_f) y.f = K::f(x, p.numbers);
    if (p.need_df) y.df = K::df(x, p.numbers);
    if (p.need_dtau) y.dtau = K::dtau(x, p.numbers);
    if (Masked) y.f = keep ? y.f : zero, y.df = keep ? y.df : zero, y.dtau = keep ? y.dtau : zero;
  }
  return y;
}

// The terms of `row_sums` and, with Gradient, the weights g_ij + g_ji: any kind, any terms.
template <class T, class K, bool Gradient> struct General {
  const Panel<T>& p;
  Vec<T> sums[SUM_COUNT][PANEL_ROWS] = {};
  ALPHACL_INLINE void begin(int64_t) {}
  ALPHACL_INLINE void end(int64_t) {}

  ALPHACL_INLINE Vec<T> term(int k, const PairValues<T>& y, Vec<T> u, Vec<T> baseline) const {
    switch (k) {
      case F: return y.f;
      case DF: return y.df;
      case F_MOMENT: return y.f * u;
      case DF_MOMENT: return y.df * u;
      default: return y.dtau * (u - baseline);
    }
  }
  ALPHACL_INLINE Vec<T> weight(const PairValues<T>& y, Vec<T> u, Vec<T> baseline) const {
    if (p.weight == WEIGHT_F) return y.f;
    if (p.weight == WEIGHT_DF) return y.df;
    return y.f + y.df * (u - baseline);
  }

  ALPHACL_INLINE PairValues<T> values(Vec<T> t, Vec<T> log_f, Vec<T> shift, Vec<T> offset, Mask<T> keep, bool masked) const {
    return masked ? pair_values<T, K, true>(p, t, log_f, shift, offset, keep)
                  : pair_values<T, K, false>(p, t, log_f, shift, offset, keep);
  }

  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> t, Mask<T> keep) {
    Mask<T> row_keep = keep, col_keep = keep;
    if (p.marked) {
      if (!Masked) keep = all_lanes<T>();
      row_keep = of_row<T>(p, r, c, keep);
      if (p.two_sided) col_keep = of_cols<T>(p, r, c, keep);
    }
    Vec<T> log_f{};
    if constexpr (K::log) log_f = rounded<T>(K::f(t, p.numbers));
    // A centre may be τ·(log f of another pair): t is then taken as τ·log f too, so that equal
    // pairs differ by exactly 0.
    if constexpr (K::linear_in_t) t = rounded<T>(log_f * p.numbers.tau);
    const Vec<T> zero{};
    PairValues<T> y = values(t, log_f, zero + p.row.shift[r], zero + p.row.argument_offset[r], row_keep, Masked || p.marked);
    Vec<T> u = t - p.row.moment_origin[r], baseline = zero + p.row.baseline[r], g{};
    if (p.terms)
      for (int k = 0; k < SUM_COUNT; k++)
        if (p.row_sums[k]) sums[k][r] += term(k, y, u, baseline);
    if constexpr (Gradient) g = weight(y, u, baseline) * p.row.row_weight[r];
    if (p.two_sided) {
      y = values(t, log_f, load(p.col.shift + c), load(p.col.argument_offset + c), col_keep, Masked || p.marked);
      u = t - load(p.col.moment_origin + c), baseline = load(p.col.baseline + c);
      if (p.col_terms)
        for (int k = 0; k < SUM_COUNT; k++)
          if (p.row_sums[k]) store(p.col_sums[k] + c, load(p.col_sums[k] + c) + term(k, y, u, baseline));
      if constexpr (Gradient) g += weight(y, u, baseline) * load(p.col.row_weight + c);
    }
    if constexpr (Gradient) store(p.s + r * LD + c, g);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    General op{p};
    for_pairs<T>(p, op);
    if (p.terms)
      for (int k = 0; k < SUM_COUNT; k++)
        if (p.row_sums[k]) add_rows<T>(p, k, op.sums[k]);
  }
};

// The weights ∂f/∂x of a linear kind, with the sums of the terms whose bits are set in TERMS: what
// `General` computes, without its choices inside the loop, so that f and ∂f/∂x share their
// exponential.
constexpr int bit(int term) { return 1 << term; }
template <class T, class K, int TERMS> struct SlopeGradient {
  const Panel<T>& p;
  Vec<T> sums[SUM_COUNT][PANEL_ROWS] = {};
  ALPHACL_INLINE void begin(int64_t) {}
  ALPHACL_INLINE void end(int64_t) {}
  // ∂f/∂x of a vector of pairs; add(term, value) receives the terms.
  template <bool Masked, class Add> ALPHACL_INLINE Vec<T> slope(Vec<T> x, Vec<T> u, Mask<T> keep, Add add) const {
    Vec<T> f = K::f(x, p.numbers), df = K::df(x, p.numbers);
    if (Masked) f = keep ? f : Vec<T>{}, df = keep ? df : Vec<T>{};
    if constexpr (TERMS & bit(F)) add(F, f);
    if constexpr (TERMS & bit(DF)) add(DF, df);
    if constexpr (TERMS & bit(DF_MOMENT)) add(DF_MOMENT, df * u);
    return df;
  }

  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> t, Mask<T> keep) {
    Vec<T> x = (t - p.row.shift[r]) + p.row.argument_offset[r];
    Vec<T> g = slope<Masked>(x, t - p.row.moment_origin[r], keep, [&](int term, Vec<T> y) { sums[term][r] += y; });
    g *= p.row.row_weight[r];
    if (p.two_sided) {
      x = (t - load(p.col.shift + c)) + load(p.col.argument_offset + c);
      const Vec<T> df = slope<Masked>(x, t - load(p.col.moment_origin + c), keep, [&](int term, Vec<T> y) {
        if (p.col_terms) store(p.col_sums[term] + c, load(p.col_sums[term] + c) + y);
      });
      g += df * load(p.col.row_weight + c);
    }
    store(p.s + r * LD + c, g);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    SlopeGradient op{p};
    for_pairs<T>(p, op);
    for (int term = 0; term < SUM_COUNT; term++)
      if (TERMS & bit(term)) add_rows<T>(p, term, op.sums[term]);
  }
};

// What `General` computes, for a user's function of linear kind. The function is called for the pairs
// of the panel's rows with one vector of columns, of both sides at once: the call costs little, and
// its numbers stay in the first-level cache.
template <class T, bool Gradient> struct OfFunction {
  enum Side { ROW, COL, SIDES };
  const Panel<T>& p;
  Vec<T> sums[SUM_COUNT][PANEL_ROWS] = {};
  Vec<T> t[PANEL_ROWS];
  Mask<T> keep[SIDES][PANEL_ROWS];
  bool masked;
  alignas(64) Vec<T> x[SIDES][PANEL_ROWS], f[SIDES][PANEL_ROWS], df[SIDES][PANEL_ROWS];

  explicit OfFunction(const Panel<T>& panel) : p(panel) {}
  ALPHACL_INLINE void begin(int64_t) { masked = false; }
  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> of_pair, Mask<T> counts) {
    t[r] = of_pair;
    x[ROW][r] = (of_pair - p.row.shift[r]) + p.row.argument_offset[r];
    if (p.two_sided) x[COL][r] = (of_pair - load(p.col.shift + c)) + load(p.col.argument_offset + c);
    if (!Masked && !p.marked) return;
    masked = true;
    if (!Masked) counts = all_lanes<T>();
    keep[ROW][r] = p.marked ? of_row<T>(p, r, c, counts) : counts;
    keep[COL][r] = p.marked && p.two_sided ? of_cols<T>(p, r, c, counts) : counts;
  }
  ALPHACL_INLINE void end(int64_t c) {
    const int sides = p.two_sided ? SIDES : 1;
    auto numbers = [](Vec<T>(*of)[PANEL_ROWS]) { return reinterpret_cast<T*>(of); };
    p.values(p.constants, numbers(x), p.need_f ? numbers(f) : nullptr, p.need_df ? numbers(df) : nullptr,
             sides * PANEL_ROWS * LANES<T>);
    if (masked)
      for (int side = 0; side < sides; side++)
        for (int r = 0; r < PANEL_ROWS; r++) {
          if (p.need_f) f[side][r] = keep[side][r] ? f[side][r] : Vec<T>{};
          if (p.need_df) df[side][r] = keep[side][r] ? df[side][r] : Vec<T>{};
        }
    const Vec<T> origin = load(p.col.moment_origin + c);
    for (int k = 0; p.terms && k < SUM_COUNT; k++) {
      if (!p.row_sums[k]) continue;
      const auto& y = k == DF || k == DF_MOMENT ? df : f;
      const bool moment = k == F_MOMENT || k == DF_MOMENT;
      Vec<T> of_cols = load(p.col_sums[k] + c);
      for (int r = 0; r < PANEL_ROWS; r++) {
        sums[k][r] += moment ? y[ROW][r] * (t[r] - p.row.moment_origin[r]) : y[ROW][r];
        if (p.col_terms) of_cols += moment ? y[COL][r] * (t[r] - origin) : y[COL][r];
      }
      store(p.col_sums[k] + c, of_cols);
    }
    if constexpr (Gradient)
      for (int r = 0; r < PANEL_ROWS; r++) {
        Vec<T> g = weight(ROW, r, p.row.moment_origin[r] + Vec<T>{}, p.row.baseline[r] + Vec<T>{}) * p.row.row_weight[r];
        if (p.two_sided) g += weight(COL, r, origin, load(p.col.baseline + c)) * load(p.col.row_weight + c);
        store(p.s + r * LD + c, g);
      }
  }
  ALPHACL_INLINE Vec<T> weight(Side side, int r, Vec<T> origin, Vec<T> baseline) const {
    if (p.weight == WEIGHT_F) return f[side][r];
    if (p.weight == WEIGHT_DF) return df[side][r];
    return f[side][r] + df[side][r] * ((t[r] - origin) - baseline);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    OfFunction op(p);
    for_pairs<T>(p, op);
    if (p.terms)
      for (int k = 0; k < SUM_COUNT; k++)
        if (p.row_sums[k]) add_rows<T>(p, k, op.sums[k]);
  }
};

// g_ij + g_ji = exp(log f − constant_shift)·(row_weight_i + row_weight_j); rows that are no anchors
// have weight 0
template <class T, class K, class Factors, bool Marked> struct ConstantShiftGradient {
  const Panel<T>& p;
  Vec<T> col_weight;
  ALPHACL_INLINE void begin(int64_t c) { col_weight = load(p.col.row_weight + c); }
  ALPHACL_INLINE void end(int64_t) {}
  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> t, Mask<T> keep) {
    Vec<T> of_r = broadcast<T>(p.row.row_weight[r]), of_c = col_weight;
    if (Marked) {
      of_r = of_row<T>(p, r, c, all_lanes<T>()) ? of_r : Vec<T>{};
      if (p.two_sided) of_c = of_cols<T>(p, r, c, all_lanes<T>()) ? of_c : Vec<T>{};
    }
    Vec<T> g = Factors::exponential(K::f(t, p.numbers) - p.numbers.middle) * (of_c + of_r);
    if (Masked) g = keep ? g : Vec<T>{};
    store(p.s + r * LD + c, g);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    ConstantShiftGradient op{p, {}};
    for_pairs<T>(p, op);
  }
};

// The same from kept factors. Masks are as before: a factor of 0 times an infinite row weight is a
// NaN, but that of an excluded pair counts for nothing.
template <class T, bool Marked> struct KeptGradient {
  const Panel<T>& p;
  Vec<T> col_weight;
  ALPHACL_INLINE void begin(int64_t c) { col_weight = load(p.col.row_weight + c); }
  ALPHACL_INLINE void end(int64_t) {}
  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> e, Mask<T> keep) {
    Vec<T> of_r = broadcast<T>(p.row.row_weight[r]), of_c = col_weight;
    if (Marked) {
      of_r = of_row<T>(p, r, c, all_lanes<T>()) ? of_r : Vec<T>{};
      if (p.two_sided) of_c = of_cols<T>(p, r, c, all_lanes<T>()) ? of_c : Vec<T>{};
    }
    Vec<T> g = e * (of_c + of_r);
    if (Masked) g = keep ? g : Vec<T>{};
    store(p.s + r * LD + c, g);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    KeptGradient op{p, {}};
    for_pairs<T>(p, op, p.kept, p.kept_stride);
  }
};

template <class T> using PanelFunction = void (*)(const Panel<T>&);

template <class T, class K> PanelFunction<T> any_kind(const Sweep& s) {
  return s.gradient ? General<T, K, true>::run : General<T, K, false>::run;
}
template <class T, class K> PanelFunction<T> linear_kind(const Sweep& s, bool marked) {
  if (!s.gradient || s.weight != WEIGHT_DF || marked) return any_kind<T, K>(s);
  int wanted = 0;
  for (int term = 0; term < TERM_COUNT; term++) wanted |= s.rows_of_terms[term] >= 0 ? bit(term) : 0;
  switch (wanted) {
    case 0: return SlopeGradient<T, K, 0>::run;
    case bit(F): return SlopeGradient<T, K, bit(F)>::run;
    case bit(F) | bit(DF): return SlopeGradient<T, K, bit(F) | bit(DF)>::run;
    case bit(F) | bit(DF) | bit(DF_MOMENT): return SlopeGradient<T, K, bit(F) | bit(DF) | bit(DF_MOMENT)>::run;
  }
  return any_kind<T, K>(s);
}
template <class T, class K, class Factors, bool Marked> PanelFunction<T> constant_shift(const Sweep& s, bool keeps_factors) {
  if (s.gradient) return ConstantShiftGradient<T, K, Factors, Marked>::run;
  const bool moment = s.rows_of_terms[F_MOMENT] >= 0;
  if (keeps_factors)
    return moment ? ConstantShiftSums<T, K, Factors, true, true, Marked>::run
                  : ConstantShiftSums<T, K, Factors, false, true, Marked>::run;
  return moment ? ConstantShiftSums<T, K, Factors, true, false, Marked>::run
                : ConstantShiftSums<T, K, Factors, false, false, Marked>::run;
}
template <class T, class K, class Factors> PanelFunction<T> log_kind(const Sweep& s, bool marked, bool keeps_factors) {
  if (s.form == Form::ONLINE) return OnlineSums<T, K>::run;
  if (s.form != Form::CONSTANT) return any_kind<T, K>(s);
  return marked ? constant_shift<T, K, Factors, true>(s, keeps_factors) : constant_shift<T, K, Factors, false>(s, keeps_factors);
}

template <class T, class Factors> PanelFunction<T> panel_function(const Sweep& s, const RowVectors& v, const KeptTile& kept) {
  const bool factors = kept.what == Keep::FACTORS, marked = v.largest_t || v.largest_guide;
  if (s.form == Form::T_MAX) return s.rows_of_terms[F] < 0 ? Maximum<T>::run : MaximumAndMoments<T>::run;
  if (factors && kept.filled) return marked ? KeptGradient<T, true>::run : KeptGradient<T, false>::run;
  if (s.values) return s.gradient ? OfFunction<T, true>::run : OfFunction<T, false>::run;
  return with_kind<T>(s, [&](auto kind) {
    using K = decltype(kind);
    if constexpr (K::log) return log_kind<T, K, Factors>(s, marked, factors);
    else return linear_kind<T, K>(s, marked);
  });
}

// log f of a log kind at n similarities (a multiple of a vector): the shifts of Form::ONLINE
template <class T> void log_f_of(const Sweep& s, const T* t, T* y, int64_t n) {
  const Numbers<T> numbers(s);
  with_kind<T>(s, [&](auto kind) {
    for (int64_t c = 0; c < n; c += LANES<T>) store(y + c, decltype(kind)::f(load(t + c), numbers));
  });
}

}  // namespace
