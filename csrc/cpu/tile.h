// What happens to a panel of similarities: the pair kind, sums over rows and columns, the weights of the gradient.
//
// A panel is PANEL_ROWS rows of a tile (I, J), hot in the first-level cache. Rows are anchors of I; columns are anchors of
// J, for which a pair (i, j) is read as (j, i): the similarity is the same, the row scalars are not.
#pragma once

#include "pairs.h"

namespace {

constexpr int PANEL_ROWS = 8;
constexpr int64_t ROW_MULTIPLE = 48;  // blocks are padded to it: a multiple of PANEL_ROWS and of every register tile
constexpr int64_t MAX_BLOCK = 240;
constexpr int64_t LD = MAX_BLOCK + 32;  // row stride of a tile: rows must not all fall into the same sets of the cache
constexpr int64_t TILE_SIZE = (MAX_BLOCK + 32) * LD;

ALPHACL_INLINE int64_t padded(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class T> struct SideScalars {  // one side's row vectors, from the panel's first row (column) on
  const T *center, *gain, *shift, *offset, *level, *base;
};

template <class T> struct Panel {
  T* s;  // (PANEL_ROWS, LD): similarities in, weights out
  int64_t rows, cols;
  int excluded;           // diagonals of excluded pairs …
  int64_t diagonals[3];   // … column of the panel's row 0
  const Int<T> *row_ids, *col_ids;  // null without ids
  const bool* clash;                // of each vector of columns: some row has the id of one of them
  SideScalars<T> row, col;
  double* row_sums[TERM_COUNT];  // at the panel's first row; null where a term is not wanted
  T* col_sums[TERM_COUNT];       // of this tile
  T* col_max;
  T* row_max;
  bool two_sided;   // the columns are anchors of their own
  bool col_terms;   // … and their terms are summed here (not in a diagonal tile, whose pairs appear twice)
  int weight;
  bool need_f, need_df, need_dtau, terms;
  Numbers<T> numbers;
  explicit Panel(const Sweep& sweep) : numbers(sweep) {}
};

// Which vectors of columns hold the id of one of the panel's rows. It is found out before the panel is gone through: there, without
// ids, this costs a test for each vector of columns.
template <class T> void find_clashes(const Int<T>* rows, const Int<T>* columns, int64_t cols, bool* clash) {
  for (int64_t c = 0; c < cols; c += LANES<T>) {
    const Mask<T> ids = load_mask<T>(columns + c);
    Mask<T> equal{};
    for (int r = 0; r < PANEL_ROWS; r++) equal |= ids == rows[r];
    clash[c / LANES<T>] = any<T>(equal);
  }
}

// Calls op.pair<masked>(r, c, t, mask) for all vectors of the panel; only vectors that hold an excluded pair or an edge are masked.
template <class T, class Op> ALPHACL_INLINE void for_pairs(const Panel<T>& p, Op& op) {
  constexpr int L = LANES<T>;
  const Mask<T> lanes = lane_numbers<T>();
  for (int64_t c = 0; c < p.cols; c += L) {
    bool special = p.rows < PANEL_ROWS || c + L > p.cols || (p.row_ids && p.clash[c / L]);
    for (int d = 0; d < p.excluded; d++) special |= p.diagonals[d] < c + L && p.diagonals[d] + PANEL_ROWS > c;
    op.begin(c);
    if (!special) {
#pragma GCC unroll 1
      for (int r = 0; r < PANEL_ROWS; r++) op.template pair<false>(r, c, load(p.s + r * LD + c), lanes);
    } else {
#pragma GCC unroll 1
      for (int r = 0; r < PANEL_ROWS; r++) {
        using I = Int<T>;
        Mask<T> keep = lanes < I(p.cols - c);
        if (p.row_ids) keep &= load_mask<T>(p.col_ids + c) != p.row_ids[r];
        if (r >= p.rows) keep = Mask<T>{};
        for (int d = 0; d < p.excluded; d++) keep &= lanes != I(r + p.diagonals[d] - c);
        const Vec<T> t = load(p.s + r * LD + c);
        op.template pair<true>(r, c, keep ? t : Vec<T>{}, keep);  // an excluded similarity may be infinite, and 0·inf is not 0
      }
    }
    op.end(c);
  }
}

template <class T> ALPHACL_INLINE void add_rows(const Panel<T>& p, int term, const Vec<T>* sums) {
  for (int64_t r = 0; r < p.rows; r++) p.row_sums[term][r] += double(sum_of<T>(sums[r]));
}

// Σ exp(log f − middle) and, with Gap, Σ exp(log f − middle)·(t − center)
template <class T, class K, bool Gap> struct FixedSums {
  const Panel<T>& p;
  Vec<T> f[PANEL_ROWS] = {}, ft[PANEL_ROWS] = {};
  Vec<T> col_f, col_ft, col_center;
  ALPHACL_INLINE void begin(int64_t c) {
    col_f = load(p.col_sums[F] + c);
    if (Gap) col_ft = load(p.col_sums[FT] + c), col_center = load(p.col.center + c);
  }
  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t, Vec<T> t, Mask<T> keep) {
    Vec<T> e = vexp_bounded<T>(K::f(t, p.numbers) - p.numbers.middle);
    if (Masked) e = keep ? e : Vec<T>{};
    f[r] += e;
    col_f += e;
    if (Gap) {
      ft[r] += e * (t - p.row.center[r]);
      col_ft += e * (t - col_center);
    }
  }
  ALPHACL_INLINE void end(int64_t c) {
    store(p.col_sums[F] + c, col_f);
    if (Gap) store(p.col_sums[FT] + c, col_ft);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    FixedSums op{p, {}, {}, {}, {}, {}};
    for_pairs<T>(p, op);
    add_rows<T>(p, F, op.f);
    if (Gap) add_rows<T>(p, FT, op.ft);
  }
};

// Σ exp(log f − base), one base per row and one per column
template <class T, class K> struct RunningSums {
  const Panel<T>& p;
  Vec<T> f[PANEL_ROWS] = {}, ft[PANEL_ROWS] = {};
  ALPHACL_INLINE void begin(int64_t) {}
  ALPHACL_INLINE void end(int64_t) {}
  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> t, Mask<T> keep) {
    const Vec<T> log_f = rounded<T>(K::f(t, p.numbers));
    Vec<T> e = vexp<T>(log_f - p.row.base[r]);
    if (Masked) e = keep ? e : Vec<T>{};
    f[r] += e;
    if (p.terms) ft[r] += e * (t - p.row.center[r]);
    if (!p.two_sided) return;
    e = vexp<T>(log_f - load(p.col.base + c));
    if (Masked) e = keep ? e : Vec<T>{};
    store(p.col_sums[F] + c, load(p.col_sums[F] + c) + e);
    if (p.terms) store(p.col_sums[FT] + c, load(p.col_sums[FT] + c) + e * (t - load(p.col.center + c)));
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    RunningSums op{p};
    for_pairs<T>(p, op);
    add_rows<T>(p, F, op.f);
    if (p.terms) add_rows<T>(p, FT, op.ft);
  }
};

// max t of every row and column
template <class T> struct Maximum {
  const Panel<T>& p;
  Vec<T> best[PANEL_ROWS];
  Vec<T> col_best;
  ALPHACL_INLINE void begin(int64_t c) { col_best = load(p.col_max + c); }
  ALPHACL_INLINE void end(int64_t c) { store(p.col_max + c, col_best); }
  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t, Vec<T> t, Mask<T> keep) {
    if (Masked) t = keep ? t : broadcast<T>(-__builtin_inf());
    best[r] = largest<T>(t, best[r]);
    col_best = largest<T>(t, col_best);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    Maximum op{p, {}, {}};
    for (auto& b : op.best) b = broadcast<T>(-__builtin_inf());
    for_pairs<T>(p, op);
    for (int64_t r = 0; r < p.rows; r++) p.row_max[r] = max_of<T>(op.best[r]);
  }
};

// Value and derivatives of a pair for one anchor's scalars; those not wanted are left undefined.
template <class T> struct Pieces {
  Vec<T> f, df, dtau;
};
template <class T, class K, bool Masked>
ALPHACL_INLINE Pieces<T> pieces(const Panel<T>& p, Vec<T> t, Vec<T> log_f, Vec<T> shift, Vec<T> offset, Mask<T> keep) {
  const Vec<T> zero{};
  Pieces<T> y{};
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
  Vec<T> sums[TERM_COUNT][PANEL_ROWS] = {};
  ALPHACL_INLINE void begin(int64_t) {}
  ALPHACL_INLINE void end(int64_t) {}

  ALPHACL_INLINE Vec<T> term(int k, const Pieces<T>& y, Vec<T> u, Vec<T> level) const {
    switch (k) {
      case F: return y.f;
      case DF: return y.df;
      case FT: return y.f * u;
      case DFT: return y.df * u;
      default: return y.dtau * (u - level);
    }
  }
  ALPHACL_INLINE Vec<T> weight(const Pieces<T>& y, Vec<T> u, Vec<T> level) const {
    if (p.weight == WEIGHT_F) return y.f;
    if (p.weight == WEIGHT_DF) return y.df;
    return y.f + y.df * (u - level);
  }

  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> t, Mask<T> keep) {
    Vec<T> log_f{};
    if constexpr (K::log) log_f = rounded<T>(K::f(t, p.numbers));
    // A centre may be τ·(log f of another pair): t is then taken as τ·log f too, so that equal pairs differ by exactly 0.
    if constexpr (K::linear_in_t) t = rounded<T>(log_f * p.numbers.tau);
    const Vec<T> zero{};
    Pieces<T> y = pieces<T, K, Masked>(p, t, log_f, zero + p.row.shift[r], zero + p.row.offset[r], keep);
    Vec<T> u = t - p.row.center[r], level = zero + p.row.level[r], g{};
    if (p.terms)
      for (int k = 0; k < TERM_COUNT; k++)
        if (p.row_sums[k]) sums[k][r] += term(k, y, u, level);
    if constexpr (Gradient) g = weight(y, u, level) * p.row.gain[r];
    if (p.two_sided) {
      y = pieces<T, K, Masked>(p, t, log_f, load(p.col.shift + c), load(p.col.offset + c), keep);
      u = t - load(p.col.center + c), level = load(p.col.level + c);
      if (p.col_terms)
        for (int k = 0; k < TERM_COUNT; k++)
          if (p.row_sums[k]) store(p.col_sums[k] + c, load(p.col_sums[k] + c) + term(k, y, u, level));
      if constexpr (Gradient) g += weight(y, u, level) * load(p.col.gain + c);
    }
    if constexpr (Gradient) store(p.s + r * LD + c, g);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    General op{p};
    for_pairs<T>(p, op);
    if (p.terms)
      for (int k = 0; k < TERM_COUNT; k++)
        if (p.row_sums[k]) add_rows<T>(p, k, op.sums[k]);
  }
};

// g_ij + g_ji = exp(log f − middle)·(gain_i + gain_j); the gain of rows that are no anchors is 0
template <class T, class K> struct FixedGradient {
  const Panel<T>& p;
  Vec<T> col_gain;
  ALPHACL_INLINE void begin(int64_t c) { col_gain = load(p.col.gain + c); }
  ALPHACL_INLINE void end(int64_t) {}
  template <bool Masked> ALPHACL_INLINE void pair(int r, int64_t c, Vec<T> t, Mask<T> keep) {
    Vec<T> g = vexp_bounded<T>(K::f(t, p.numbers) - p.numbers.middle) * (col_gain + p.row.gain[r]);
    if (Masked) g = keep ? g : Vec<T>{};
    store(p.s + r * LD + c, g);
  }
  static __attribute__((noinline)) void run(const Panel<T>& p) {
    FixedGradient op{p, {}};
    for_pairs<T>(p, op);
  }
};

template <class T> using PanelFunction = void (*)(const Panel<T>&);

template <class T, class K> PanelFunction<T> log_kind(const Sweep& s) {
  const bool gap = s.rows_of_terms[FT] >= 0;
  switch (s.form) {
    case LOG_SUMS_FIXED: return gap ? FixedSums<T, K, true>::run : FixedSums<T, K, false>::run;
    case LOG_SUMS_RUNNING: return RunningSums<T, K>::run;
    case GRAD_FIXED: return FixedGradient<T, K>::run;
    case PLAIN_SUMS: return General<T, K, false>::run;
    default: return General<T, K, true>::run;
  }
}
template <class T, class K> PanelFunction<T> linear_kind(const Sweep& s) {
  return s.form == PLAIN_SUMS ? General<T, K, false>::run : General<T, K, true>::run;
}

template <class T> PanelFunction<T> panel_function(const Sweep& s) {
  if (s.form == MAXIMUM) return Maximum<T>::run;
  switch (s.kind) {
    case EXP: return log_kind<T, Exp<T>>(s);
    case GIBBS: return log_kind<T, Gibbs<T>>(s);
    case POWER: return s.params[1] == 2 ? log_kind<T, Power<T, 2>>(s) : log_kind<T, Power<T, 0>>(s);
    case INVERSE: return log_kind<T, Inverse<T>>(s);
    case HINGE: return linear_kind<T, Hinge<T>>(s);
    case SIGMOID: return linear_kind<T, Sigmoid<T>>(s);
    case SQUARE: return linear_kind<T, Square<T>>(s);
    default: return linear_kind<T, Gamma<T>>(s);
  }
}

// log f of the kind at n similarities (a multiple of a vector): bases of LOG_SUMS_RUNNING
template <class T> void log_f_of(const Sweep& s, const T* t, T* y, int64_t n) {
  const Numbers<T> numbers(s);
  for (int64_t c = 0; c < n; c += LANES<T>) {
    const Vec<T> x = load(t + c);
    Vec<T> l;
    switch (s.kind) {
      case EXP: l = Exp<T>::f(x, numbers); break;
      case GIBBS: l = Gibbs<T>::f(x, numbers); break;
      case POWER: l = Power<T, 0>::f(x, numbers); break;
      default: l = Inverse<T>::f(x, numbers);
    }
    store(y + c, l);
  }
}

}  // namespace
