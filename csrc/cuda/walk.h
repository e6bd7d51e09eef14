// How a block walks over the tiles of its rows: which tiles, how they come into shared memory,
// their similarities.
#pragma once

#include "engine.h"
#include "pairs.h"
#include "problem.h"

namespace alphacl {

// tiles in shared memory: one is multiplied while the other is being copied
constexpr int STAGES = 2;

// The place of a row of a block. With two views a block holds 32 pairs: first the rows of one view,
// then their partners.
struct Place {
  int64_t row;   // number in f; another row's if this one does not exist
  int64_t pair;  // rows of the two sides with the same number are the same pair
  bool keep;     // the row exists
  DEVICE Place(int64_t block, int i, int64_t n, int64_t start, int64_t half, bool paired) {
    pair = paired ? block * (SIDE / 2) + (i & (SIDE / 2 - 1)) : block * SIDE + i;
    const int64_t last = (paired ? half : n) - 1;
    keep = pair <= last;
    row = start + (keep ? pair : last) + (paired && i >= SIDE / 2 ? half : 0);
  }
};
DEVICE Place row_place(const Sweep& a, int64_t block, int i) {
  return Place(block, i, a.n_rows, a.row_start, a.half, a.rows_paired);
}
DEVICE Place column_place(const Sweep& a, int64_t tile, int j) {
  return Place(tile, j, a.n_cols, a.col_start, a.half, a.cols_paired);
}

// The order in which a block meets the column tiles: a ring that starts with the tile of the
// block's first pair. A split takes the positions [begin, end). The first `special` positions hold
// pairs that do not meet.
struct Schedule {
  int64_t tiles, first;
  int begin, end, special;
  bool ragged;  // the last tile holds columns that do not exist
  DEVICE Schedule(const Sweep& a, int64_t block, int split) {
    const int row_pairs = a.rows_paired ? SIDE / 2 : SIDE, column_pairs = a.cols_paired ? SIDE / 2 : SIDE;
    tiles = (a.n_cols + SIDE - 1) / SIDE;
    first = block * row_pairs / column_pairs;
    special = a.exclude ? int((block * row_pairs + row_pairs - 1) / column_pairs - first) + 1 : 0;
    first %= tiles;
    begin = a.begin, end = a.end;
    // Half way round an even ring both ends meet: the first half of the blocks serves that tile.
    if (a.triangle && a.symmetric && tiles % 2 == 0 && block >= tiles / 2 && end > tiles / 2) end = int(tiles / 2);
    // rows that do not exist must not count for columns
    if (a.symmetric && (block + 1) * SIDE > a.n_rows) special = end;
    const int each = (end - begin + a.splits - 1) / a.splits;
    begin = begin + split * each < end ? begin + split * each : end;
    end = begin + each < end ? begin + each : end;
    ragged = a.n_cols % SIDE != 0;
  }
  DEVICE int64_t tile(int position) const { return (first + position) % tiles; }
  DEVICE bool masked(int position) const { return position < special || (ragged && tile(position) == tiles - 1); }
};

// Row scalars of one side in shared memory: vector v of row i is at v·SIDE + i.
enum Scalar : int {
  SCALE = 0, BIAS = 1, MOMENT_ORIGIN = 2, ROW_WEIGHT = 3, SHIFT = 4, ARGUMENT_OFFSET = 5, BASELINE = 6, LARGEST_T = 7, ALL_SCALARS = 8
};
// Fast kernels need two: the scale, and the row weight (pair_grad) or the moment's origin
// (row_sums).
constexpr int FAST_SCALARS = 2, SECOND = 1;

template <class T, int COUNT> struct Scalars {
  T x[COUNT];
};
template <class T, int COUNT> DEVICE Scalars<T, COUNT> scalars(const Sweep& a, int64_t row, bool anchor, T no_shift, T inv_unit) {
  const auto get = [row](const void* v, T absent) { return v ? static_cast<const T*>(v)[row] : absent; };
  const auto of_anchor = [&](const void* v, T absent) { return anchor ? get(v, absent) : absent; };
  Scalars<T, COUNT> s;
  s.x[SCALE] = get(a.scale, 1);
  if constexpr (COUNT == FAST_SCALARS) {
    s.x[SECOND] = a.pair_grad ? of_anchor(a.row_weight, 0) * inv_unit : of_anchor(a.moment_origin, 0);
  } else {
    s.x[BIAS] = get(a.bias, 0);
    s.x[MOMENT_ORIGIN] = of_anchor(a.moment_origin, 0);
    s.x[ROW_WEIGHT] = of_anchor(a.row_weight, 0) * inv_unit;
    s.x[SHIFT] = of_anchor(a.shift, no_shift);
    s.x[ARGUMENT_OFFSET] = of_anchor(a.argument_offset, 0);
    s.x[BASELINE] = of_anchor(a.baseline, 0);
    s.x[LARGEST_T] = of_anchor(a.largest_t, INFINITE<T>);
  }
  return s;
}

// A block's shared memory. E is the engine; with CHUNKS, rows are longer than E::K features and
// tiles of both sides pass by.
template <class E, bool CHUNKS, int SCALARS> struct Memory {
  using T = typename E::T;
  static constexpr int TILE = E::place(SIDE), VECTORS = SCALARS * SIDE * int(sizeof(T));
  static constexpr int STAGE = (CHUNKS ? 2 : 1) * TILE;
  static constexpr int ROW_VECTORS = STAGES * STAGE + (CHUNKS ? 0 : TILE), COL_VECTORS = ROW_VECTORS + VECTORS;
  static constexpr int REST = COL_VECTORS + STAGES * VECTORS;
  static DEVICE unsigned char* rows(int stage) { return device::shared() + (CHUNKS ? stage * STAGE + TILE : STAGES * STAGE); }
  static DEVICE unsigned char* cols(int stage) { return device::shared() + stage * STAGE; }
  static DEVICE T* row_scalars() { return reinterpret_cast<T*>(device::shared() + ROW_VECTORS); }
  static DEVICE T* col_scalars(int stage) { return reinterpret_cast<T*>(device::shared() + COL_VECTORS + stage * VECTORS); }
  static DEVICE unsigned char* rest() { return device::shared() + REST; }
};

// Starts the copies of features [from, from + K) of a block's 64 rows.
template <class E, class Where> DEVICE void fetch(const Sweep& a, unsigned char* to, int from, Where&& place) {
  using Element = typename E::Element;
  constexpr int PER = 16 / int(sizeof(Element)), CHUNKS = E::K / PER, STEP = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0 && SIDE % STEP == 0);
  const int chunk = device::thread() % CHUNKS, feature = from + chunk * PER, left = a.dim - feature;
  const auto* f = static_cast<const Element*>(a.f);
#pragma unroll 1
  for (int i = device::thread() / CHUNKS; i < SIDE; i += STEP) {
    const Element* source = f + place(i).row * a.stride + feature;
    unsigned char* target = to + E::place(i) + 16 * chunk;
    if (a.aligned) {
      device::copy16(target, left > 0 ? source : f, left >= PER ? 16 : left > 0 ? left * int(sizeof(Element)) : 0);
    } else {
      for (int e = 0; e < PER; ++e) reinterpret_cast<Element*>(target)[e] = e < left ? source[e] : Element(0);
    }
  }
}

// Prepares the part of a tile that this thread has fetched and waited for.
template <class E> DEVICE void prepare(unsigned char* tile) {
  constexpr int CHUNKS = E::K * int(sizeof(typename E::Element)) / 16, STEP = THREADS / CHUNKS;
  unsigned char* const first = tile + 16 * (device::thread() % CHUNKS);
#pragma unroll 4
  for (int i = device::thread() / CHUNKS; i < SIDE; i += STEP) E::prepare(first + E::place(i));
}

// A tile whose similarities are there.
template <class T> struct TileAt {
  int64_t tile;
  int position;
  bool masked;  // some of its pairs do not meet
  const T* cols;  // the columns' scalars
  const unsigned char* features;  // of its columns, where whole rows fit
};

// Calls use(s, tile) for every tile of this block's part of the schedule; s holds the products
// ⟨f_i, f_j⟩. Between two calls all threads pass a barrier.
template <class E, bool CHUNKS, int SCALARS, class Use>
DEVICE void walk(const Sweep& a, const Schedule& schedule, int64_t block, typename E::T no_shift, typename E::T inv_unit, Use&& use) {
  using T = typename E::T;
  using M = Memory<E, CHUNKS, SCALARS>;
  const int thread = device::thread(), chunks = CHUNKS ? (a.dim + E::K - 1) / E::K : 1;
  const int steps = (schedule.end - schedule.begin) * chunks;
  const auto tile_of = [&](int step) { return schedule.tile(schedule.begin + step / chunks); };

  const auto start = [&](int step) {
    const int stage = step % STAGES, from = step % chunks * E::K;
    const int64_t tile = tile_of(step);
    fetch<E>(a, M::cols(stage), from, [&](int j) { return column_place(a, tile, j); });
    if (CHUNKS || step == 0) fetch<E>(a, M::rows(stage), from, [&](int i) { return row_place(a, block, i); });
  };
  const auto column_scalars = [&](int step) {
    return scalars<T, SCALARS>(a, column_place(a, tile_of(step), thread).row, a.cols_anchor, no_shift, inv_unit);
  };
  const auto put = [&](T* to, const Scalars<T, SCALARS>& s) {
#pragma unroll
    for (int v = 0; v < SCALARS; ++v) to[v * SIDE + thread] = s.x[v];
  };

  if (thread < SIDE)
    put(M::row_scalars(), scalars<T, SCALARS>(a, row_place(a, block, thread).row, a.rows_anchor, no_shift, inv_unit));
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) {
      start(step);
      if (thread < SIDE && step % chunks == 0) put(M::col_scalars(step / chunks % STAGES), column_scalars(step));
    }
    device::copy_commit();
  }
  T s[8][4];
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    device::copy_wait<STAGES - 2>();
    if constexpr (E::PREPARES) {
      prepare<E>(M::cols(step % STAGES));
      if (CHUNKS || step == 0) prepare<E>(M::rows(step % STAGES));
    }
    device::sync();
    const int next = step + STAGES - 1;
    const bool more = next < steps, scalars_too = more && thread < SIDE && next % chunks == 0;
    Scalars<T, SCALARS> ahead;
    if (more) start(next);
    device::copy_commit();
    if (scalars_too) ahead = column_scalars(next);
    if (step % chunks == 0) {
#pragma unroll
      for (int m = 0; m < 8; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][e] = 0;
    }
    E::similarities(s, M::rows(step % STAGES), M::cols(step % STAGES));
    if (step % chunks == chunks - 1) {
      const int at = schedule.begin + step / chunks;
      const T* cols = M::col_scalars(step / chunks % STAGES);
      use(s, TileAt<T>{schedule.tile(at), at, schedule.masked(at), cols, M::cols(step % STAGES)});
    }
    if (scalars_too) put(M::col_scalars(next / chunks % STAGES), ahead);
  }
  device::copy_wait<0>();
  device::sync();  // the row scalars are there even where there is no tile
}

// Which of a thread's 32 pairs meet.
struct Meeting {
  uint32_t bits = ~0u;
  DEVICE bool operator()(int r, int q) const { return bits >> Fragment::number(r, q) & 1; }

  static DEVICE Meeting of(const Sweep& a, int64_t block, int64_t tile) {
    const Fragment fragment;
    Meeting meeting{0};
#pragma unroll 1
    for (int r = 0; r < Fragment::ROWS; ++r) {
      const Place i = row_place(a, block, fragment.row(r));
#pragma unroll 1
      for (int q = 0; q < Fragment::COLUMNS; ++q) {
        const Place j = column_place(a, tile, fragment.column(q));
        if (i.keep && j.keep && !(a.exclude && i.pair == j.pair)) meeting.bits |= 1u << Fragment::number(r, q);
      }
    }
    return meeting;
  }

  // As the general kernels need it: any two rows may have the same id.
  static DEVICE Meeting of(const Sweep& a, int64_t block, int64_t tile, bool masked) {
    Meeting meeting = masked ? of(a, block, tile) : Meeting{};
    if (a.ids) meeting.leave_out_equal_ids(a, block, tile);
    return meeting;
  }
  DEVICE void leave_out_equal_ids(const Sweep& a, int64_t block, int64_t tile) {
    const Fragment fragment;
    int32_t own[Fragment::ROWS];
#pragma unroll
    for (int r = 0; r < Fragment::ROWS; ++r) own[r] = a.ids[row_place(a, block, fragment.row(r)).row];
#pragma unroll 1
    for (int q = 0; q < Fragment::COLUMNS; ++q) {
      const int32_t other = a.ids[column_place(a, tile, fragment.column(q)).row];
#pragma unroll
      for (int r = 0; r < Fragment::ROWS; ++r)
        if (own[r] == other) bits &= ~(1u << Fragment::number(r, q));
    }
  }
};

// A sum over a row arrives in thousands of parts: Kahan's compensated sum. An infinite total stays
// infinite.
template <class T> DEVICE void add(T& total, T& comp, T x) {
  const T y = x - comp, sum = total + y, rest = (sum - total) - y;
  total = sum;
  comp = sum - sum == 0 ? rest : T(0);
}
// The sum over the four lanes that share a row.
template <class T> DEVICE T row_sum(T x) {
  x += device::shuffle_xor(x, 1);
  return x + device::shuffle_xor(x, 2);
}
template <class T> DEVICE T row_max(T x) {
  x = larger(x, device::shuffle_xor(x, 1));
  return larger(x, device::shuffle_xor(x, 2));
}
// The sum over the eight lanes that share a column.
template <class T> DEVICE T column_sum(T x) {
  x += device::shuffle_xor(x, 4);
  x += device::shuffle_xor(x, 8);
  return x + device::shuffle_xor(x, 16);
}
template <class T> DEVICE T column_max(T x) {
  for (int lanes = 4; lanes <= 16; lanes *= 2) x = larger(x, device::shuffle_xor(x, lanes));
  return x;
}
// The sums of all of a thread's columns at once, by recursive halving. x[q] comes in for the
// fragment's column q. In each of three exchanges a lane sends half of its values to the lane that
// keeps them. In the end lane group g holds the sums of the columns g·COUNT/8 to (g + 1)·COUNT/8 − 1
// in x[0] to x[COUNT/8 − 1].
template <int MASK = 16, class T, int COUNT> DEVICE void column_sums(T (&x)[COUNT]) {
  constexpr int HALF = COUNT * MASK / 32;
  const bool upper = (device::thread() % 32 & MASK) != 0;
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    const T mine = upper ? x[i + HALF] : x[i], other = upper ? x[i] : x[i + HALF];
    x[i] = mine + device::shuffle_xor(other, MASK);
  }
  if constexpr (MASK > 4) column_sums<MASK / 2>(x);
}

}  // namespace alphacl
