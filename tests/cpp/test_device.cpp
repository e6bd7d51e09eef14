// The GPU as tests/emulator/device_host.h emulates it: that primitives do what device.h and the PTX
// manual say, that misuse is noticed, and that the order of threads is what device::schedule()
// says.
//
//   test_device                all of that
//   test_device --race NAME    a kernel with a race, for ThreadSanitizer to object to; `--races` lists the names
//   test_device --time         what a block costs

#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.h"

namespace {

constexpr int SEEDS[] = {0, 1, 2, 3, 12345};
int failures = 0;

__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  std::putchar('\n');
  va_end(arguments);
  failures++;
}

#define CHECK(condition) \
  if (!(condition)) fail("%s:%d: not true: %s", __FILE__, __LINE__, #condition)

std::mt19937 generator(1);

float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(generator); }

// A kernel out of a body, for tests of a few lines.
template <int THREADS_, class Body> struct Kernel {
  using Args = Body;
  static constexpr int THREADS = THREADS_, BLOCKS = 1;
  static DEVICE void body(const Args& args) { args(); }
};

template <int THREADS, class Body> std::string launch(int grid_x, int grid_y, size_t shared_bytes, const Body& body) {
  const char* error = device::launch<Kernel<THREADS, Body>>(grid_x, grid_y, shared_bytes, body, nullptr);
  return error ? error : "";
}

template <int THREADS, class Body> void expect_error(const char* wanted, size_t shared_bytes, const Body& body) {
  for (const int seed : SEEDS) {
    device::schedule(seed);
    const std::string error = launch<THREADS>(1, 1, shared_bytes, body);
    if (error.find(wanted) == std::string::npos) fail("'%s' instead of '%s', seed %d", error.c_str(), wanted, seed);
  }
  // a launch that failed leaves nothing behind
  const std::string after = launch<THREADS>(1, 1, 0, [] { device::sync(); });
  if (!after.empty()) fail("after '%s': %s", wanted, after.c_str());
}

// --- numbers -------------------------------------------------------------------------------------

double value_f16(uint32_t bits) {  // by its definition
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

double value_bf16(uint32_t bits) { return device::from_bits(bits << 16); }

// Of all values that may be the result: the nearest, of two the even one.
template <class Value> uint32_t nearest(float x, uint32_t infinity, Value value) {
  uint32_t low = 0, high = infinity;  // finite values and infinity ascend with their bits
  const double wanted = std::fabs(x);
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (value(middle) <= wanted ? low : high) = middle;
  }
  // as if exponents went on
  const double beyond = high == infinity ? 2 * value(low) - value(low - 1) : value(high);
  const double below = wanted - value(low), above = beyond - wanted;
  const bool up = std::isinf(wanted) || above < below || (above == below && low % 2);
  return (up ? high : low) | (std::signbit(x) ? 0x8000 : 0);
}

void test_numbers() {
  for (uint32_t bits = 0; bits < 0x10000; bits++) {
    const double wanted = value_f16(bits);
    const float is = device::from_f16(uint16_t(bits));
    CHECK(std::isnan(wanted) ? std::isnan(is) : wanted == is && std::signbit(wanted) == std::signbit(is));
    if (!std::isnan(wanted)) CHECK(device::pack_f16(is, -is) == (bits | (bits ^ 0x8000) << 16));
  }
  std::vector<float> samples = {0.0f, 65504.0f, 65519.996f, 65520.0f, 65536.0f, 0x1p-24f, 0x1p-25f, 0x1.000002p-25f, 0x1p-149f,
                                0x1.ffep-15f, 0x1.fffp-15f, 0x1.ffdp-15f, 3.3895314e38f, 3.3961775e38f, INFINITY};
  for (int k = 0; k < 200000; k++) samples.push_back(device::from_bits(generator()));
  for (int k = 0; k < 200000; k++) samples.push_back(std::ldexp(uniform(), int(generator() % 50) - 30));
  for (uint32_t bits = 0; bits < 0x7c00; bits++)  // halfway
    samples.push_back(float((value_f16(bits) + (bits == 0x7bff ? 65536 : value_f16(bits + 1))) / 2));
  for (const float x : samples) {
    const uint32_t f16 = device::pack_f16(x, -x), bf16 = device::pack_bf16(-x, x);
    if (std::isnan(x)) {
      CHECK(f16 == 0x7fff7fffu && bf16 == 0x7fff7fffu);
      continue;
    }
    const uint32_t want_f16 = nearest(x, 0x7c00, value_f16), want_bf16 = nearest(x, 0x7f80, value_bf16);
    if ((f16 & 0xffff) != want_f16 || f16 >> 16 != (want_f16 ^ 0x8000)) fail("pack_f16(%a) is %x, not %x", x, f16, want_f16);
    if (bf16 >> 16 != want_bf16 || (bf16 & 0xffff) != (want_bf16 ^ 0x8000)) fail("pack_bf16(%a) is %x", x, bf16);
  }
  CHECK(device::exp2_approx(-126.0f) == 0x1p-126f && device::exp2_approx(-126.5f) == 0.0f);
  CHECK(device::exp2_approx(3.0f) == 8.0f && device::exp2_approx(-INFINITY) == 0.0f && std::isnan(device::exp2_approx(NAN)));
}

// --- threads -------------------------------------------------------------------------------------

void test_order() {
  std::set<std::vector<int>> orders;
  for (const int seed : SEEDS) {
    device::schedule(seed);
    std::vector<int> places(64 * 6, 0);
    int counter = 0;
    CHECK(launch<64>(3, 2, 0, [&] {
            const int now = __atomic_add_fetch(&counter, 1, __ATOMIC_RELAXED);
            places[size_t(64 * (3 * device::block_y() + device::block_x()) + device::thread())] = now;
          }).empty());
    CHECK(std::set<int>(places.begin(), places.end()).size() == places.size() && counter == int(places.size()));
    for (size_t k = 0; k < places.size(); k++) {
      if (seed == 0) CHECK(places[k] == int(k) + 1);
      if (seed == 1) CHECK(places[k] == int(places.size() - k));
    }
    orders.insert(places);
  }
  CHECK(orders.size() == std::size(SEEDS));
}

void test_meeting() {
  std::vector<uint32_t> expected;
  for (const int seed : SEEDS) {
    device::schedule(seed);
    std::vector<uint32_t> out(4 * 128, 0);
    const std::string error = launch<128>(4, 1, 128 * 4 + 16, [&] {
      auto* const memory = reinterpret_cast<uint32_t*>(device::shared());
      const int t = device::thread();
      CHECK(uintptr_t(memory) % 1024 == 0 && memory[t] == 0xffffffffu && memory[131] == 0xffffffffu);
      memory[t] = uint32_t(t + 1000 * device::block_x());
      for (int round = 0; round < 5; round++) {
        device::sync();
        const uint32_t far = memory[(t + 32) % 128];
        device::sync();
        memory[t] = far * 3 + device::shuffle_xor(far, 1 << round);
        device::sync_warp();
        const uint32_t near = memory[t ^ 5];
        device::sync_warp();
        memory[t] = near;
      }
      if (t < 64) {
        device::sync_some(3, 64);
        memory[t] += memory[63 - t] * 0;
      } else {
        device::sync_some(1, 64);
      }
      double wide = device::shuffle_xor(double(memory[t]), 0);
      out[size_t(128 * device::block_x() + t)] = uint32_t(wide);
    });
    if (!error.empty()) fail("%s", error.c_str());
    if (seed == 0) expected = out;
    CHECK(out == expected);
  }
  CHECK(expected[0] != expected[128] && expected[0] != 0);
}

std::vector<int> without_barrier(int seed) {
  device::schedule(seed);
  std::vector<int> out(64);
  launch<64>(1, 1, 64 * 4, [&] {
    auto* const memory = reinterpret_cast<int*>(device::shared());
    const int t = device::thread();
    memory[t] = t;
    device::shuffle_xor(t, 1);  // orders no memory
    out[size_t(t)] = memory[63 - t];
  });
  return out;
}

void test_errors() {
  using namespace device;
  expect_error<64>("lanes of warp 1 meet at different operations: ", 0, [] {
    if (thread() == 40) sync_warp();
    else shuffle_xor(1, 1);
  });
  expect_error<128>("deadlock: threads 0-31 have returned; threads 32-127 wait in sync; barrier 0 has 96 of 128", 0, [] {
    if (thread() >= 32) sync();
  });
  expect_error<64>("threads 0-31 wait in sync; threads 32-63 wait in sync_some; barrier 0 has 32 of 64; barrier 2 has 32", 0,
                   [] { thread() < 32 ? sync() : sync_some(2, 64); });
  expect_error<32>("threads 0-15 have returned; threads 16-31 wait in shuffle_xor", 0, [] {
    if (thread() >= 16) shuffle_xor(1.0f, 1);
  });
  expect_error<64>("threads", 0, [] {
    if (thread() != 63) sync_some(2, thread() < 62 ? 64 : 32);
    else sync_some(3, 32);
  });
  expect_error<32>("sync_some with barrier 16", 0, [] { sync_some(16, 32); });
  expect_error<32>("sync_some of 16 threads", 0, [] { sync_some(1, 16); });
  expect_error<32>("more than 232448 bytes", 232449, [] {});
  alignas(16) static float source[8] = {};
  expect_error<32>("copy16 with an address that", 64, [] { copy16(shared() + 8, source, 16); });
  expect_error<32>("copy16 with an address that", 64, [] { copy16(shared(), source + 1, 16); });
  expect_error<32>("copy16 of 17 bytes", 64, [] { copy16(shared(), source, 17); });
  expect_error<32>("copy16 to outside of shared memory", 72, [] { copy16(shared() + 64, source, 16); });
  expect_error<32>("copy16 to outside of shared memory", 72, [] { copy16(source, source, 16); });
  expect_error<32>("copy16 that nobody waited for", 64, [] { copy16(shared(), source, 16), copy_wait<0>(); });
  expect_error<32>("copy16 that nobody waited for", 64, [] { copy16(shared(), source, 16), copy_commit(), copy_wait<1>(); });
  expect_error<32>("load_matrices from an address", 64, [] {
    uint32_t r[4];
    load_matrices(r, shared() + 8);
  });
  expect_error<64>("uniform() of what is not the same in all lanes", 0, [] { device::uniform(thread() / 16); });
  const std::string none = launch<32>(0, 1, 0, [] {});
  CHECK(none == "a grid without blocks");
}

// --- copies --------------------------------------------------------------------------------------

void test_copies() {
  for (const int seed : SEEDS) {
    device::schedule(seed);
    alignas(16) uint32_t from[64 * 4];
    for (uint32_t k = 0; k < 256; k++) from[k] = k + 1;
    const std::string error = launch<64>(1, 1, 64 * 32, [&] {
      const int t = device::thread(), bytes = t % 17;
      auto* const mine = reinterpret_cast<uint32_t*>(device::shared() + 32 * t);
      device::copy16(mine, bytes ? from + 4 * t : reinterpret_cast<const uint32_t*>(3), bytes);
      device::copy_commit();
      device::copy16(mine + 4, from + 4 * t, 16);
      device::copy_commit();
      CHECK(mine[0] == 0xffffffffu && mine[4] == 0xffffffffu);
      device::copy_wait<2>();
      CHECK(mine[0] == 0xffffffffu && mine[4] == 0xffffffffu);
      device::copy_wait<1>();
      CHECK(mine[4] == 0xffffffffu);
      uint32_t wanted[4] = {};
      std::memcpy(wanted, from + 4 * t, size_t(bytes));
      CHECK(!std::memcmp(mine, wanted, 16));
      device::copy_wait<0>();
      device::sync();
      CHECK(mine[4 + t % 4] == uint32_t(4 * t + t % 4 + 1));
      const int next = (t + 1) % 64;
      CHECK(reinterpret_cast<uint32_t*>(device::shared() + 32 * next)[7] == uint32_t(4 * next + 4));
      device::copy_commit();  // a group of nothing
    });
    if (!error.empty()) fail("%s", error.c_str());
  }
}

// --- matrices ------------------------------------------------------------------------------------

void test_loading() {
  for (const int seed : SEEDS) {
    device::schedule(seed);
    const std::string error = launch<64>(1, 1, 2 * 32 * 16, [] {
      const int t = device::thread(), lane = t % 32;
      auto* const rows = reinterpret_cast<uint16_t*>(device::shared() + t / 32 * 512);
      // Row k of matrix m stands at place 8k + m, to be told from the order of lanes.
      const auto place = [](int m, int k) { return (4 * k + m) * 8; };
      for (int j = 0; j < 8; j++) rows[place(lane / 8, lane % 8) + j] = uint16_t(100 * (lane / 8) + 10 * (lane % 8) + j);
      device::sync_warp();
      uint32_t r[4], transposed[4];
      device::load_matrices(r, rows + place(lane / 8, lane % 8));
      device::load_matrices_transposed(transposed, rows + place(lane / 8, lane % 8));
      for (int m = 0; m < 4; m++) {
        const int i = lane / 4, j = lane % 4 * 2;
        CHECK((r[m] & 0xffff) == uint32_t(100 * m + 10 * i + j) && r[m] >> 16 == uint32_t(100 * m + 10 * i + j + 1));
        CHECK((transposed[m] & 0xffff) == uint32_t(100 * m + 10 * j + i));
        CHECK(transposed[m] >> 16 == uint32_t(100 * m + 10 * (j + 1) + i));
      }
    });
    if (!error.empty()) fail("%s", error.c_str());
  }
}

// Fragments by the PTX manual's tables: row and column of element i of a lane's a, b and c.
struct Place {
  int row, column;
};
Place a16(int lane, int i) { return {lane / 4 + (i % 4 < 2 ? 0 : 8), lane % 4 * 2 + i % 2 + (i < 4 ? 0 : 8)}; }
Place b16(int lane, int i) { return {lane % 4 * 2 + i % 2 + (i < 2 ? 0 : 8), lane / 4}; }
Place a8(int lane, int i) { return {lane / 4 + (i % 2 ? 8 : 0), lane % 4 + (i < 2 ? 0 : 4)}; }
Place b8(int lane, int i) { return {lane % 4 + (i ? 4 : 0), lane / 4}; }
Place c(int lane, int i) { return {lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + i % 2}; }

enum Format { BF16, F16, TF32 };

void test_products(Format format) {
  const int K = format == TF32 ? 8 : 16;
  float left[16][16], right[16][8], sum[16][8], before[16][8];
  const auto round = [&](float x) {
    if (format == BF16) return float(value_bf16(device::pack_bf16(x, 0)));
    if (format == F16) return float(value_f16(device::pack_f16(x, 0)));
    return device::from_bits(device::to_bits(x) & ~0x1fffu);
  };
  for (auto& row : left)
    for (float& x : row) x = uniform();
  for (auto& row : right)
    for (float& x : row) x = uniform();
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      sum[i][j] = before[i][j] = uniform();
      double total = before[i][j];
      for (int k = 0; k < K; k++) total += double(round(left[i][k])) * double(round(right[k][j]));
      sum[i][j] = float(total);
    }
  for (const int seed : SEEDS) {
    device::schedule(seed);
    const std::string error = launch<64>(1, 1, 0, [&] {
      const int lane = device::thread() % 32;
      uint32_t a[4], b[2];
      float d[4];
      for (int i = 0; i < 4; i++) {
        d[i] = before[c(lane, i).row][c(lane, i).column];
        const auto l = [&](Place p) { return left[p.row][p.column]; };
        const auto r = [&](Place p) { return right[p.row][p.column]; };
        if (format == TF32) {
          a[i] = device::to_bits(l(a8(lane, i)));
          if (i < 2) b[i] = device::to_bits(r(b8(lane, i)));
        } else {
          const auto pack = format == BF16 ? device::pack_bf16 : device::pack_f16;
          a[i] = pack(l(a16(lane, 2 * i)), l(a16(lane, 2 * i + 1)));
          if (i < 2) b[i] = pack(r(b16(lane, 2 * i)), r(b16(lane, 2 * i + 1)));
        }
      }
      if (format == BF16) device::mma_bf16(d, a, b[0], b[1]);
      if (format == F16) device::mma_f16(d, a, b[0], b[1]);
      if (format == TF32) device::mma_tf32(d, a, b[0], b[1]);
      for (int i = 0; i < 4; i++) CHECK(d[i] == sum[c(lane, i).row][c(lane, i).column]);
    });
    if (!error.empty()) fail("%s", error.c_str());
  }
}

// --- mbarriers and tensor copies -----------------------------------------------------------------

constexpr int STAGE = 8 * 128;  // bytes of a box of 8 rows of 64 elements

// A warp copies the boxes of a column of `image` one after the other into two stages, a warpgroup
// reads them.
struct Ring {
  int pitch, boxes;
  std::vector<uint16_t> image;
  device::TensorMap map;
  Ring(int columns, int rows) : pitch(columns / 8 * 8 + 8), boxes(rows / 8 + 1), image(size_t(pitch * rows)) {
    for (size_t k = 0; k < image.size(); k++) image[k] = uint16_t(k + 1);
    map = {image.data(), 2, columns, rows, 2 * pitch, 8};
  }
  bool skip_full = false, skip_empty = false;  // to leave out a wait

  void run(int x, std::vector<uint16_t>& out) const {
    using namespace device;
    auto* const full = reinterpret_cast<uint64_t*>(shared() + 2 * STAGE);
    uint64_t* const empty = full + 2;
    if (thread() == 0) {
      for (int k = 0; k < 2; k++) barrier_init(full + k, 1), barrier_init(empty + k, 128);
      barrier_publish();
    }
    sync();
    for (int k = 0; k < boxes; k++) {
      const int stage = k % 2, round = k / 2;
      if (thread() == 128) {
        if (!skip_empty) barrier_wait(empty + stage, (round & 1) ^ 1);
        barrier_expect(full + stage, STAGE);
        tensor_copy(shared() + stage * STAGE, &map, x, 8 * k, full + stage);
      } else if (thread() < 128) {
        if (!skip_full) barrier_wait(full + stage, round & 1);
        for (int e = 4 * thread(); e < 4 * thread() + 4; e++) {
          const int row = e / 64, column = e % 64;
          uint16_t is;
          std::memcpy(&is, shared() + stage * STAGE + row * 128 + (column / 8 ^ row) * 16 + column % 8 * 2, 2);
          out[size_t(512 * k + e)] = is;
        }
        barrier_arrive(empty + stage);
      }
    }
    if (skip_full && thread() == 128) {
      for (int stage = 0; stage < 2; stage++) barrier_wait(full + stage, ((boxes - 1 - stage) / 2) & 1);
    }
  }
};

void test_ring() {
  const Ring ring(100, 37);
  for (const int seed : SEEDS) {
    for (const int x : {-8, 0, 64}) {
      device::schedule(seed);
      std::vector<uint16_t> out(size_t(512 * ring.boxes), 0xffff);
      const std::string error = launch<160>(1, 1, 2 * STAGE + 32, [&] { ring.run(x, out); });
      if (!error.empty()) fail("%s", error.c_str());
      for (int row = 0; row < 8 * ring.boxes; row++)
        for (int column = x; column < x + 64; column++) {
          const bool inside = row < 37 && column >= 0 && column < 100;
          CHECK(out[size_t(64 * row + column - x)] == (inside ? ring.image[size_t(ring.pitch * row + column)] : 0));
        }
    }
  }
}

// --- products of a warpgroup ---------------------------------------------------------------------

// Operands of 128 bytes of k as device_host_hopper.h says they lie: the 16-byte piece at row
// (K-major) or k (MN-major) modulo 8, exclusive-or, of its line.
void place_k_major(unsigned char* to, int i, int k, uint32_t bits, int size = 2) {
  const int at = k * size;
  std::memcpy(to + i * 128 + (at / 16 ^ i % 8) * 16 + at % 16, &bits, size_t(size));
}
void place_mn_major(unsigned char* to, int leading, int k, int j, uint16_t bits) {
  std::memcpy(to + j / 64 * leading + k * 128 + (j % 64 / 8 ^ k % 8) * 16 + j % 8 * 2, &bits, 2);
}

using device::Factors;
enum Hurry { NO, C_TOO_EARLY, OPERAND_TOO_EARLY, A_TOO_EARLY };

// 64 × N from k = 64, or 32 of floats, by two warpgroups. The second one multiplies twice the A. A
// warpgroup that hurries gets garbage.
template <device::Factors TYPE, int N, int TRANS_B> void test_product(bool registers, Hurry hurry) {
  constexpr bool WIDE = TYPE == device::Factors::TF32;
  constexpr int SIZE = WIDE ? 4 : 2, K = 128 / SIZE, DEPTH = 32 / SIZE, A = 64 * 128, B = N * 128;
  std::vector<float> left(64 * K), right(K * N), before(64 * N), wanted(2 * 64 * N);
  const auto pack = [](float low, float high) {
    return TYPE == device::Factors::BF16 ? device::pack_bf16(low, high) : device::pack_f16(low, high);
  };
  // the low 13 bits of a float must not be read
  const auto bits = [&](float x) { return WIDE ? device::rounded_to_tf32(x) | 0x1fff : pack(x, 0) & 0xffff; };
  const auto round = [&](float x) {
    if (WIDE) return device::from_bits(device::rounded_to_tf32(x));
    return TYPE == device::Factors::BF16 ? float(value_bf16(uint16_t(bits(x)))) : device::from_f16(uint16_t(bits(x)));
  };
  for (auto* values : {&left, &right, &before})
    for (float& x : *values) x = round(uniform());
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < N; j++)
      for (int group = 0; group < 2; group++) {
        float total = before[size_t(i * N + j)];
        for (int step = 0; step < 4; step++) {
          double sum = double(total);
          for (int k = DEPTH * step; k < DEPTH * (step + 1); k++)
            sum += (1 + group) * double(left[size_t(i * K + k)]) * double(right[size_t(k * N + j)]);
          total = float(sum);
        }
        wanted[size_t((group * 64 + i) * N + j)] = total;
      }
  for (const int seed : SEEDS) {
    device::schedule(seed);
    std::vector<float> out(2 * 64 * N, 0.0f);
    const std::string error = launch<256>(1, 1, 2 * A + B, [&] {
      using namespace device;
      const int t = thread(), lane = t % 32, group = t / 128, warp = t / 32 % 4;
      unsigned char* const a = shared() + group * A;
      unsigned char* const b = shared() + 2 * A;
      for (int e = t % 128; e < 64 * K; e += 128)
        place_k_major(a, e / K, e % K, bits(float(1 + group) * left[size_t(e)]), SIZE);
      for (int e = t; e < K * N; e += 256) {
        if (TRANS_B) place_mn_major(b, 64 * 128, e / N, e % N, uint16_t(bits(right[size_t(e)])));
        else place_k_major(b, e % N, e / N, bits(right[size_t(e)]), SIZE);
      }
      sync();
      float c[N / 2];
      const auto place = [&](int e) {
        return size_t((16 * warp + lane / 4 + e / 2 % 2 * 8) * N + e / 4 * 8 + lane % 4 * 2 + e % 2);
      };
      for (int e = 0; e < N / 2; e++) c[e] = before[place(e)];
      uint32_t x[4][4];
      for (int step = 0; step < 4; step++)
        for (int i = 0; i < 4; i++) {
          const auto at = [&](int row, int k) {
            return float(1 + group) * left[size_t((16 * warp + row) * K + DEPTH * step + k)];
          };
          const auto l = [&](int e) {
            const Place p = a16(lane, e);
            return at(p.row, p.column);
          };
          x[step][i] = WIDE ? bits(at(lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4)) : pack(l(2 * i), l(2 * i + 1));
        }
      product_begin();
      for (int step = 0; step < 4; step++) {
        const uint64_t operand = TRANS_B ? matrix_descriptor(b + step * 2048, 64 * 128, 1024)
                                         : matrix_descriptor(b + step * 32, 0, 1024);
        if (registers) product_rs<TYPE, N, TRANS_B>(c, x[step], operand, 1);
        else product_ss<TYPE, N, TRANS_B>(c, matrix_descriptor(a + step * 32, 0, 1024), operand, 1);
      }
      product_commit();
      float sum = 0;
      if (hurry == C_TOO_EARLY) sum = c[0];
      if (hurry == A_TOO_EARLY) x[3][0] = 0x7fff7fff;
      if (hurry == OPERAND_TOO_EARLY && t == 0) place_k_major(a, 0, 0, 0x7fff);
      product_wait<0>();
      if (hurry == C_TOO_EARLY) c[0] = sum;
      for (int e = 0; e < N / 2; e++) out[size_t(64 * N * group) + place(e)] = c[e];
    });
    if (!error.empty()) fail("%s", error.c_str());
    const bool right_result = out == wanted, noticed = seed > 1 || !right_result;
    if (hurry ? !noticed : !right_result) fail("product of %d columns, %d %d %d, seed %d", N, TRANS_B, registers, hurry, seed);
  }
}

void test_votes() {  // the second of two warps has a lane where it holds
  std::vector<int> found(64);
  const std::string error = launch<64>(1, 1, 16, [&] { found[size_t(device::thread())] = device::any(device::thread() == 40); });
  if (!error.empty()) fail("%s", error.c_str());
  for (int t = 0; t < 64; t++) CHECK(found[size_t(t)] == (t >= 32));
}

void test_groups() {  // two under way, the first waited for; add = 0 overwrites
  device::schedule(0);
  const std::string error = launch<128>(1, 1, 2 * 64 * 128, [] {
    using namespace device;
    for (int e = thread(); e < 64 * 64; e += 128)
      for (int operand = 0; operand < 2; operand++)
        place_k_major(shared() + operand * 64 * 128, e / 64, e % 64, uint16_t(pack_bf16(1, 0)));
    sync();
    const uint64_t a = matrix_descriptor(shared(), 0, 1024), b = matrix_descriptor(shared() + 64 * 128, 0, 1024);
    float first[32] = {}, second[32] = {};
    product_begin();
    product_ss<Factors::BF16, 64, 0>(first, a, b, 0);
    product_ss<Factors::BF16, 64, 0>(first, a, b, 1);
    product_commit();
    product_ss<Factors::BF16, 64, 0>(second, a, b, 0);
    product_commit();
    CHECK(std::isnan(first[0]) && std::isnan(second[31]));
    product_wait<1>();
    CHECK(first[0] == 32 && first[31] == 32 && std::isnan(second[0]));
    product_wait<0>();
    CHECK(second[0] == 16 && second[31] == 16);
    registers_more<240>();
    registers_less<24>();
  });
  if (!error.empty()) fail("%s", error.c_str());
}

void test_hopper_errors() {
  using namespace device;
  static const auto barrier = [] { return reinterpret_cast<uint64_t*>(shared() + 8192); };
  static const auto initialised = [](int arrivals) {
    if (thread() == 0) barrier_init(barrier(), arrivals), barrier_publish();
    sync();
  };
  alignas(16) static uint16_t image[64 * 8] = {};
  static const TensorMap map = {image, 2, 64, 8, 128, 8};
  expect_error<32>("deadlock: threads 0-31 wait in barrier_wait", 8200, [] { initialised(1), barrier_wait(barrier(), 0); });
  expect_error<32>("barrier_wait at what is no mbarrier", 8200, [] { barrier_wait(barrier(), 0); });
  expect_error<32>("barrier_init outside of shared memory", 8199, [] { initialised(1); });
  expect_error<32>("barrier_init twice", 8200, [] { initialised(1), initialised(1); });
  expect_error<32>("more arrivals than barrier_init() announced", 8200, [] {
    initialised(1);
    if (thread() == 0) barrier_expect(barrier(), 16), barrier_arrive(barrier());
  });
  expect_error<32>("tensor_copy before barrier_publish", 8200, [] {
    if (thread() == 0) barrier_init(barrier(), 1), tensor_copy(shared(), &map, 0, 0, barrier());
  });
  expect_error<32>("no multiple of 1024", 8200, [] {
    initialised(1);
    tensor_copy(shared() + 128, &map, 0, 0, barrier());
  });
  expect_error<32>("tensor_copy to outside of shared memory", 8200, [] {
    initialised(1);
    tensor_copy(shared() + 8192, &map, 0, 0, barrier());
  });
  schedule(0);
  Ring ring(64, 80);
  ring.skip_empty = true;
  std::vector<uint16_t> out(size_t(512 * ring.boxes));
  const std::string early = launch<160>(1, 1, 2 * STAGE + 32, [&] { ring.run(0, out); });
  if (early.find("barrier_expect: more arrivals") == std::string::npos) fail("'%s'", early.c_str());
  const std::string late = launch<32>(1, 1, 8200, [] {
    initialised(1);
    if (thread() == 0) barrier_expect(barrier(), STAGE), tensor_copy(shared(), &map, 0, 0, barrier());
  });
  if (late.find("tensor copies that nobody waited for") == std::string::npos) fail("'%s'", late.c_str());
  static const auto product = [](int bytes) {
    float c[32] = {};
    const uint64_t a = matrix_descriptor(shared() + bytes, 0, 1024);
    product_ss<Factors::BF16, 64, 0>(c, a, a, 0);
    product_commit();
    product_wait<0>();
  };
  expect_error<128>("a product without product_begin()", 8192, [] { product(0); });
  expect_error<64>("a product of a warpgroup in a block of 64 threads", 8192, [] { product(0); });
  expect_error<128>("operand reaches out of shared memory", 8192, [] { product_begin(), product(1024); });
  expect_error<128>("threads of a warpgroup issue different products", 16384, [] {
    product_begin();
    product(thread() == 77 ? 1024 : 0);
  });
  expect_error<128>("products that not all warps of a warpgroup issue", 8192, [] {
    product_begin();
    if (thread() < 64) product(0);
  });
  expect_error<128>("products that nobody waited for", 8192, [] {
    float c[32];
    product_begin();
    product_ss<Factors::BF16, 64, 0>(c, matrix_descriptor(shared(), 0, 1024), matrix_descriptor(shared(), 0, 1024), 0);
  });
}

// --- races ---------------------------------------------------------------------------------------

struct Race {
  const char* name;
  void (*run)();
};
const Race RACES[] = {
    {"sync", [] { without_barrier(2); }},
    {"sync_warp", [] {
       launch<32>(1, 1, 32 * 4, [] {
         auto* const memory = reinterpret_cast<int*>(device::shared());
         memory[device::thread()] = memory[device::shuffle_xor(device::thread(), 1)];
       });
     }},
    {"copy", [] {  // each thread has waited for its own
       alignas(16) static float from[4] = {};
       launch<64>(1, 1, 64 * 16, [] {
         device::copy16(device::shared() + 16 * device::thread(), from, 16);
         device::copy_commit();
         device::copy_wait<0>();
         device::load_matrices(*new uint32_t[1][4], device::shared() + 16 * (63 - device::thread()));
       });
     }},
    {"blocks", [] {
       float out = 0;
       launch<32>(2, 1, 0, [&] {
         if (device::thread() == 9 * device::block_x()) out += 1;
       });
     }},
    {"full", [] {
       Ring ring(64, 80);
       ring.skip_full = true;
       std::vector<uint16_t> out(size_t(512 * ring.boxes));
       launch<160>(1, 1, 2 * STAGE + 32, [&] { ring.run(0, out); });
     }},
    {"operand", [] { test_product<Factors::BF16, 64, 0>(false, OPERAND_TOO_EARLY); }},
};

// -------------------------------------------------------------------------------------------------

void time_block() {
  device::schedule(0);
  const int blocks = 200;
  const auto start = std::chrono::steady_clock::now();
  const std::string error = launch<128>(blocks, 1, 1024, [] {
    float c[4] = {};
    const uint32_t one = device::pack_bf16(1.0f, 1.0f), a[4] = {one, one, one, one};
    for (int k = 0; k < 64; k++) {
      device::mma_bf16(c, a, one, one);
      if (k < 10) device::sync();
    }
  });
  const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - start;
  std::printf("%.0f us for a block of 128 threads with 64 mma a warp and 10 sync%s\n", taken.count() / blocks, error.c_str());
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  if (mode == "--races")
    for (const Race& race : RACES) std::puts(race.name);
  if (mode == "--race")
    for (const Race& race : RACES)
      if (count > 2 && !std::strcmp(race.name, arguments[2])) race.run();
  if (mode == "--races" || mode == "--race") return 0;
  if (mode == "--time") {
    time_block();
    return 0;
  }
  test_numbers();
  test_order();
  test_meeting();
  test_errors();
  test_copies();
  test_loading();
  for (const Format format : {BF16, F16, TF32}) test_products(format);
  test_ring();
  for (const bool registers : {false, true}) {
    test_product<Factors::BF16, 64, 0>(registers, NO), test_product<Factors::BF16, 64, 1>(registers, NO);
    test_product<Factors::BF16, 128, 0>(registers, NO), test_product<Factors::BF16, 128, 1>(registers, NO);
    test_product<Factors::BF16, 256, 0>(registers, NO), test_product<Factors::BF16, 256, 1>(registers, NO);
    test_product<Factors::F16, 64, 0>(registers, NO), test_product<Factors::F16, 128, 1>(registers, NO);
    test_product<Factors::TF32, 64, 0>(registers, NO), test_product<Factors::TF32, 128, 0>(registers, NO);
    test_product<Factors::BF16, 64, 0>(registers, C_TOO_EARLY);
  }
  test_product<Factors::BF16, 64, 0>(true, A_TOO_EARLY);
  test_votes();
  test_groups();
  test_hopper_errors();
#ifndef __SANITIZE_THREAD__  // which says so
  test_product<Factors::BF16, 64, 0>(false, OPERAND_TOO_EARLY);
  CHECK(without_barrier(0) != without_barrier(1));
#endif
  std::printf(failures ? "%d failures\n" : "all as it should be\n", failures);
  return failures != 0;
}
