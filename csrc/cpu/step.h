// A whole step of a loss in one call: normalisation, sums, row steps, gradient and reduction, in one
// parallel region.
//
// A step executes the program that Python recorded from an objective (alphacl_fast/program.py). Its
// row vectors stay where the kernels need them, padded block by block. The work is cut into phases
// of independent items, which are dealt out in order. A thread waits for items that others are still
// working on, never for a thread: one that the system does not run delays nobody. All sums are made
// in an order that follows from the sizes alone.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "kept.h"
#include "prepare.h"
#include "schedule.h"
#include "threads.h"
#include "workspace.h"

namespace {

// Items of one phase that have been dealt out, and that are done; of a repeated sweep also the items
// with anchors that are not done.
struct alignas(64) Phase {
  std::atomic<int64_t> next{0}, done{0}, undone{0};
};

// Rows minus their mean are no longer rows of half precision.
inline Dtype dtype_of_rows(const Step& call) {
  return call.similarity != EUCLIDEAN ? Dtype(call.dtype) : call.dtype == FLOAT64 ? FLOAT64 : FLOAT32;
}

// The sizes of a step as those of a sweep, for the layout of the blocks and the packing of rows.
inline Sweep sizes_of(const Step& call) {
  Sweep s{};
  s.n = call.rows, s.dim = s.row_stride = call.dim, s.split = call.split, s.partner = call.partner;
  s.anchors = call.anchors, s.lo = std::min(call.lo, call.rows), s.hi = std::min(call.hi, call.rows);
  s.block = call.block, s.tau = call.tau, s.dtype = dtype_of_rows(call), s.kind = call.kind;
  s.values = call.values, s.constants = call.constants;
  std::copy(std::begin(call.params), std::end(call.params), s.params);
  s.threads = call.threads, s.df = call.dz, s.ids = call.ids;
  s.guide = call.guide, s.guide_dim = call.guide_dim;
  s.bias = call.similarity == EUCLIDEAN ? call.z1 : call.bias;  // of interest is only whether there is one
  for (int32_t k = 0; k < call.instructions; k++) s.gradient |= call.program[k].row_step < 0 && call.program[k].gradient;
  return s;
}

// The layout of a step: blocks and what belongs to them, then the rows and what belongs to pairs.
struct StepPlan {
  static constexpr int64_t CHUNK = 64;  // pairs of an item
  Sweep sweep;
  Plan plan;
  bool half, scaled;  // rows are stored as given; similarities are scaled, not rows
  int64_t number_bytes, tiles, phases;
  int64_t chunks;     // of pairs
  Pieces rows, scales, factors, norms, pairs, columns, mean, biases, weight_sums, block_sums, phase_memory;

  StepPlan(const Step& call, const TileKernels& kernels)
      : sweep(sizes_of(call)), plan(sweep, kernels, call.places + own_places(call), row_bytes(call)) {
    half = sweep.dtype == BFLOAT16 || sweep.dtype == FLOAT16, scaled = kernels.operands == BFLOAT16;
    chunks = (call.n_pairs + CHUNK - 1) / CHUNK;
    number_bytes = call.dtype == FLOAT64 ? 8 : 4;
    tiles = Schedule(plan).tiles();
    phases = 2 * call.instructions + 8;
    for (int32_t k = 0; k < call.instructions; k++) phases += 2 * call.program[k].most;
    rows = plan.pieces(1, 2 * call.n_pairs * call.dim * (half ? 2 : number_bytes));
    scales = plan.pieces(half && call.similarity == COSINE, 2 * call.n_pairs * number_bytes);
    factors = plan.pieces(call.factor != 1, 2 * call.n_pairs * number_bytes);
    norms = plan.pieces(1, 2 * call.n_pairs * number_bytes);
    pairs = plan.pieces(2, call.n_pairs * number_bytes);  // t⁺ and q
    const bool euclidean = call.similarity == EUCLIDEAN;
    columns = plan.pieces(euclidean ? chunks : 0, call.dim * 8);
    mean = plan.pieces(euclidean, call.dim * number_bytes);
    biases = plan.pieces(euclidean, 2 * call.n_pairs * number_bytes);
    weight_sums = plan.pieces(euclidean, 2 * call.n_pairs * number_bytes);
    block_sums = plan.pieces(BLOCK_SUMS, plan.blocks * 8);
    phase_memory = plan.pieces(phases, sizeof(Phase));
  }
  // Beside the places of the program; the last ones are left out where they are not needed.
  enum BlockSum { LOSS, LARGEST_WEIGHT, SLOPES, BLOCK_SUMS = SLOPES + MOST_SLOPES };
  enum Own { N_NEG, MANTISSA, WEIGHT, BIAS, IDS, EMPTY, LARGEST_T, LARGEST_GUIDE, ALL };
  static int64_t own_places(const Step& call) {
    return call.guide ? ALL : call.limited ? LARGEST_GUIDE : call.ids ? EMPTY : IDS;
  }
  static int64_t row_bytes(const Step& call) { return aligned(2 * (call.dim + 64) * (call.dtype == FLOAT64 ? 8 : 4)); }
};

// T is the accumulation dtype.
template <class T> class StepRun {
 public:
  // `row_kernels` pass over single rows, in the accumulation dtype.
  StepRun(const Step& call, const StepPlan& layout, const TileKernels& row_kernels, char* memory, KeptTiles& kept)
      : call_(call), layout_(layout), plan_(layout.plan), kernels_(plan_.kernels), row_kernels_(row_kernels),
        memory_(memory), kept_(kept), schedule_(plan_), blocks_(place_blocks(plan_, memory)),
        progress_(memory + plan_.rounds.at, plan_.blocks) {
    phases_ = reinterpret_cast<Phase*>(memory + layout.phase_memory.at);
    for (int64_t k = 0; k < layout.phases; k++) new (phases_ + k) Phase();
    pack_ = layout.sweep;
    pack_.f = memory + layout.rows.at;
    if (layout.scales.count) pack_.scale = memory + layout.scales.at;
    if (call.factor != 1) pack_.scale = memory + layout.factors.at;
    rows_ = PairRows{};
    rows_.z1 = call.z1, rows_.z2 = call.z2, rows_.f = memory + layout.rows.at, rows_.similarity = call.similarity;
    if (layout.scales.count) rows_.scale = memory + layout.scales.at;
    rows_.mean = memory + layout.mean.at, rows_.bias = memory + layout.biases.at;
    rows_.weight_sums = memory + layout.weight_sums.at;
    rows_.inv_norm = memory + layout.norms.at, rows_.pos = memory + layout.pairs.at;
    rows_.d = call.dz, rows_.q = memory + layout.pairs.at + layout.pairs.size;
    rows_.n_pairs = call.n_pairs, rows_.dim = rows_.stride = call.dim;
    rows_.stride1 = call.stride1, rows_.stride2 = call.stride2;
    rows_.lo = call.lo, rows_.hi = call.hi, rows_.swept = call.rows, rows_.dtype = call.dtype;
    plan_sweeps();
  }

  // What one thread does; `interrupted` is asked after each item.
  template <class Interrupted> void work(int thread, Interrupted interrupted) {
    Worker<Interrupted> me{*this, memory_ + plan_.thread.at + thread * plan_.thread.size, interrupted, 0};
    auto for_chunks = [&](auto function) {
      return me.phase(layout_.chunks, [&](int64_t k) {
        const int64_t begin = k * StepPlan::CHUNK, end = std::min(begin + StepPlan::CHUNK, call_.n_pairs);
        function(begin, end);
      });
    };
    if (call_.similarity == EUCLIDEAN) {
      if (!for_chunks([&](int64_t begin, int64_t end) { add_columns(begin, end, me.mine); })) return;
      if (!me.phase(1, [&](int64_t) { take_mean(); })) return;
    }
    if (!for_chunks([&](int64_t begin, int64_t end) { row_kernels_.normalize(rows_, begin, end, me.mine); })) return;
    if (!me.phase(plan_.blocks, [&](int64_t b) { start_block(b, me.mine); })) return;
    int sweeps = 0;
    for (int32_t k = 0, end; k < call_.instructions; k = end) {
      const Instruction& begin = call_.program[k];
      const bool sweep = begin.row_step < 0;
      end = k + sweep;
      while (end < call_.instructions && call_.program[end].row_step >= 0 && !(begin.most && end == k + 2)) end++;
      for (int32_t round = 1;; round++) {
        if (sweep && !sweep_tiles(me, k, sweeps++)) return;
        if (!me.phase(plan_.blocks, [&](int64_t b) {
              between_sweeps(b, sweep ? k : -1, k + sweep, end);
              if (begin.most && !all_done(blocks_[b], begin.done)) me.undone();
            }))
          return;
        if (round >= begin.most || me.all_done()) break;
      }
    }
    if (call_.hi == call_.lo) return;
    if (!me.phase(plan_.blocks, [&](int64_t b) {
          const double factor = b < plan_.left ? call_.factor : 1;
          if (blocks_[b].wanted) kernels_.unpack(pack_, blocks_[b], df_scale_ * factor, me.mine);
          copy_dbias(blocks_[b]);
        }))
      return;
    for_chunks([&](int64_t begin, int64_t end) {
      weigh_pairs(begin, end);
      row_kernels_.finish(rows_, begin, end, me.mine);
    });
  }

  // Loss and gradient in τ, after all threads are done.
  Status finish() {
    if (progress_.status() != OK) return progress_.status();
    auto total = [&](int which) {
      double sum = 0;
      for (int64_t b = 0; b < plan_.blocks; b++) sum += block_sum(which)[b];
      return sum;
    };
    if (call_.loss && !call_.each) *static_cast<T*>(call_.loss) = T(total(StepPlan::LOSS) / call_.divisor);
    for (int32_t k = 0; k < call_.slopes; k++) static_cast<T*>(call_.dtau)[k] = T(total(StepPlan::SLOPES + k));
    return OK;
  }

 private:
  // --- phases ------------------------------------------------------------------------------------

  template <class Interrupted> struct Worker {
    StepRun& run;
    char* mine;
    Interrupted interrupted;
    int64_t number;  // of the phase

    // Takes part in a phase of `count` items and returns when all of them are done, or false if the
    // step was stopped.
    template <class Item> bool phase(int64_t count, Item item) {
      Phase& phase = run.phases_[number++];
      for (int64_t k; (k = phase.next.fetch_add(1)) < count;) {
        item(k);
        phase.done.fetch_add(1, std::memory_order_release);
        if (interrupted()) run.progress_.stop(INTERRUPTED);
        if (run.progress_.status() != OK) return false;
      }
      for (int spins = 0; phase.done.load(std::memory_order_acquire) < count; spins++) {
        if (run.progress_.status() != OK) return false;
        if (spins > 1000) std::this_thread::yield();
      }
      return true;
    }
    // An item of this phase has anchors that are not done; after it all threads see whether any has.
    void undone() { run.phases_[number - 1].undone.fetch_add(1, std::memory_order_relaxed); }
    bool all_done() const { return run.phases_[number - 1].undone.load(std::memory_order_relaxed) == 0; }
  };

  // The tiles of the sweep k, which `before` others precede.
  template <class Me> bool sweep_tiles(Me& me, int32_t k, int before) {
    if (has_own_weights(k) && layout_.scaled && !me.phase(plan_.blocks, [&](int64_t b) { scale_weights(b); })) return false;
    const RowVectors v = vectors(k);
    return me.phase(schedule_.tiles(), [&](int64_t number) { tile(k, before, v, number, me.mine); });
  }

  bool all_done(const Block& x, int32_t done) const {
    bool all = true;
    for (int64_t r = 0; x.anchor && r < x.rows; r++) all &= place(done)[x.at + r] != 0;
    return all;
  }

  void tile(int32_t k, int sweep, const RowVectors& v, int64_t number, void* mine) {
    const Tile tile = schedule_.tile(number);
    const int64_t before = sweep * schedule_.rounds();
    if (!progress_.wait(tile.i, before + tile.round) || !progress_.wait(tile.j, before + tile.round)) return;
    if (tile.i != NO_BLOCK && tile.j != NO_BLOCK)
      kernels_.tile(sweeps_[k], v, blocks_[tile.i], blocks_[tile.j], mine, kept_.tile(number, sweep > 0));
    progress_.finish(tile.i, before + tile.round + 1);
    if (tile.j != tile.i) progress_.finish(tile.j, before + tile.round + 1);
  }

  // --- rows ----------------------------------------------------------------------------------------

  double* columns(int64_t chunk) const {
    return reinterpret_cast<double*>(memory_ + layout_.columns.at + chunk * layout_.columns.size);
  }
  void add_columns(int64_t begin, int64_t end, void* mine) {
    double* sums = columns(begin / StepPlan::CHUNK);
    std::fill_n(sums, call_.dim, 0.0);
    row_kernels_.add_columns(rows_, begin, end, mine, sums);
  }
  // t does not change under a common shift, but its error does.
  void take_mean() {
    T* mean = reinterpret_cast<T*>(memory_ + layout_.mean.at);
    for (int64_t k = 0; k < call_.dim; k++) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < layout_.chunks; chunk++) sum += columns(chunk)[k];
      mean[k] = T(sum / double(2 * call_.n_pairs));
    }
  }

  // --- blocks ------------------------------------------------------------------------------------

  void start_block(int64_t b, void* mine) {
    const Block& x = blocks_[b];
    for (int64_t k = 0; k < plan_.vectors.count; k++) std::memset(place(k) + x.at, 0, size_t(plan_.stride) * sizeof(T));
    for (int which = 0; which < StepPlan::BLOCK_SUMS; which++) block_sum(which)[b] = 0;  // of a block without anchors
    if (call_.factor != 1) {
      const T* scale = static_cast<const T*>(rows_.scale);
      T* factors = reinterpret_cast<T*>(memory_ + layout_.factors.at);
      const T factor = b < plan_.left ? T(call_.factor) : T(1);
      for (int64_t row = x.first; row < x.first + x.rows; row++) factors[row] = scale ? scale[row] * factor : factor;
    }
    pack(x, mine);
    const T* counts = static_cast<const T*>(call_.n_neg_of);
    T *all_pos = place(POSITIVES) + x.at, *n_neg = own(StepPlan::N_NEG) + x.at;
    for (int64_t r = 0; r < x.rows; r++) {
      const int64_t row = x.first + r;
      all_pos[r] = positive(row);
      n_neg[r] = counts && row < call_.anchors ? counts[row] : T(call_.n_neg);
    }
    copy_bias(x);
    if (call_.limited)
      for (int64_t r = 0; r < x.rows; r++) own(StepPlan::LARGEST_T)[x.at + r] = all_pos[r] + T(call_.max_gap);
    if (call_.guide)
      for (int64_t r = 0; r < x.rows && x.first + r < call_.anchors; r++)
        own(StepPlan::LARGEST_GUIDE)[x.at + r] = static_cast<const T*>(call_.largest_guide)[x.first + r];
    if (layout_.scaled && pack_.scale) {
      // rows are packed with the power of two of their scale
      int exponent;
      for (int64_t r = 0; r < x.rows; r++)
        own(StepPlan::MANTISSA)[x.at + r] = std::frexp(static_cast<const T*>(pack_.scale)[x.first + r], &exponent);
    }
    if (call_.ids) {
      auto* ids = reinterpret_cast<Int*>(own(StepPlan::IDS)) + x.at;
      for (int64_t r = 0; r < plan_.stride; r++) ids[r] = r < x.rows ? call_.ids[x.first + r] : -1;
    }
    progress_.finish(b, 0);
    prepare(0, x);
  }

  // Packs rows that have been prepared or, with given positives, rows as they lie in z1 and z2.
  void pack(const Block& x, void* mine) {
    if (!call_.pos) return kernels_.pack(pack_, x, mine);
    const bool second = call_.split && x.first >= call_.split;
    Sweep rows = pack_;
    rows.f = second ? call_.z2 : call_.z1, rows.row_stride = second ? call_.stride2 : call_.stride1;
    Block block = x;
    if (second) block.first -= call_.split;
    kernels_.pack(rows, block, mine);
  }
  T positive(int64_t row) const {
    if (call_.pos) return row < call_.anchors ? static_cast<const T*>(call_.pos)[row] : T(0);
    return static_cast<const T*>(rows_.pos)[row < call_.n_pairs ? row : row - call_.n_pairs];
  }
  void copy_bias(const Block& x) {
    if (!pack_.bias || (call_.bias && x.first < call_.split)) return;
    const T* bias = call_.bias ? static_cast<const T*>(call_.bias) + (x.first - call_.split)
                               : static_cast<const T*>(rows_.bias) + x.first;
    std::copy_n(bias, x.rows, own(StepPlan::BIAS) + x.at);
  }

  // Clears what the next sweep from instruction k on adds to.
  void prepare(int32_t k, const Block& x) {
    while (k < call_.instructions && call_.program[k].row_step >= 0) k++;
    if (k == call_.instructions) return;
    const int count = SUM_COUNT + (pack_.bias && call_.program[k].gradient);  // the last: of weights
    for (int term = 0; term < count; term++)
      std::memset(sums() + term * plan_.padded + x.at, 0, size_t(plan_.stride) * sizeof(double));
    if (T* largest = running_max(k)) std::fill_n(largest + x.at, plan_.stride, T(-HUGE_VAL));
  }

  // Collects the sums of a sweep (-1: there was none) and makes the row steps [first, last).
  void between_sweeps(int64_t b, int32_t sweep, int32_t first, int32_t last) {
    const Block& x = blocks_[b];
    if (x.anchor) {
      if (sweep >= 0) collect(call_.program[sweep], x);
      for (int32_t k = first; k < last; k++) make_row_step(call_.program[k], x);
      const bool over = last == call_.instructions;
      if (may_be_empty()) leave_out_empty(x, over ? -1 : call_.program[last].scalars[ROW_WEIGHT], over);
      if (over) reduce(b);
      else if (has_own_weights(last)) copy_weights(b, call_.program[last].scalars[ROW_WEIGHT]);
    }
    if (sweep >= 0 && call_.program[sweep].most) prepare(sweep, x);
    prepare(last, x);
  }

  // Whether the similarities say which pairs count.
  bool marked() const { return call_.limited || call_.guide; }
  bool may_be_empty() const { return call_.empty || marked(); }
  bool empty(const Block& x, int64_t r) const {
    return (call_.empty && call_.empty[x.first + r]) || (marked() && own(StepPlan::EMPTY)[x.at + r] != 0);
  }

  void collect(const Instruction& sweep, const Block& x) {
    if (marked() && sweep.terms[SHIFT] >= 0)  // the sum of exponentials of no pairs is 0
      for (int64_t r = 0; r < x.rows; r++) own(StepPlan::EMPTY)[x.at + r] = T(sums()[F * plan_.padded + x.at + r] == 0);
    if (marked() && sweep.terms[T_MAX] >= 0)
      for (int64_t r = 0; r < x.rows; r++) own(StepPlan::EMPTY)[x.at + r] = T(place(sweep.terms[T_MAX])[x.at + r] == T(-HUGE_VAL));
    for (int term = 0; term < TERM_COUNT; term++) {
      if (sweep.terms[term] < 0) continue;
      T* to = place(sweep.terms[term]) + x.at;
      if (term < SUM_COUNT) {
        const double* from = sums() + term * plan_.padded + x.at;
        for (int64_t r = 0; r < x.rows; r++) to[r] = T(from[r]);
      } else if (sweep.form == Form::CONSTANT) {
        std::fill_n(to, x.rows, T(sweep.constant_shift));
      }
      std::fill(to + x.rows, to + plan_.stride, T(0));  // a running maximum has −∞ there, and 0·∞ is no 0
      // An empty sum becomes that over one pair with f = 1, where every formula is finite.
      if (!may_be_empty() || sweep.gradient) continue;
      for (int64_t r = 0; r < x.rows; r++) {
        if (term < SUM_COUNT) to[r] = empty(x, r) ? T(1) : to[r];
        else if (to[r] == T(-HUGE_VAL)) to[r] = 0;
      }
    }
    if (marked() && sweep.form == Form::T_MAX && sweep.terms[F] >= 0)  // it has counted them
      std::copy_n(place(sweep.terms[F]) + x.at, x.rows, own(StepPlan::N_NEG) + x.at);
  }

  void make_row_step(const Instruction& step, const Block& x) {
    const void* inputs[MOST_VECTORS];
    void* outputs[MOST_VECTORS];
    for (int k = 0; k < MOST_VECTORS; k++) inputs[k] = place(step.inputs[k]), outputs[k] = place(step.outputs[k]);
    if (step.values)
      reinterpret_cast<ValuesFunction<T>>(step.values)(step.constants, place(step.inputs[0]) + x.at, place(step.outputs[0]) + x.at,
                                                       place(step.outputs[1]) + x.at, plan_.stride);
    else
      kernels_.row_step({inputs, outputs, own(StepPlan::N_NEG), step.params, call_.tau, call_.divisor, step.row_step, x.at,
                         x.at + plan_.stride});
    for (int32_t k = 0; k < step.output_count; k++)  // padding meets no pair
      std::fill(static_cast<T*>(outputs[k]) + x.at + x.rows, static_cast<T*>(outputs[k]) + x.at + plan_.stride, T(0));
  }

  // Loss, gradient and weights of anchors without negatives are 0.
  void leave_out_empty(const Block& x, int32_t weight, bool over) {
    auto leave_out = [&](int32_t p) {
      for (int64_t r = 0; p > 0 && r < x.rows; r++)
        if (empty(x, r)) place(p)[x.at + r] = 0;
    };
    leave_out(weight);
    if (!over) return;
    leave_out(call_.mass), leave_out(call_.losses);
    for (int32_t k = 0; k < call_.slopes; k++) leave_out(call_.dtau_of[k]);
  }

  void reduce(int64_t b) {
    const Block& x = blocks_[b];
    T* losses = place(call_.losses) + x.at;
    const T* incoming = incoming_of(x);
    auto sum_of = [&](T* vector, bool weighted) {
      double sum = 0;
      for (int64_t r = 0; r < x.rows; r++) {
        if (weighted) vector[r] *= incoming[r];
        sum += double(vector[r]);
      }
      return sum;
    };
    block_sum(StepPlan::LOSS)[b] = sum_of(losses, false);
    T* mass = place(call_.mass) + x.at;
    if (incoming) sum_of(mass, true);
    if (call_.dpos)
      for (int64_t r = 0; r < x.rows; r++) static_cast<T*>(call_.dpos)[x.first + r] = -mass[r];
    for (int32_t k = 0; k < call_.slopes; k++)
      block_sum(StepPlan::SLOPES + k)[b] = sum_of(place(call_.dtau_of[k]) + x.at, incoming);
    if (call_.loss && call_.each) std::copy_n(losses, x.rows, static_cast<T*>(call_.loss) + x.first);
  }

  // The weights of the positive pairs of both anchors.
  void weigh_pairs(int64_t begin, int64_t end) {
    T* q = static_cast<T*>(const_cast<void*>(rows_.q));
    T* weights = static_cast<T*>(const_cast<void*>(rows_.weight_sums));
    const T* mass = place(call_.mass);
    for (int64_t i = begin; i < end; i++) {
      q[i] = mass[padded_place(i)];
      for (int64_t row : {i, call_.n_pairs + i})
        if (pack_.bias && row < call_.rows) weights[row] = T(sums()[SUM_COUNT * plan_.padded + padded_place(row)]);
      if (call_.anchors > call_.n_pairs) q[i] += mass[padded_place(call_.n_pairs + i)];
    }
  }

  void copy_dbias(const Block& x) {
    if (!call_.dbias || x.first < call_.split) return;
    const double* weights = sums() + SUM_COUNT * plan_.padded + x.at;
    T* dbias = static_cast<T*>(call_.dbias) + (x.first - call_.split);
    for (int64_t r = 0; r < x.rows; r++) dbias[r] = T(weights[r] * df_scale_);
  }

  int64_t padded_place(int64_t row) const {
    const bool right = row >= plan_.left_rows;
    const int64_t within = right ? row - plan_.left_rows : row;
    return ((right ? plan_.left : 0) + within / plan_.block_rows) * plan_.stride + within % plan_.block_rows;
  }

  // --- row weights that differ from the program's -------------------------------------------------
  // Weights that are rounded to bfloat16 are divided by the largest row weight: equal ones, as a
  // hinge has them, become powers of two, whose errors would otherwise not average out.

  bool has_own_weights(int32_t k) const {
    return call_.program[k].row_step < 0 && call_.program[k].gradient && (layout_.scaled || call_.incoming);
  }
  const T* incoming_of(const Block& x) const {
    return call_.incoming ? static_cast<const T*>(call_.incoming) + x.first : nullptr;
  }
  void copy_weights(int64_t b, int32_t weight) {
    const Block& x = blocks_[b];
    const T *from = place(weight) + x.at, *incoming = incoming_of(x);
    T *to = own(StepPlan::WEIGHT) + x.at, largest = 0;
    for (int64_t r = 0; r < x.rows; r++) {
      to[r] = incoming ? from[r] * incoming[r] : from[r];
      largest = std::fmax(largest, std::fabs(to[r]));
    }
    block_sum(StepPlan::LARGEST_WEIGHT)[b] = double(largest);
  }
  void scale_weights(int64_t b) {
    T largest = 0;
    for (int64_t other = 0; other < plan_.blocks; other++) largest = std::fmax(largest, T(block_sum(StepPlan::LARGEST_WEIGHT)[other]));
    if (!(largest > std::numeric_limits<T>::min() && largest < std::numeric_limits<T>::max())) largest = 1;
    for (int64_t r = 0; r < plan_.stride; r++) own(StepPlan::WEIGHT)[blocks_[b].at + r] /= largest;
    if (b == 0) df_scale_ = double(largest);
  }

  // --- sweeps ------------------------------------------------------------------------------------

  void plan_sweeps() {
    int count = 0;
    bool constant = true;
    for (int32_t k = 0; k < call_.instructions; k++) {
      const Instruction& instruction = call_.program[k];
      if (instruction.row_step >= 0) continue;
      Sweep& s = sweeps_[k] = pack_;
      s.form = instruction.form, s.constant_shift = instruction.constant_shift;
      s.gradient = instruction.gradient, s.weight = instruction.weight;
      std::copy(std::begin(instruction.terms), std::end(instruction.terms), s.rows_of_terms);
      count += instruction.most > 1 ? 2 : 1, constant &= instruction.form == Form::CONSTANT;
    }
    const bool factors = count == 2 && constant;
    kept_.keep(count < 2 ? Keep::NOTHING : factors ? Keep::FACTORS : Keep::SIMILARITIES,
               plan_.stride * plan_.stride * int64_t(sizeof(T)), marked() ? kernels_.mark_bytes(plan_.stride) : 0,
               layout_.tiles);
  }

  RowVectors vectors(int32_t k) const {
    const int32_t* places = call_.program[k].scalars;
    RowVectors v{};
    v.moment_origin = place(places[0]), v.row_weight = place(places[ROW_WEIGHT]), v.shift = place(places[2]);
    v.argument_offset = place(places[3]), v.baseline = place(places[4]);
    if (has_own_weights(k)) v.row_weight = own(StepPlan::WEIGHT);
    if (layout_.scaled && pack_.scale) v.scale = own(StepPlan::MANTISSA);
    if (call_.ids) v.ids = own(StepPlan::IDS);
    if (call_.limited) v.largest_t = own(StepPlan::LARGEST_T);
    if (call_.guide) v.largest_guide = own(StepPlan::LARGEST_GUIDE);
    v.running_max = running_max(k);
    if (pack_.bias) v.bias = own(StepPlan::BIAS);
    v.sums = sums(), v.padded = plan_.padded, v.df_scale = 1;
    if (pack_.bias && call_.program[k].gradient) v.weight_sums = v.sums + SUM_COUNT * plan_.padded;
    return v;
  }

  T* running_max(int32_t k) const {
    const Instruction& sweep = call_.program[k];
    const int32_t at = sweep.form == Form::ONLINE ? sweep.terms[SHIFT] : sweep.form == Form::T_MAX ? sweep.terms[T_MAX] : -1;
    return at < 0 ? nullptr : place(at);
  }

  // --- memory ------------------------------------------------------------------------------------

  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int POSITIVES = 1, ROW_WEIGHT = 1;
  T* place(int64_t k) const { return reinterpret_cast<T*>(memory_ + plan_.vectors.at + k * plan_.vectors.size); }
  T* own(StepPlan::Own which) const { return place(call_.places + which); }
  double* sums() const { return reinterpret_cast<double*>(memory_ + plan_.sums.at); }
  double* block_sum(int which) const {
    return reinterpret_cast<double*>(memory_ + layout_.block_sums.at + which * layout_.block_sums.size);
  }

  const Step& call_;
  const StepPlan& layout_;
  const Plan& plan_;
  const TileKernels &kernels_, &row_kernels_;
  char* memory_;
  KeptTiles& kept_;
  Schedule schedule_;
  std::vector<Block> blocks_;
  Progress progress_;
  Phase* phases_;
  Sweep pack_, sweeps_[MOST_INSTRUCTIONS];
  PairRows rows_;
  double df_scale_ = 1;
};

template <class T> Status run_step(const Step& call, const TileKernels& kernels, const TileKernels& row_kernels) {
  WithoutInterpreter<Step> interpreter(call);
  const StepPlan layout(call, kernels);
  const Workspace workspace(layout.plan.bytes);
  if (!workspace.start()) return NO_MEMORY;
  KeptTiles kept(call.workspace);
  StepRun<T> run(call, layout, row_kernels, workspace.start(), kept);
  in_parallel(layout.plan.threads, [&](int thread) { run.work(thread, [&] { return interpreter.interrupted(); }); });
  return run.finish();
}

}  // namespace
