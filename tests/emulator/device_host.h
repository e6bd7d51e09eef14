// device.h on the host: the threads of a block are fibres of one thread of the operating system,
// blocks run one after the other. Whatever hardware leaves open is chosen against the kernel:
//
// - schedule(seed) orders lanes, warps and blocks: 0 ascending, 1 descending, else pseudo-random. A
// warp runs until it has to
//   wait for another one, so a missing barrier shows as a result that depends on the seed.
// - Shared memory is an allocation of exactly the size asked for, filled with NaN before each
// block.
// - Asynchronous copies arrive only where the kernel waits for them; until then their destination
// holds NaN.
// - Under ThreadSanitizer each fibre counts as a thread of its own, which nothing orders after
// another but what orders memory
//   on the GPU: sync(), sync_some(), sync_warp(), mbarriers, the start and the end of a launch. As in CUDA, neither shuffles
//   nor matrix operations do. Blocks of one launch are unordered too.
//
// Misuse (a barrier that not all reach, lanes of a warp at different operations, misaligned
// addresses, copies never waited for…) ends the launch, which returns what went wrong.
//
// Matrix operations add up in float64 and round once to float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "device_host_engine.h"

#define DEVICE inline

namespace device {

// --- position, barriers, shuffles ----------------------------------------------------------------

// The order of whatever happens at once: 0 ascending, 1 descending, else pseudo-random.
inline void schedule(int seed) { emulation::seed() = seed; }

DEVICE int thread() { return emulation::self->index; }
DEVICE int block_x() { return emulation::engine->x; }
DEVICE int block_y() { return emulation::engine->y; }
DEVICE unsigned char* shared() { return emulation::engine->memory; }

DEVICE void sync() { emulation::meet("sync", 0, emulation::engine->count); }
DEVICE void sync_some(int id, int threads) {
  if (id < 1 || id > 15) emulation::fail("sync_some with barrier %d", id);
  emulation::meet("sync_some", id, threads);
}
DEVICE void sync_warp() {
  emulation::Warp& warp = emulation::engine->warps[emulation::self->warp];
  void* const token = &warp.token[warp.meetings & 1];
  emulation::release(token);
  emulation::together<void>("sync_warp", nullptr, [&](void**) { warp.meetings++; });
  emulation::acquire(token);
}

template <class T> DEVICE T shuffle_xor(T x, int mask) {
  struct Operands {
    T x, result;
    int mask;
  } mine{x, x, mask};
  if (mask < 0 || mask > 31) emulation::fail("shuffle_xor with mask %d", mask);
  emulation::together("shuffle_xor", &mine, [](Operands** lanes) {
    for (int lane = 0; lane < 32; lane++) lanes[lane]->result = lanes[lane ^ lanes[lane]->mask]->x;
  });
  return mine.result;
}

DEVICE int uniform(int x) {
  emulation::together("uniform", &x, [](int** lanes) {
    for (int lane = 1; lane < 32; lane++)
      if (*lanes[lane] != *lanes[0]) emulation::fail("uniform() of what is not the same in all lanes");
  });
  return x;
}

DEVICE bool any(bool x) {
  struct Operands {
    bool x, result;
  } mine{x, false};
  emulation::together("any", &mine, [](Operands** lanes) {
    bool found = false;
    for (int lane = 0; lane < 32; lane++) found |= lanes[lane]->x;
    for (int lane = 0; lane < 32; lane++) lanes[lane]->result = found;
  });
  return mine.result;
}

// --- asynchronous copies -------------------------------------------------------------------------

DEVICE void copy16(void* to, const void* from, int bytes) {
  using namespace emulation;
  if (bytes < 0 || bytes > 16) fail("copy16 of %d bytes", bytes);
  if (!aligned(to, 16) || (bytes && !aligned(from, 16))) fail("copy16 with an address that is no multiple of 16");
  const size_t offset = size_t(static_cast<unsigned char*>(to) - engine->memory);
  if (offset > engine->bytes || engine->bytes - offset < 16) fail("copy16 to outside of shared memory");
  std::memset(to, 0xff, 16);
  Quiet quiet;
  self->copies.push_back({to, from, bytes, self->group});
}

DEVICE void copy_commit() {
  emulation::Quiet quiet;
  emulation::self->group++;
}

template <int N> DEVICE void copy_wait() {
  using namespace emulation;
  std::vector<Copy>& copies = self->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < self->group - N; done++) {
    unsigned char bytes[16] = {};
    if (copies[done].bytes) std::memcpy(bytes, copies[done].from, size_t(copies[done].bytes));
    std::memcpy(copies[done].to, bytes, 16);
  }
  Quiet quiet;
  copies.erase(copies.begin(), copies.begin() + std::ptrdiff_t(done));
}

// --- numbers -------------------------------------------------------------------------------------

DEVICE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
DEVICE double from_bits(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
DEVICE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
DEVICE uint64_t to_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
DEVICE uint32_t rounded_to_tf32(float x) { return x != x ? 0x7fffffffu : (to_bits(x) + 0x1000u) & 0xffffe000u; }

DEVICE float from_f16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) return from_bits(sign | 0x7f800000u | magnitude);
  return from_bits(sign | to_bits(from_bits(magnitude) * 0x1p112f));
}

namespace emulation {

inline float from_bf16(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }
inline uint16_t low16(uint32_t pair) { return uint16_t(pair & 0xffffu); }
inline uint16_t high16(uint32_t pair) { return uint16_t(pair >> 16); }

inline uint32_t to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline uint32_t to_f16(float x) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (x != x) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
  // below 2^-14: units of 2^-24, rounded by the addition
  if (magnitude < 0x38800000u)
    return sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u);
  return sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

}  // namespace emulation

DEVICE uint32_t pack_bf16(float low, float high) { return emulation::to_bf16(high) << 16 | emulation::to_bf16(low); }
DEVICE uint32_t pack_f16(float low, float high) { return emulation::to_f16(high) << 16 | emulation::to_f16(low); }

DEVICE float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

// --- matrices ------------------------------------------------------------------------------------

namespace emulation {

template <bool TRANSPOSED> void load(const char* name, uint32_t (&r)[4], const void* row) {
  if (!aligned(row, 16)) fail("%s from an address that is no multiple of 16", name);
  struct Operands {
    uint16_t row[8];
    uint32_t* r;
  } mine;
  std::memcpy(mine.row, row, 16);
  mine.r = r;
  together(name, &mine, [](Operands** lanes) {
    for (int lane = 0; lane < 32; lane++)
      for (int m = 0; m < 4; m++) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = TRANSPOSED ? lanes[8 * m + j]->row[i] : lanes[8 * m + i]->row[j];
        const uint32_t high = TRANSPOSED ? lanes[8 * m + j + 1]->row[i] : lanes[8 * m + i]->row[j + 1];
        lanes[lane]->r[m] = high << 16 | low;
      }
  });
}

struct Fragments {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// c += a · b for one warp; lane 4i + j holds a (i + 8m, 2j … of half h), b (2j … of half h, i) and
// c (i + 8m, 2j …).
template <int K, class Unpack> void multiply(const char* name, float* c, const uint32_t* a, const uint32_t* b, Unpack unpack) {
  Fragments mine{c, a, {b[0], b[1]}};
  together(name, &mine, [&](Fragments** lanes) {
    constexpr int EACH = K / 8;  // elements in a register
    // which every processor has registers for
    using Pair = double __attribute__((vector_size(16), may_alias));
    alignas(16) double sum[16][8], left[16][K], right[K][8];
    for (int lane = 0; lane < 32; lane++) {
      const Fragments& f = *lanes[lane];
      const int i = lane / 4, j = lane % 4;
      for (int m = 0; m < 2; m++)
        for (int n = 0; n < 2; n++) sum[i + 8 * m][2 * j + n] = double(f.c[2 * m + n]);
      for (int h = 0; h < 2; h++)
        for (int e = 0; e < EACH; e++) {
          const int k = h * K / 2 + j * EACH + e;
          for (int m = 0; m < 2; m++) left[i + 8 * m][k] = unpack(f.a[2 * h + m], e);
          right[k][i] = unpack(f.b[h], e);
        }
    }
    for (int i = 0; i < 16; i++) {
      Pair* const row = reinterpret_cast<Pair*>(sum[i]);
      Pair a0 = row[0], a1 = row[1], a2 = row[2], a3 = row[3];
      for (int k = 0; k < K; k++) {
        const Pair* const factor = reinterpret_cast<const Pair*>(right[k]);
        a0 += left[i][k] * factor[0], a1 += left[i][k] * factor[1];
        a2 += left[i][k] * factor[2], a3 += left[i][k] * factor[3];
      }
      row[0] = a0, row[1] = a1, row[2] = a2, row[3] = a3;
    }
    for (int lane = 0; lane < 32; lane++)
      for (int m = 0; m < 2; m++)
        for (int n = 0; n < 2; n++) lanes[lane]->c[2 * m + n] = float(sum[lane / 4 + 8 * m][lane % 4 * 2 + n]);
  });
}

}  // namespace emulation

DEVICE void load_matrices(uint32_t (&r)[4], const void* row) { emulation::load<false>("load_matrices", r, row); }
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulation::load<true>("load_matrices_transposed", r, row);
}

DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[] = {b0, b1};
  emulation::multiply<16>("mma_bf16", c, a, b, [](uint32_t pair, int e) {
    return emulation::from_bf16(e ? emulation::high16(pair) : emulation::low16(pair));
  });
}
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[] = {b0, b1};
  emulation::multiply<16>("mma_f16", c, a, b, [](uint32_t pair, int e) {
    return from_f16(e ? emulation::high16(pair) : emulation::low16(pair));
  });
}
DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[] = {b0, b1};
  emulation::multiply<8>("mma_tf32", c, a, b, [](uint32_t x, int) { return from_bits(x & ~0x1fffu); });
}

// --- launch --------------------------------------------------------------------------------------

// Null, or what went wrong: a text that is good until this thread's next launch.
template <class K>
const char* launch(int grid_x, int grid_y, size_t shared_bytes, const typename K::Args& args, void* = nullptr) {
  static_assert(K::THREADS % 32 == 0 && K::THREADS >= 32 && K::THREADS <= 1024 && K::BLOCKS >= 1, "a block is whole warps");
  emulation::Engine& engine = emulation::own_engine();
  engine.args = &args;
  engine.body = [](const void* a) { K::body(*static_cast<const typename K::Args*>(a)); };
  return engine.run(grid_x, grid_y, K::THREADS, shared_bytes);
}

}  // namespace device

#include "device_host_hopper.h"
