// The kernels of one instruction set; compiled once for each, with ALPHACL_ISA its name.
//
// A tile (I, J) goes through: similarities of PANEL_ROWS rows → their pair kind, sums and weights while they are in the
// first-level cache → after the last panel the two products with F, from the weights in the second-level cache.

#if defined(ALPHACL_USE_AMX)
#include "amx.h"
#elif defined(ALPHACL_USE_DOT)
#include "dot.h"
#else
#include "native.h"
#endif

namespace {

template <class T> struct Scratch {  // of one thread
  T *tile, *col_sums, *row_max, *col_max, *row_base, *col_base;
  void* rest;
  static int64_t bytes() { return (TILE_SIZE + (TERM_COUNT + 4) * MAX_BLOCK) * int64_t(sizeof(T)); }
  explicit Scratch(void* p) {
    tile = static_cast<T*>(p);
    col_sums = tile + TILE_SIZE;
    row_max = col_sums + TERM_COUNT * MAX_BLOCK;
    col_max = row_max + MAX_BLOCK;
    row_base = col_max + MAX_BLOCK;
    col_base = row_base + MAX_BLOCK;
    rest = col_base + MAX_BLOCK;
  }
};

template <class T> SideScalars<T> side(const RowVectors& v, int64_t at, const T* base) {
  auto vector = [at](const void* p) { return static_cast<const T*>(p) + at; };
  return {vector(v.center), vector(v.gain), vector(v.shift), vector(v.offset), vector(v.level), base};
}
template <class T> SideScalars<T> later(const SideScalars<T>& s, int64_t r) {
  return {s.center + r, s.gain + r, s.shift + r, s.offset + r, s.level + r, s.base + r};
}

// t = scale_i·scale_j·s + (bias_i + bias_j) on one panel; t_ij and t_ji must be the same number
template <class T> void scale_and_shift(const RowVectors& v, bool scales, const Block& i, const Block& j, int64_t r0, T* s) {
  const T* scale = scales ? static_cast<const T*>(v.scale) : nullptr;
  const T* bias = static_cast<const T*>(v.bias);
  for (int64_t r = 0; r < PANEL_ROWS; r++)
    for (int64_t c = 0; c < j.rows; c += LANES<T>) {
      Vec<T> t = load(s + r * LD + c);
      if (scale) t *= load(scale + j.packed + c) * scale[i.packed + r0 + r];
      if (bias) t += load(bias + j.packed + c) + bias[i.packed + r0 + r];
      store(s + r * LD + c, t);
    }
}

template <class T> void add_weight_sums(const RowVectors& v, const Block& i, const Block& j, int64_t r0, int64_t rows, bool diagonal, const T* w) {
  for (int64_t r = 0; r < rows; r++) {
    Vec<T> sum{};
    for (int64_t c = 0; c < j.rows; c += LANES<T>) sum += load(w + r * LD + c);  // 0 beyond the last column
    v.weight_sums[i.packed + r0 + r] += double(sum_of<T>(sum));
  }
  if (diagonal) return;
  for (int64_t c = 0; c < j.rows; c++) {
    double sum = 0;
    for (int64_t r = 0; r < rows; r++) sum += double(w[r * LD + c]);
    v.weight_sums[j.packed + c] += sum;
  }
}

// New bases of rows [at, at + n) from the largest similarity met in this tile; the sums so far become relative to them.
template <class T> void rebase(const Sweep& s, const RowVectors& v, int64_t at, int64_t n, T* largest, T* base) {
  log_f_of<T>(s, largest, base, padded(n, LANES<T>));
  T* so_far = static_cast<T*>(v.base) + at;
  double* totals = static_cast<double*>(v.total) + at;
  for (int64_t r = 0; r < n; r++) {
    if (largest[r] == T(-__builtin_inf()) || !(base[r] > so_far[r])) base[r] = so_far[r];
    if (base[r] != so_far[r]) {
      const double factor = __builtin_exp(double(so_far[r]) - double(base[r]));
      totals[r] *= factor;
      totals[r + v.padded] *= factor;
      so_far[r] = base[r];
    }
    if (base[r] == T(-__builtin_inf())) base[r] = 0;  // every pair so far was excluded
  }
}

template <class Products>
void tile(const Sweep& s, const RowVectors& v, const Block& i, const Block& j, void* memory) {
  using T = typename Products::T;
  const Scratch<T> scratch(memory);
  const bool diagonal = !s.split && i.first == j.first;
  const bool gradient = s.form == GRAD_FIXED || s.form == GRAD;
  const PanelFunction<T> panel = panel_function<T>(s);

  Panel<T> p(s);
  p.cols = j.rows;
  p.two_sided = gradient ? j.anchor || diagonal : j.anchor && !diagonal;
  p.col_terms = p.two_sided && !diagonal;
  p.weight = s.weight;
  p.col_max = scratch.col_max;
  const Int<T>* ids = static_cast<const Int<T>*>(v.ids);
  bool clash[MAX_BLOCK];
  p.row_ids = nullptr, p.col_ids = ids ? ids + j.packed : nullptr, p.clash = clash;
  const SideScalars<T> rows = side<T>(v, i.packed, scratch.row_base);
  p.col = side<T>(v, j.packed, scratch.col_base);
  const int32_t* wanted = s.rows_of_terms;
  p.terms = false;
  for (int k = 0; k < TERM_COUNT; k++) {
    p.col_sums[k] = scratch.col_sums + k * MAX_BLOCK;
    if (wanted[k] >= 0) p.terms = true, std::memset(p.col_sums[k], 0, MAX_BLOCK * sizeof(T));
  }
  if (s.form == LOG_SUMS_RUNNING) p.terms = wanted[FT] >= 0;
  const bool weight_f = gradient && s.weight != WEIGHT_DF, weight_df = gradient && s.weight != WEIGHT_F;
  p.need_f = weight_f || wanted[F] >= 0 || wanted[FT] >= 0;
  p.need_df = weight_df || wanted[DF] >= 0 || wanted[DFT] >= 0;
  p.need_dtau = wanted[DTAU] >= 0;

  double* sums = s.form == LOG_SUMS_RUNNING ? static_cast<double*>(v.total) : v.sums;
  auto sums_of = [&](int k) { return sums + (s.form == LOG_SUMS_RUNNING ? k == FT : k) * v.padded; };
  auto position = [&](int64_t r0) {  // the panel of rows [r0, r0 + PANEL_ROWS)
    p.rows = i.rows - r0 < PANEL_ROWS ? i.rows - r0 : PANEL_ROWS;
    p.row = later(rows, r0);
    p.row_max = scratch.row_max + r0;
    if (ids) {
      p.row_ids = ids + i.packed + r0;
      find_clashes<T>(p.row_ids, p.col_ids, p.cols, clash);
    }
    p.excluded = 0;
    auto exclude = [&](int64_t d) {
      const int64_t at = i.first + r0 + d - j.first;
      if (at > -PANEL_ROWS && at < p.cols) p.diagonals[p.excluded++] = at;
    };
    if (!s.split) exclude(0);
    if (s.partner) exclude(s.partner), exclude(-s.partner);
    for (int k = 0; k < TERM_COUNT; k++) p.row_sums[k] = wanted[k] >= 0 ? sums_of(k) + i.packed + r0 : nullptr;
  };
  const bool keep_tile = s.form == LOG_SUMS_RUNNING || (gradient && Products::WEIGHTS_IN_PLACE);

  if (s.form == LOG_SUMS_RUNNING || s.form == MAXIMUM)
    for (int64_t c = 0; c < MAX_BLOCK; c++) scratch.col_max[c] = T(-__builtin_inf());
  for (int64_t r0 = 0; r0 < i.rows; r0 += PANEL_ROWS) {
    position(r0);
    p.s = scratch.tile + (keep_tile ? r0 : r0 % Products::SIMILARITY_ROWS) * LD;
    Products::similarities(s, v, i, j, r0, p.s);
    if (v.bias || (v.scale && !Products::SCALES)) scale_and_shift<T>(v, !Products::SCALES, i, j, r0, p.s);
    if (s.form == LOG_SUMS_RUNNING) {
      Maximum<T>::run(p);
      continue;
    }
    panel(p);
    if (v.weight_sums) add_weight_sums<T>(v, i, j, r0, p.rows, diagonal, p.s);
    if constexpr (!Products::WEIGHTS_IN_PLACE)
      if (gradient) Products::weights(v, i, j, r0, p.s, scratch.rest);
  }

  if (s.form == LOG_SUMS_RUNNING) {
    rebase<T>(s, v, i.packed, i.rows, scratch.row_max, scratch.row_base);
    if (p.two_sided) rebase<T>(s, v, j.packed, j.rows, scratch.col_max, scratch.col_base);
    for (int64_t r0 = 0; r0 < i.rows; r0 += PANEL_ROWS) {
      position(r0);
      p.s = scratch.tile + r0 * LD;
      panel(p);
    }
  }
  if (s.form == MAXIMUM) {
    T* best = static_cast<T*>(v.base);
    auto merge = [best](const T* found, int64_t at, int64_t n) {
      for (int64_t r = 0; r < n; r++)
        if (found[r] > best[at + r] || found[r] != found[r]) best[at + r] = found[r];
    };
    merge(scratch.row_max, i.packed, i.rows);
    if (p.two_sided) merge(scratch.col_max, j.packed, j.rows);
  }
  if (p.col_terms)
    for (int k = 0; k < TERM_COUNT; k++)
      if (wanted[k] >= 0)
        for (int64_t c = 0; c < j.rows; c++) sums_of(k)[j.packed + c] += double(p.col_sums[k][c]);
  if (gradient) Products::products(s, scratch.tile, scratch.rest, i, j, diagonal);
}

template <class T> void exponential(const void* x, void* y, int64_t n) {
  for (int64_t c = 0; c < n; c += LANES<T>) store(static_cast<T*>(y) + c, vexp<T>(load(static_cast<const T*>(x) + c)));
}
template <class T> void logarithm(const void* x, void* y, int64_t n) {
  for (int64_t c = 0; c < n; c += LANES<T>) store(static_cast<T*>(y) + c, vlog<T>(load(static_cast<const T*>(x) + c)));
}
template <class Products> Engine engine(const char* name, int32_t operands) {
  using T = typename Products::T;
  return {name, operands, sizeof(T) == 4 ? FLOAT32 : FLOAT64, Products::MULTIPLE, Products::LARGEST,
          Products::packed_bytes, Products::df_bytes,
          [](int64_t dim, int64_t stride) { return padded(Scratch<T>::bytes() + Products::scratch_bytes(dim, stride), 4096); },
          [](const Sweep& s, const Block& b, bool gradient, void* memory) {
            Products::pack(s, b, gradient, Scratch<T>(memory).rest);
          },
          tile<Products>, Products::in_place,
          [](const Sweep& s, const Block& b, double scale, void* memory) {
            Products::unpack(s, b, scale, Scratch<T>(memory).tile);
          },
          normalize_pairs<T>, finish_pairs<T>, exponential<T>, logarithm<T>};
}

}  // namespace

#define ALPHACL_JOIN_(a, b) a##b
#define ALPHACL_JOIN(a, b) ALPHACL_JOIN_(a, b)
#define ALPHACL_TEXT_(a) #a
#define ALPHACL_TEXT(a) ALPHACL_TEXT_(a)

// Fills `engines` and returns how many there are.
int ALPHACL_JOIN(alphacl_engines_, ALPHACL_ISA)(Engine* engines) {
  const char* name = ALPHACL_TEXT(ALPHACL_ISA);
#if defined(ALPHACL_USE_AMX)
  engines[0] = engine<AmxProducts>(name, BFLOAT16);
  return 1;
#elif defined(ALPHACL_USE_DOT)
  engines[0] = engine<DotProducts>(name, BFLOAT16);
  return 1;
#else
  engines[0] = engine<NativeProducts<float>>(name, FLOAT32);
  engines[1] = engine<NativeProducts<double>>(name, FLOAT64);
  return 2;
#endif
}
