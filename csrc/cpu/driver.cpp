// The two sweeps: which blocks meet when, memory, threads, choice of the instruction set. Plain C interface (backend/cpu.py
// loads it with ctypes), no header of torch or Python: one binary for every version of both.
//
// Order. With m blocks (one more, of no rows, to make m odd) round r pairs the blocks i + j ≡ r (mod m): every block is in
// exactly one tile of a round, the one with 2i ≡ r in its own diagonal tile, and after m rounds every pair has met once. A
// tile adds to the sums and the gradient of its two blocks, so tiles of a round are independent and each block's
// additions happen in the order of the rounds: no locks, no copies per thread, and the same bits whatever the number of
// threads. There is no barrier either: tiles are dealt out in order, and each waits only until its two blocks have
// finished the round before.

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "sweep.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

int alphacl_engines_portable(Engine*);
#if defined(ALPHACL_WITH_AVX2)
int alphacl_engines_avx2(Engine*);
#endif
#if defined(ALPHACL_WITH_AVX512)
int alphacl_engines_avx512(Engine*);
#endif
#if defined(ALPHACL_WITH_AVX512_BF16)
int alphacl_engines_avx512_bf16(Engine*);
#endif
#if defined(ALPHACL_WITH_AMX)
int alphacl_engines_amx(Engine*);
#endif
#if defined(ALPHACL_WITH_AMX_EMULATED)
int alphacl_engines_amx_emulated(Engine*);
#endif

namespace {

// --- instruction sets -----------------------------------------------------------------------------------------------

// Engines are asked for only where their instructions exist: even the functions that list them are compiled with those.
bool amx_usable() {
#if defined(ALPHACL_WITH_AMX) && defined(__linux__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;
  Features() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA) || !(c & bit_F16C)) return;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned b7 = b, d7 = d;
    avx2 = b7 >> 5 & 1;
    avx512 = avx2 && (low & 0xe6) == 0xe6 && (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1);  // F DQ BW VL
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
    avx512_bf16 = avx512 && (a >> 5 & 1);
    amx = avx512_bf16 && (d7 >> 22 & 1) && (d7 >> 24 & 1) && (low >> 17 & 3) == 3 && amx_usable();
#endif
  }
};

enum InstructionSet : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4, AMX_EMULATED = 5, SET_COUNT = 6 };

bool runs_here(int32_t set) {
  static const Features cpu;
  switch (set) {
    case PORTABLE: return true;
    case AVX2: return cpu.avx2;
    case AVX512: return cpu.avx512;
    case AVX512_BF16: return cpu.avx512_bf16;
    case AMX: return cpu.amx;
    case AMX_EMULATED: return cpu.avx512_bf16;
    default: return false;
  }
}

struct EngineSet {  // of one instruction set, by operand dtype; absent where it is not compiled or does not run
  const Engine *float32 = nullptr, *float64 = nullptr, *bfloat16 = nullptr;
};

const EngineSet* engine_sets() {
  static Engine engines[SET_COUNT * 4];
  static EngineSet sets[SET_COUNT];
  static const bool filled = [] {
    int count = 0;
    auto take = [&](InstructionSet set, int (*fill)(Engine*)) {
      if (!runs_here(set)) return;
      const int added = fill(engines + count);
      for (int e = count; e < count + added; e++) {
        EngineSet& entry = sets[set];
        (engines[e].operands == FLOAT32 ? entry.float32 : engines[e].operands == FLOAT64 ? entry.float64 : entry.bfloat16) =
            engines + e;
      }
      count += added;
    };
    take(PORTABLE, alphacl_engines_portable);
#if defined(ALPHACL_WITH_AVX2)
    take(AVX2, alphacl_engines_avx2);
#endif
#if defined(ALPHACL_WITH_AVX512)
    take(AVX512, alphacl_engines_avx512);
#endif
#if defined(ALPHACL_WITH_AVX512_BF16)
    take(AVX512_BF16, alphacl_engines_avx512_bf16);
#endif
#if defined(ALPHACL_WITH_AMX)
    take(AMX, alphacl_engines_amx);
#endif
#if defined(ALPHACL_WITH_AMX_EMULATED)
    take(AMX_EMULATED, alphacl_engines_amx_emulated);
#endif
    return true;
  }();
  (void)filled;
  return sets;
}

bool compiled(int32_t set) {
  constexpr bool with[SET_COUNT] = {
      true,
#if defined(ALPHACL_WITH_AVX2)
      true,
#else
      false,
#endif
#if defined(ALPHACL_WITH_AVX512)
      true,
#else
      false,
#endif
#if defined(ALPHACL_WITH_AVX512_BF16)
      true,
#else
      false,
#endif
#if defined(ALPHACL_WITH_AMX)
      true,
#else
      false,
#endif
#if defined(ALPHACL_WITH_AMX_EMULATED)
      true,
#else
      false,
#endif
  };
  return with[set];
}

// The engine for a dtype when instruction sets up to `set` may be used: half precision without products of its own is
// multiplied as float32.
const Engine* choose(int32_t set, int32_t dtype) {
  const EngineSet* sets = engine_sets();
  if (set < 0 || set >= SET_COUNT || !runs_here(set)) return nullptr;
  auto usable = [&](int32_t other) { return runs_here(other) && (other != AMX_EMULATED || set == AMX_EMULATED); };
  if (dtype == BFLOAT16)
    for (int32_t other = set; other >= 0; other--)
      if (usable(other) && sets[other].bfloat16 && !(set == AMX_EMULATED && other == AMX)) return sets[other].bfloat16;
  for (int32_t other = set; other >= 0; other--) {
    const Engine* engine = dtype == FLOAT64 ? sets[other].float64 : sets[other].float32;
    if (usable(other) && engine) return engine;
  }
  return nullptr;
}

// --- memory ---------------------------------------------------------------------------------------------------------

// One allocation, handed out in pieces; big ones in huge pages. The last one is kept for the next call unless it is large:
// its pages' faults would cost small batches half their time.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      std::swap(start_, kept_), std::swap(size_, kept_size_);
    }
    if (size_ >= bytes) return;
    std::free(start_);  // too small: it would only be memory that is held beside the new one
    constexpr int64_t HUGE_PAGE = 2 << 20;
    const bool big = bytes >= 2 * HUGE_PAGE;
    size_ = (bytes + 4095) / 4096 * 4096;
    void* start = nullptr;
    start_ = posix_memalign(&start, big ? HUGE_PAGE : 4096, size_) == 0 ? static_cast<char*>(start) : nullptr;
    if (!start_) size_ = 0;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (big && start_) madvise(start_, size_ / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);  // not of what lies behind the end
#endif
  }
  ~Memory() {
    if (size_ <= LARGEST_KEPT) {
      const std::lock_guard<std::mutex> hold(mutex_);
      if (size_ > kept_size_) std::swap(start_, kept_), std::swap(size_, kept_size_);
    }
    std::free(start_);
  }
  Memory(const Memory&) = delete;
  explicit operator bool() const { return start_; }
  template <class T = char> T* take(int64_t bytes) {
    T* p = reinterpret_cast<T*>(start_ + used_);
    used_ += size(bytes);
    return p;
  }
  static int64_t size(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  static constexpr int64_t LARGEST_KEPT = 64 << 20;
  static std::mutex mutex_;
  static char* kept_;
  static int64_t kept_size_;
  char* start_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};
std::mutex Memory::mutex_;
char* Memory::kept_ = nullptr;
int64_t Memory::kept_size_ = 0;

// --- order of the tiles -----------------------------------------------------------------------------------------------

struct Order {
  int64_t left, right;  // blocks; a triangle has left == right
  bool triangle;
  int64_t m, per_round;
  Order(int64_t left_, int64_t right_, bool triangle_) : left(left_), right(right_), triangle(triangle_) {
    m = triangle ? left | 1 : left > right ? left : right;
    per_round = triangle ? (m + 1) / 2 : m;
  }
  int64_t tiles() const { return m * per_round; }
  // Tile number → round and blocks; a block number beyond the real ones is the empty block.
  void at(int64_t number, int64_t& round, int64_t& i, int64_t& j) const {
    round = number / per_round;
    int64_t k = number % per_round;
    if (triangle) {
      // i + j ≡ round: the two blocks around half = round/2 (mod m), at distance k on either side
      const int64_t half = round % 2 == 0 ? round / 2 : (round + m) / 2 % m;
      // The far pairs of one round hold the near blocks of the next: going to and fro keeps a round between the two.
      if (round % 2) k = per_round - 1 - k;
      i = (half - k + m) % m, j = (half + k) % m;
      if (i > j) std::swap(i, j);
    } else {
      i = k, j = (k + round) % m;
    }
  }
};

// work(0) … work(threads − 1), each in a thread; fewer may come, and work(0) is in the calling one.
template <class Work> void in_parallel(int threads, Work&& work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
  work(omp_get_thread_num());
#else
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (int t = 1; t < threads; t++) others.emplace_back(work, t);
  } catch (const std::system_error&) {  // those that there are will do
  }
  work(0);
  for (auto& t : others) t.join();
#endif
}

// --- a sweep ----------------------------------------------------------------------------------------------------------

template <class T> int run(const Sweep& s, const Engine& engine, void*& lock) {
  const bool gradient = s.form == GRAD_FIXED || s.form == GRAD;
  const int64_t block = s.block < engine.largest_block ? s.block : int64_t(engine.largest_block);
  const int64_t stride = (block + engine.row_multiple - 1) / engine.row_multiple * engine.row_multiple;
  const int64_t left_rows = s.split ? s.split : s.n;
  const int64_t left = (left_rows + block - 1) / block;
  const int64_t right = s.split ? (s.n - s.split + block - 1) / block : 0;
  const int64_t count = left + right, rows = count * stride;
  const bool raw = engine.operands == BFLOAT16;  // scale is applied to the similarities, not to the rows

  const int64_t packed_bytes = Memory::size(engine.packed_bytes(s.dim, stride, gradient));
  const int64_t df_bytes = gradient ? Memory::size(engine.df_bytes(s.dim, stride)) : 0;
  const int64_t vector_bytes = Memory::size(rows * int64_t(sizeof(T))), sum_bytes = Memory::size(rows * 8);
  const int threads = s.threads > 1 ? s.threads : 1;
  const int64_t scratch_bytes = Memory::size(engine.scratch_bytes(s.dim, stride));
  const bool wants_df = gradient && s.hi > s.lo;
  // The rows of s.df that a block's gradient ends up in may hold its accumulator: the largest piece of memory there is.
  auto rows_of_df = [&](const Block& b) { return static_cast<T*>(s.df) + (b.first - s.lo) * s.dim; };
  auto in_place = [&](const Block& b) {
    const bool whole = b.rows == stride && b.first >= s.lo && b.first + b.rows <= s.hi;
    return whole && engine.in_place(s.dim, stride) && reinterpret_cast<uintptr_t>(rows_of_df(b)) % 64 == 0;
  };
  auto block_at = [&](int64_t b) {
    Block x{};
    x.first = b < left ? b * block : s.split + (b - left) * block;
    const int64_t end = b < left ? left_rows : s.n;
    x.rows = end - x.first < block ? end - x.first : block;
    x.stride = stride, x.packed = b * stride;
    x.anchor = x.first < s.anchors;
    x.wanted = wants_df && x.first < s.hi && x.first + x.rows > s.lo;
    return x;
  };
  int64_t apart = 0;  // accumulators of their own
  for (int64_t b = 0; wants_df && b < count; b++) {
    const Block x = block_at(b);
    apart += x.wanted && !in_place(x);
  }
  Memory memory(count * packed_bytes + apart * df_bytes + 10 * vector_bytes + (TERM_COUNT + 3) * sum_bytes +
                threads * scratch_bytes + Memory::size(count * int64_t(sizeof(std::atomic<int64_t>))));
  if (!memory) return NO_MEMORY;  // before anything else is allocated: a sweep too large ends here

  RowVectors v{};
  v.padded = rows;
  std::vector<Block> blocks(count);
  for (int64_t b = 0; b < count; b++) {
    Block& x = blocks[b] = block_at(b);
    x.left = memory.take(packed_bytes);
    x.df = nullptr;
    if (x.wanted) x.df = in_place(x) ? rows_of_df(x) : memory.take<T>(df_bytes);
  }
  T* gain = nullptr;
  double df_scale = 1;
  {  // padded copies of the row vectors; a missing one is zero, all of those one and the same
    T* zeros = memory.take<T>(vector_bytes);
    std::memset(zeros, 0, vector_bytes);
    auto spread = [&](const void* from, int64_t length) -> T* {
      if (!from) return zeros;
      T* to = memory.take<T>(vector_bytes);
      std::memset(to, 0, vector_bytes);
      for (const Block& b : blocks) {
        const int64_t n = b.first + b.rows <= length ? b.rows : length > b.first ? length - b.first : 0;
        std::memcpy(to + b.packed, static_cast<const T*>(from) + b.first, n * sizeof(T));
      }
      return to;
    };
    v.center = spread(s.center, s.anchors);
    v.gain = gain = spread(s.gain, s.anchors);
    v.shift = spread(s.shift, s.anchors);
    v.offset = spread(s.offset, s.anchors);
    v.level = spread(s.level, s.anchors);
    if (raw && s.scale) {  // rows are packed with the power of two of their scale
      T* scale = spread(s.scale, s.n);
      int exponent;
      for (int64_t r = 0; r < rows; r++) scale[r] = std::frexp(scale[r], &exponent);
      v.scale = scale;
    }
    v.bias = s.bias ? spread(s.bias, s.n) : nullptr;
    if (s.ids) {
      using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
      Int* ids = memory.take<Int>(vector_bytes);
      for (int64_t r = 0; r < rows; r++) ids[r] = -1;
      for (const Block& b : blocks)
        for (int64_t r = 0; r < b.rows; r++) ids[b.packed + r] = s.ids[b.first + r];
      v.ids = ids;
    }
    if (s.form == GRAD_FIXED) {
      const T* shift = static_cast<const T*>(v.shift);
      for (int64_t r = 0; r < rows; r++)
        if (gain[r] != 0) gain[r] *= std::exp(T(s.middle) - shift[r]);
    }
    if (raw && gradient) {  // equal weights, as those of a hinge, become powers of two: rounding them would not average out
      T largest = 0;
      for (int64_t r = 0; r < rows; r++) largest = std::fabs(gain[r]) > largest ? std::fabs(gain[r]) : largest;
      if (largest > std::numeric_limits<T>::min() && largest < std::numeric_limits<T>::max()) {
        for (int64_t r = 0; r < rows; r++) gain[r] /= largest;
        df_scale = largest;
      }
    }
    if (s.form == LOG_SUMS_RUNNING || s.form == MAXIMUM) {
      T* base = memory.take<T>(vector_bytes);
      for (int64_t r = 0; r < rows; r++) base[r] = -HUGE_VAL;
      v.base = base;
    }
  }
  v.sums = memory.take<double>(TERM_COUNT * sum_bytes);
  v.total = memory.take<double>(2 * sum_bytes);
  v.weight_sums = s.bias && gradient ? memory.take<double>(sum_bytes) : nullptr;
  std::memset(v.sums, 0, TERM_COUNT * sum_bytes);
  std::memset(v.total, 0, 2 * sum_bytes);
  if (v.weight_sums) std::memset(v.weight_sums, 0, sum_bytes);
  char* scratch = memory.take(threads * scratch_bytes);
  auto* done = memory.take<std::atomic<int64_t>>(count * sizeof(std::atomic<int64_t>));
  for (int64_t b = 0; b < count; b++) new (done + b) std::atomic<int64_t>(-1);

  const Order order(left, s.split ? right : left, !s.split);
  std::atomic<int64_t> next_block{0}, next_tile{0}, next_unpack{0};
  std::atomic<int> status{OK};
  const auto main_thread = std::this_thread::get_id();

  auto work = [&](int thread) {
    void* mine = scratch + thread * scratch_bytes;
    auto wait_for = [&](int64_t b, int64_t round) {  // until the block has been packed and is through with rounds < round
      for (int spins = 0; done[b].load(std::memory_order_acquire) < round; spins++) {
        if (status.load(std::memory_order_relaxed) != OK) return;
        if (spins > 1000) std::this_thread::yield();
      }
    };
    for (int64_t b; (b = next_block.fetch_add(1)) < count;) {
      engine.pack(s, blocks[b], gradient, mine);
      done[b].store(0, std::memory_order_release);
    }
    auto asked = std::chrono::steady_clock::now();
    for (int64_t number; status.load(std::memory_order_relaxed) == OK && (number = next_tile.fetch_add(1)) < order.tiles();) {
      int64_t round, i, j;
      order.at(number, round, i, j);
      const bool has_i = i < order.left, has_j = j < order.right;
      const int64_t bi = i, bj = order.triangle ? j : left + j;
      const bool other = has_j && !(order.triangle && i == j);
      if (has_i) wait_for(bi, round);
      if (other) wait_for(bj, round);
      if (status.load(std::memory_order_relaxed) != OK) break;
      if (has_i && has_j) engine.tile(s, v, blocks[bi], blocks[bj], mine);
      if (has_i) done[bi].store(round + 1, std::memory_order_release);
      if (other) done[bj].store(round + 1, std::memory_order_release);
      if (s.check_signals && std::this_thread::get_id() == main_thread) {
        const auto now = std::chrono::steady_clock::now();
        if (now - asked > std::chrono::milliseconds(200)) {
          asked = now;
          s.take_lock(lock);
          if (s.check_signals()) status.store(INTERRUPTED);
          lock = s.release_lock();
        }
      }
    }
    if (wants_df)
      for (int64_t b; status.load() == OK && (b = next_unpack.fetch_add(1)) < count;) {
        if (!blocks[b].wanted) continue;
        wait_for(b, order.m);
        engine.unpack(s, blocks[b], df_scale, mine);
      }
  };

  in_parallel(threads, work);
  if (status.load() != OK) return status.load();

  auto gather = [&](const auto* from, void* to, int64_t length) {
    for (const Block& b : blocks)
      for (int64_t r = 0; r < b.rows && b.first + r < length; r++) static_cast<T*>(to)[b.first + r] = T(from[b.packed + r]);
  };
  if (s.form == MAXIMUM) {
    gather(static_cast<const T*>(v.base), s.out, s.anchors);
  } else if (s.form == LOG_SUMS_RUNNING || s.form == LOG_SUMS_FIXED) {
    T* out = static_cast<T*>(s.out);
    const bool running = s.form == LOG_SUMS_RUNNING;
    if (running) gather(static_cast<const T*>(v.base), out, s.anchors);
    else for (int64_t r = 0; r < s.anchors; r++) out[r] = T(s.middle);
    const double* sums = running ? static_cast<const double*>(v.total) : v.sums;
    for (int k : {int(F), int(FT)})
      if (s.rows_of_terms[k] >= 0)
        gather(sums + (running ? k == FT : k) * rows, out + s.rows_of_terms[k] * s.anchors, s.anchors);
  } else {
    for (int k = 0; k < TERM_COUNT; k++)
      if (s.rows_of_terms[k] >= 0)
        gather(v.sums + k * rows, static_cast<T*>(gradient ? s.sums : s.out) + s.rows_of_terms[k] * s.anchors, s.anchors);
  }
  if (v.weight_sums) gather(v.weight_sums, s.weight_sums, s.n);
  return OK;
}

// Pairs of rows in chunks; a row is done by itself, so the number of threads changes nothing.
template <class T> int run_rows(const PairRows& p, void (*pairs)(const PairRows&, int64_t, int64_t, void*)) {
  constexpr int64_t CHUNK = 64;
  const int threads = p.threads > 1 ? p.threads : 1;
  const int64_t scratch_bytes = Memory::size(2 * (p.dim + 64) * int64_t(sizeof(T)));
  Memory memory(threads * scratch_bytes);
  if (!memory) return NO_MEMORY;
  char* scratch = memory.take(threads * scratch_bytes);
  std::atomic<int64_t> next{0};
  in_parallel(threads, [&](int thread) {
    for (int64_t i; (i = next.fetch_add(CHUNK)) < p.n_pairs;)
      pairs(p, i, i + CHUNK < p.n_pairs ? i + CHUNK : p.n_pairs, scratch + thread * scratch_bytes);
  });
  return OK;
}

int run_rows(const PairRows* p, bool finish) {
  const Engine* engine = choose(p->instruction_set, p->dtype == FLOAT64 ? FLOAT64 : FLOAT32);
  if (!engine) return UNSUPPORTED;
  const auto pairs = finish ? engine->finish : engine->normalize;
  return p->dtype == FLOAT64 ? run_rows<double>(*p, pairs) : run_rows<float>(*p, pairs);
}

}  // namespace

#define ALPHACL_EXPORT __attribute__((visibility("default")))

extern "C" {

// Sizes of the structs that Python mirrors.
ALPHACL_EXPORT int32_t alphacl_cpu_sweep_size() { return sizeof(Sweep); }
ALPHACL_EXPORT int32_t alphacl_cpu_rows_size() { return sizeof(PairRows); }

ALPHACL_EXPORT const char* alphacl_cpu_build() { return ALPHACL_BUILD; }
ALPHACL_EXPORT const char* alphacl_cpu_sources() { return ALPHACL_SOURCES; }

// Bit k is set if instruction set k is compiled in (bits 0…) and runs here (bits 16…).
ALPHACL_EXPORT int32_t alphacl_cpu_instruction_sets() {
  int32_t mask = 0;
  for (int32_t set = 0; set < SET_COUNT; set++) mask |= compiled(set) << set | (compiled(set) && runs_here(set)) << (16 + set);
  return mask;
}

// Rows that make a block fastest: multiples of *multiple up to *largest; what multiplies this dtype here.
ALPHACL_EXPORT const char* alphacl_cpu_engine(int32_t set, int32_t dtype, int32_t* multiple, int32_t* largest) {
  const Engine* engine = choose(set, dtype);
  if (!engine) return nullptr;
  *multiple = engine->row_multiple, *largest = engine->largest_block;
  return engine->instruction_set;
}

ALPHACL_EXPORT int32_t alphacl_cpu_sweep(const Sweep* s) {
  const Engine* engine = choose(s->instruction_set, s->dtype);
  if (!engine) return UNSUPPORTED;
  void* lock = s->release_lock ? s->release_lock() : nullptr;
  int status = NO_MEMORY;
  try {
    status = engine->accumulate == FLOAT64 ? run<double>(*s, *engine, lock) : run<float>(*s, *engine, lock);
  } catch (const std::bad_alloc&) {
  }
  if (s->take_lock) s->take_lock(lock);
  return status;
}

// Cosine similarity: unit rows, their inverse norms and the positives' similarities; the gradient's last step.
ALPHACL_EXPORT int32_t alphacl_cpu_normalize(const PairRows* p) { return run_rows(p, false); }
ALPHACL_EXPORT int32_t alphacl_cpu_finish(const PairRows* p) { return run_rows(p, true); }

// exp (which = 0) or log (1) of n numbers, 64-byte aligned, n a multiple of 16.
ALPHACL_EXPORT int32_t alphacl_cpu_function(int32_t set, int32_t dtype, int32_t which, const void* x, void* y, int64_t n) {
  const Engine* engine = choose(set, dtype);
  if (!engine) return UNSUPPORTED;
  (which ? engine->logarithm : engine->exponential)(x, y, n);
  return OK;
}

}  // extern "C"
