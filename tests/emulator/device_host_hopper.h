// What device.h has for sm_90a only, on the host.
//
// A tensor copy arrives as late as it can (schedule 0), at once (1), at any time (even schedules)
// or late and out of order (odd); a product reads its operands and writes c when it is waited for,
// or earlier if the schedule is pseudo-random. Until then their destinations hold NaN.
//
// Operands in shared memory lie in lines of 128 bytes (64 elements). Eight lines, 1024 bytes,
// are one unit of the swizzle: the address's bits 4 … 6, a 16-byte piece's place in its line, are
// exclusive-ored with bits 7 … 9, the line's place in its unit. With addresses before that step:
//
//   K-major (A always, B without TRANS_B): row i has a line for 64 elements of k. Element (i, k) is at
//     start + i / 8 · stride + i % 8 · 128 + 2k;   the next 16 of k follow at start + 32
//     (floats: 32 in a line, (i, k) at … + 4k; the next 8 of k at start + 32)
//   MN-major (B with TRANS_B): each k has lines for the N columns, 64 in a line. Element (k, j) is at
//     start + j / 64 · leading + k / 8 · stride + k % 8 · 128 + j % 64 · 2
//
// A box of a tensor map arrives as such lines one after the other, so a box of 64 elements × n rows
// is a K-major operand of n rows (stride 1024), and as well an MN-major one of n values of k
// (stride 1024; leading is the distance to the next box).
#pragma once

#include <deque>
#include <map>

#include "device_host.h"

namespace device {

enum class Factors { BF16, F16, TF32 };

// A two-dimensional tensor as cuTensorMapEncodeTiled describes it, with boxes of 128 bytes ×
// box_rows.
struct TensorMap {
  const void* base;
  int element;  // bytes
  int64_t columns, rows;
  int64_t pitch;  // bytes from row to row
  int box_rows;
};

namespace emulation {

constexpr int LINE = 128;

inline size_t swizzled(size_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

struct Mbarrier {
  int arrivals, pending, phase = 0;
  int64_t bytes = 0;  // announced, less those that came
  bool published = false;
  int owner;
  char token[2];
};

constexpr uint64_t MBARRIER = 0xb7a5c3e1d2f48697u;  // what an mbarrier's word holds

struct TensorCopy {
  unsigned char* to;
  TensorMap map;
  int x, y;
  uint64_t* barrier;
};

struct Product {
  int n, add, group;
  Factors type;
  bool transposed, registers, fresh;  // fresh: no product under way had written c
  uint64_t a, b;
  float* c[32];
  const uint32_t* left[32];
  std::vector<float> before;  // c of all lanes, where it is fresh and added to
};

struct Hopper {
  std::map<const uint64_t*, Mbarrier> barriers;
  struct Waiting {
    Thread* thread;
    const uint64_t* barrier;
    int parity;
  };
  std::vector<Waiting> waiting;
  std::vector<TensorCopy> copies;
  struct Products {  // of a warp
    std::deque<Product> under_way;
    bool begun = false;
    int group = 0;
    size_t count = 0;
    char token;
  } products[MOST_WARPS];
  struct Issued {
    int n, add;
    Factors type;
    bool transposed, registers;
    uint64_t a, b;
    bool operator!=(const Issued& o) const {
      return n != o.n || add != o.add || type != o.type || transposed != o.transposed || registers != o.registers ||
             a != o.a || b != o.b;
    }
  };
  std::vector<Issued> issued[MOST_WARPS / 4];  // by warpgroup: its warps issue the same
};

inline Hopper& hopper();

inline void complete(Hopper& h, const uint64_t* b, Mbarrier& state) {
  if (state.pending || state.bytes) return;
  const int parity = state.phase++ & 1;
  state.pending = state.arrivals;
  for (size_t k = 0; k < h.waiting.size();) {
    const auto [waiter, barrier, wanted] = h.waiting[k];
    if (barrier == b && wanted == parity) engine->wake(*waiter), h.waiting.erase(h.waiting.begin() + std::ptrdiff_t(k));
    else k++;
  }
}

inline void deliver(Hopper& h, size_t which) {
  const TensorCopy copy = h.copies[which];
  h.copies.erase(h.copies.begin() + std::ptrdiff_t(which));
  const int each = LINE / copy.map.element;
  for (int row = 0; row < copy.map.box_rows; row++)
    for (int column = 0; column < each; column++) {
      const int64_t x = int64_t(copy.x) + column, y = int64_t(copy.y) + row;
      const size_t offset = size_t(copy.to - engine->memory) + size_t(row * LINE + column * copy.map.element);
      unsigned char* const to = engine->memory + swizzled(offset);
      if (x >= 0 && x < copy.map.columns && y >= 0 && y < copy.map.rows)
        std::memcpy(to, static_cast<const unsigned char*>(copy.map.base) + y * copy.map.pitch + x * copy.map.element,
                    size_t(copy.map.element));
      else
        std::memset(to, 0, size_t(copy.map.element));
    }
  Mbarrier& state = h.barriers.at(copy.barrier);
  state.bytes -= copy.map.box_rows * LINE;
  complete(h, copy.barrier, state);
}

inline Hopper& hopper() {
  if (!engine->hopper) {
    engine->hopper = std::make_shared<Hopper>();
    engine->progress = [](bool stuck) {
      Hopper& h = hopper();
      if (h.copies.empty() || (!stuck && (seed() < 2 || seed() % 2))) return false;
      deliver(h, seed() < 2 ? 0 : engine->next_random() % h.copies.size());
      return true;
    };
    engine->unfinished_work = []() -> const char* {
      Hopper& h = hopper();
      if (!h.products[self->warp].under_way.empty()) return "products that nobody waited for (product_commit, product_wait)";
      if (engine->unfinished > 1) return nullptr;
      for (int warp = 0; warp < engine->count / 32; warp++)
        if (h.products[warp].count != h.issued[warp / 4].size()) return "products that not all warps of a warpgroup issue";
      return h.copies.empty() ? nullptr : "tensor copies that nobody waited for";
    };
  }
  return *static_cast<Hopper*>(engine->hopper.get());
}

inline Mbarrier& find(const char* operation, uint64_t* b) {
  // a read that races with a late init
  if (b == nullptr || *b != MBARRIER) fail("%s at what is no mbarrier", operation);
  Quiet quiet;
  Hopper& h = hopper();
  const auto found = h.barriers.find(b);
  if (found == h.barriers.end()) fail("%s at what is no mbarrier", operation);
  return found->second;
}

// Where hardware lets others run, a pseudo-random schedule sometimes does.
inline void pause(const char* operation) {
  if (seed() < 2 || engine->next_random() % 4) return;
  engine->wake(*self);
  wait(operation);
}

inline void arrive(const char* operation, uint64_t* b, int bytes) {
  Mbarrier& state = find(operation, b);
  Quiet quiet;
  release(&state.token[state.phase & 1]);
  if (state.pending == 0) fail("%s: more arrivals than barrier_init() announced", operation);
  state.pending--;
  state.bytes += bytes;
  complete(hopper(), b, state);
  pause(operation);
}

}  // namespace emulation

// --- mbarriers and tensor copies -----------------------------------------------------------------

DEVICE void barrier_init(uint64_t* b, int arrivals) {
  using namespace emulation;
  const size_t offset = size_t(reinterpret_cast<unsigned char*>(b) - engine->memory);
  if (!aligned(b, 8) || offset > engine->bytes || engine->bytes - offset < 8) fail("barrier_init outside of shared memory");
  if (arrivals < 1) fail("barrier_init of %d arrivals", arrivals);
  *b = MBARRIER;
  Quiet quiet;
  Mbarrier state{};
  state.arrivals = state.pending = arrivals;
  state.owner = self->index;
  if (!hopper().barriers.emplace(b, state).second) fail("barrier_init twice");
}

DEVICE void barrier_publish() {
  emulation::Quiet quiet;
  for (auto& [b, state] : emulation::hopper().barriers)
    if (state.owner == emulation::self->index) state.published = true;
}

DEVICE void barrier_arrive(uint64_t* b) { emulation::arrive("barrier_arrive", b, 0); }
DEVICE void barrier_expect(uint64_t* b, int bytes) { emulation::arrive("barrier_expect", b, bytes); }

DEVICE void barrier_wait(uint64_t* b, int parity) {
  using namespace emulation;
  Mbarrier& state = find("barrier_wait", b);
  {
    Quiet quiet;
    if ((state.phase & 1) == parity) {
      hopper().waiting.push_back({self, b, parity});
      wait("barrier_wait");
    } else {
      pause("barrier_wait");
    }
  }
  acquire(&state.token[parity]);
}

DEVICE void tensor_copy(void* to, const TensorMap* map, int x, int y, uint64_t* b) {
  using namespace emulation;
  Mbarrier& state = find("tensor_copy", b);
  if (!state.published) fail("tensor_copy before barrier_publish");
  if (map->element != 2 && map->element != 4) fail("tensor_copy of elements of %d bytes", map->element);
  if (map->box_rows < 1 || map->box_rows > 256) fail("tensor_copy of a box of %d rows", map->box_rows);
  if (!aligned(map->base, 16) || map->pitch % 16) fail("tensor_copy of rows that do not start at multiples of 16 bytes");
  if (!aligned(to, 1024)) fail("tensor_copy to an address that is no multiple of 1024");
  const size_t offset = size_t(static_cast<unsigned char*>(to) - engine->memory), bytes = size_t(map->box_rows) * LINE;
  if (offset > engine->bytes || engine->bytes - offset < bytes) fail("tensor_copy to outside of shared memory");
  std::memset(to, 0xff, bytes);
#if defined(__SANITIZE_THREAD__)
  const int64_t first = std::max(x, 0), last = std::min<int64_t>(x + LINE / map->element, map->columns);
  for (int64_t row = std::max(y, 0); row < std::min<int64_t>(y + map->box_rows, map->rows) && first < last; row++)
    __tsan_read_range(static_cast<char*>(const_cast<void*>(map->base)) + row * map->pitch + first * map->element,
                      (unsigned long)((last - first) * map->element));
#endif
  Quiet quiet;
  release(&state.token[state.phase & 1]);
  hopper().copies.push_back({static_cast<unsigned char*>(to), *map, x, y, b});
  if (seed() == 1) deliver(hopper(), hopper().copies.size() - 1);
}

// --- products of a warpgroup ---------------------------------------------------------------------

// As PTX packs it: address, distances in units of 16 bytes, the kind of swizzle.
DEVICE uint64_t matrix_descriptor(const void* start, int leading, int stride) {
  using namespace emulation;
  const size_t offset = size_t(static_cast<const unsigned char*>(start) - engine->memory);
  if (offset >= engine->bytes) fail("matrix_descriptor of what is outside of shared memory");
  if (offset % 16 || leading % 16 || stride % 16) fail("matrix_descriptor of what is no multiple of 16");
  const auto field = [](size_t bytes) { return uint64_t(bytes >> 4 & 0x3fff); };
  return field(offset) | field(size_t(leading)) << 16 | field(size_t(stride)) << 32 | uint64_t(1) << 62;
}

namespace emulation {

inline float factor(uint32_t bits, Factors type) {
  if (type == Factors::TF32) return from_bits(bits & 0xffffe000u);
  return type == Factors::BF16 ? from_bf16(uint16_t(bits)) : from_f16(uint16_t(bits));
}
inline int bytes_of(Factors type) { return type == Factors::TF32 ? 4 : 2; }
// values of k of an instruction, 32 bytes
inline int depth_of(Factors type) { return 32 / bytes_of(type); }

struct Operand {
  Factors type;
  size_t start, leading, stride;
  Operand(uint64_t d, Factors type) : type(type), start(bytes(d)), leading(bytes(d >> 16)), stride(bytes(d >> 32)) {
    if (d >> 62 != 1) fail("a product's operand that no matrix_descriptor() describes");
  }
  static size_t bytes(uint64_t field) { return size_t(field & 0x3fff) << 4; }
  float k_major(int i, int k) const {
    return at(start + size_t(i / 8) * stride + size_t(i % 8 * LINE + bytes_of(type) * k));
  }
  float mn_major(int k, int j) const {
    return at(start + size_t(j / 64) * leading + size_t(k / 8) * stride + size_t(k % 8 * LINE + j % 64 * 2));
  }
  float at(size_t offset) const {
    const size_t place = swizzled(offset), size = size_t(bytes_of(type));
    if (place + size > engine->bytes) fail("a product's operand reaches out of shared memory");
    // Each of a fixed size: ThreadSanitizer sees loads, but no copy of a size that is not known.
    return factor(type == Factors::TF32 ? load<uint32_t>(place) : load<uint16_t>(place), type);
  }
  template <class T> static T load(size_t place) {
    T bits;
    std::memcpy(&bits, engine->memory + place, sizeof bits);
    return bits;
  }
};

// This warp's 16 of the 64 rows.
inline void multiply(const Product& p) {
  const int depth = depth_of(p.type);
  double left[16][16];
  std::vector<double> right(size_t(depth * p.n)), sum(size_t(16 * p.n), 0.0);
  {
    Audible audible;  // reads operands as the warp does
    const Operand b(p.b, p.type);
    for (int k = 0; k < depth; k++)
      for (int j = 0; j < p.n; j++) right[size_t(k * p.n + j)] = double(p.transposed ? b.mn_major(k, j) : b.k_major(j, k));
    if (!p.registers) {
      const Operand a(p.a, p.type);
      for (int i = 0; i < 16; i++)
        for (int k = 0; k < depth; k++) left[i][k] = double(a.k_major(self->warp % 4 * 16 + i, k));
    }
  }
  if (p.registers) {
    const int each = depth / 8;  // elements of a register
    for (int lane = 0; lane < 32; lane++)
      for (int r = 0; r < 4; r++)
        for (int e = 0; e < each; e++) {
          const uint32_t bits = p.left[lane][r];
          left[lane / 4 + r % 2 * 8][(lane % 4 + r / 2 * 4) * each + e] =
              double(factor(each == 1 ? bits : e ? high16(bits) : low16(bits), p.type));
        }
  }
  const auto element = [&](int lane, int e) -> double& {
    return sum[size_t((lane / 4 + e / 2 % 2 * 8) * p.n + e / 4 * 8 + lane % 4 * 2 + e % 2)];
  };
  if (p.add)
    for (int lane = 0; lane < 32; lane++)
      for (int e = 0; e < p.n / 2; e++)
        element(lane, e) = double(p.fresh ? p.before[size_t(lane * p.n / 2 + e)] : p.c[lane][e]);
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < depth; k++)
      for (int j = 0; j < p.n; j++) sum[size_t(i * p.n + j)] += left[i][k] * right[size_t(k * p.n + j)];
  for (int lane = 0; lane < 32; lane++)
    for (int e = 0; e < p.n / 2; e++) p.c[lane][e] = float(element(lane, e));
}

inline void finish_products(Hopper::Products& products, int before_group) {
  while (!products.under_way.empty() && products.under_way.front().group < before_group) {
    const Product first = std::move(products.under_way.front());
    products.under_way.pop_front();
    multiply(first);
  }
}

inline void issue(float* c, const uint32_t* left, const Hopper::Issued& what) {
  if (engine->count % 128) fail("a product of a warpgroup in a block of %d threads", engine->count);
  struct Operands {
    float* c;
    const uint32_t* left;
    const Hopper::Issued* what;
  } mine{c, left, &what};
  together("product", &mine, [](Operands** lanes) {
    Hopper& h = hopper();
    Hopper::Products& products = h.products[self->warp];
    const Hopper::Issued& what = *lanes[0]->what;
    std::vector<Hopper::Issued>& issued = h.issued[self->warp / 4];
    if (products.count == issued.size()) issued.push_back(what);
    for (int lane = 0; lane < 32; lane++)
      if (*lanes[lane]->what != issued[products.count]) fail("threads of a warpgroup issue different products");
    products.count++;
    if (!products.begun) fail("a product without product_begin() since the last product_wait()");
    if (seed() > 1 && engine->next_random() % 2) finish_products(products, products.group);
    Product p{what.n, what.add, products.group, what.type, what.transposed, what.registers, true, what.a, what.b, {}, {}, {}};
    for (const Product& other : products.under_way) p.fresh &= other.c[0] != lanes[0]->c;
    for (int lane = 0; lane < 32; lane++) {
      p.c[lane] = lanes[lane]->c, p.left[lane] = lanes[lane]->left;
      if (!p.fresh) continue;
      if (what.add) p.before.insert(p.before.end(), p.c[lane], p.c[lane] + what.n / 2);
      std::fill_n(p.c[lane], what.n / 2, from_bits(0xffffffffu));
    }
    products.under_way.push_back(std::move(p));
  });
}

}  // namespace emulation

template <Factors TYPE, int N, int TRANS_B> DEVICE void product_ss(float (&c)[N / 2], uint64_t a, uint64_t b, int add) {
  static_assert(N % 8 == 0 && N <= 256 && (TYPE != Factors::TF32 || !TRANS_B), "m64nN");
  emulation::issue(c, nullptr, {N, add, TYPE, TRANS_B != 0, false, a, b});
}
template <Factors TYPE, int N, int TRANS_B>
DEVICE void product_rs(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {
  static_assert(N % 8 == 0 && N <= 256 && (TYPE != Factors::TF32 || !TRANS_B), "m64nN");
  emulation::issue(c, a, {N, add, TYPE, TRANS_B != 0, true, 0, b});
}

DEVICE void operands_written() {}  // the interpreter of PTX looks for it (tests/ptx)
template <class T> DEVICE void hold_registers(T&) {}  // nothing is reordered here
DEVICE void product_begin() {
  using namespace emulation;
  together<void>("product_begin", nullptr, [](void**) { hopper().products[self->warp].begun = true; });
}
DEVICE void product_commit() {
  using namespace emulation;
  together<void>("product_commit", nullptr, [](void**) { hopper().products[self->warp].group++; });
}
template <int N> DEVICE void product_wait() {
  using namespace emulation;
  together<void>("product_wait", nullptr, [](void**) {
    Hopper::Products& products = hopper().products[self->warp];
    products.begun = false;
    finish_products(products, products.group - N);
    release(&products.token);
  });
  // who knows that the wait is over knows that operands have been read
  acquire(&hopper().products[self->warp].token);
}

constexpr bool HOPPER = true;
template <class K> bool runs_hopper() { return true; }
template <class K> const char* why_not() { return nullptr; }

inline const char* tensor_map(TensorMap& map, const void* base, int64_t columns, int64_t rows, int64_t pitch, int box_rows) {
  map = {base, 2, columns, rows, pitch, box_rows};
  return nullptr;
}

template <int N> DEVICE void registers_more() { static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg"); }
template <int N> DEVICE void registers_less() { static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg"); }

}  // namespace device
