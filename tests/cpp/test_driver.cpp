// The pieces of the driver of csrc/cpu, each by itself: instruction sets, workspace, plan, prepare,
// schedule, collect. The kernels here are stand-ins with sizes but no arithmetic.

#include <algorithm>
#include <cstdio>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

// avx512 was not compiled, so that it has to be passed over.
#define ALPHACL_SETS SET(portable) SET(avx2) SET(avx512_bf16)

#include "../../csrc/cpu/collect.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/prepare.h"
#include "../../csrc/cpu/schedule.h"
#include "../../csrc/cpu/workspace.h"

namespace {

int failures = 0;

#define CHECK(condition, what) \
  if (!(condition) && ++failures < 20) \
  std::fprintf(stderr, "FAILED: line %d, %s: %s\n", __LINE__, #condition, (what).c_str())

// Blocks of up to 24 rows, padded to multiples of 8.
TileKernels stand_in(const char* set, Dtype operands) {
  TileKernels k{};
  k.instruction_set = set, k.operands = operands, k.accumulate = operands == FLOAT64 ? FLOAT64 : FLOAT32;
  k.row_multiple = 8, k.largest_block = 24;
  k.packed_bytes = [](int64_t dim, int64_t stride, bool gradient) { return stride * dim * (gradient ? 8 : 4) + 1; };
  k.df_bytes = [](int64_t dim, int64_t stride) { return stride * dim * 8; };
  k.guide_bytes = [](int64_t dim, int64_t stride) { return stride * dim * 4; };
  k.workspace_bytes = [](int64_t dim, int64_t guide_dim, int64_t stride) { return std::max(dim, guide_dim) + stride; };
  k.in_place = [](int64_t dim, int64_t) { return dim % 16 == 0; };
  return k;
}
const TileKernels PORTABLE[] = {stand_in("portable", FLOAT32), stand_in("portable", FLOAT64)};
const TileKernels AVX2[] = {stand_in("avx2", FLOAT32), stand_in("avx2", FLOAT64)};
const TileKernels BF16 = stand_in("avx512_bf16", BFLOAT16);

}  // namespace

const TileKernels* alphacl_kernels_portable(Dtype d) { return d < BFLOAT16 ? &PORTABLE[d] : nullptr; }
const TileKernels* alphacl_kernels_avx2(Dtype d) { return d < BFLOAT16 ? &AVX2[d] : nullptr; }
const TileKernels* alphacl_kernels_avx512_bf16(Dtype d) { return d == BFLOAT16 ? &BF16 : nullptr; }

namespace {

void test_instruction_sets() {
  for (int32_t set = -1; set <= SET_COUNT; set++)
    for (int32_t dtype : {FLOAT32, FLOAT64, BFLOAT16, FLOAT16}) {
      const TileKernels* expected = nullptr;
      const bool here = set >= 0 && set < SET_COUNT && runs_here(set);
      if (here && dtype == BFLOAT16 && set >= avx512_bf16) expected = &BF16;
      else if (here) expected = &(set >= avx2 ? AVX2 : PORTABLE)[dtype == FLOAT64];
      CHECK(choose(set, dtype) == expected, "set " + std::to_string(set) + ", dtype " + std::to_string(dtype));
    }
  CHECK(runs_here(portable) && !kernels_of(avx512) && !kernels_of(-1), std::string("compiled sets"));
}

void test_workspace() {
  const std::string what = "workspace";
  auto start_of = [](int64_t bytes) {
    const Workspace w(bytes);
    if (w.start()) std::memset(w.start(), 1, size_t(bytes));
    return w.start();
  };
  char* kept = start_of(1 << 20);
  CHECK(kept && reinterpret_cast<uintptr_t>(kept) % 4096 == 0, what);
  CHECK(start_of(1000) == kept && start_of(1 << 20) == kept, what);  // used again
  {
    auto first = std::make_unique<Workspace>(1000);  // of two callers at once
    const Workspace second(1000);
    CHECK(first->start() == kept && second.start() && second.start() != kept, what);
    first.reset();
  }
  CHECK(start_of(1 << 20) == kept, what);  // the larger one was kept
  CHECK(!start_of(int64_t(1) << 60), what);
  CHECK(start_of(1000), what);
}

// Exactly so many bytes, aligned as torch aligns a tensor: the sanitizer guards both ends.
std::unique_ptr<char, decltype(&std::free)> exact(int64_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, size_t(bytes)) == 0) std::memset(p, 0xff, size_t(bytes));
  return {static_cast<char*>(p), std::free};
}

struct Case {
  int64_t n, split, block, anchors, lo, hi, dim = 3;
  bool gradient = false, bias = false;
  int threads = 1;
  Sweep sweep() const {
    Sweep s{};
    s.n = n, s.split = split, s.block = block, s.anchors = anchors, s.lo = lo, s.hi = hi, s.dim = dim;
    s.gradient = gradient, s.threads = threads, s.tau = 1;
    alignas(64) static char memory[144 * 16 * 8];
    s.df = memory;
    if (bias) s.bias = memory;
    for (int32_t& row : s.rows_of_terms) row = -1;
    return s;
  }
  std::string name() const {
    std::string text = gradient ? "gradient" : "sums";
    for (int64_t x : {n, split, block, anchors, lo, hi, dim}) text += " " + std::to_string(x);
    return text + " (n, split, block, anchors, lo, hi, dim)";
  }
};

std::vector<Case> cases() {
  std::vector<Case> list;
  for (int64_t n : {1, 2, 3, 5, 8, 16, 17, 24, 25, 40, 73, 144})
    for (int64_t split : {int64_t(0), int64_t(1), n / 2, n - 1})
      for (int64_t block : {1, 3, 8, 16, 100}) {
        if (split >= n || (split == 0 && n / 2 == 0 && block > 3)) continue;
        list.push_back({n, split, block, split ? split : n, 0, 0});
        for (int64_t dim : {3, 16}) list.push_back({n, split, block, n, n / 3, n - n / 4, dim, true, block == 3, 4});
        list.push_back({n, split, block, n, n / 2, n / 2, 16, true});  // no gradient is wanted
        list.push_back({n, split, block, n, 0, n, 16, true});
      }
  return list;
}

void test_blocks(const Case& c, const Plan& p) {
  int64_t row = 0;
  for (int64_t b = 0; b < p.blocks; b++) {
    const Block x = p.block(b);
    CHECK(x.first == row && x.rows > 0 && x.rows <= c.block && x.rows <= p.kernels.largest_block, c.name());
    CHECK(x.at == b * p.stride && x.stride == p.stride && x.rows <= p.stride, c.name());
    CHECK(!c.split || x.first >= c.split || x.first + x.rows <= c.split, c.name());
    CHECK(x.anchor == (x.first < c.anchors), c.name());
    bool wanted = false;
    for (int64_t r = x.first; r < x.first + x.rows; r++) wanted |= c.gradient && r >= c.lo && r < c.hi;
    CHECK(x.wanted == wanted, c.name());
    CHECK(!p.in_place(x) || (x.rows == p.stride && x.first >= c.lo && x.first + x.rows <= c.hi), c.name());
    row += x.rows;
  }
  CHECK(row == c.n && p.padded == p.blocks * p.stride, c.name());
  CHECK(p.stride % p.kernels.row_multiple == 0 && p.stride < p.block_rows + p.kernels.row_multiple, c.name());
}

// The pieces follow one another without a gap, and each has room for what is said to be in it.
void test_bytes(const Case& c, const Plan& p) {
  int64_t end = 0, own_accumulators = 0;
  for (const Pieces* pieces : {&p.packed, &p.accumulators, &p.vectors, &p.sums, &p.thread, &p.rounds}) {
    CHECK(pieces->at == end && pieces->size % 64 == 0, c.name());
    end += pieces->size * pieces->count;
  }
  CHECK(end == p.bytes, c.name());
  for (int64_t b = 0; b < p.blocks; b++) own_accumulators += p.block(b).wanted && !p.in_place(p.block(b));
  CHECK(p.accumulators.count == own_accumulators, c.name());
  CHECK(p.packed.count == p.blocks && p.packed.size >= p.kernels.packed_bytes(c.dim, p.stride, c.gradient), c.name());
  CHECK(p.accumulators.size >= p.kernels.df_bytes(c.dim, p.stride), c.name());
  CHECK(p.thread.count == c.threads && p.thread.size >= p.kernels.workspace_bytes(c.dim, 0, p.stride), c.name());
  CHECK(p.sums.size >= p.padded * 8 * (c.gradient && c.bias ? 6 : 5), c.name());
  CHECK(p.rounds.size >= p.blocks * int64_t(sizeof(std::atomic<int64_t>)), c.name());
}

// All pairs of rows are in exactly one tile, all blocks in exactly one tile of every round.
void test_pairs(const Case& c, const Plan& p) {
  const Schedule schedule(p);
  std::vector<int> met(size_t(c.n * c.n));
  std::vector<int64_t> round_of(size_t(p.blocks), -1);
  int64_t last_round = 0;
  for (int64_t number = 0; number < schedule.tiles(); number++) {
    const Tile t = schedule.tile(number);
    CHECK(t.round == last_round || t.round == last_round + 1, c.name());
    last_round = t.round;
    for (int64_t b : t.i == t.j ? std::set<int64_t>{t.i} : std::set<int64_t>{t.i, t.j}) {
      if (b == NO_BLOCK) continue;
      CHECK(b >= 0 && b < p.blocks && round_of[size_t(b)] == t.round - 1, c.name());
      round_of[size_t(b)] = t.round;
    }
    if (t.i == NO_BLOCK || t.j == NO_BLOCK) continue;
    const Block i = p.block(t.i), j = p.block(t.j);
    for (int64_t r = i.first; r < i.first + i.rows; r++)
      for (int64_t s = j.first; s < j.first + j.rows; s++) met[size_t(std::min(r, s) * c.n + std::max(r, s))]++;
  }
  for (int64_t round : round_of) CHECK(round == schedule.rounds() - 1, c.name());
  for (int64_t r = 0; r < c.n; r++)
    for (int64_t s = r + 1; s < c.n; s++) {
      const int64_t same_block = !c.split && p.block(r / p.block_rows).first == p.block(s / p.block_rows).first;
      const bool meet = !c.split || (r < c.split && s >= c.split);
      // a diagonal tile is a full square
      CHECK(met[size_t(r * c.n + s)] == meet + same_block, c.name());
    }
}

// Every block's rounds go up by one: a store that comes twice could take another thread's back.
class OneByOne : public Progress {
 public:
  OneByOne(void* rounds, const Case& c, int64_t blocks) : Progress(rounds, blocks), case_(c), seen_(size_t(blocks), -1) {}
  void finish(int64_t b, int64_t rounds) {
    if (b != NO_BLOCK) CHECK(rounds == ++seen_[size_t(b)], case_.name());
    Progress::finish(b, rounds);
  }

 private:
  const Case& case_;
  std::vector<int64_t> seen_;
};

// Runs the schedule and returns which blocks each block met, in order. The logs are written without
// a lock: ThreadSanitizer reports it if two tiles of a block ever overlap.
std::vector<std::vector<int64_t>> logs_of(const Case& c, const Plan& plan, int threads, int64_t stop_after = -1) {
  const Schedule schedule(plan);
  const auto rounds = std::make_unique<std::atomic<int64_t>[]>(size_t(plan.blocks));
  OneByOne progress(rounds.get(), c, plan.blocks);
  std::vector<std::vector<int64_t>> logs(static_cast<size_t>(plan.blocks));
  std::vector<int> packed(size_t(plan.blocks)), unpacked(size_t(plan.blocks));
  std::atomic<int64_t> tiles{0};
  auto run = [&](int thread) {
    uint64_t chance = uint64_t(thread) + 1;
    run_thread(
        plan, schedule, progress, [&](int64_t b) { packed[size_t(b)]++; },
        [&](int64_t number, int64_t i, int64_t j) {
          CHECK(schedule.tile(number).i == i && schedule.tile(number).j == j, c.name());
          for (chance = chance * 6364136223846793005u + 1442695040888963407u; chance >> 62 == 0; chance *= 3)
            std::this_thread::yield();
          CHECK(packed[size_t(i)] == 1 && packed[size_t(j)] == 1, c.name());
          logs[size_t(i)].push_back(j);
          if (i != j) logs[size_t(j)].push_back(i);
          tiles++;
        },
        [&](int64_t b) {
          CHECK(plan.block(b).wanted && int64_t(logs[size_t(b)].size()) > 0, c.name());
          unpacked[size_t(b)]++;
        },
        [&] { return stop_after >= 0 && tiles >= stop_after; });
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; t++) others.emplace_back(run, t);
  run(0);
  for (auto& t : others) t.join();
  CHECK(progress.status() == (stop_after < 0 ? OK : INTERRUPTED), c.name());
  for (int64_t b = 0; b < plan.blocks; b++) {
    CHECK(packed[size_t(b)] == 1, c.name());
    CHECK(unpacked[size_t(b)] <= plan.block(b).wanted, c.name());
    CHECK(stop_after >= 0 || unpacked[size_t(b)] == plan.block(b).wanted, c.name());
  }
  return logs;
}

void test_threads(const Case& c, const Plan& plan) {
  const auto alone = logs_of(c, plan, 1);
  for (int threads : {2, 5}) CHECK(logs_of(c, plan, threads) == alone, c.name());
  const auto stopped = logs_of(c, plan, 3, 1);
  for (size_t b = 0; b < stopped.size(); b++)  // in the same order up to where they stopped
    CHECK(stopped[b].size() <= alone[b].size() && std::equal(stopped[b].begin(), stopped[b].end(), alone[b].begin()),
          c.name());
}

template <class T> std::vector<T> numbers(int64_t n, double first, double step) {
  std::vector<T> x;
  for (int64_t k = 0; k < n; k++) x.push_back(T(first + step * double(k)));
  return x;
}

template <class T> void test_prepare(const Case& c, Dtype operands) {
  const TileKernels kernels = stand_in("portable", operands);
  const int64_t n = c.n, anchors = c.anchors;
  const auto origin = numbers<T>(anchors, 1, 1), weight = numbers<T>(anchors, 0, -3), shift = numbers<T>(anchors, 2, 0.25),
             offset = numbers<T>(anchors, 5, 1), scale = numbers<T>(n, 3, 2), bias = numbers<T>(n, -1, 1);
  const auto ids = numbers<int32_t>(n, 7, 1);
  for (Form form : {Form::CONSTANT, Form::ONLINE, Form::PLAIN, Form::T_MAX}) {
    const bool half = operands == BFLOAT16, maxima = form == Form::ONLINE || form == Form::T_MAX;
    Sweep s = c.sweep();
    const int64_t df_bytes = (c.hi - c.lo) * c.dim * int64_t(sizeof(T));
    const auto df = exact(df_bytes);
    s.moment_origin = origin.data(), s.row_weight = weight.data(), s.shift = shift.data();
    s.argument_offset = offset.data(), s.baseline = maxima ? offset.data() : nullptr, s.scale = scale.data(), s.bias = bias.data(), s.ids = ids.data();
    s.form = form, s.constant_shift = 1.5, s.df = df.get();
    const Plan plan(s, kernels);
    const auto memory = exact(plan.bytes);
    const std::vector<Block> blocks = place_blocks(plan, memory.get());
    std::set<void*> accumulators;
    for (const Block& b : blocks) {
      CHECK(b.packed == memory.get() + plan.packed.at + b.at / plan.stride * plan.packed.size, c.name());
      CHECK(bool(b.df) == b.wanted && (!b.df || accumulators.insert(b.df).second), c.name());
      if (!b.wanted) continue;
      const char* const start = static_cast<char*>(b.df);
      if (plan.in_place(b)) {
        const int64_t at = (b.first - c.lo) * c.dim * int64_t(sizeof(T));
        CHECK(start == df.get() + at && at + b.rows * c.dim * int64_t(sizeof(T)) <= df_bytes, c.name());
      } else {
        const int64_t at = start - memory.get();
        CHECK(at >= plan.accumulators.at && at + plan.accumulators.size <= plan.vectors.at, c.name());
      }
    }
    const RowVectors v = pad_row_vectors<T>(plan, blocks, memory.get());
    CHECK(bool(v.running_max) == maxima && bool(v.scale) == half && bool(v.weight_sums) == c.gradient, c.name());
    auto at = [](const void* x, int64_t r) { return double(static_cast<const T*>(x)[r]); };
    std::vector<bool> real(size_t(plan.padded));
    T largest = 0;
    auto weight_of = [&](int64_t row) {
      const bool folded = c.gradient && form == Form::CONSTANT;
      return folded ? T(weight[size_t(row)] * std::exp(T(1.5) - shift[size_t(row)])) : weight[size_t(row)];
    };
    for (int64_t row = 0; row < anchors; row++) largest = std::max(largest, std::fabs(weight_of(row)));
    const bool divided = half && c.gradient && largest > 0;
    CHECK(v.df_scale == (divided ? largest : T(1)), c.name());
    for (const Block& b : blocks)
      for (int64_t r = b.at; r < b.at + plan.stride; r++) {
        const int64_t row = b.first + r - b.at;
        const bool padding = r >= b.at + b.rows, anchor = !padding && row < anchors;
        const size_t k = size_t(row);
        const T one = divided ? largest : T(1);
        CHECK(at(v.moment_origin, r) == (anchor ? origin[k] : 0) && at(v.shift, r) == (anchor ? shift[k] : 0), c.name());
        CHECK(at(v.argument_offset, r) == (anchor ? offset[k] : 0), c.name());
        CHECK(at(v.baseline, r) == (anchor && maxima ? offset[k] : 0), c.name());
        CHECK(std::fabs(at(v.row_weight, r) - (anchor ? weight_of(row) / one : 0)) <= 1e-6 * largest, c.name());
        CHECK(at(v.bias, r) == (padding ? 0 : bias[k]), c.name());
        int exponent;
        CHECK(!half || at(v.scale, r) == (padding ? 0 : std::frexp(scale[k], &exponent)), c.name());
        const int64_t id = sizeof(T) == 4 ? static_cast<const int32_t*>(v.ids)[r] : static_cast<const int64_t*>(v.ids)[r];
        CHECK(id == (padding ? -1 : ids[k]), c.name());
        CHECK(!maxima || at(v.running_max, r) == -HUGE_VAL, c.name());
        for (int term = 0; term < SUM_COUNT; term++) CHECK(v.sums[term * v.padded + r] == 0, c.name());
      }
  }
}

template <class T> void test_collect(const Case& c, const TileKernels& kernels) {
  Sweep s = c.sweep();
  const int rows[SUM_COUNT] = {2, -1, 1, 3, -1};
  std::copy(rows, rows + SUM_COUNT, s.rows_of_terms);
  std::vector<T> out(size_t(4 * c.anchors), T(-1)), out_weights(size_t(c.n), T(-1));
  s.sums = out.data(), s.weight_sums = out_weights.data(), s.constant_shift = 0.75;
  const Plan plan(s, kernels);
  std::vector<double> sums(size_t(SUM_COUNT * plan.padded)), weight_sums(size_t(plan.padded));
  std::vector<T> maxima(size_t(plan.padded));
  RowVectors v{};
  v.padded = plan.padded, v.sums = sums.data(), v.weight_sums = c.gradient ? weight_sums.data() : nullptr, v.df_scale = 0.5;
  std::vector<Block> blocks;
  for (int64_t b = 0; b < plan.blocks; b++) blocks.push_back(plan.block(b));
  for (const Block& b : blocks)
    for (int64_t r = 0; r < plan.stride; r++) {
      const double row = r < b.rows ? double(b.first + r) : 1e6;  // the padding must not show
      for (int term = 0; term < SUM_COUNT; term++) sums[size_t(term * plan.padded + b.at + r)] = 1000 * term + row;
      weight_sums[size_t(b.at + r)] = 2 * row, maxima[size_t(b.at + r)] = T(row / 2);
    }
  for (bool online : {false, true}) {
    s.rows_of_terms[SHIFT] = c.gradient ? -1 : 0, v.running_max = online ? maxima.data() : nullptr;
    collect<T>(plan, blocks, v);
    for (int64_t i = 0; i < c.anchors; i++) {
      CHECK(out[size_t(i)] == (c.gradient ? T(-1) : online ? T(i) / 2 : T(0.75)), c.name());
      for (int term = 0; term < SUM_COUNT; term++)
        CHECK(rows[term] < 0 || out[size_t(rows[term] * c.anchors + i)] == T(1000 * term + i), c.name());
    }
    for (int64_t i = 0; i < c.n; i++) CHECK(out_weights[size_t(i)] == (c.gradient ? T(i) : T(-1)), c.name());
  }
}

}  // namespace

int main() {
  test_instruction_sets();
  test_workspace();
  const std::vector<Case> all = cases();
  for (size_t k = 0; k < all.size(); k++) {
    const Case& c = all[k];
    const Sweep s = c.sweep();
    const Plan plan(s, PORTABLE[0]);
    test_blocks(c, plan);
    test_bytes(c, plan);
    test_pairs(c, plan);
    if (k % 5 == 0) test_threads(c, plan);
    test_prepare<float>(c, FLOAT32);
    test_prepare<double>(c, FLOAT64);
    test_prepare<float>(c, BFLOAT16);
    test_collect<float>(c, PORTABLE[0]);
    test_collect<double>(c, PORTABLE[1]);
  }
  std::printf("%zu plans: %s\n", all.size(), failures ? "FAILED" : "all good");
  return failures ? 1 : 0;
}
