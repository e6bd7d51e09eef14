// The kernels of one instruction set; compiled once for each, with ALPHACL_ISA its name.
//
// A tile (I, J) goes through: similarities of PANEL_ROWS rows → their pair kind, sums and weights
// while they are in the first-level cache → after the last panel the two products with F, from the
// weights in the second-level cache.

#if defined(ALPHACL_USE_AMX)
#include "amx.h"
#elif defined(ALPHACL_USE_DOT)
#include "dot.h"
#else
#include "native.h"
#endif
#include "same_id.h"

#define ALPHACL_JOIN_(a, b) a##b
#define ALPHACL_JOIN(a, b) ALPHACL_JOIN_(a, b)
#define ALPHACL_TEXT_(a) #a
#define ALPHACL_TEXT(a) ALPHACL_TEXT_(a)

namespace {

template <class T> struct ThreadWorkspace {
  T *tile, *guide, *col_sums, *row_max, *col_max, *row_shift, *col_shift;
  Marks* marks;
  void* rest;
  static int64_t bytes() {
    return (TILE_SIZE + PANEL_ROWS * LD + (SUM_COUNT + 4) * MAX_BLOCK) * int64_t(sizeof(T)) + mark_bytes<T>(MAX_BLOCK);
  }
  explicit ThreadWorkspace(void* p) {
    tile = static_cast<T*>(p);
    guide = tile + TILE_SIZE;
    col_sums = guide + PANEL_ROWS * LD;
    row_max = col_sums + SUM_COUNT * MAX_BLOCK;
    col_max = row_max + MAX_BLOCK;
    row_shift = col_max + MAX_BLOCK;
    col_shift = row_shift + MAX_BLOCK;
    marks = reinterpret_cast<Marks*>(col_shift + MAX_BLOCK);
    rest = reinterpret_cast<char*>(marks) + mark_bytes<T>(MAX_BLOCK);
  }
};

template <class T> SideScalars<T> side(const RowVectors& v, int64_t at, const T* online_shift) {
  auto vector = [at](const void* p) { return p ? static_cast<const T*>(p) + at : nullptr; };
  return {vector(v.moment_origin), vector(v.row_weight), vector(v.shift), vector(v.argument_offset),
          vector(v.baseline), online_shift, vector(v.largest_t), vector(v.largest_guide)};
}
// t = scale_i·scale_j·s + (bias_i + bias_j) on one panel, for those vectors that there are; t_ij and
// t_ji must be the same number
template <class T> void scale_and_shift(const T* scale, const T* bias, const Block& i, const Block& j, int64_t r0, T* s) {
  if (!scale && !bias) return;
  for (int64_t r = 0; r < PANEL_ROWS; r++)
    for (int64_t c = 0; c < j.rows; c += LANES<T>) {
      Vec<T> t = load(s + r * LD + c);
      if (scale) t *= load(scale + j.at + c) * scale[i.at + r0 + r];
      if (bias) t += load(bias + j.at + c) + bias[i.at + r0 + r];
      store(s + r * LD + c, t);
    }
}

template <class T> void add_weight_sums(const RowVectors& v, const Block& i, const Block& j, int64_t r0, int64_t rows, bool diagonal, const T* w) {
  for (int64_t r = 0; r < rows; r++) {
    Vec<T> sum{};
    // 0 beyond the last column
    for (int64_t c = 0; c < j.rows; c += LANES<T>) sum += load(w + r * LD + c);
    v.weight_sums[i.at + r0 + r] += double(sum_of<T>(sum));
  }
  if (diagonal) return;
  for (int64_t c = 0; c < j.rows; c++) {
    double sum = 0;
    for (int64_t r = 0; r < rows; r++) sum += double(w[r * LD + c]);
    v.weight_sums[j.at + c] += sum;
  }
}

// Updates the running maxima of rows [at, at + n) from the largest similarity of this tile and
// rescales the sums so far.
template <class T>
void rescale(const Sweep& s, const RowVectors& v, int64_t at, int64_t n, T* largest, T* shift) {
  log_f_of<T>(s, largest, shift, padded(n, LANES<T>));
  T* so_far = static_cast<T*>(v.running_max) + at;
  double *sums = v.sums + at, *moments = sums + F_MOMENT * v.padded;
  for (int64_t r = 0; r < n; r++) {
    if (largest[r] == T(-__builtin_inf()) || !(shift[r] > so_far[r])) shift[r] = so_far[r];
    if (shift[r] != so_far[r]) {
      const double factor = __builtin_exp(double(so_far[r]) - double(shift[r]));
      sums[r] *= factor;
      moments[r] *= factor;
      so_far[r] = shift[r];
    }
    if (shift[r] == T(-__builtin_inf())) shift[r] = 0;  // every pair so far was excluded
  }
}

// A block's rows of the guide, in the layout of the first operand.
template <class T> void pack_guide(const Sweep& s, Block block, void* workspace) {
  Sweep guide{};
  guide.f = s.guide, guide.dim = guide.row_stride = s.guide_dim, guide.dtype = sizeof(T) == 4 ? FLOAT32 : FLOAT64;
  block.packed = block.guide;
  NativeProducts<T>::pack(guide, block, workspace);
}

// A panel of similarities to a kept tile.
template <class T> void keep_panel(const T* from, T* to, int64_t stride, int64_t cols) {
  for (int64_t r = 0; r < PANEL_ROWS; r++)
    for (int64_t c = 0; c < cols; c += LANES<T>) store(to + r * stride + c, load(from + r * LD + c));
}

template <class Products>
void tile(const Sweep& s, const RowVectors& v, const Block& i, const Block& j, void* memory, const KeptTile& kept) {
  using T = typename Products::T;
  const ThreadWorkspace<T> workspace(memory);
  const bool diagonal = !s.split && i.first == j.first;
  const bool gradient = s.gradient, online = s.form == Form::ONLINE;
  const PanelFunction<T> panel = panel_function<T, typename Products::Factors>(s, v, kept);
  const bool similarities = kept.what == Keep::SIMILARITIES;

  Panel<T> p(s);
  p.cols = j.rows;
  p.kept_stride = j.stride;
  p.two_sided = gradient ? j.anchor || diagonal : j.anchor && !diagonal;
  p.col_terms = p.two_sided && !diagonal;
  p.weight = s.weight;
  p.col_max = workspace.col_max;
  p.marked = v.largest_t || v.largest_guide;
  Marks* const marks = kept.marks ? static_cast<Marks*>(kept.marks) : workspace.marks;
  p.marks_stride = (kept.marks ? j.stride : MAX_BLOCK) / LANES<T>;
  const Int<T>* ids = static_cast<const Int<T>*>(v.ids);
  bool clash[MAX_BLOCK];
  p.row_ids = nullptr, p.col_ids = ids ? ids + j.at : nullptr, p.clash = clash;
  p.col = side<T>(v, j.at, workspace.col_shift);
  const int32_t* wanted = s.rows_of_terms;
  p.terms = false;
  for (int k = 0; k < SUM_COUNT; k++) {
    p.col_sums[k] = workspace.col_sums + k * MAX_BLOCK;
    if (wanted[k] >= 0) p.terms = true, std::memset(p.col_sums[k], 0, MAX_BLOCK * sizeof(T));
  }
  if (online) p.terms = wanted[F_MOMENT] >= 0;
  const bool weight_f = gradient && s.weight != WEIGHT_DF, weight_df = gradient && s.weight != WEIGHT_F;
  p.need_f = weight_f || wanted[F] >= 0 || wanted[F_MOMENT] >= 0;
  p.need_df = weight_df || wanted[DF] >= 0 || wanted[DF_MOMENT] >= 0;
  p.need_dtau = wanted[DTAU] >= 0;

  const T* const scale = Products::SCALES ? nullptr : static_cast<const T*>(v.scale);
  const T* const bias = static_cast<const T*>(v.bias);
  const bool weighted = s.weighted && p.marked;

  auto mark = [&](int64_t r0) {
    if (v.largest_guide) NativeProducts<T>::panel(i.guide, j.guide, s.guide_dim, j.rows, r0, workspace.guide);
    mark_pairs<T>(p, workspace.guide);
  };
  auto position = [&](int64_t r0) {  // the panel of rows [r0, r0 + PANEL_ROWS)
    p.rows = i.rows - r0 < PANEL_ROWS ? i.rows - r0 : PANEL_ROWS;
    p.row = side<T>(v, i.at + r0, workspace.row_shift + r0);
    p.row_max = workspace.row_max + r0;
    p.marks = marks + r0 * p.marks_stride;
    if (ids) {
      p.row_ids = ids + i.at + r0;
      find_clashes<T>(p.row_ids, p.col_ids, p.cols, clash);
    }
    p.excluded = 0;
    auto exclude = [&](int64_t d) {
      const int64_t at = i.first + r0 + d - j.first;
      if (at > -PANEL_ROWS && at < p.cols) p.diagonals[p.excluded++] = at;
    };
    if (!s.split) exclude(0);
    if (s.partner) exclude(s.partner), exclude(-s.partner);
    for (int k = 0; k < SUM_COUNT; k++) p.row_sums[k] = wanted[k] >= 0 ? v.sums + k * v.padded + i.at + r0 : nullptr;
  };
  const bool keep_tile = online || (gradient && Products::WEIGHTS_IN_PLACE);
  const bool read_kept = similarities && kept.filled;
  auto similarities_at = [&](int64_t r0, T* computed) {
    p.s = computed;
    p.kept = kept.at ? static_cast<T*>(kept.at) + r0 * p.kept_stride : nullptr;
    p.t = read_kept ? p.kept : p.s;
    p.t_stride = read_kept ? p.kept_stride : LD;
  };

  if (online || s.form == Form::T_MAX)
    for (int64_t c = 0; c < MAX_BLOCK; c++) workspace.col_max[c] = T(-__builtin_inf());
  for (int64_t r0 = 0; r0 < i.rows; r0 += PANEL_ROWS) {
    position(r0);
    similarities_at(r0, workspace.tile + (keep_tile ? r0 : r0 % Products::SIMILARITY_ROWS) * LD);
    if (!kept.filled) {
      Products::similarities(s, v, i, j, r0, p.s);
      scale_and_shift<T>(scale, weighted ? nullptr : bias, i, j, r0, p.s);
      if (weighted) {
        mark(r0);
        scale_and_shift<T>(nullptr, bias, i, j, r0, p.s);
      }
      if (similarities) keep_panel<T>(p.s, p.kept, p.kept_stride, p.cols);
    }
    if (p.marked && !weighted && !kept.filled) mark(r0);
    if (online) {
      Maximum<T>::run(p);
      continue;
    }
    panel(p);
    if (v.weight_sums) add_weight_sums<T>(v, i, j, r0, p.rows, diagonal, p.s);
    if constexpr (!Products::WEIGHTS_IN_PLACE)
      if (gradient) Products::weights(v, i, j, r0, p.s, workspace.rest);
  }

  if (online) {
    rescale<T>(s, v, i.at, i.rows, workspace.row_max, workspace.row_shift);
    if (p.two_sided) rescale<T>(s, v, j.at, j.rows, workspace.col_max, workspace.col_shift);
    for (int64_t r0 = 0; r0 < i.rows; r0 += PANEL_ROWS) {
      position(r0);
      similarities_at(r0, workspace.tile + r0 * LD);
      panel(p);
    }
  }
  if (s.form == Form::T_MAX) {
    T* best = static_cast<T*>(v.running_max);
    auto merge = [best](const T* found, int64_t at, int64_t n) {
      for (int64_t r = 0; r < n; r++)
        if (found[r] > best[at + r] || found[r] != found[r]) best[at + r] = found[r];
    };
    merge(workspace.row_max, i.at, i.rows);
    if (p.two_sided) merge(workspace.col_max, j.at, j.rows);
  }
  if (p.col_terms)
    for (int k = 0; k < SUM_COUNT; k++)
      if (wanted[k] >= 0)
        for (int64_t c = 0; c < j.rows; c++) v.sums[k * v.padded + j.at + c] += double(p.col_sums[k][c]);
  if (gradient) Products::products(s, workspace.tile, workspace.rest, i, j, diagonal);
}

template <class T> void row_step(const RowStepCall& call) {
  const RowNumbers<T> numbers(call);
  auto inputs = reinterpret_cast<const T* const*>(call.inputs);
  auto outputs = reinterpret_cast<T* const*>(call.outputs);
  with_row_step<T>(call.step, [&](auto step) {
    for (int64_t at = call.begin; at < call.end; at += LANES<T>) decltype(step)::rows(inputs, outputs, at, numbers);
  });
}

// y = function(x), for tests.
template <class T, Vec<T> function(Vec<T>)> void apply(const void* x, void* y, int64_t n) {
  for (int64_t c = 0; c < n; c += LANES<T>) store(static_cast<T*>(y) + c, function(load(static_cast<const T*>(x) + c)));
}

template <class Products> constexpr TileKernels tile_kernels(Dtype operands) {
  using T = typename Products::T;
  return {ALPHACL_TEXT(ALPHACL_ISA), operands, sizeof(T) == 4 ? FLOAT32 : FLOAT64,
          Products::MULTIPLE, Products::LARGEST, Products::FEWEST, Products::packed_bytes, Products::df_bytes,
          [](int64_t dim, int64_t stride) { return NativeProducts<T>::packed_bytes(dim, stride, false); }, mark_bytes<T>,
          [](int64_t dim, int64_t guide_dim, int64_t stride) {
            const int64_t own = Products::workspace_bytes(dim, stride);
            const int64_t of_guide = NativeProducts<T>::workspace_bytes(guide_dim, stride);
            return padded(ThreadWorkspace<T>::bytes() + (own > of_guide ? own : of_guide), 4096);
          },
          [](const Sweep& s, const Block& b, void* memory) {
            Products::pack(s, b, ThreadWorkspace<T>(memory).rest);
            if (b.guide) pack_guide<T>(s, b, ThreadWorkspace<T>(memory).rest);
            if (b.df) std::memset(b.df, 0, Products::df_bytes(s.dim, b.stride));
          },
          tile<Products>, Products::in_place,
          [](const Sweep& s, const Block& b, double scale, void* memory) {
            Products::unpack(s, b, scale, ThreadWorkspace<T>(memory).tile);
          },
          add_columns<T>, normalize_pairs<T>, finish_pairs<T>, unit_rows<T>, row_step<T>, same_id_rows<T>,
          apply<T, vexp<T>>, apply<T, vlog<T>>, apply<T, Products::Factors::exponential>};
}

}  // namespace

// The kernels for operands of a dtype, or null.
const TileKernels* ALPHACL_JOIN(alphacl_kernels_, ALPHACL_ISA)(Dtype operands) {
#if defined(ALPHACL_USE_AMX) || defined(ALPHACL_USE_DOT)
#if defined(ALPHACL_USE_AMX)
  static constexpr TileKernels bfloat16 = tile_kernels<AmxProducts>(BFLOAT16);
#else
  static constexpr TileKernels bfloat16 = tile_kernels<DotProducts>(BFLOAT16);
#endif
  return operands == BFLOAT16 ? &bfloat16 : nullptr;
#else
  static constexpr TileKernels float32 = tile_kernels<NativeProducts<float>>(FLOAT32);
  static constexpr TileKernels float64 = tile_kernels<NativeProducts<double>>(FLOAT64);
  return operands == FLOAT32 ? &float32 : operands == FLOAT64 ? &float64 : nullptr;
#endif
}
