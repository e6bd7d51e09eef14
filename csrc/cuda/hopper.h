// The fast kernels (sweeps.h) of bfloat16, float16 and TF32 rows for sm_90a: products of whole
// warpgroups (wgmma), which run while exponentials are computed. TF32 rows are floats that have been
// rounded before (rows.h).
//
// A block has 128 rows, 64 for each of two consumer warpgroups; a producer warpgroup copies the
// tiles of columns that they walk over into stages of shared memory, one after the other. A stage
// is `full` when its copies and its columns' scalars have arrived, `empty` when both consumers have
// read it. A consumer asks for the similarities S of the next tile before it takes this one's
// exponentials. Its weights W are the other product's operand from registers, by quarters: one is
// computed while those before are being multiplied, and the last ones still are when the next tile
// begins. For float16 and TF32 rows all weights of a tile are computed while the one before is being
// multiplied.
//
// wgmma multiplies floats only if the terms of a sum are neighbours in shared memory. The gradient
// sums over columns, so its producer also writes each tile of TF32 columns transposed.
//
// ptxas decides whether products really overlap with anything: it must not find them "serialized"
// (`python -m tools.cuda_resources`). The waits were placed accordingly.
#pragma once

#include <optional>

#include "launch.h"
#include "sweeps.h"

namespace alphacl::hopper {

constexpr int GROUP = 128, CONSUMERS = 2, GROUP_ROWS = 64, BLOCK_ROWS = CONSUMERS * GROUP_ROWS;
constexpr int THREADS = (CONSUMERS + 1) * GROUP;
// Bytes of a row in shared memory, a box of 64 features, or of 32 of TF32; a tile of more is several
// boxes. An instruction multiplies 32 bytes of each row.
constexpr int LINE = 128, STEP = 32;
using device::Factors;
using device::rounded_to_tf32;

// What the dtypes of rows differ in: the bytes of a feature; whether weights are lifted before they
// are rounded (`Lift`); whether the gradient needs its columns transposed; whether it rounds the
// weights of a tile only when the tile before has been multiplied.
template <Factors TYPE> struct Format {
  static constexpr int BYTES = 2;
  static constexpr bool LIFTS = TYPE == Factors::F16, TRANSPOSES = false, LATE = LIFTS;
  static DEVICE uint32_t pack(float low, float high) {
    return TYPE == Factors::BF16 ? device::pack_bf16(low, high) : device::pack_f16(low, high);
  }
  // Rounds the weights of 8 columns to operands of a product. A thread has two neighbouring columns
  // of two rows.
  static DEVICE void put(uint32_t (*to)[4], int eight, const float (&x)[4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) to[eight / 2][eight % 2 * 2 + r] = pack(x[2 * r], x[2 * r + 1]);
  }
};
// An instruction multiplies 8 columns, and a thread supplies operands t and t + 4 of them. The order of
// the columns is free: `Memory::transpose` permutes them so that these are columns 2t and 2t + 1, which
// the thread's accumulators hold already.
template <> struct Format<Factors::TF32> {
  static constexpr int BYTES = 4;
  static constexpr bool LIFTS = false, TRANSPOSES = true, LATE = true;
  static DEVICE void put(uint32_t (*to)[4], int eight, const float (&x)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[eight][e] = rounded_to_tf32(x[e % 2 * 2 + e / 2]);
  }
};

struct Args {
  Sweep sweep;
  device::TensorMap rows[2], cols[2];  // of a tile's first half and of its second
};

// Where the rows of a side's tiles are: of two views a tile of SIZE rows holds SIZE/2 pairs, first
// the rows of one view, then their partners. Rows that do not exist are zeros in shared memory.
template <int SIZE> struct Tiling {
  int count, start, half, pairs;  // pair numbers in all, and in a tile
  bool paired;
  DEVICE Tiling(int64_t n, int64_t start, int64_t half, bool paired)
      : count(int(paired ? half : n)), start(int(start)), half(int(half)), pairs(paired ? SIZE / 2 : SIZE), paired(paired) {}
  DEVICE int pair(int tile, int i) const { return tile * pairs + (paired ? i % (SIZE / 2) : i); }
  DEVICE int row(int tile, int i) const { return start + pair(tile, i) + (paired && i >= SIZE / 2 ? half : 0); }
  // in its tensor map
  DEVICE int y(int tile, int second) const { return tile * pairs + (paired ? 0 : second * (SIZE / 2)); }
};
DEVICE Tiling<BLOCK_ROWS> row_tiling(const Sweep& a) { return {a.n_rows, a.row_start, a.half, a.rows_paired != 0}; }
template <int N> DEVICE Tiling<N> column_tiling(const Sweep& a) {
  return {a.n_cols, a.col_start, a.half, a.cols_paired != 0};
}

// A split of a block's schedule, as `alphacl::Schedule`, and where in it the block is.
template <int N> struct Schedule {
  int tiles, tile, at, end, special;  // now at position `at`, which is tile `tile`
  bool ragged;
  DEVICE explicit Schedule(const Sweep& a) {
    const int block = device::block_x(), rows = row_tiling(a).pairs, cols = column_tiling<N>(a).pairs;
    tiles = int((a.n_cols + N - 1) / N);
    int from = 0, to = tiles;
    if (a.symmetric) {
      from = a.begin, to = a.end;
      // Half way round an even ring both ends meet: the first half of the blocks serves that tile.
      if (a.triangle && tiles % 2 == 0 && block >= tiles / 2 && to > tiles / 2) to = tiles / 2;
    }
    const int first = block * rows / cols, each = (to - from + a.splits - 1) / a.splits;
    special = a.exclude ? (block * rows + rows - 1) / cols - first + 1 : 0;
    // rows that do not exist must not count for columns
    if (a.symmetric && (block + 1) * BLOCK_ROWS > a.n_rows) special = to;
    ragged = a.n_cols % N != 0;
    at = from + int(device::block_y()) * each < to ? from + int(device::block_y()) * each : to;
    end = at + each < to ? at + each : to;
    // a 64-bit remainder would be a call, which takes too many registers
    tile = int((unsigned(first) + unsigned(at)) % unsigned(tiles));
  }
  DEVICE bool none() const { return at >= end; }
  DEVICE bool last() const { return at == end - 1; }
  DEVICE bool masked() const { return at < special || (ragged && tile == tiles - 1); }
  DEVICE void next() {
    ++at;
    if (++tile == tiles) tile = 0;
  }
};

// Which pairs of a tile count for a consumer's thread, whose columns are 8m + 2t + p, as distances
// from its first column.
template <int N> struct Mask {
  int own[2], last, apart;  // apart: by how much the second half's columns are numbered too high
  bool exists[2];           // a row that does not exist must not count for the columns
  DEVICE Mask(const Sweep& a, int tile, int row) {
    const Tiling<BLOCK_ROWS> rows = row_tiling(a);
    const Tiling<N> cols = column_tiling<N>(a);
    const int from = cols.pair(tile, 0) + 2 * (device::thread() % 4);
    for (int r = 0; r < 2; ++r) {
      const int pair = rows.pair(device::block_x(), row + 8 * r);
      own[r] = a.exclude ? pair - from : -1, exists[r] = !a.symmetric || pair < rows.count;
    }
    last = cols.count - 1 - from;
    apart = cols.paired ? N / 2 : 0;
  }
  DEVICE bool counts(int r, int column) const {
    const int shift = column >= N / 2 ? apart : 0;
    return exists[r] && column != own[r] + shift && column <= last + shift;
  }
};

// A tile's stage in shared memory and the slot of its columns' scalars. Scalars have one slot more
// than there are stages, because a stage may be refilled while its scalars are still being read.
template <int STAGES> struct StageOf {
  int stage = 0, phase = 0, scalars = 0;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
    if (++scalars == STAGES + 1) scalars = 0;
  }
};

struct alignas(16) Four {
  float x[4];
};
struct alignas(8) Two {
  float x[2];
};

// Shared memory. K features, N columns in a tile; Scalars holds two neighbouring columns. With
// TRANSPOSED a stage holds its columns a second time. That leaves no room for the rows: they pass
// through the last stage into registers, before its first tile.
template <int K, int N, int STAGES, class Scalars, Factors TYPE, bool TRANSPOSED = false> struct Memory {
  static constexpr int BOXES = K * Format<TYPE>::BYTES / LINE, ROWS = BLOCK_ROWS * BOXES * LINE, STAGE = N * BOXES * LINE;
  static constexpr int EACH = (TRANSPOSED ? 2 : 1) * STAGE, STAGES_AT = TRANSPOSED ? 0 : ROWS;
  static constexpr int ROWS_AT = TRANSPOSED ? (STAGES - 1) * EACH : 0;
  static constexpr int VECTORS = N / 2 * int(sizeof(Scalars));
  static constexpr int VECTORS_AT = STAGES_AT + STAGES * EACH, BARRIERS_AT = VECTORS_AT + (STAGES + 1) * VECTORS;
  static constexpr int BYTES = BARRIERS_AT + (1 + (TRANSPOSED ? 3 : 2) * STAGES) * int(sizeof(uint64_t));
  static_assert(!TRANSPOSED || ROWS <= EACH, "the rows pass through a stage");
  static constexpr int STEPS = K * Format<TYPE>::BYTES / STEP;  // of the product of two rows
  static constexpr int WORDS = Format<TYPE>::BYTES / 2;         // of 16 bits, in which tensor maps count
  static DEVICE unsigned char* rows(int group) { return device::shared() + ROWS_AT + group * (GROUP_ROWS * BOXES * LINE); }
  static DEVICE unsigned char* stage(int k) { return device::shared() + STAGES_AT + k * EACH; }
  static DEVICE unsigned char* transposed(int k) { return stage(k) + STAGE; }
  static DEVICE Scalars* scalars(int place) {
    return reinterpret_cast<Scalars*>(device::shared() + VECTORS_AT + place * VECTORS);
  }
  static DEVICE uint64_t* rows_full() { return reinterpret_cast<uint64_t*>(device::shared() + BARRIERS_AT); }
  static DEVICE uint64_t* full(int k) { return rows_full() + 1 + k; }
  static DEVICE uint64_t* empty(int k) { return rows_full() + 1 + STAGES + k; }
  static DEVICE uint64_t* turned(int k) { return rows_full() + 1 + 2 * STAGES + k; }

  static DEVICE void initialise() {
    if (device::thread() == 0) {
      device::barrier_init(rows_full(), 1);
      for (int k = 0; k < STAGES; ++k) {
        device::barrier_init(full(k), 1 + N / 32);
        device::barrier_init(empty(k), CONSUMERS * 4);
        if (TRANSPOSED) device::barrier_init(turned(k), GROUP / 32);
      }
      device::barrier_publish();
    }
    device::sync();
  }

  // Returns x, but the compiler cannot know that: it computes addresses again from the result instead of
  // keeping them in registers.
  static DEVICE int anew(int x) {
    uint32_t held[1] = {uint32_t(x)};
    device::hold_registers(held);
    return int(held[0]);
  }

  // The producer warpgroup: its first N threads load one column's scalars each, and thread 0 also
  // starts the copies. All of them transpose a tile when the next one's copies are on their way.
  static DEVICE void produce(const Args& args, float inv_unit) {
    const Sweep& a = args.sweep;
    const int thread = device::thread() - CONSUMERS * GROUP;
    const Tiling<N> cols = column_tiling<N>(a);
    Schedule<N> schedule(a);
    const bool loads = thread < N;
    if ((!TRANSPOSED && !loads) || schedule.none()) return;
    if (thread == 0) {
      const Tiling<BLOCK_ROWS> tiling = row_tiling(a);
      constexpr int RUN = N / 2;  // rows of a box
      device::barrier_expect(rows_full(), ROWS);
      for (int group = 0; group < CONSUMERS; ++group)
        for (int box = 0; box < BOXES; ++box)
          for (int from = 0; from < GROUP_ROWS; from += RUN)
            device::tensor_copy(rows(group) + (box * GROUP_ROWS + from) * LINE, &args.rows[group], 64 * box,
                                tiling.y(device::block_x(), group) + from, rows_full());
    }
    const auto scalars_of = [&](int tile) {
      const int i = TRANSPOSED ? anew(thread) : thread;
      const bool exists = loads && cols.pair(tile, i) < cols.count;
      const int64_t row = exists ? cols.row(tile, i) : cols.start;
      return alphacl::scalars<float, FAST_SCALARS>(a, row, a.cols_anchor, 0.0f, inv_unit);
    };
    StageOf<STAGES> now, before;
    alphacl::Scalars<float, FAST_SCALARS> ahead = scalars_of(schedule.tile);
    const auto fill = [&] {
      // In a fresh barrier the phase before the first counts as complete. Where rows pass through a
      // stage, its first phase is theirs.
      device::barrier_wait(empty(now.stage), now.phase ^ (TRANSPOSED && now.stage == STAGES - 1 ? 0 : 1));
      if (thread == 0) {
        device::barrier_expect(full(now.stage), STAGE);
        for (int second = 0; second < 2; ++second)
          for (int box = 0; box < BOXES; ++box)
            device::tensor_copy(stage(now.stage) + (box * N + second * (N / 2)) * LINE, &args.cols[second], 64 * box,
                                cols.y(schedule.tile, second), full(now.stage));
      }
      if (loads) {
        Scalars& to = scalars(now.scalars)[thread / 2];
        to.x[thread % 2] = ahead.x[SCALE];
        if constexpr (sizeof(Scalars) == sizeof(Four)) to.x[2 + thread % 2] = ahead.x[SECOND] * ahead.x[SCALE];
        device::sync_warp();
        if (thread % 32 == 0) device::barrier_arrive(full(now.stage));
      }
      schedule.next();
      now.next();
      if (!schedule.none()) ahead = scalars_of(schedule.tile);
    };
    if constexpr (!TRANSPOSED) {
#pragma unroll 1
      while (!schedule.none()) fill();
    } else {
#pragma unroll 1
      for (bool first = true, more = true; more; first = false) {
        more = !schedule.none();
        const StageOf<STAGES> at = now;
        if (more) fill();
        if (!first) transpose(before, thread);
        before = at;
      }
    }
  }

  // Waits for a stage's tile and writes its transpose: a line holds 32 columns of one feature, and each
  // group of eight columns is stored in the order 0, 2, 4, 6, 1, 3, 5, 7. Every lane writes another
  // feature, so the lanes use different banks.
  static DEVICE void transpose(const StageOf<STAGES>& now, int thread) {
    constexpr int IN_LINE = LINE / 4, LINES = N / IN_LINE * BOXES / (GROUP / 32);  // columns; lines of a thread
    static_assert(LINES > 0 && N / IN_LINE % LINES == 0);
    const uint32_t number = anew(thread), warp = number / 32, lane = number % 32;
    const uint32_t box = warp % BOXES, first = warp / BOXES * LINES;
    device::barrier_wait(full(now.stage), now.phase);
#pragma unroll 1
    for (uint32_t line = first; line < first + LINES; ++line) {
      const unsigned char* const from = stage(now.stage) + (box * N + line * IN_LINE) * LINE;
      unsigned char* const to = transposed(now.stage) + (line * K + box * IN_LINE + lane) * LINE;
#pragma unroll
      for (int piece = 0; piece < LINE / 16; ++piece) {  // which are swizzled
        Four x;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 2 * i + piece % 2;  // of eight
          x.x[i] = *reinterpret_cast<const float*>(from + (8 * (piece / 2) + column) * LINE + (4 * lane ^ 16 * column));
        }
        *reinterpret_cast<Four*>(to + 16 * (piece ^ lane % 8)) = x;
      }
    }
    device::operands_written();
    device::sync_warp();
    if (lane == 0) device::barrier_arrive(turned(now.stage));
  }

  // A consumer has read a stage.
  static DEVICE void release(int k) {
    device::sync_warp();
    if (device::thread() % 32 == 0) device::barrier_arrive(empty(k));
  }

  // Starts S (64, N) = a warpgroup's rows · a stage's columns.
  static DEVICE void similarities(float (&s)[N / 2], int group, int k) {
    // Each tile tells the compiler again that all lanes agree: otherwise eight descriptors of the
    // rows would stay in registers.
    const uint64_t a = device::matrix_descriptor(rows(device::uniform(group)), 0, 8 * LINE);
    const uint64_t b = device::matrix_descriptor(stage(k), 0, 8 * LINE);
    device::hold_registers(s);
    device::product_begin();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {  // a descriptor counts in 16 bytes
      const int box = step / 4, within = step % 4 * 2;
      device::product_ss<TYPE, N, 0>(s, a + box * (GROUP_ROWS * LINE / 16) + within, b + box * (N * LINE / 16) + within, step > 0);
    }
    device::product_commit();
  }

  // The same with a warpgroup's rows in registers, which spares shared memory a third of its reads.
  using Rows = uint32_t[STEPS][4];
  static DEVICE void load_rows(Rows& a, int group) {
    const int row = device::thread() % GROUP / 32 * 16 + Fragment::matrix() % 2 * 8 + Fragment::matrix_row();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int piece = step % 4 * 2 + Fragment::matrix() / 2;  // of 16 bytes, which are swizzled
      device::load_matrices(a[step], rows(group) + step / 4 * (GROUP_ROWS * LINE) + row * LINE + (piece ^ row % 8) * 16);
    }
  }
  static DEVICE void similarities(float (&s)[N / 2], Rows& a, int k) {
    const uint64_t b = device::matrix_descriptor(stage(k), 0, 8 * LINE);
    device::hold_registers(s);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) device::hold_registers(a[step]);
    device::product_begin();
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
      device::product_rs<TYPE, N, 0>(s, a[step], b + step / 4 * (N * LINE / 16) + step % 4 * 2, step > 0);
    device::product_commit();
  }

  // Starts acc += W·F for COUNT steps of a stage's columns from `first` on, with weights x.
  template <int COUNT> static DEVICE void gradient(float (&acc)[K / 2], uint32_t (&x)[COUNT][4], int first, int k) {
    const uint64_t b = TRANSPOSED ? device::matrix_descriptor(transposed(k), 0, 8 * LINE)
                                  : device::matrix_descriptor(stage(k), N * LINE, 8 * LINE);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) device::hold_registers(x[i]);
    device::product_begin();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int step = first + i, at = TRANSPOSED ? step / 4 * (K * LINE / 16) + step % 4 * 2 : step * (16 * LINE / 16);
      device::product_rs<TYPE, K, !TRANSPOSED>(acc, x[i], b + at, 1);
    }
    device::product_commit();
  }
};

// exp(log f − constant_shift) of t = u·scale_i, where u is the product of two rows times scale_j.
template <bool AFFINE> struct Exponential {
  float c, slope, constant;
  DEVICE explicit Exponential(const Sweep& a) {
    const FastExponential fast(a);
    c = fast.c, slope = fast.slope, constant = AFFINE ? fast.constant - fast.c * fast.slope : fast.constant;
  }
  DEVICE float of_row(float scale) const { return AFFINE ? scale * slope : scale; }
  DEVICE float operator()(float u, float row) const {
    if constexpr (AFFINE) return device::exp2_approx(u * row + constant);
    const float d = positive(c - u * row);
    return device::exp2_approx(d * d * slope + constant);
  }
};

// This thread's two rows of its block (`Fragment::row`); warps are numbered across both consumers.
struct Row {
  int row = Fragment().row(0);
  DEVICE bool exists(const Sweep& a, int r) const {
    const Tiling<BLOCK_ROWS> tiling = row_tiling(a);
    return tiling.pair(device::block_x(), row + 8 * r) < tiling.count;
  }
  DEVICE int64_t number(const Sweep& a, int r) const { return row_tiling(a).row(device::block_x(), row + 8 * r); }
  DEVICE alphacl::Scalars<float, FAST_SCALARS> scalars(const Sweep& a, int r, float inv_unit) const {
    const int64_t at = exists(a, r) ? number(a, r) : a.row_start;
    return alphacl::scalars<float, FAST_SCALARS>(a, at, a.rows_anchor, 0.0f, inv_unit);
  }
};

// --- sweep 1 -------------------------------------------------------------------------------------

// With SYMMETRIC a tile's similarities count for its columns too. Their sums over the block's rows
// come together in shared memory, where two tiles take turns.
template <int K, bool AFFINE, bool MOMENT, bool SYMMETRIC, Factors TYPE> struct RowSums {
  using Args = hopper::Args;
  static constexpr bool BOTH_SIDES = SYMMETRIC;
  static constexpr bool SHORT = K * Format<TYPE>::BYTES <= 2 * LINE;
  static constexpr int N = 128, STAGES = SHORT ? 4 : 2, WARPS = 4 * CONSUMERS;
  static constexpr bool ROWS_IN_REGISTERS = SHORT;  // there are not enough for more features
  using M = Memory<K, N, STAGES, Two, TYPE>;
  static constexpr int SPREAD_AT = (M::BYTES + 15) / 16 * 16, SPREAD = WARPS * N;
  static constexpr int THREADS = hopper::THREADS, BLOCKS = 1;
  static constexpr int SHARED = SYMMETRIC ? SPREAD_AT + 2 * SPREAD * int(sizeof(float)) : M::BYTES;
  static_assert(!(SYMMETRIC && MOMENT), "registers hold one sum of a tile's columns");

  static DEVICE void body(const Args& args) {
    if constexpr (device::HOPPER) {
      M::initialise();
      if (device::thread() >= CONSUMERS * GROUP) {
        device::registers_less<24>();
        M::produce(args, 1.0f);
      } else {
        device::registers_more<240>();
        consume(args.sweep);
      }
    }
  }

  static DEVICE void consume(const Sweep& a) {
    const int group = device::thread() / GROUP;
    const Row row;
    const Exponential<AFFINE> exponential(a);
    // Σf, Σf·(t − moment_origin)
    float scale[2], slope[2], origin[2], total[2][2] = {}, comp[2][2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto s = row.scalars(a, r, 1.0f);
      scale[r] = s.x[SCALE], origin[r] = s.x[SECOND], slope[r] = exponential.of_row(s.x[SCALE]);
    }
    const auto tile_sums = [&](auto masked, const float(&s)[N / 2], const Two* cols, int tile, int position) {
      const Mask<N> mask(a, tile, row.row);
      float sums[2][2] = {}, column[N / 4] = {};
#pragma unroll
      for (int m = 0; m < N / 8; ++m) {
        const Two scale_j = cols[4 * m + device::thread() % 4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = e / 2, p = e % 2;
          const bool counts = !masked.value || mask.counts(r, 8 * m + p);
          const float product = s[4 * m + e] * scale_j.x[p], u = counts ? product : 0.0f;
          const float f = counts ? exponential(u, slope[r]) : 0.0f;
          sums[r][0] += f;
          if (SYMMETRIC) column[2 * m + p] += f;
          if (MOMENT) sums[r][1] += f * (u * scale[r] - origin[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        add(total[r][0], comp[r][0], sums[r][0]);
        if (MOMENT) add(total[r][1], comp[r][1], sums[r][1]);
      }
      if constexpr (SYMMETRIC) write_columns(a, tile, position, column);
    };

    Schedule<N> schedule(a);
    StageOf<STAGES> now;
    typename M::Rows rows;
    const auto similarities = [&](float(&s)[N / 2]) {
      device::barrier_wait(M::full(now.stage), now.phase);
      if constexpr (ROWS_IN_REGISTERS) M::similarities(s, rows, now.stage);
      else M::similarities(s, group, now.stage);
    };
    // Takes the sums of the tile whose S is there, while the next one's is on its way; the last
    // one's is asked for once more.
    const auto step = [&](const float(&s)[N / 2], float(&next)[N / 2]) {
      const bool last = schedule.last(), masked = schedule.masked();
      const int tile = schedule.tile, position = schedule.at;
      const Two* cols = M::scalars(now.scalars);
      M::release(now.stage);
      schedule.next();
      if (!last) now.next();
      similarities(next);
      if (masked) tile_sums(True{}, s, cols, tile, position);
      else tile_sums(False{}, s, cols, tile, position);
      device::product_wait<0>();
      device::hold_registers(next);
      return last;
    };
    if (!schedule.none()) {
      float even[N / 2], odd[N / 2];
      device::barrier_wait(M::rows_full(), 0);
      if constexpr (ROWS_IN_REGISTERS) M::load_rows(rows, group);
      similarities(even);
      device::product_wait<0>();
      device::hold_registers(even);
#pragma unroll 1
      while (!step(even, odd) && !step(odd, even)) {
      }
    }

    float* out = slice<float>(a, device::block_y(), 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float f = row_sum(total[r][0]), f_moment = row_sum(total[r][1]);
      if (row.exists(a, r) && device::thread() % 4 == 0) {
        out[a.row_of_term[F] * a.anchors + row.number(a, r)] = f;
        if (MOMENT) out[a.row_of_term[F_MOMENT] * a.anchors + row.number(a, r)] = f_moment;
      }
    }
  }

  // Adds a tile's column sums up over the warps and writes them to the slice of their ring
  // distance. Threads wait once a tile: a buffer is written again only two tiles later, and its
  // readers have met the others in between.
  static DEVICE void write_columns(const Sweep& a, int tile, int position, float (&column)[N / 4]) {
    auto* spread = reinterpret_cast<float*>(device::shared() + SPREAD_AT) + position % 2 * SPREAD;
    column_sums(column);
    const int thread = device::thread(), lane = thread % 32;
    float* to = spread + thread / 32 * N + 16 * (lane / 4) + 2 * (lane % 4);
#pragma unroll
    for (int k = 0; k < 2; ++k) *reinterpret_cast<Two*>(to + 8 * k) = {column[2 * k], column[2 * k + 1]};
    device::sync_some(1, CONSUMERS * GROUP);
    const Tiling<N> cols = column_tiling<N>(a);
    if (thread >= N || !serves_columns(a, position) || cols.pair(tile, thread) >= cols.count) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += spread[w * N + thread];
    slice<float>(a, a.column_slice + position, 0)[a.row_of_term[F] * a.anchors + cols.row(tile, thread)] = sum;
  }
};

// --- sweep 2 -------------------------------------------------------------------------------------

// float16 has five bits of exponent: before they are rounded, the weights of a row are multiplied by
// a power of two that brings the largest one so far into a range which ends where float16 does. When
// a tile's weights leave the range, the factor changes, and the row's sum so far is multiplied by
// the quotient. No other bound of the weights is needed.
//
// A weight below 2⁻¹⁴ is rounded by 2⁻²⁵ at most, which is 2⁻³² of the row's largest weight so far.
// For up to 2²⁰ columns all these errors together are less than 2⁻¹² of it, its own rounding.
struct Lift {
  static constexpr float LEAST = 128.0f, MOST = 32768.0f;
  static constexpr int TARGET = 11, BIAS = 127, LIMIT = 126;  // powers of two, whose inverses are normal too
  float largest[2] = {}, factor[2] = {1, 1};  // of the weights that this thread has seen; of the row

  static DEVICE float power_of_two(int exponent) { return device::from_bits(uint32_t(BIAS + exponent) << 23); }
  static DEVICE int exponent(float x) { return int(device::to_bits(x) >> 23) - BIAS; }
  // NaN says nothing about the others
  DEVICE void meets(int r, float weight) { largest[r] = fmaxf(largest[r], fabsf(weight)); }
  DEVICE bool fits(int r) const { return largest[r] * factor[r] >= LEAST && largest[r] * factor[r] <= MOST; }
  // Chooses a row's factor, and returns the one by which its sum changes.
  DEVICE float change(int r) {
    largest[r] = row_max(largest[r]);
    if (fits(r) || largest[r] == 0 || largest[r] == INFINITE<float>) return 1;
    const int before = exponent(factor[r]), wanted = TARGET - exponent(largest[r]), now = wanted < LIMIT ? wanted : LIMIT;
    factor[r] = power_of_two(now);
    return now - before < -LIMIT ? 0.0f : power_of_two(now - before);
  }
};

template <int K, bool AFFINE, Factors TYPE> struct PairGrad {
  using Args = hopper::Args;
  using Of = Format<TYPE>;
  static constexpr bool BOTH_SIDES = false, TRANSPOSED = Of::TRANSPOSES;
  // Registers hold the gradient, a tile of similarities and one of weights, and either the
  // similarities of another tile or, where there is no room for them in shared memory, the rows.
  // Three stages must do there: one is being filled, two are multiplied.
  static constexpr int N = K * Of::BYTES <= 2 * LINE ? 128 : 64, STAGES = TRANSPOSED ? 3 : 4;
  static constexpr int PIECES = 4, STEPS = N * Of::BYTES / STEP / PIECES, EIGHTS = N / 8 / PIECES;
  // pieces still being multiplied when a tile ends: registers allow no more
  static constexpr int PENDING = TYPE == Factors::BF16 && K == 64 ? 2 : 1;
  using M = Memory<K, N, STAGES, Four, TYPE, TRANSPOSED>;
  static constexpr int THREADS = hopper::THREADS, BLOCKS = 1, SHARED = M::BYTES;
  static constexpr int PRODUCER_REGISTERS = TRANSPOSED ? 56 : 24, CONSUMER_REGISTERS = TRANSPOSED ? 224 : 240;

  static DEVICE void body(const Args& args) {
    if constexpr (device::HOPPER) {
      M::initialise();
      if (device::thread() >= CONSUMERS * GROUP) {
        device::registers_less<PRODUCER_REGISTERS>();
        M::produce(args, 1 / unit_of<float>(args.sweep));
      } else {
        device::registers_more<CONSUMER_REGISTERS>();
        consume(args.sweep);
      }
    }
  }

  static DEVICE void consume(const Sweep& a) {
    const int group = device::thread() / GROUP;
    const Row row;
    const Exponential<AFFINE> exponential(a);
    Lift lift;
    float slope[2], weight[2], acc[K / 2] = {};
    uint32_t w[PIECES][STEPS][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto s = row.scalars(a, r, 1 / unit_of<float>(a));
      slope[r] = exponential.of_row(s.x[SCALE]), weight[r] = s.x[SECOND];
    }
    // Weights of a piece times the columns' scales: as operands, or, where they are rounded later, in
    // place of the similarities.
    const auto weights = [&](auto masked, auto& s, int piece, const Four* cols, int tile) {
      const Mask<N> mask(a, tile, row.row);
#pragma unroll
      for (int k = 0; k < EIGHTS; ++k) {
        const int m = EIGHTS * piece + k;
        const Four column = cols[4 * m + device::thread() % 4];
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = e / 2, p = e % 2;
          const float f = exponential(s[4 * m + e] * column.x[p], slope[r]), g = weight[r] * column.x[p] + column.x[2 + p];
          x[e] = !masked.value || mask.counts(r, 8 * m + p) ? f * g : 0.0f;
        }
        if constexpr (!Of::LATE) {
          Of::put(w[piece], k, x);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            s[4 * m + e] = x[e];
            if (Of::LIFTS) lift.meets(e / 2, x[e]);
          }
        }
      }
    };
    const auto choose_lift = [&] {
      if (!device::any(!(lift.fits(0) && lift.fits(1)))) return;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float factor = lift.change(r);
#pragma unroll
        for (int d = 0; d < K / 8; ++d) acc[4 * d + 2 * r] *= factor, acc[4 * d + 2 * r + 1] *= factor;
      }
    };
    const auto round = [&](const float(&s)[N / 2], int piece) {
#pragma unroll
      for (int k = 0; k < EIGHTS; ++k) {
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = s[4 * (EIGHTS * piece + k) + e] * (Of::LIFTS ? lift.factor[e / 2] : 1.0f);
        Of::put(w[piece], k, x);
      }
    };

    Schedule<N> schedule(a);
    StageOf<STAGES> now;
    typename M::Rows rows;
    const auto start_similarities = [&](float(&s)[N / 2]) {
      device::barrier_wait(M::full(now.stage), now.phase);
      if constexpr (TRANSPOSED) M::similarities(s, rows, now.stage);
      else M::similarities(s, group, now.stage);
    };
    const auto first_similarities = [&](float(&s)[N / 2]) {
      device::barrier_wait(M::rows_full(), 0);
      if constexpr (TRANSPOSED) M::load_rows(rows, group), M::release(STAGES - 1);
      start_similarities(s);
      device::product_wait<0>();
      device::hold_registers(s);
    };
    device::hold_registers(acc);
    if (schedule.none()) {
    } else if constexpr (!Of::LATE) {
      int before = -1;  // stage of the tile whose W·F is under way
      // Adds the tile whose S is there, while the next one's is on its way; the last one's is asked
      // for once more.
      const auto step = [&](const float(&s)[N / 2], float(&next)[N / 2]) {
        const bool last = schedule.last(), masked = schedule.masked();
        const int tile = schedule.tile, stage = now.stage;
        const Four* cols = M::scalars(now.scalars);
        schedule.next();
        if (!last) now.next();
        start_similarities(next);
        device::product_wait<1>();  // the tile before has been multiplied
        if (before >= 0) M::release(before);
        before = stage;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
          if (masked) weights(True{}, s, piece, cols, tile);
          else weights(False{}, s, piece, cols, tile);
          M::gradient(acc, w[piece], piece * STEPS, stage);
        }
        device::product_wait<PENDING>();
        device::hold_registers(next);
        return last;
      };
      float even[N / 2], odd[N / 2];
      first_similarities(even);
#pragma unroll 1
      while (!step(even, odd) && !step(odd, even)) {
      }
      device::product_wait<0>();
    } else {
      float s[N / 2];
      const auto all_weights = [&] {
        const Four* cols = M::scalars(now.scalars);
        const bool masked = schedule.masked();
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
          if (masked) weights(True{}, s, piece, cols, schedule.tile);
          else weights(False{}, s, piece, cols, schedule.tile);
        }
      };
      const auto round_all = [&] {
        if constexpr (Of::LIFTS) choose_lift();
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) round(s, piece);
      };
      const auto multiply_all = [&](const StageOf<STAGES>& at) {
        if constexpr (TRANSPOSED) device::barrier_wait(M::turned(at.stage), at.phase);
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) M::gradient(acc, w[piece], piece * STEPS, at.stage);
      };
      first_similarities(s);
      all_weights();
      round_all();
      // Multiplies a tile, and takes the weights of the next one meanwhile.
#pragma unroll 1
      while (!schedule.last()) {
        const StageOf<STAGES> before = now;
        schedule.next(), now.next();
        start_similarities(s);
        multiply_all(before);
        device::product_wait<PIECES>();
        device::hold_registers(s);
        all_weights();
        device::product_wait<0>();
        device::hold_registers(acc);
        M::release(before.stage);
        round_all();
      }
      multiply_all(now);
      device::product_wait<0>();
    }
    device::hold_registers(acc);

    const float unit = unit_of<float>(a);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!row.exists(a, r)) continue;
      const float lowered = 1 / lift.factor[r];
      float* to = static_cast<float*>(a.df) + (device::block_y() * a.n_out + row.number(a, r) - a.lo) * a.dim;
#pragma unroll
      for (int d = 0; d < K / 8; ++d)
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int feature = 8 * d + 2 * (device::thread() % 4) + p;
          if (feature < a.dim) to[feature] = acc[4 * d + 2 * r + p] * lowered * unit;
        }
    }
  }
};

// --- launches ------------------------------------------------------------------------------------

// Starts a kernel and returns null or an error; nothing if the launch has the smaller tiles of the
// other kernels. A launch must have all row blocks of a region, and all columns unless its tiles are
// symmetric.
template <class Kernel> std::optional<const char*> start(const Sweep& a, void* stream) {
  if (a.side != BLOCK_ROWS) {
    if (hopper_mode == 1 && !a.symmetric) return "required of the kernels of hopper.h, which cannot serve this launch";
    return {};
  }
  const int64_t most = INT32_MAX - 256;
  const bool all_columns = a.symmetric || (a.begin == 0 && a.end == (a.n_cols + BLOCK_ROWS - 1) / BLOCK_ROWS);
  const bool all = all_columns && a.first_block == 0 && a.row_blocks == (a.n_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const bool fits = a.aligned && a.stride >= a.dim && a.row_start + a.n_rows < most && a.col_start + a.n_cols < most;
  if (a.symmetric != Kernel::BOTH_SIDES || !all || !fits || !device::runs_hopper<Kernel>()) return NOT_SERVED;
  Args args{a, {}, {}};
  const int words = Kernel::M::WORDS;
  const auto describe = [&](device::TensorMap(&maps)[2], int64_t first, int64_t n, bool paired) -> const char* {
    for (int second = 0; second < 2; ++second) {
      const int64_t row = first + (paired && second ? a.half : 0), pitch = words * a.stride;
      const auto* from = static_cast<const uint16_t*>(a.f) + row * pitch;
      const char* error = device::tensor_map(maps[second], from, words * a.dim, paired ? a.half : n, 2 * pitch, Kernel::N / 2);
      if (error) return error;
    }
    return nullptr;
  };
  if (const char* error = describe(args.rows, a.row_start, a.n_rows, a.rows_paired)) return error;
  if (const char* error = describe(args.cols, a.col_start, a.n_cols, a.cols_paired)) return error;
  return device::launch<Kernel>(int((a.n_rows + BLOCK_ROWS - 1) / BLOCK_ROWS), a.splits, Kernel::SHARED, args, stream);
}

// Serves a call of the fast kernels.
template <int K, Factors TYPE> std::optional<const char*> row_sums(const Sweep& a, void* stream) {
  const bool affine = a.kind != POWER, moment = a.row_of_term[F_MOMENT] >= 0;
  if (a.symmetric && !moment && affine) return start<RowSums<K, true, false, true, TYPE>>(a, stream);
  if (a.symmetric && !moment) return start<RowSums<K, false, false, true, TYPE>>(a, stream);
  if (affine && moment) return start<RowSums<K, true, true, false, TYPE>>(a, stream);
  if (affine) return start<RowSums<K, true, false, false, TYPE>>(a, stream);
  if (moment) return start<RowSums<K, false, true, false, TYPE>>(a, stream);
  return start<RowSums<K, false, false, false, TYPE>>(a, stream);
}
template <int K, Factors TYPE> std::optional<const char*> pair_grad(const Sweep& a, void* stream) {
  if (a.kind != POWER) return start<PairGrad<K, true, TYPE>>(a, stream);
  return start<PairGrad<K, false, TYPE>>(a, stream);
}

}  // namespace alphacl::hopper
