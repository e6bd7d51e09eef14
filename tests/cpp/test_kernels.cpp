// The kernels of csrc/cpu through their C interface, against plain loops written from the
// definitions in docs/design.md.
//
// The reference shares no code with the kernels. It evaluates every pair three times, at t and at t
// ± the most that a similarity can be off by in the dtype that sums are made in: what a result may
// differ by follows from that (a kink in reach, a steep exponential), plus the rounding of the sums
// themselves. So a tolerance is neither a guess nor a matter of luck with the seed; `run.py`
// compiles this file and the kernels with sanitizers.
//
// Every output and input is an allocation of its own of exactly the size that the interface
// promises, outputs hold NaN before each call, and so does the driver's workspace where the linker
// can wrap its allocation (ALPHACL_WRAPPED).

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include <unistd.h>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/generated/row_codes.h"

extern "C" {
int32_t alphacl_cpu_sweep_size();
int32_t alphacl_cpu_rows_size();
const char* alphacl_cpu_build();
const char* alphacl_cpu_sources();
int32_t alphacl_cpu_instruction_sets();
const char* alphacl_cpu_kernels(int32_t set, int32_t dtype, int32_t* multiple, int32_t* largest, int32_t* fewest);
int32_t alphacl_cpu_sweep(const Sweep* s);
int32_t alphacl_cpu_normalize(const PairRows* p);
int32_t alphacl_cpu_finish(const PairRows* p);
int32_t alphacl_cpu_step(const Step* s);
int32_t alphacl_cpu_same_id_size();
int32_t alphacl_cpu_same_id(const SameIdBlock* b);
int32_t alphacl_cpu_unit_rows(const UnitRows* u);
int32_t alphacl_cpu_number_ids(const int64_t* ids, int64_t n, int64_t split, int64_t anchors, int32_t dtype, int32_t* numbers, void* n_neg,
                               bool* empty);
int32_t alphacl_cpu_function(int32_t set, int32_t dtype, int32_t which, const void* x, void* y, int64_t n);
}

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr int THREADS[] = {1, 2, 5};
const char* const SETS[] = {ALPHACL_SET_NAMES};  // from tools/build_cpu.py
const char* const DTYPES[] = {"float32", "float64", "bfloat16", "float16"};
const char* const KINDS[] = {"exp", "gibbs", "power", "inverse", "hinge", "sigmoid", "square", "gamma", "logistic"};
const char* const FORMS[] = {"constant shift", "online", "plain", "largest t"};
const char* const WEIGHTS[] = {"f", "df", "f+df"};

int failures = 0;

__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "FAILED: ");
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  if (++failures == 20) {
    std::fprintf(stderr, "too many failures\n");
    std::exit(1);
  }
}

// A tile that waits for ever is a failure, too: `alarm` ends the test with the name of what was
// under way.
char under_way[1500] = "nothing";
void watch(const std::string& what, unsigned seconds = 900) {
  std::snprintf(under_way, sizeof(under_way), "FAILED: does not end: %s\n", what.c_str());
  alarm(seconds);
}
extern "C" void give_up(int) {
  (void)!write(2, under_way, std::strlen(under_way));
  _exit(1);
}

// --- chance, the same everywhere -----------------------------------------------------------------

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  double uniform(double low, double high) { return low + (high - low) * double(bits() >> 11) * 0x1p-53; }
  // both included
  int64_t integer(int64_t low, int64_t high) { return low + int64_t(bits() % uint64_t(high - low + 1)); }
  bool chance(double p) { return uniform(0, 1) < p; }
  double normal() {
    const double r = std::sqrt(-2 * std::log(uniform(1e-300, 1)));
    return r * std::cos(uniform(0, 6.283185307179586));
  }
  template <class List> auto pick(const List& list) { return list[bits() % std::size(list)]; }
  template <class T> T pick(std::initializer_list<T> list) { return list.begin()[bits() % list.size()]; }

 private:
  uint64_t state_;
};

// --- memory --------------------------------------------------------------------------------------

#if defined(ALPHACL_WRAPPED)
extern "C" int __real_posix_memalign(void** p, size_t alignment, size_t size);
#else
int __real_posix_memalign(void** p, size_t alignment, size_t size) { return posix_memalign(p, alignment, size); }
#endif

// Exactly `size` elements: the sanitizer's red zone begins at the next byte. They are aligned as
// torch aligns a tensor, or start `skip` elements later, because rows of a caller's matrix are
// aligned to their elements and to nothing more.
template <class T> class Exact {
 public:
  explicit Exact(int64_t size = 0, int64_t skip = 0)
      : size(size), block_(allocated(size_t(size + skip) * sizeof(T))), data(block_ + skip) {}
  Exact(Exact&& other) noexcept : size(other.size), block_(other.block_), data(other.data) { other.block_ = nullptr; }
  Exact& operator=(Exact&& other) noexcept {
    std::swap(size, other.size), std::swap(block_, other.block_), std::swap(data, other.data);
    return *this;
  }
  ~Exact() { std::free(block_); }
  void fill_with_nan() {
    if (size) std::memset(data, 0xff, size_t(size) * sizeof(T));  // a NaN in every dtype there is
  }
  T& operator[](int64_t k) { return data[k]; }
  const T& operator[](int64_t k) const { return data[k]; }
  int64_t size;

 private:
  static T* allocated(size_t bytes) {
    void* block = nullptr;
    return __real_posix_memalign(&block, 64, bytes) == 0 ? static_cast<T*>(block) : nullptr;
  }
  T* block_;

 public:
  T* data;
};

#if defined(ALPHACL_WRAPPED)
// The driver's workspace, NaN when it comes and again before every call (the driver keeps it from
// one call to the next): a kernel that reads what it has not written shows.
std::mutex workspace_mutex;
std::map<void*, size_t> workspace;
extern "C" void __real_free(void* p);
extern "C" int __wrap_posix_memalign(void** p, size_t alignment, size_t size) {
  if (const int error = __real_posix_memalign(p, alignment, size)) return error;
  std::memset(*p, 0xff, size);
  const std::lock_guard<std::mutex> hold(workspace_mutex);
  workspace[*p] = size;
  return 0;
}
extern "C" void __wrap_free(void* p) {
  if (p) {
    const std::lock_guard<std::mutex> hold(workspace_mutex);
    workspace.erase(p);
  }
  __real_free(p);
}
void poison_workspace() {
  const std::lock_guard<std::mutex> hold(workspace_mutex);
  for (const auto& [p, size] : workspace) std::memset(p, 0xff, size);
}
#else
void poison_workspace() {}
#endif

// --- dtypes --------------------------------------------------------------------------------------

uint16_t to_bfloat16(double x) {  // truncated: which neighbour it is does not matter
  const float y = float(x);
  uint32_t u;
  std::memcpy(&u, &y, 4);
  return uint16_t(u >> 16);
}
double from_bfloat16(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float y;
  std::memcpy(&y, &u, 4);
  return y;
}
uint16_t to_float16(double x) {  // truncated, finite
  const double a = std::min(std::fabs(x), 65504.0);
  int exponent;
  std::frexp(a, &exponent);
  const int e = std::max(exponent - 1, -14);  // 2^e <= a, or the subnormals' exponent
  // in units of 2^(e − 10), with the leading one of a normal number
  const auto steps = uint32_t(std::ldexp(a, 10 - e));
  const uint32_t magnitude = steps < 1024 ? steps : (uint32_t(e + 15) << 10 | (steps - 1024));
  return uint16_t(magnitude | (std::signbit(x) ? 0x8000u : 0u));
}
double from_float16(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double a = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return h & 0x8000 ? -a : a;
}

bool is_double(int dtype) { return dtype == FLOAT64; }
bool is_half(int dtype) { return dtype == BFLOAT16 || dtype == FLOAT16; }
int64_t element_size(int dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }
// half an ulp of 1, of the accumulation dtype
double unit(int dtype) { return is_double(dtype) ? 0x1p-53 : 0x1p-24; }
double round_to(int dtype, double x) { return is_double(dtype) ? x : double(float(x)); }

// --- inputs --------------------------------------------------------------------------------------

// A row vector as the interface takes it; absent: a null pointer.
class RowVector {
 public:
  RowVector() = default;
  RowVector(int dtype, std::vector<double> x) : values(std::move(x)), present(true) {
    bytes_ = Exact<char>(int64_t(values.size()) * (is_double(dtype) ? 8 : 4));
    for (size_t k = 0; k < values.size(); k++) {
      if (is_double(dtype)) {
        std::memcpy(bytes_.data + 8 * k, &values[k], 8);
      } else {
        const float y = float(values[k]);
        std::memcpy(bytes_.data + 4 * k, &y, 4);
        values[k] = y;
      }
    }
  }
  const void* pointer() const { return present ? bytes_.data : nullptr; }
  double operator[](int64_t k) const { return present ? values[size_t(k)] : absent; }
  std::vector<double> values;
  bool present = false;
  double absent = 0;

 private:
  Exact<char> bytes_;
};

struct Data {
  int dtype;
  int64_t n, dim, stride;
  Exact<char> raw{0};      // what the kernels get
  RowVector scale, bias;
  std::vector<double> f;   // (n, dim): exactly the numbers that raw and scale stand for
  std::vector<double> t;   // (n, n)
  double delta;            // the most that a similarity can be off by
};

Data make_data(Random& random, int dtype, int64_t n, int64_t dim, bool extra) {
  Data d;
  d.dtype = dtype, d.n = n, d.dim = dim;
  d.stride = dim + (random.chance(0.4) ? random.integer(1, 5) : 0);
  const int64_t size = element_size(dtype), count = n ? (n - 1) * d.stride + dim : 0;
  // As many bytes in front as one element: no alignment beyond it.
  Exact<char> raw(count * size, random.chance(0.5) ? size : 0);
  raw.fill_with_nan();  // and so the gaps between rows stay NaN
  const bool scaled = extra && is_half(dtype), biased = extra && !is_half(dtype);

  std::vector<double> mean(size_t(dim), 0.0), scales, row;
  for (auto& x : mean) x = random.normal();
  const double spread = random.pick({0.02, 0.5, 30.0});
  d.f.resize(size_t(n * dim));
  row.resize(size_t(dim));
  for (int64_t i = 0; i < n; i++) {
    double square = 0;
    const bool twin = i > 0 && !scaled && random.chance(0.03), zero = scaled && random.chance(0.02);
    for (int64_t k = 0; k < dim; k++) {
      row[size_t(k)] = mean[size_t(k)] + spread * random.normal();
      square += row[size_t(k)] * row[size_t(k)];
    }
    // Rows of any length where their scale makes up for it; float16 reaches its subnormal numbers,
    // bfloat16 goes far beyond.
    const int64_t exponent = random.integer(-1, 1) * (dtype == FLOAT16 ? 7 : 70);
    const double length = scaled ? std::ldexp(random.uniform(0.5, 1), int(exponent)) : 1;
    for (int64_t k = 0; k < dim; k++) {
      double x = zero ? 0 : row[size_t(k)] / std::sqrt(square) * 0.999 * length;
      if (twin) x = d.f[size_t((i - 1) * dim + k)];
      char* at = raw.data + (i * d.stride + k) * size;
      if (dtype == FLOAT64) {
        std::memcpy(at, &x, 8);
      } else if (dtype == FLOAT32) {
        const float y = float(x);
        std::memcpy(at, &y, 4);
        x = y;
      } else {
        const uint16_t y = dtype == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
        std::memcpy(at, &y, 2);
        x = dtype == BFLOAT16 ? from_bfloat16(y) : from_float16(y);
      }
      d.f[size_t(i * dim + k)] = x;
    }
    if (scaled) {
      double norm = 0;
      for (int64_t k = 0; k < dim; k++) norm += d.f[size_t(i * dim + k)] * d.f[size_t(i * dim + k)];
      scales.push_back(norm > 0 ? float(0.999 / std::sqrt(norm)) : 0.0);
      for (int64_t k = 0; k < dim; k++) d.f[size_t(i * dim + k)] *= scales.back();
    }
  }
  d.raw = std::move(raw);
  double largest_bias = 0;
  if (scaled) d.scale = RowVector(dtype, scales);
  if (biased) {
    std::vector<double> b;
    for (int64_t i = 0; i < n; i++) b.push_back(random.uniform(-0.4, 0.2));
    d.bias = RowVector(dtype, b);
    largest_bias = 0.4;
  }
  d.t.resize(size_t(n * n));
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j <= i; j++) {
      long double sum = 0;
      const double *a = &d.f[size_t(i * dim)], *b = &d.f[size_t(j * dim)];
      for (int64_t k = 0; k < dim; k++) sum += (long double)(a[k]) * b[k];
      d.t[size_t(i * n + j)] = d.t[size_t(j * n + i)] = double(sum + d.bias[i] + d.bias[j]);
    }
  // dim additions of partial sums below 1, and a few roundings of what is done with t afterwards.
  d.delta = unit(dtype) * (double(dim) + 32 + 16 * largest_bias);
  return d;
}

// --- a case --------------------------------------------------------------------------------------

struct Variant {
  Form form;
  int kind, weight;
  bool gradient = false;
  std::string name() const {
    return std::string(FORMS[int(form)]) + (gradient ? " gradient " : " sums ") + KINDS[kind] + " " + WEIGHTS[weight];
  }
};

bool is_log(int kind) { return kind <= INVERSE; }

std::vector<Variant> all_variants() {
  std::vector<Variant> list{{Form::T_MAX, EXP, 0}};
  for (int kind = EXP; kind <= LOGISTIC; kind++) {
    list.push_back({Form::PLAIN, kind, 0});
    for (int weight = 0; weight < 3; weight++) list.push_back({Form::PLAIN, kind, weight, true});
    if (!is_log(kind)) continue;
    list.push_back({Form::CONSTANT, kind, 0});
    list.push_back({Form::CONSTANT, kind, 0, true});
    list.push_back({Form::ONLINE, kind, 0});
  }
  return list;
}

struct Layout {
  int64_t split, partner, anchors;
  std::vector<int32_t> ids = {};  // of every row, or none
};

struct Case {
  Variant v;
  Layout layout;
  int64_t lo = 0, hi = 0;
  double tau = 1, constant_shift = 0, params[3] = {0, 0, 0};
  RowVector moment_origin, row_weight, shift, argument_offset, baseline;
  int rows_of_terms[SUM_COUNT] = {-1, -1, -1, -1, -1};
  int terms = 0;  // rows of sums, without the shift
  bool largest() const { return v.form == Form::T_MAX; }
  bool log_sums() const { return !v.gradient && (v.form == Form::CONSTANT || v.form == Form::ONLINE); }
};

// Calls what(j) for all negatives of anchor i.
template <class Function> void for_negatives(const Layout& l, int64_t n, int64_t i, Function what) {
  const int64_t from = l.split && i < l.split ? l.split : 0, to = l.split && i >= l.split ? l.split : n;
  for (int64_t j = from; j < to; j++)
    if (j != i && (l.partner == 0 || std::llabs(i - j) != l.partner) && (l.ids.empty() || l.ids[i] != l.ids[j])) what(j);
}

// --- the definitions -----------------------------------------------------------------------------

double power(double d, double q) { return d > 0 ? std::pow(d, q) : 0; }
double power_slope(double d, double q) { return d > 0 ? q * std::pow(d, q - 1) : 0; }

double log_f(const Case& c, double t) {
  const double* p = c.params;
  switch (c.v.kind) {
    case EXP: return t / c.tau;
    case GIBBS: return (t - p[0]) / c.tau;
    case POWER: return -power(p[0] - t, p[1]) / c.tau;
    default: return -p[2] * std::log(power(p[0] - t, p[1]) + c.tau);
  }
}
double log_f_slope(const Case& c, double t) {
  const double* p = c.params;
  switch (c.v.kind) {
    case EXP:
    case GIBBS: return 1 / c.tau;
    case POWER: return power_slope(p[0] - t, p[1]) / c.tau;
    default: return p[2] * power_slope(p[0] - t, p[1]) / (power(p[0] - t, p[1]) + c.tau);
  }
}
double log_f_tau(const Case& c, double t) {
  const double* p = c.params;
  switch (c.v.kind) {
    case EXP: return -t / (c.tau * c.tau);
    case GIBBS: return -(t - p[0]) / (c.tau * c.tau);
    case POWER: return power(p[0] - t, p[1]) / (c.tau * c.tau);
    default: return -p[2] / (power(p[0] - t, p[1]) + c.tau);
  }
}

struct Pieces {
  double f = 0, df = 0, dtau = 0;
  double noise = 0;  // rounding of df beyond its own last place
};

struct Wanted {
  bool df, dtau;
};

// Of similarity t for anchor i.
Pieces pieces(const Case& c, Wanted wanted, double u, double t, int64_t i) {
  Pieces y;
  const double* p = c.params;
  if (is_log(c.v.kind)) {
    y.f = std::exp(log_f(c, t) - (c.log_sums() && c.v.form == Form::CONSTANT ? c.constant_shift : c.shift[i]));
    if (wanted.df) y.df = y.f * log_f_slope(c, t);
    if (wanted.dtau) y.dtau = y.f * log_f_tau(c, t);
    return y;
  }
  const double x = t - c.shift[i] + c.argument_offset[i];
  switch (c.v.kind) {
    case HINGE:
      y.f = std::max(x + p[0], 0.0), y.df = x + p[0] > 0;
      break;
    case SIGMOID:
      y.f = 1 / (1 + std::exp(-p[0] * x)), y.df = p[0] * y.f * (1 - y.f);
      y.noise = p[0] * 8 * u;  // 1 − f
      break;
    case SQUARE:
      y.f = std::max(x, 0.0) / c.tau, y.df = (x > 0) / c.tau, y.dtau = -std::max(x, 0.0) / (c.tau * c.tau);
      break;
    case LOGISTIC:
      y.f = std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))), y.df = 1 / (1 + std::exp(-x));
      break;
    default:
      y.f = std::pow(c.tau / -x, 1 / p[0]), y.df = y.f / (-p[0] * x), y.dtau = y.f / (p[0] * c.tau);
  }
  return y;
}

struct Bounded {
  double value = 0, slack = 0;
  void add(double v, double s) { value += v, slack += s; }
};

struct Expected {
  std::vector<double> base;           // (anchors), of log sums
  std::vector<Bounded> sums;          // (terms, anchors)
  std::vector<Bounded> df;            // (hi − lo, dim)
  std::vector<double> df_magnitude;   // Σ |g_ij + g_ji|·|F_j|
  std::vector<Bounded> weight_sums;   // (n)
};

double term(int k, const Pieces& y, double u, double baseline) {
  switch (k) {
    case F: return y.f;
    case DF: return y.df;
    case F_MOMENT: return y.f * u;
    case DF_MOMENT: return y.df * u;
    default: return y.dtau * (u - baseline);
  }
}

// The most that a kernel's number may be away from what the definition says where its similarities
// are off by up to delta.
Expected expected(const Data& d, Case& c) {
  const int64_t n = d.n, anchors = c.layout.anchors;
  const double u = unit(d.dtype), tiny = is_double(d.dtype) ? 1e-290 : 1e-30;
  const double of_sums = u * (double(n) + 64);
  Expected e;
  const double* t_of = d.t.data();

  if (c.largest() || c.log_sums())
    for (int64_t i = 0; i < anchors; i++) {
      double best = -INF;
      for_negatives(c.layout, n, i, [&](int64_t j) { best = std::max(best, t_of[i * n + j]); });
      if (!c.largest()) best = best == -INF ? best : log_f(c, best);
      e.base.push_back(c.v.form == Form::CONSTANT ? c.constant_shift : best);
    }
  if (c.largest()) return e;
  // sums are relative to the base, which takes the place of a shift
  if (c.v.form == Form::ONLINE) {
    std::vector<double> base = e.base;
    for (double& b : base) b = b == -INF ? 0 : b;
    c.shift.values = base, c.shift.present = true;
  }

  std::vector<int> wanted_terms;
  for (int k = 0; k < SUM_COUNT; k++)
    if (c.rows_of_terms[k] >= 0) wanted_terms.push_back(k);
  const bool gradient = c.v.gradient;
  const Wanted wanted{c.rows_of_terms[DF] >= 0 || c.rows_of_terms[DF_MOMENT] >= 0 || (gradient && c.v.weight != WEIGHT_F),
                      c.rows_of_terms[DTAU] >= 0};
  e.sums.resize(size_t(c.terms * anchors));
  std::vector<Bounded> g(gradient ? size_t(n * n) : 0);

  for (int64_t i = 0; i < anchors; i++) {
    const double origin = c.moment_origin[i], baseline = c.baseline[i], row_weight = c.row_weight[i];
    for_negatives(c.layout, n, i, [&](int64_t j) {
      const double t = t_of[i * n + j];
      const Pieces y = pieces(c, wanted, u, t, i), low = pieces(c, wanted, u, t - d.delta, i),
                   high = pieces(c, wanted, u, t + d.delta, i);
      // An exponential turns rounding of its argument into a relative error.
      double relative = of_sums;
      if (is_log(c.v.kind)) {
        const double l = std::fabs(log_f(c, t)), shift = std::fabs(c.shift[i]), constant = std::fabs(c.constant_shift);
        relative += u * (8 + 4 * l + 4 * shift + 4 * constant);
      }
      auto slack = [&](double at, double below, double above, double magnitude) {
        return std::max(std::fabs(below - at), std::fabs(above - at)) + relative * magnitude;
      };
      for (int k : wanted_terms) {
        const double at = term(k, y, t - origin, baseline);
        const double below = term(k, low, t - d.delta - origin, baseline), above = term(k, high, t + d.delta - origin, baseline);
        const double noise = k == DF ? y.noise : k == DF_MOMENT ? y.noise * std::fabs(t - origin) : 0;
        e.sums[size_t(c.rows_of_terms[k] * anchors + i)].add(at, slack(at, below, above, std::fabs(at)) + noise);
      }
      if (!gradient) return;
      auto weight = [&](const Pieces& z, double s) {
        const double v = s - origin - baseline;
        return row_weight * (c.v.weight == WEIGHT_F ? z.f : c.v.weight == WEIGHT_DF ? z.df : z.f + z.df * v);
      };
      const double factor = c.v.weight == WEIGHT_F ? 0 : c.v.weight == WEIGHT_DF ? 1 : std::fabs(t - origin - baseline);
      const double magnitude = std::fabs(row_weight) * (c.v.weight == WEIGHT_DF ? std::fabs(y.df) : y.f + std::fabs(y.df) * factor);
      const double at = weight(y, t);
      const double room =
          slack(at, weight(low, t - d.delta), weight(high, t + d.delta), magnitude) + std::fabs(row_weight) * factor * y.noise;
      g[size_t(i * n + j)].add(at, room);
    });
  }
  for (auto& s : e.sums) s.slack += tiny;
  if (!gradient) return e;

  for (int64_t i = 0; i < n; i++)  // g_ij + g_ji
    for (int64_t j = 0; j < i; j++) {
      Bounded &a = g[size_t(i * n + j)], &b = g[size_t(j * n + i)];
      a.add(b.value, b.slack);
      b = a;
    }
  if (d.bias.present) {
    e.weight_sums.resize(size_t(n));
    for (int64_t i = 0; i < n; i++) {
      for (int64_t j = 0; j < n; j++) {
        const Bounded& w = g[size_t(i * n + j)];
        e.weight_sums[size_t(i)].add(w.value, w.slack + of_sums * std::fabs(w.value));
      }
      e.weight_sums[size_t(i)].slack += tiny;
    }
  }
  const int64_t rows = c.hi - c.lo;
  e.df.resize(size_t(rows * d.dim));
  e.df_magnitude.resize(size_t(rows * d.dim));
  for (int64_t r = 0; r < rows; r++) {
    Bounded* out = &e.df[size_t(r * d.dim)];
    double* magnitude = &e.df_magnitude[size_t(r * d.dim)];
    for (int64_t j = 0; j < n; j++) {
      const Bounded w = g[size_t((c.lo + r) * n + j)];
      const double absolute = std::fabs(w.value), room = w.slack + 2 * of_sums * absolute;
      if (w.value == 0 && w.slack == 0) continue;
      const double* f = &d.f[size_t(j * d.dim)];
      for (int64_t k = 0; k < d.dim; k++) {
        out[k].add(w.value * f[k], room * std::fabs(f[k]));
        magnitude[k] += absolute * std::fabs(f[k]);
      }
    }
    for (int64_t k = 0; k < d.dim; k++) out[k].slack += tiny;
  }
  return e;
}

// --- drawing a case ------------------------------------------------------------------------------

RowVector draw_vector(Random& random, int dtype, int64_t size, double low, double high) {
  std::vector<double> x;
  for (int64_t i = 0; i < size; i++) x.push_back(random.uniform(low, high));
  return RowVector(dtype, std::move(x));
}

// A point in the middle of the widest gap between similarities, or beyond all of them: a kink there
// touches no pair.
double in_a_gap(Random& random, std::vector<double> t) {
  std::sort(t.begin(), t.end());
  const double beyond = t.back() + random.pick({0.05, 0.3, 1.0});
  double width = 0.02, best = beyond;
  for (size_t k = 1; k < t.size(); k++)
    if (t[k] - t[k - 1] > width) width = t[k] - t[k - 1], best = (t[k] + t[k - 1]) / 2;
  return random.chance(0.5) ? best : beyond;
}

Case draw(Random& random, const Data& d, const Variant& v, const Layout& layout) {
  Case c;
  c.v = v, c.layout = layout;
  const int dtype = d.dtype;
  const int64_t n = d.n, anchors = layout.anchors;
  std::vector<double> t, row_max(size_t(anchors), -INF);
  for (int64_t i = 0; i < anchors; i++)
    for_negatives(layout, n, i, [&](int64_t j) {
      t.push_back(d.t[size_t(i * n + j)]);
      row_max[size_t(i)] = std::max(row_max[size_t(i)], t.back());
    });
  if (t.empty()) t.push_back(0);
  for (double& x : row_max) x = x == -INF ? 0 : x;
  const double top = *std::max_element(t.begin(), t.end());

  auto number = [&](double x) { return round_to(dtype, x); };
  const bool constant = v.form == Form::CONSTANT;
  c.tau = number(random.pick({0.001, 0.02, 0.1, 0.5, 1.0, 7.0}));
  switch (v.kind) {
    case GIBBS: c.params[0] = random.pick({0.0, 1.0}); break;
    case POWER:
    case INVERSE:
      c.params[1] = number(random.pick({0.5, 0.7, 1.0, 1.5, 2.0, 3.0}));
      c.params[0] = number(c.params[1] < 1 ? in_a_gap(random, t) : random.pick({0.0, 1.0, top + 0.1, top - 0.1}));
      if (v.kind == INVERSE) c.params[2] = number(random.pick({0.5, 1.0, 3.0}));
      break;
    case HINGE: c.params[0] = number(random.uniform(-0.5, 0.5)); break;
    case SIGMOID: c.params[0] = number(random.pick({0.5, 1.0, 8.0})); break;
    case GAMMA: c.params[0] = number(random.pick({1.0, 1.3, 2.0, 4.0})); break;
    default: break;
  }

  bool shifted = random.chance(0.8);
  if (is_log(v.kind)) {
    // half of log f's range for a constant shift, |log f| without a shift
    const double room = is_double(dtype) ? 500 : 60;
    for (;; c.tau *= 4) {
      double low = INF, high = -INF;
      for (double x : t) low = std::min(low, log_f(c, x)), high = std::max(high, log_f(c, x));
      c.constant_shift = constant ? number((low + high) / 2) : 0;
      const bool fits = !constant || high - low < 2 * room, small = std::max(std::fabs(low), std::fabs(high)) < room / 2;
      if (v.gradient && constant && !small) shifted = true;
      if (fits && (shifted || small || !(v.gradient && constant))) {
        if (!small) shifted = true;
        break;
      }
    }
  }
  auto vector = [&](double p, double low, double high) {
    return random.chance(p) ? draw_vector(random, dtype, anchors, low, high) : RowVector();
  };
  c.moment_origin = vector(0.8, -1, 1), c.baseline = vector(0.8, -1, 1);
  if (is_log(v.kind) && !c.log_sums() && shifted) {
    std::vector<double> x;
    for (double best : row_max) x.push_back(log_f(c, best) + random.uniform(-1, 3));
    c.shift = RowVector(dtype, x);
  }
  if (!is_log(v.kind)) {
    std::vector<double> shift, offset;
    for (double best : row_max) {
      const bool below = v.kind == GAMMA;  // x < 0 throughout
      shift.push_back(below ? best : random.uniform(-0.5, 0.5));
      offset.push_back(below ? -random.uniform(0.02, 2) : random.uniform(-0.5, 0.5));
    }
    if (v.kind == GAMMA || shifted) c.shift = RowVector(dtype, shift);
    if (v.kind == GAMMA || random.chance(0.7)) c.argument_offset = RowVector(dtype, offset);
  }

  const bool has_dtau = v.kind != HINGE && v.kind != SIGMOID && v.kind != LOGISTIC;
  std::vector<int> terms;
  if (c.log_sums()) {
    terms.push_back(F);
    if (random.chance(0.5)) terms.push_back(F_MOMENT);
  } else if (v.form == Form::PLAIN) {
    const double p = random.pick({0.0, 0.4, 1.0});
    for (int k = 0; k < SUM_COUNT; k++)
      if ((k != DTAU || has_dtau) && random.chance(p)) terms.push_back(k);
    if (terms.empty() && v.form == Form::PLAIN && !v.gradient) terms.push_back(int(random.integer(F, has_dtau ? DTAU : DF_MOMENT)));
    for (size_t k = terms.size(); k > 1; k--) std::swap(terms[k - 1], terms[size_t(random.integer(0, int64_t(k) - 1))]);
  }
  c.terms = int(terms.size());
  for (int row = 0; row < c.terms; row++) c.rows_of_terms[terms[size_t(row)]] = row;

  if (c.v.gradient) {
    c.row_weight = random.chance(0.98) ? draw_vector(random, dtype, anchors, -1, 1) : RowVector();
    if (random.chance(0.2) && c.row_weight.present) {  // an anchor that a reduction leaves out
      std::vector<double> x = c.row_weight.values;
      x[size_t(random.integer(0, anchors - 1))] = 0;
      c.row_weight = RowVector(dtype, x);
    }
    c.lo = random.chance(0.5) ? 0 : random.integer(0, n), c.hi = random.chance(0.5) ? n : random.integer(c.lo, n);
  }
  return c;
}

// --- running and comparing -----------------------------------------------------------------------

struct Setting {
  int set;
  int64_t block;
  int threads;
};

template <class T> struct Outputs {
  Exact<T> df, weight_sums, sums;
  Outputs(const Data& d, const Case& c)
      : df((c.hi - c.lo) * d.dim, c.hi % 4 == 1), weight_sums(c.v.gradient && d.bias.present ? d.n : 0),
        sums((c.terms + c.log_sums() + c.largest()) * c.layout.anchors) {
    for (Exact<T>* x : all()) x->fill_with_nan();
  }
  std::array<Exact<T>*, 3> all() { return {&df, &weight_sums, &sums}; }
};

// The hinge as a user's function, which may rely on aligned pointers.
template <class T> void hinge(const double* margin, const T* x, T* f, T* df, int64_t n) {
  for (const T* p : {x, const_cast<const T*>(f), const_cast<const T*>(df)})
    if (reinterpret_cast<uintptr_t>(p) % 64 || n * int64_t(sizeof(T)) % 64) std::abort();
  for (int64_t k = 0; k < n; k++) {
    const T y = x[k] + T(*margin);
    if (f) f[k] = y > 0 ? y : 0;
    if (df) df[k] = y > 0;
  }
}

Sweep sweep_of(const Data& d, const Case& c, const Setting& setting) {
  Sweep s{};
  s.f = d.raw.data, s.scale = d.scale.pointer(), s.bias = d.bias.pointer();
  s.moment_origin = c.moment_origin.pointer(), s.row_weight = c.row_weight.pointer(), s.argument_offset = c.argument_offset.pointer(), s.baseline = c.baseline.pointer();
  s.shift = c.log_sums() ? nullptr : c.shift.pointer();
  s.n = d.n, s.dim = d.dim, s.row_stride = d.stride;
  s.split = c.layout.split, s.partner = c.layout.partner, s.anchors = c.layout.anchors;
  s.ids = c.layout.ids.empty() ? nullptr : c.layout.ids.data();
  s.lo = c.lo, s.hi = c.hi, s.block = setting.block, s.tau = c.tau, s.constant_shift = c.constant_shift;
  for (int k = 0; k < 3; k++) s.params[k] = c.params[k];
  s.dtype = d.dtype, s.kind = c.v.kind, s.form = c.v.form, s.gradient = c.v.gradient, s.weight = c.v.weight;
  if (c.v.kind == HINGE && d.n % 2) {
    auto* of_dtype = is_double(d.dtype) ? reinterpret_cast<void (*)()>(hinge<double>) : reinterpret_cast<void (*)()>(hinge<float>);
    s.values = of_dtype, s.constants = c.params, s.kind = -1;
  }
  s.threads = setting.threads, s.instruction_set = setting.set;
  for (int k = 0; k < SUM_COUNT; k++) s.rows_of_terms[k] = c.rows_of_terms[k] < 0 ? -1 : c.rows_of_terms[k] + c.log_sums();
  s.rows_of_terms[SHIFT] = c.log_sums() ? 0 : -1, s.rows_of_terms[T_MAX] = c.largest() ? 0 : -1;
  return s;
}

template <class T> int run(const Data& d, const Case& c, const Setting& setting, Outputs<T>& o) {
  Sweep s = sweep_of(d, c, setting);
  s.df = o.df.data, s.weight_sums = o.weight_sums.data, s.sums = o.sums.data;
  return alphacl_cpu_sweep(&s);
}

std::string describe(const Data& d, const Case& c, const Setting& s) {
  char text[1000];
  std::string terms, vectors;
  const char* const names[] = {"f", "df", "f_moment", "df_moment", "dtau"};
  for (int k = 0; k < SUM_COUNT; k++)
    if (c.rows_of_terms[k] >= 0) terms += std::string(" ") + names[k];
  auto vector = [&](const RowVector& v, const char* name) {
    if (v.present) vectors += std::string(" ") + name;
  };
  if (!c.layout.ids.empty()) vectors += " ids";
  vector(d.scale, "scale"), vector(d.bias, "bias"), vector(c.moment_origin, "moment_origin");
  vector(c.row_weight, "row_weight"), vector(c.shift, "shift"), vector(c.argument_offset, "argument_offset");
  vector(c.baseline, "baseline");
  std::snprintf(
      text, sizeof(text),
      "%s, %s, %s (%g, %g, %g), terms:%s, n %lld, dim %lld, stride %lld, split %lld, partner %lld, "
      "anchors %lld, [lo, hi) = [%lld, %lld), block %lld, threads %d, tau %g, constant shift %g, with%s",
      SETS[s.set], DTYPES[d.dtype], c.v.name().c_str(), c.params[0], c.params[1], c.params[2], terms.c_str(), (long long)(d.n), (long long)(d.dim), (long long)(d.stride),
      (long long)(c.layout.split), (long long)(c.layout.partner), (long long)(c.layout.anchors), (long long)(c.lo),
      (long long)(c.hi), (long long)(s.block), s.threads, c.tau, c.constant_shift, vectors.c_str());
  return text;
}

struct Served {  // by which kernels a dtype is served when an instruction set is asked for
  int set;
  std::string kernels;
  bool bfloat16;  // they multiply bfloat16, so that weights of the gradient are rounded to it
};

struct Statistics {
  int64_t cases = 0, sweeps = 0;
  double largest = 0;  // error in units of its tolerance
};
std::map<std::string, Statistics> statistics;  // by kernels and dtype
std::map<std::string, int64_t> coverage;       // of kernels, dtype, form, kind, weight

template <class T> struct Comparison {
  const Data& d;
  const Case& c;
  const Setting& setting;
  Statistics& found;
  bool good = true;

  void check(const char* what, int64_t at, double got, double value, double slack) {
    if (!good) return;
    if (std::isinf(value)) {
      good = got == value;
    } else {
      const double error = std::fabs(got - value);
      good = error <= slack;
      if (slack > 0) found.largest = std::max(found.largest, error / slack);
    }
    if (good) return;
    const int64_t width = what[0] == 'd' ? d.dim : c.layout.anchors;
    fail("%s[%lld, %lld] is %.9g, expected %.9g ± %.2g\n        %s", what, (long long)(at / width), (long long)(at % width),
         got, value, slack, describe(d, c, setting).c_str());
  }

  void operator()(const Outputs<T>& o, const Expected& e, bool bfloat16) {
    const int64_t anchors = c.layout.anchors;
    const double u = unit(d.dtype);
    if (c.largest()) {
      for (int64_t i = 0; i < anchors; i++) check("t_max", i, o.sums[i], e.base[size_t(i)], d.delta);
      return;
    }
    const Exact<T>& sums = o.sums;
    const int64_t first = c.log_sums() ? anchors : 0;
    for (int64_t i = 0; i < first; i++) {
      const double base = e.base[size_t(i)];
      double slack = 0;
      if (c.v.form == Form::ONLINE && base > -INF) {
        double t = -INF;
        for_negatives(c.layout, d.n, i, [&](int64_t j) { t = std::max(t, d.t[size_t(i * d.n + j)]); });
        slack = log_f(c, t + d.delta) - log_f(c, t - d.delta) + u * (16 + 8 * std::fabs(base));
      }
      check("shift", i, sums[i], base, slack);
    }
    for (int64_t at = 0; at < int64_t(e.sums.size()); at++) {
      const double base = first ? e.base[size_t(at % anchors)] : 0;
      // to the kernel's base
      const double factor = first && base > -INF ? std::exp(base - double(sums[at % anchors])) : 1;
      const Bounded& s = e.sums[size_t(at)];
      if (base == -INF) check("sums", at, sums[first + at], 0, 0);
      else check("sums", at, sums[first + at], s.value * factor, s.slack * factor * 1.01);
    }
    for (int64_t i = 0; i < int64_t(e.weight_sums.size()); i++)
      check("weight_sums", i, o.weight_sums[i], e.weight_sums[size_t(i)].value, e.weight_sums[size_t(i)].slack);
    for (int64_t at = 0; at < int64_t(e.df.size()); at++) {
      const double rounding = bfloat16 ? 1.001 * 0x1p-8 * e.df_magnitude[size_t(at)] : 0;
      check("df", at, o.df[at], e.df[size_t(at)].value, e.df[size_t(at)].slack + rounding);
    }
  }
};

std::string key(const Served& served, int dtype) { return served.kernels + " " + DTYPES[dtype]; }

template <class T>
void test_case(const Data& d, const Case& c, const Expected& e, const Served& served, int64_t block, const int* threads,
               int count) {
  Statistics& found = statistics[key(served, d.dtype)];
  found.cases++;
  coverage[key(served, d.dtype) + " " + c.v.name()]++;
  std::vector<Outputs<T>> results;
  for (int k = 0; k < count; k++) {
    const Setting setting{served.set, block, threads[k]};
    results.emplace_back(d, c);
    Outputs<T>& o = results.back();
    poison_workspace();
    watch(describe(d, c, setting));
    found.sweeps++;
    if (const int status = run<T>(d, c, setting, o)) {
      fail("status %d\n        %s", status, describe(d, c, setting).c_str());
      return;
    }
    if (k == 0) {
      Comparison<T> compare{d, c, setting, found};
      compare(o, e, served.bfloat16);
      if (!compare.good) return;
      continue;
    }
    for (size_t x = 0; x < 3; x++) {
      const Exact<T>&a = *results[0].all()[x], &b = *o.all()[x];
      if (a.size && std::memcmp(a.data, b.data, size_t(a.size) * sizeof(T)) != 0) {
        fail("%d threads give other bits than %d\n        %s", threads[k], threads[0], describe(d, c, setting).c_str());
        return;
      }
    }
  }
}

// The instruction sets that serve a dtype in ways of their own.
std::vector<Served> served(int dtype) {
  std::vector<Served> list;
  const int32_t mask = alphacl_cpu_instruction_sets();
  for (int set = 0; set < 6; set++) {
    if (!(mask >> (16 + set) & 1)) continue;
    int32_t multiple = 0, largest = 0, fewest = 0;
    const char* name = alphacl_cpu_kernels(set, dtype, &multiple, &largest, &fewest);
    if (!name || multiple <= 0 || largest <= 0 || largest % multiple != 0 || fewest <= 0) {
      fail("%s, %s: served by %s, multiple %d, largest %d", SETS[set], DTYPES[dtype], name ? name : "none", multiple,
           largest);
      continue;
    }
    const std::string kernels = name;
    const bool known = std::any_of(list.begin(), list.end(), [&](const Served& s) { return s.kernels == kernels; });
    if (known) continue;
    if (kernels != SETS[set]) fail("%s, %s: first served by %s", SETS[set], DTYPES[dtype], name);
    list.push_back({set, kernels, kernels == "avx512_bf16" || kernels == "amx" || kernels == "amx_emulated"});
  }
  return list;
}

template <class Function> void by_dtype(int dtype, Function what) { is_double(dtype) ? what(double()) : what(float()); }

void test_sweep(Random& random, const Data& d, const Variant& v, const Layout& layout, const std::vector<int64_t>& blocks) {
  Layout with_ids = layout;
  if (random.chance(0.3)) {  // from one group of all rows to a few pairs of rows
    const int64_t groups = random.pick({int64_t(1), int64_t(2), d.n / 2 + 1, 4 * d.n});
    for (int64_t i = 0; i < d.n; i++) with_ids.ids.push_back(int32_t(random.integer(0, groups - 1)));
  }
  Case c = draw(random, d, v, with_ids);
  const Expected e = expected(d, c);
  for (const Served& s : served(d.dtype)) {
    const int64_t block = random.pick(blocks);
    by_dtype(d.dtype, [&](auto zero) { test_case<decltype(zero)>(d, c, e, s, block, THREADS, 3); });
  }
}

std::vector<Layout> layouts_of(Random& random, int64_t n) {
  std::vector<Layout> list{{0, 0, n}};
  if (n % 2 == 0) {
    const int64_t half = n / 2;
    list.push_back({0, half, n});
    for (int64_t anchors : {half, n}) list.push_back({half, half, anchors});
  }
  if (n < 2) return list;
  const int64_t split = random.integer(1, n - 1);
  for (int64_t partner : {int64_t(0), split})
    for (int64_t anchors : {split, n}) list.push_back({split, partner, anchors});
  return list;
}

// Deals out all variants before any comes again.
class Deck {
 public:
  explicit Deck(Random& random) : random_(random) {}
  Variant next() {
    if (left_.empty()) left_ = all_variants();
    std::swap(left_.back(), left_[random_.bits() % left_.size()]);
    const Variant v = left_.back();
    left_.pop_back();
    return v;
  }

 private:
  Random& random_;
  std::vector<Variant> left_;
};

void test_random(Random& random, double share) {
  std::array<std::unique_ptr<Deck>, 4> decks;
  for (auto& deck : decks) deck = std::make_unique<Deck>(random);
  // Half as many rows cost a quarter: most cases are small, where every corner is as near.
  const struct { int64_t n; double sweeps; } sizes[] = {{2, 3},  {3, 3},     {17, 5},    {18, 5},
                                                        {50, 4}, {131, 1.3}, {132, 1.3}, {300, 0.7}};
  for (int dtype : {FLOAT32, FLOAT64, BFLOAT16, FLOAT16})
    for (int64_t dim : {1, 3, 16, 33, 70})
      for (const auto& size : sizes)
        for (bool extra : {false, true}) {
          const double wanted = size.sweeps * share;
          const int count = int(wanted) + random.chance(wanted - std::floor(wanted));
          if (!count) continue;
          const Data d = make_data(random, dtype, size.n, dim, extra);
          for (int k = 0; k < count; k++) {
            const Variant v = decks[size_t(dtype)]->next();
            test_sweep(random, d, v, random.pick(layouts_of(random, size.n)), {5, 48, 96, 240});
          }
        }
}

// Sizes where something ends: no negatives, one row against many, blocks that are full to the last
// row or begin with one.
void test_corners(Random& random, bool thorough) {
  const struct { int64_t n, dim; Layout layout; std::vector<int64_t> blocks; } corners[] = {
      {1, 1, {0, 0, 1}, {5, 48}},           {2, 1, {0, 1, 2}, {1, 48}},         {2, 3, {1, 0, 1}, {5, 240}},
      {2, 3, {1, 1, 2}, {1, 240}},          {2, 16, {0, 0, 2}, {1, 2, 1000}},   {4, 2, {2, 2, 4}, {1, 3}},
      {9, 17, {0, 0, 9}, {1, 2, 3, 8, 9}},  {10, 32, {0, 5, 10}, {1, 4, 5, 7}}, {40, 48, {1, 0, 1}, {5, 8, 48}},
      {40, 31, {39, 0, 40}, {5, 40, 1000}}, {48, 49, {0, 24, 48}, {24, 48}},    {49, 64, {0, 0, 49}, {16, 48, 49}},
      {96, 15, {48, 48, 96}, {48, 16}},     {97, 47, {96, 0, 97}, {48, 96}},
      // Similarities of many features are summed in parts.
      {9, 128, {0, 0, 9}, {4, 48}},         {10, 257, {0, 5, 10}, {4, 48}},     {50, 300, {25, 25, 50}, {16, 48}},
  };
  // Every variant meets every small corner, the further vectors (`extra`) every other variant.
  size_t turn = 0;
  for (const auto& corner : corners)
    for (int dtype : {FLOAT32, FLOAT64, BFLOAT16, FLOAT16}) {
      turn++;
      for (bool extra : {false, true}) {
        const Data d = make_data(random, dtype, corner.n, corner.dim, extra);
        const std::vector<Variant> variants = all_variants();
        for (size_t k = 0; k < variants.size(); k++) {
          const bool due = thorough ? (k + turn) % 2 == extra : random.chance(0.1);
          if (corner.n <= 10 ? due : random.chance(thorough ? 0.1 : 0.02))
            test_sweep(random, d, variants[k], corner.layout, corner.blocks);
        }
      }
    }
}

// Blocks of the greatest size, full, and one row more or less; more threads than blocks.
void test_large_blocks(Random& random, bool thorough) {
  const int threads[] = {1, 17};
  const Variant variants[] = {{Form::CONSTANT, EXP, 0}, {Form::ONLINE, POWER, 0},
                              {Form::CONSTANT, EXP, 0, true}, {Form::PLAIN, SQUARE, 2, true}};
  for (int64_t n : {191, 192, 193, 239, 240, 241, 480})
    for (int dtype : {FLOAT32, FLOAT64, BFLOAT16}) {
      if (!thorough && n != 193) continue;
      const Data d = make_data(random, dtype, n, 20, true);
      for (const Variant& v : variants) {
        Case c = draw(random, d, v, {0, 0, n});
        if (c.v.gradient) {  // rows around the border between two blocks
          c.lo = std::min<int64_t>(n, 192) - random.integer(0, 3);
          c.hi = std::min(n, c.lo + random.integer(0, 6));
        }
        const Expected e = expected(d, c);
        for (const Served& s : served(dtype)) {
          const int64_t block = random.pick({192, 240, 1000});
          by_dtype(dtype, [&](auto zero) { test_case<decltype(zero)>(d, c, e, s, block, threads, 2); });
        }
      }
    }
}

void test_coverage() {
  for (int dtype : {FLOAT32, FLOAT64, BFLOAT16, FLOAT16})
    for (const Served& s : served(dtype))
      for (const Variant& v : all_variants()) {
        const std::string what = key(s, dtype) + " " + v.name();
        if (!coverage[what]) fail("no case of: %s", what.c_str());
      }
}

// --- before and after the sweeps -----------------------------------------------------------------

// Unit rows, inverse norms and positives; then the gradient's last step. `size` scales all rows.
template <class T>
void test_pairs(Random& random, const Served& s, int dtype, int64_t n, int64_t dim, double size, int threads) {
  const bool half = is_half(dtype);
  const double u = unit(dtype);
  const int64_t bytes = element_size(dtype), strides[2] = {dim + random.integer(0, 2), dim + random.integer(0, 2)};
  char what[300];
  std::snprintf(what, sizeof(what), "rows: %s, %s, n %lld, dim %lld, size %g, %d threads", s.kernels.c_str(), DTYPES[dtype],
                (long long)(n), (long long)(dim), size, threads);
  watch(what);
  Exact<char> z[2] = {Exact<char>(((n - 1) * strides[0] + dim) * bytes, bytes),
                      Exact<char>(((n - 1) * strides[1] + dim) * bytes)};
  std::vector<long double> unit_rows(size_t(2 * n * dim)), norms(size_t(2 * n));
  std::vector<double> exact(size_t(2 * n * dim));
  for (int view = 0; view < 2; view++) {
    z[view].fill_with_nan();
    for (int64_t i = 0; i < n; i++) {
      const bool zero = random.chance(0.1);
      long double square = 0;
      const int64_t row = i + view * n;
      for (int64_t k = 0; k < dim; k++) {
        double x = zero ? 0 : size * random.normal();
        char* at = z[view].data + (i * strides[view] + k) * bytes;
        if (dtype == FLOAT64) {
          std::memcpy(at, &x, 8);
        } else if (dtype == FLOAT32) {
          const float y = float(x);
          std::memcpy(at, &y, 4);
          x = y;
        } else {
          const uint16_t y = dtype == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
          std::memcpy(at, &y, 2);
          x = dtype == BFLOAT16 ? from_bfloat16(y) : from_float16(y);
        }
        exact[size_t(row * dim + k)] = x;
        square += (long double)(x)*x;
      }
      norms[size_t(row)] = std::sqrt(square);
      for (int64_t k = 0; k < dim; k++)
        unit_rows[size_t(row * dim + k)] = square > 0 ? exact[size_t(row * dim + k)] / norms[size_t(row)] : 0;
    }
  }
  const int64_t f_stride = dim + 3;
  Exact<char> f(((2 * n - 1) * f_stride + dim) * bytes);
  Exact<T> scale(2 * n), inv_norm(2 * n), pos(n), d(2 * n * dim), q(n);
  f.fill_with_nan(), scale.fill_with_nan(), inv_norm.fill_with_nan(), pos.fill_with_nan();
  PairRows p{};
  p.z1 = z[0].data, p.z2 = z[1].data, p.f = f.data, p.scale = scale.data, p.inv_norm = inv_norm.data, p.pos = pos.data;
  p.n_pairs = n, p.dim = dim, p.stride1 = strides[0], p.stride2 = strides[1], p.stride = f_stride;
  p.hi = p.swept = 2 * n;
  p.dtype = dtype, p.threads = threads, p.instruction_set = s.set;
  poison_workspace();
  if (alphacl_cpu_normalize(&p)) return fail("%s: refused", what);
  auto check = [&](const char* name, int64_t at, double got, long double right, double slack) {
    if (!(std::fabs(double(got - right)) <= slack))
      fail("%s: %s[%lld] is %.9g, expected %.9g ± %.2g", what, name, (long long)(at), got, double(right), slack);
  };
  const double sums = u * (double(dim) + 16);
  const long double most = std::numeric_limits<T>::max();
  for (int64_t r = 0; r < 2 * n; r++) {
    const long double inverse = norms[size_t(r)] > 0 ? std::min(most, 1 / norms[size_t(r)]) : 0;
    check("1/norm", r, inv_norm[r], inverse, double(inverse * sums));
    double largest = 0;
    for (int64_t k = 0; k < dim; k++) largest = std::max(largest, std::fabs(exact[size_t(r * dim + k)]));
    const bool extreme = dtype == BFLOAT16 && largest > 0 && (largest < 0x1p-30 || largest >= 0x1p30);
    const double lift = extreme ? std::exp2(-std::ilogb(largest)) : 1;
    if (half) check("1/stored norm", r, scale[r], inverse / lift, double(inverse / lift * sums));
    for (int64_t k = 0; k < dim; k++) {
      const int64_t at = r * dim + k;
      T x;
      if (half) {
        uint16_t y;
        std::memcpy(&y, f.data + (r * f_stride + k) * 2, 2);
        check("f", at, dtype == BFLOAT16 ? from_bfloat16(y) : from_float16(y), exact[size_t(at)] * lift, extreme ? 0x1p-130 : 0);
      } else {
        std::memcpy(&x, f.data + (r * f_stride + k) * int64_t(sizeof(T)), sizeof(T));
        check("f", at, x, unit_rows[size_t(at)], sums);
      }
    }
  }
  for (int64_t i = 0; i < n; i++) {
    long double right = 0;
    for (int64_t k = 0; k < dim; k++) right += unit_rows[size_t(i * dim + k)] * unit_rows[size_t((i + n) * dim + k)];
    check("pos", i, pos[i], right, 3 * sums);
  }

  std::vector<double> before;
  for (int64_t at = 0; at < 2 * n * dim; at++) before.push_back(d[at] = T(random.normal()));
  for (int64_t i = 0; i < n; i++) q[i] = T(random.normal());
  p.z1 = p.z2 = nullptr, p.pos = nullptr, p.d = d.data, p.q = q.data;
  poison_workspace();
  if (alphacl_cpu_finish(&p)) return fail("%s: refused", what);
  std::vector<long double> g(static_cast<size_t>(dim));
  for (int64_t r = 0; r < 2 * n; r++) {
    const long double *mine = &unit_rows[size_t(r * dim)], *partner = &unit_rows[size_t((r + (r < n ? n : -n)) * dim)];
    long double along = 0, norm = 0;
    for (int64_t k = 0; k < dim; k++) {
      g[size_t(k)] = before[size_t(r * dim + k)] - (long double)(q[r % n]) * partner[k];
      along += g[size_t(k)] * mine[k], norm += g[size_t(k)] * g[size_t(k)];
    }
    const double inverse = inv_norm[r], slack = 8 * sums * (double(std::sqrt(norm)) + std::fabs(double(q[r % n]))) * inverse;
    for (int64_t k = 0; k < dim; k++) {
      const long double right = (g[size_t(k)] - mine[k] * along) * inverse;
      if (std::fabs(right) < 0.1 * most) check("d", r * dim + k, d[r * dim + k], right, slack + 1e-37);
    }
  }
}

void test_pair_rows(Random& random, bool thorough) {
  for (int dtype : {FLOAT32, FLOAT64, BFLOAT16, FLOAT16})
    for (const Served& s : served(dtype == FLOAT64 ? FLOAT64 : FLOAT32))
      for (int64_t dim : {1, 3, 4, 8, 16, 33, 64, 70, 200})
        for (int64_t n : {1, 2, 64, 65, 131}) {
          if (!thorough && n != 131) continue;
          const double size = dtype == FLOAT16 ? random.pick({1e-3, 1.0, 1e3})
                                               : random.pick({1e-30, 1e-3, 1.0, 1e3, 1e30, dtype == FLOAT64 ? 1e-200 : 1.0});
          const int threads = random.pick(THREADS);
          by_dtype(dtype, [&](auto zero) { test_pairs<decltype(zero)>(random, s, dtype, n, dim, size, threads); });
        }
}

// --- whole steps ---------------------------------------------------------------------------------

// Two views, InfoNCE with ε = 1, and who meets whom.
struct StepCase {
  int64_t n, dim, rows, split, anchors, lo, hi;
  int dtype;
  Similarity similarity;
  bool online, ids, incoming;
  int64_t guide_dim;  // 0: no guide
};

// log(1 + Σ_j exp((t_ij − t⁺_i)/τ)) and its gradient, from the definitions.
struct ExactStep {
  std::vector<double> losses, dz;
  double loss = 0, dtau = 0;
};

ExactStep exact_step(const StepCase& c, const std::vector<double>& z, const std::vector<int32_t>& ids,
                     const std::vector<double>& guide, const std::vector<double>& largest_guide,
                     const std::vector<double>& incoming, double tau, double divisor) {
  ExactStep e;
  const int64_t n = c.n, d = c.dim;
  std::vector<double> f(z.size()), df(z.size()), norm(size_t(2 * n));
  for (int64_t r = 0; r < 2 * n; r++) {
    double square = 0;
    for (int64_t k = 0; k < d; k++) square += z[size_t(r * d + k)] * z[size_t(r * d + k)];
    norm[size_t(r)] = c.similarity == COSINE ? std::sqrt(square) : 1;
    for (int64_t k = 0; k < d; k++) f[size_t(r * d + k)] = z[size_t(r * d + k)] / norm[size_t(r)];
  }
  auto dot = [&](const std::vector<double>& a, int64_t i, const std::vector<double>& b, int64_t j) {
    double sum = 0;
    for (int64_t k = 0; k < d; k++) sum += a[size_t(i * d + k)] * b[size_t(j * d + k)];
    return sum;
  };
  const bool euclidean = c.similarity == EUCLIDEAN;
  auto similarity = [&](int64_t i, int64_t j) {
    return euclidean ? dot(f, i, f, j) - (dot(f, i, f, i) + dot(f, j, f, j)) / 2 : dot(f, i, f, j);
  };
  auto add = [&](int64_t i, int64_t j, double g) {  // g·∂t_ij
    for (int64_t k = 0; k < d; k++) {
      const double mine = f[size_t(i * d + k)], other = f[size_t(j * d + k)];
      df[size_t(i * d + k)] += g * (other - (euclidean ? mine : 0));
      df[size_t(j * d + k)] += g * (mine - (euclidean ? other : 0));
    }
  };
  for (int64_t i = 0; i < c.anchors; i++) {
    const int64_t partner = i < n ? i + n : i - n;
    const double pos = similarity(i, partner);
    std::vector<std::pair<int64_t, double>> factors;
    double sum = 0, moment = 0;
    for (int64_t j = 0; j < c.rows; j++) {
      if (j == i || j == partner || (c.split && (i < c.split) == (j < c.split))) continue;
      if (c.ids && ids[size_t(i)] == ids[size_t(j)]) continue;
      double of_guide = 0;
      for (int64_t k = 0; k < c.guide_dim; k++) of_guide += guide[size_t(i * c.guide_dim + k)] * guide[size_t(j * c.guide_dim + k)];
      if (c.guide_dim && of_guide > largest_guide[size_t(i)]) continue;
      const double gap = similarity(i, j) - pos;
      factors.emplace_back(j, std::exp(gap / tau));
      sum += factors.back().second, moment += factors.back().second * gap;
    }
    e.losses.push_back(factors.empty() ? 0 : std::log1p(sum));
    const double scale = incoming[size_t(i)] / divisor / (1 + sum);
    e.dtau -= scale * moment / tau / tau;
    for (const auto& [j, factor] : factors) add(i, j, scale / tau * factor);
    if (!factors.empty()) add(i, partner, -scale / tau * sum);
    e.loss += e.losses.back() / divisor;
  }
  for (int64_t r = c.lo; r < c.hi; r++) {
    const double along = c.similarity == COSINE ? dot(f, r, df, r) : 0;
    for (int64_t k = 0; k < d; k++)
      e.dz.push_back((df[size_t(r * d + k)] - f[size_t(r * d + k)] * along) / norm[size_t(r)]);
  }
  return e;
}

// The program that alphacl_fast/program.py records of InfoNCE, with the gradient in τ.
void write_program(Step& s, bool online, bool gradient) {
  enum Place { ZEROS, POSITIVES, TOP, SUM, MOMENT, ROW_WEIGHT, MASS, LOSSES, SLOPE, PLACES };
  Instruction &sums = s.program[0], &rows = s.program[1], &last = s.program[2];
  for (Instruction* k : {&sums, &last}) {
    k->row_step = -1;
    std::fill(std::begin(k->terms), std::end(k->terms), -1);
    std::fill(std::begin(k->scalars), std::end(k->scalars), int32_t(ZEROS));
    k->scalars[0] = POSITIVES;
  }
  sums.form = online ? Form::ONLINE : Form::CONSTANT;
  sums.terms[SHIFT] = TOP, sums.terms[F] = SUM, sums.terms[F_MOMENT] = MOMENT;
  rows.row_step = EXP_ROWS_WITH_DTAU_4, rows.output_count = 4, rows.params[0] = 1;
  const int32_t from[] = {POSITIVES, TOP, SUM, MOMENT}, to[] = {ROW_WEIGHT, MASS, LOSSES, SLOPE};
  std::copy(std::begin(from), std::end(from), rows.inputs);
  std::copy(std::begin(to), std::end(to), rows.outputs);
  last.form = online ? Form::PLAIN : Form::CONSTANT, last.gradient = 1, last.weight = WEIGHT_F;
  last.scalars[1] = ROW_WEIGHT, last.scalars[2] = TOP;
  s.instructions = gradient ? 3 : 2, s.places = PLACES;
  s.mass = MASS, s.losses = LOSSES, s.slopes = 1, s.dtau_of[0] = SLOPE;
}

// Against the definition, and to the last bit alike for any threads and any workspace, which may
// hold all tiles, some of them or none.
template <class T> void test_step(Random& random, const Served& s, const StepCase& c) {
  const int64_t n = c.n, dim = c.dim, size = element_size(c.dtype), wanted = c.hi - c.lo;
  char what[300];
  const char* similarity = c.similarity == COSINE ? "cosine" : c.similarity == DOT ? "dot" : "euclidean";
  std::snprintf(what, sizeof(what), "step: %s, %s, %s, n %lld, dim %lld, %lld rows, split %lld, %lld anchors, [%lld, %lld), %s%s%s",
                s.kernels.c_str(), DTYPES[c.dtype], similarity, (long long)(n), (long long)(dim), (long long)(c.rows), (long long)(c.split),
                (long long)(c.anchors), (long long)(c.lo), (long long)(c.hi), c.online ? "online" : "constant shift",
                c.ids ? ", ids" : "", c.incoming ? ", incoming" : c.guide_dim ? ", guide" : "");
  watch(what);
  std::vector<double> exact;
  Exact<char> z[2] = {Exact<char>(n * dim * size, size), Exact<char>(n * (dim + 1) * size)};
  const int64_t strides[2] = {dim, dim + 1};
  for (int view = 0; view < 2; view++) {
    z[view].fill_with_nan();
    for (int64_t i = 0; i < n; i++)
      for (int64_t k = 0; k < dim; k++) {
        double x = random.normal() * (c.similarity == COSINE ? 1 : 0.3);
        char* at = z[view].data + (i * strides[view] + k) * size;
        if (c.dtype == FLOAT64) {
          std::memcpy(at, &x, 8);
        } else if (c.dtype == FLOAT32) {
          const float y = float(x);
          std::memcpy(at, &y, 4), x = y;
        } else {
          const uint16_t y = c.dtype == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
          std::memcpy(at, &y, 2), x = c.dtype == BFLOAT16 ? from_bfloat16(y) : from_float16(y);
        }
        exact.push_back(x);
      }
  }
  std::vector<int32_t> ids;
  for (int64_t r = 0; r < 2 * n; r++) ids.push_back(r < n ? int32_t(random.integer(0, n / 3)) : ids[size_t(r - n)]);
  Exact<int32_t> given(c.rows);
  std::copy_n(ids.begin(), c.rows, given.data);
  Exact<T> n_neg(c.anchors), weights(c.anchors);
  Exact<bool> empty(c.anchors);
  std::vector<double> incoming;
  for (int64_t i = 0; i < c.anchors; i++) {
    incoming.push_back(c.incoming ? random.normal() : 1);
    weights[i] = T(incoming.back());
    int64_t count = 0;
    for (int64_t j = 0; j < c.rows; j++)
      count += ids[size_t(i)] != ids[size_t(j)] && (!c.split || (i < c.split) != (j < c.split));
    n_neg[i] = T(std::max<int64_t>(count, 1)), empty[i] = count == 0;
  }
  // whole numbers: products are exact, and many equal the limit, at which a pair counts
  std::vector<double> guide, largest_guide;
  Exact<T> own_guide(c.rows * c.guide_dim), limits(c.anchors);
  for (int64_t k = 0; k < own_guide.size; k++) guide.push_back(double(random.integer(-1, 1))), own_guide[k] = T(guide.back());
  for (int64_t i = 0; i < c.anchors; i++) largest_guide.push_back(double(random.integer(-1, 1))), limits[i] = T(largest_guide.back());
  const double tau = 0.25, divisor = double(c.anchors);
  const ExactStep truth = exact_step(c, exact, ids, guide, largest_guide, incoming, tau, divisor);
  std::vector<T> first;
  for (int threads : {1, 3})
    for (int64_t workspace : {int64_t(0), int64_t(300000), int64_t(1) << 24})
      for (bool each : {false, true}) {
        if (each && (c.incoming || workspace == 300000)) continue;
        Exact<T> loss(each ? c.anchors : 1), dz(wanted * dim), dtau(1);
        loss.fill_with_nan(), dz.fill_with_nan(), dtau.fill_with_nan();
        Step step{};
        step.z1 = z[0].data, step.z2 = z[1].data, step.stride1 = strides[0], step.stride2 = strides[1];
        if (c.ids) step.ids = given.data, step.n_neg_of = n_neg.data, step.empty = empty.data;
        if (c.guide_dim) step.guide = own_guide.data, step.largest_guide = limits.data, step.guide_dim = c.guide_dim;
        if (c.incoming) step.incoming = weights.data;
        else step.loss = loss.data;
        step.dz = wanted ? dz.data : nullptr, step.dtau = dtau.data, step.each = each;
        step.n_pairs = n, step.dim = dim, step.rows = c.rows, step.split = c.split;
        step.partner = c.rows > n ? n : 0, step.anchors = c.anchors, step.lo = c.lo, step.hi = c.hi;
        step.block = 13, step.workspace = workspace, step.tau = tau, step.n_neg = double(c.rows), step.divisor = divisor;
        step.similarity = c.similarity, step.factor = 1;
        step.dtype = c.dtype, step.kind = EXP, step.threads = threads, step.instruction_set = s.set;
        write_program(step, c.online, wanted > 0);
        poison_workspace();
        if (const int32_t status = alphacl_cpu_step(&step)) return fail("%s: status %d", what, status);
        const bool half = is_half(c.dtype);
        const double slack = c.dtype == FLOAT64 ? 1e-12 : half ? 2e-2 : 2e-5;
        auto check = [&](const char* name, const T* got, const double* right, int64_t count) {
          double apart = 0, norm = 1e-6;
          for (int64_t k = 0; k < count; k++) {
            apart += (double(got[k]) - right[k]) * (double(got[k]) - right[k]), norm += right[k] * right[k];
          }
          if (!(std::sqrt(apart) <= slack * std::sqrt(norm)))
            fail("%s: %s is %.3g apart, its norm is %.3g", what, name, std::sqrt(apart), std::sqrt(norm));
        };
        if (!c.incoming) check("loss", loss.data, each ? truth.losses.data() : &truth.loss, loss.size);
        check("dz", dz.data, truth.dz.data(), dz.size);
        check("dtau", dtau.data, &truth.dtau, 1);
        std::vector<T> results(dz.data, dz.data + dz.size);
        results.push_back(dtau[0]);
        if (first.empty()) first = results;
        if (std::memcmp(first.data(), results.data(), first.size() * sizeof(T)))
          fail("%s: %d threads and %lld bytes change bits", what, threads, (long long)(workspace));
      }
}

// InfoNCE of anchors with given positives against other rows, or one another, with a bias: against the
// definition, and to the last bit alike for any threads and any workspace.
template <class T> void test_given_step(Random& random, const Served& s, int dtype, bool online, bool rectangle) {
  const int64_t n = random.integer(2, 50), m = rectangle ? random.integer(1, 50) : 0, dim = random.integer(1, 40);
  const int64_t rows = n + m, split = rectangle ? n : 0, met = rows - split, size = element_size(dtype);
  char what[200];
  std::snprintf(what, sizeof(what), "given step: %s, %s, n %lld, m %lld, dim %lld, %s", s.kernels.c_str(), DTYPES[dtype],
                (long long)(n), (long long)(m), (long long)(dim), online ? "online" : "constant shift");
  watch(what);
  std::vector<double> f;
  Exact<char> z(n * dim * size, size), others(std::max<int64_t>(m, 1) * dim * size, size);
  for (int64_t r = 0; r < rows; r++) {
    std::vector<double> row;
    double square = 1e-3;
    for (int64_t k = 0; k < dim; k++) row.push_back(random.normal()), square += row.back() * row.back();
    for (int64_t k = 0; k < dim; k++) {
      double x = row[size_t(k)] / std::sqrt(square);
      char* at = r < n ? z.data + (r * dim + k) * size : others.data + ((r - n) * dim + k) * size;
      if (dtype == FLOAT64) {
        std::memcpy(at, &x, 8);
      } else if (dtype == FLOAT32) {
        const float y = float(x);
        std::memcpy(at, &y, 4), x = y;
      } else {
        const uint16_t y = dtype == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
        std::memcpy(at, &y, 2), x = dtype == BFLOAT16 ? from_bfloat16(y) : from_float16(y);
      }
      f.push_back(x);
    }
  }
  Exact<T> pos(n), bias(met);
  for (int64_t i = 0; i < n; i++) pos[i] = T(random.normal() * 0.3);
  for (int64_t j = 0; j < met; j++) bias[j] = T(random.normal() * 0.1);
  const double tau = 0.25, divisor = double(n);
  double loss = 0, dtau = 0;
  std::vector<double> dz(size_t(rows * dim)), dpos(size_t(n), 0.0), dbias(size_t(met), 0.0);
  for (int64_t i = 0; i < n; i++) {
    std::vector<double> factors(size_t(rows), 0.0), gaps(size_t(rows), 0.0);
    double sum = 0, moment = 0;
    for (int64_t j = split; j < rows; j++) {
      if (j == i) continue;
      double t = double(bias[j - split]) + (split ? 0 : double(bias[i])) - double(pos[i]);
      for (int64_t k = 0; k < dim; k++) t += f[size_t(i * dim + k)] * f[size_t(j * dim + k)];
      sum += factors[size_t(j)] = std::exp(t / tau);
      moment += factors[size_t(j)] * t;
    }
    const double scale = 1 / divisor / (1 + sum);
    loss += std::log1p(sum) / divisor, dtau -= scale * moment / tau / tau, dpos[size_t(i)] = -scale / tau * sum;
    for (int64_t j = split; j < rows; j++) {
      const double g = scale / tau * factors[size_t(j)];
      dbias[size_t(j - split)] += g;
      if (!split) dbias[size_t(i)] += g;
      for (int64_t k = 0; k < dim; k++) {
        dz[size_t(i * dim + k)] += g * f[size_t(j * dim + k)];
        dz[size_t(j * dim + k)] += g * f[size_t(i * dim + k)];
      }
    }
  }
  std::vector<T> first;
  for (int threads : {1, 3})
    for (int64_t workspace : {int64_t(0), int64_t(40000), int64_t(1) << 24}) {
      Exact<T> of_loss(1), of_z(rows * dim), of_tau(1), of_pos(n), of_bias(met);
      for (auto* x : {&of_loss, &of_z, &of_tau, &of_pos, &of_bias}) x->fill_with_nan();
      Step step{};
      step.z1 = z.data, step.z2 = rectangle ? others.data : nullptr, step.stride1 = step.stride2 = dim;
      step.pos = pos.data, step.bias = bias.data, step.dpos = of_pos.data, step.dbias = of_bias.data;
      step.loss = of_loss.data, step.dz = of_z.data, step.dtau = of_tau.data;
      step.dim = dim, step.rows = rows, step.split = split, step.anchors = n, step.hi = rows;
      step.block = 13, step.workspace = workspace, step.tau = tau, step.n_neg = double(rows), step.divisor = divisor;
      step.similarity = DOT, step.factor = 1, step.dtype = dtype, step.kind = EXP, step.threads = threads;
      step.instruction_set = s.set;
      write_program(step, online, true);
      poison_workspace();
      if (const int32_t status = alphacl_cpu_step(&step)) return fail("%s: status %d", what, status);
      std::vector<T> results;
      auto check = [&](const char* name, const Exact<T>& got, const double* right) {
        double apart = 0, norm = 1e-6;
        for (int64_t k = 0; k < got.size; k++) {
          apart += (double(got[k]) - right[k]) * (double(got[k]) - right[k]), norm += right[k] * right[k];
          results.push_back(got[k]);
        }
        const double slack = dtype == FLOAT64 ? 1e-12 : is_half(dtype) ? 2e-2 : 2e-5;
        if (!(std::sqrt(apart) <= slack * std::sqrt(norm)))
          fail("%s: %s is %.3g apart, its norm is %.3g", what, name, std::sqrt(apart), std::sqrt(norm));
      };
      check("loss", of_loss, &loss), check("dz", of_z, dz.data()), check("dtau", of_tau, &dtau);
      check("dpos", of_pos, dpos.data()), check("dbias", of_bias, dbias.data());
      if (first.empty()) first = results;
      if (std::memcmp(first.data(), results.data(), first.size() * sizeof(T)))
        fail("%s: %d threads and %lld bytes change bits", what, threads, (long long)(workspace));
    }
}

// Σ_j max(x_ij, 0)/τ = 1 by the repeated sweep, whose row step moves y from one iterate to the next.
template <class T> void test_repeated_sweep(Random& random, const Served& s, int dtype) {
  enum Place { ZEROS, POSITIVES, TOP, LOW, HIGH, Y, MASS, SLOPE, MOMENT, DONE, ROW_WEIGHT, ALPHA, LOSSES, PLACES };
  const int64_t n = random.integer(3, 60), dim = random.integer(1, 20);
  watch("repeated sweep");
  Exact<T> z1(n * dim), z2(n * dim);
  for (int64_t k = 0; k < n * dim; k++) z1[k] = T(random.normal()), z2[k] = T(random.normal());
  std::vector<T> first;
  for (int threads : {1, 3})
    for (int64_t workspace : {int64_t(0), int64_t(1) << 24}) {
      Exact<T> losses(n);
      losses.fill_with_nan();
      Step step{};
      step.z1 = z1.data, step.z2 = z2.data, step.stride1 = step.stride2 = dim, step.loss = losses.data, step.each = 1;
      step.n_pairs = n, step.dim = dim, step.rows = n, step.anchors = n, step.block = 13, step.workspace = workspace;
      step.tau = 0.5, step.n_neg = double(n - 1), step.divisor = 1, step.similarity = COSINE, step.factor = 1;
      step.dtype = dtype, step.kind = SQUARE, step.threads = threads, step.instruction_set = s.set;
      Instruction &top = step.program[0], &bracket = step.program[1], &sums = step.program[2], &newton = step.program[3],
                  &last = step.program[4];
      auto sweep = [](Instruction& k, Form form) {
        k.row_step = -1, k.form = form;
        std::fill(std::begin(k.terms), std::end(k.terms), -1);
        std::fill(std::begin(k.scalars), std::end(k.scalars), int32_t(ZEROS));
      };
      auto rows = [](Instruction& k, int32_t code, std::initializer_list<int32_t> in, std::initializer_list<int32_t> out) {
        k.row_step = code, k.output_count = int32_t(out.size());
        std::copy(in.begin(), in.end(), k.inputs), std::copy(out.begin(), out.end(), k.outputs);
      };
      sweep(top, Form::T_MAX), top.terms[T_MAX] = TOP;
      // y is 0 at first: the place of an output that is not asked for
      rows(bracket, NEWTON_BRACKET_1, {TOP}, {LOW, HIGH}), bracket.params[0] = 0.5 / double(n - 1), bracket.params[1] = 0.5;
      sweep(sums, Form::PLAIN), sums.terms[F] = MASS, sums.terms[DF] = SLOPE, sums.terms[F_MOMENT] = MOMENT;
      sums.scalars[0] = sums.scalars[2] = TOP, sums.scalars[3] = Y, sums.most = 60, sums.done = DONE;
      rows(newton, NEWTON_5, {MASS, SLOPE, Y, LOW, HIGH}, {LOW, HIGH, Y, DONE}), newton.params[0] = -1, newton.params[1] = -0.5;
      rows(last, MIN_PLAYER_ROWS_4, {TOP, POSITIVES, MASS, MOMENT}, {ROW_WEIGHT, LOSSES, ALPHA});
      step.instructions = 5, step.places = PLACES, step.mass = ROW_WEIGHT, step.losses = LOSSES;  // the losses are the masses
      poison_workspace();
      if (const int32_t status = alphacl_cpu_step(&step)) return fail("repeated sweep: status %d", status);
      for (int64_t i = 0; i < n; i++)
        if (!(std::fabs(double(losses[i]) - 1) < (sizeof(T) == 4 ? 1e-4 : 1e-12)))
          fail("repeated sweep: the masses of anchor %lld add up to %.9g", (long long)(i), double(losses[i]));
      if (first.empty()) first.assign(losses.data, losses.data + n);
      if (std::memcmp(first.data(), losses.data, size_t(n) * sizeof(T)))
        fail("repeated sweep: %d threads and %lld bytes change bits", threads, (long long)(workspace));
    }
}

void test_given_steps(Random& random) {
  for (int dtype : {FLOAT32, FLOAT64, BFLOAT16, FLOAT16})
    for (const Served& s : served(dtype)) {
      for (bool rectangle : {false, true})
        by_dtype(dtype, [&](auto zero) { test_given_step<decltype(zero)>(random, s, dtype, random.chance(0.5), rectangle); });
      if (dtype == FLOAT32) test_repeated_sweep<float>(random, s, dtype);
      if (dtype == FLOAT64) test_repeated_sweep<double>(random, s, dtype);
    }
}

void test_unit_rows(Random& random) {
  for (int dtype : {FLOAT32, FLOAT64})
    for (const Served& s : served(dtype))
      by_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const int64_t n = random.integer(1, 300), dim = random.integer(1, 40);
        Exact<T> z(n * dim), f(n * dim), inverse(n), d(n * dim), dz(n * dim);
        for (int64_t k = 0; k < n * dim; k++) z[k] = T(random.normal()), d[k] = T(random.normal());
        UnitRows u{z.data, f.data, inverse.data, nullptr, nullptr, n, dim, dim, 0, dtype, 3, s.set};
        if (alphacl_cpu_unit_rows(&u)) return fail("unit rows: refused");
        u.d = d.data, u.dz = dz.data, u.d_stride = dim;
        if (alphacl_cpu_unit_rows(&u)) return fail("unit rows: refused");
        for (int64_t i = 0; i < n; i++) {
          double square = 0, along = 0, apart = 0;
          for (int64_t k = 0; k < dim; k++) square += double(z[i * dim + k]) * double(z[i * dim + k]);
          const double norm = std::sqrt(square);
          for (int64_t k = 0; k < dim; k++) along += double(z[i * dim + k]) * double(d[i * dim + k]) / square;
          for (int64_t k = 0; k < dim; k++) {
            const double right = (double(d[i * dim + k]) - double(z[i * dim + k]) * along) / norm;
            apart = std::max(apart, std::fabs(double(f[i * dim + k]) - double(z[i * dim + k]) / norm));
            apart = std::max(apart, std::fabs(double(dz[i * dim + k]) - right) * norm / (1 + std::fabs(along) * norm));
          }
          if (!(apart < (dtype == FLOAT64 ? 1e-13 : 1e-5))) fail("unit rows: %.3g apart", apart);
        }
      });
}

void test_ids(Random& random) {
  for (int repeat = 0; repeat < 20; repeat++) {
    const int64_t n = random.integer(1, 90), split = random.chance(0.5) ? random.integer(1, n) : 0;
    const int64_t anchors = split && random.chance(0.5) ? split : n;
    Exact<int64_t> ids(n);
    Exact<int32_t> numbers(n);
    Exact<double> n_neg(anchors);
    Exact<bool> empty(anchors);
    for (int64_t i = 0; i < n; i++) ids[i] = random.integer(-3, 3) * (int64_t(1) << random.pick({0, 32, 60}));
    if (alphacl_cpu_number_ids(ids.data, n, split, anchors, FLOAT64, numbers.data, n_neg.data, empty.data))
      return fail("ids: refused");
    for (int64_t i = 0; i < anchors; i++) {
      int64_t count = 0;
      for (int64_t j = 0; j < n; j++) {
        if ((ids[i] == ids[j]) != (numbers[i] == numbers[j])) return fail("ids: other numbers");
        count += ids[i] != ids[j] && (!split || (i < split) != (j < split));
      }
      if (n_neg[i] != double(std::max<int64_t>(count, 1)) || empty[i] != (count == 0)) return fail("ids: other counts");
    }
  }
}

void test_steps(Random& random, bool thorough) {
  for (int dtype : {FLOAT32, FLOAT64, BFLOAT16, FLOAT16})
    for (const Served& s : served(dtype))
      for (int mode = 0; mode < 4; mode++)
        for (bool online : {false, true}) {
          if (!thorough && online != bool(mode & 1)) continue;
          const Similarity similarity = online ? random.pick({COSINE, DOT, EUCLIDEAN}) : COSINE;  // of unit rows log f is bounded
          const int64_t n = random.integer(2, 60), dim = random.integer(1, 70);
          const int64_t rows = mode == 1 ? n : 2 * n, split = mode > 1 ? n : 0;
          const int64_t anchors = mode == 0 || mode == 2 ? 2 * n : n;
          const int64_t lo = random.pick({int64_t(0), int64_t(0), n}), hi = random.pick({2 * n, 2 * n, n});
          const StepCase c{n, dim, rows, split, anchors, lo, std::max(lo, hi), dtype, similarity, online, random.chance(0.4), random.chance(0.3),
                           random.chance(0.5) ? random.integer(1, 140) : 0};
          by_dtype(dtype, [&](auto zero) { test_step<decltype(zero)>(random, s, c); });
        }
}

// --- rows of equal ids ---------------------------------------------------------------------------

// The forms of supervised losses, from the definitions.
template <class T> void test_same_id_block(Random& random, const Served& s, int32_t form, bool bounded) {
  const int64_t rows = random.integer(1, 40), cols = random.integer(1, 90), size = rows * cols;
  const double tau = 0.3;
  Exact<T> t(size), log_sums(rows), origin(rows), weight(rows), loss(rows), of_log_sums(rows), of_tau(rows);
  Exact<int64_t> first(rows), last(rows), own(rows);
  for (int64_t k = 0; k < size; k++) t[k] = T(random.normal() * 0.3);
  for (int64_t r = 0; r < rows; r++) {
    first[r] = random.integer(0, cols - 1), last[r] = random.integer(first[r], cols), own[r] = random.integer(-2, cols + 1);
    log_sums[r] = T(random.normal() * 2), origin[r] = T(random.normal() * 0.1), weight[r] = T(random.normal());
  }
  std::vector<double> right(size_t(3 * rows + size), 0.0);
  for (int64_t r = 0; r < rows; r++) {
    std::vector<int64_t> columns;
    for (int64_t c = first[r]; c < last[r]; c++)
      if (c != own[r]) columns.push_back(c);
    if (columns.empty()) continue;
    auto g = [&](int64_t c) { return (double(t[r * cols + c]) - double(origin[r])) / tau; };
    const double count = double(columns.size()), negatives = std::exp(double(log_sums[r]));
    double sum = 0, mean = 0;
    for (int64_t c : columns) sum += std::exp(g(c)), mean += g(c) / count;
    double moment = 0, value = form == 0 ? std::log(sum + negatives) - mean : form == 1 ? std::log(count * (1 + negatives / sum)) : 0;
    double slope = form == 2 ? 0 : negatives / (sum + negatives);
    for (int64_t c : columns) {
      const double e = std::exp(g(c)), share = e / (sum + negatives), pull = negatives / (negatives + e);
      const double dg = form == 0 ? share - 1 / count : form == 1 ? share - e / sum : -pull / count;
      if (form == 2) value += std::log1p(negatives / e) / count, slope += pull / count;
      moment += dg * g(c), right[size_t(3 * rows + r * cols + c)] = dg / tau * double(weight[r]);
    }
    right[size_t(r)] = value, right[size_t(rows + r)] = slope, right[size_t(2 * rows + r)] = -moment / tau;
  }
  const SameIdBlock block{t.data, first.data, last.data, own.data, log_sums.data, origin.data, weight.data, loss.data,
                          of_log_sums.data, of_tau.data, rows, cols, tau, form, bounded, sizeof(T) == 8 ? FLOAT64 : FLOAT32,
                          int32_t(random.pick({1, 3})), s.set};
  watch("rows of equal ids");
  poison_workspace();
  if (const int32_t status = alphacl_cpu_same_id(&block)) return fail("rows of equal ids: status %d", status);
  const double slack = sizeof(T) == 8 ? 1e-13 : 3e-6;
  auto check = [&](const char* name, const T* got, int64_t at, int64_t length) {
    for (int64_t k = 0; k < length; k++)
      if (!(std::fabs(double(got[k]) - right[size_t(at + k)]) <= slack * (1 + std::fabs(right[size_t(at + k)]))))
        return fail("rows of equal ids: %s of form %d, %s: %g, not %g", name, form, s.kernels.c_str(), double(got[k]), right[size_t(at + k)]);
  };
  check("loss", loss.data, 0, rows), check("slope in the sums", of_log_sums.data, rows, rows);
  check("slope in tau", of_tau.data, 2 * rows, rows), check("gradient", t.data, 3 * rows, size);
}

void test_same_id(Random& random, bool thorough) {
  for (int dtype : {FLOAT32, FLOAT64})
    for (const Served& s : served(dtype))
      for (int32_t form : {0, 1, 2})
        for (int k = 0; k < (thorough ? 8 : 2); k++)
          by_dtype(dtype, [&](auto zero) { test_same_id_block<decltype(zero)>(random, s, form, k % 2); });
  if (alphacl_cpu_same_id_size() != int32_t(sizeof(SameIdBlock))) fail("size of SameIdBlock: %d", alphacl_cpu_same_id_size());
}

// --- several callers, interruption, refusals -----------------------------------------------------

// Sweeps run without the interpreter's lock, so Python's threads may be in the library at once.
void test_callers(Random& random) {
  for (int dtype : {FLOAT32, FLOAT64, BFLOAT16})
    for (const Served& s : served(dtype))
      for (const Variant& v : {Variant{Form::ONLINE, EXP, 0}, {Form::PLAIN, HINGE, 2, true}, {Form::CONSTANT, GIBBS, 0, true}}) {
        const Data d = make_data(random, dtype, 100, 20, true);
        const Case c = draw(random, d, v, {0, 50, 100});
        by_dtype(dtype, [&](auto zero) {
          using T = decltype(zero);
          std::vector<Outputs<T>> results;
          for (int k = 0; k < 12; k++) results.emplace_back(d, c);
          std::array<int, 12> status{};
          watch("several callers");
          std::vector<std::thread> callers;
          for (size_t caller = 0; caller < 3; caller++)
            callers.emplace_back([&, caller] {
              for (size_t k = caller; k < 12; k += 3) status[k] = run<T>(d, c, {s.set, 24, 1 + int(k % 2)}, results[k]);
            });
          for (auto& caller : callers) caller.join();
          for (size_t k = 0; k < 12; k++)
            for (size_t x = 0; x < 3; x++) {
              const Exact<T>&a = *results[0].all()[x], &b = *results[k].all()[x];
              if (status[k] == OK && (!a.size || std::memcmp(a.data, b.data, size_t(a.size) * sizeof(T)) == 0)) continue;
              const std::string what = describe(d, c, {s.set, 24, 1 + int(k % 2)});
              return fail("several callers: status %d or other bits\n        %s", status[k], what.c_str());
            }
        });
      }
}

// Stand-ins for the interpreter: a lock that only the thread which called may take and give.
namespace interpreter {
bool held, broken;
int asked, answers_until_signal;
std::thread::id caller;
int token;
void* release() {
  broken |= !held || std::this_thread::get_id() != caller;
  held = false;
  return &token;
}
void take(void* lock) {
  broken |= held || lock != &token || std::this_thread::get_id() != caller;
  held = true;
}
int check() {
  broken |= !held || std::this_thread::get_id() != caller;
  return ++asked > answers_until_signal;
}
void reset(int answers) {
  held = true, broken = false, asked = 0, answers_until_signal = answers;
  caller = std::this_thread::get_id();
}
}  // namespace interpreter

void test_interruption() {
  // hours of work with sanitizers: only the watchdog would end it
  constexpr int64_t n = 1000000, dim = 4;
  Exact<double> f(n * dim), row_weight(n), sums(n), df(n * dim);
  for (int64_t k = 0; k < n * dim; k++) f[k] = double(k % 7 - 3) / 16;
  for (int64_t k = 0; k < n; k++) row_weight[k] = 1;
  Sweep s{};
  s.f = f.data, s.row_weight = row_weight.data, s.sums = sums.data, s.df = df.data;
  s.n = n, s.dim = dim, s.row_stride = dim, s.anchors = n, s.block = 240, s.tau = 1;
  s.dtype = FLOAT64, s.kind = EXP, s.instruction_set = 0;
  for (int& row : s.rows_of_terms) row = -1;
  s.release_lock = interpreter::release, s.take_lock = interpreter::take, s.check_signals = interpreter::check;
  for (bool gradient : {false, true})
    for (int threads : THREADS) {
      s.form = gradient ? Form::PLAIN : Form::T_MAX, s.gradient = gradient, s.threads = threads, s.hi = gradient ? n : 0;
      const int answers = threads == 2;  // the first time asked, or the second
      interpreter::reset(answers);
      watch("interruption");
      const int status = alphacl_cpu_sweep(&s);
      const char* what = gradient ? "gradient" : "largest t";
      if (status != INTERRUPTED || interpreter::asked != answers + 1)
        fail("interruption: status %d, asked %d times (%s, %d threads)", status, interpreter::asked, what, threads);
      if (interpreter::broken || !interpreter::held)
        fail("interruption: lock not taken and given in turn (%s, %d threads)", what, threads);
    }
  // the next sweep is none the worse
  s.n = s.anchors = 500, s.hi = 0, s.form = Form::T_MAX, s.gradient = 0;
  interpreter::reset(1000000);
  if (alphacl_cpu_sweep(&s) != OK || interpreter::broken || !interpreter::held) fail("interruption: the sweep after it");
}

void test_refusals() {
  float x = 1, y = 0;
  Sweep s{};
  s.f = &x, s.sums = &y, s.n = s.dim = s.row_stride = s.anchors = 1, s.block = 48, s.tau = 1, s.form = Form::T_MAX;
  for (int& row : s.rows_of_terms) row = -1;
  const int32_t mask = alphacl_cpu_instruction_sets();
  for (int set : {-1, 0, 1, 2, 3, 4, 5, 6, 1000}) {
    const bool here = set >= 0 && set < 6 && (mask >> (16 + set) & 1);
    s.instruction_set = set;
    int32_t multiple, largest, fewest;
    // A set the compiler did not have falls back to the one before; what the processor lacks is
    // refused.
    if (set >= 0 && set < 6 && !here && !(mask >> set & 1)) continue;
    const int status = alphacl_cpu_sweep(&s);
    if (status != (here ? OK : UNSUPPORTED)) fail("instruction set %d: runs here %d, status %d", set, here, status);
    if (!here && alphacl_cpu_kernels(set, FLOAT32, &multiple, &largest, &fewest)) fail("instruction set %d has kernels", set);
  }
  s.instruction_set = 0;
  s.n = s.anchors = int64_t(1) << 40;
  if (alphacl_cpu_sweep(&s) != NO_MEMORY) fail("2^40 rows: status %d", alphacl_cpu_sweep(&s));
  if (alphacl_cpu_sweep_size() != int32_t(sizeof(Sweep))) fail("size of Sweep: %d", alphacl_cpu_sweep_size());
  if (alphacl_cpu_rows_size() != int32_t(sizeof(PairRows))) fail("size of PairRows: %d", alphacl_cpu_rows_size());
  if (!*alphacl_cpu_build() || !*alphacl_cpu_sources()) fail("the library does not say what it was built from");
}

// --- elementary functions ------------------------------------------------------------------------

template <class T> struct Aligned {  // as the interface asks: 64 bytes, a multiple of 16 numbers
  explicit Aligned(size_t n) : data(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  T* data;
};

template <class T> double in_ulps(T y, long double truth) {
  int exponent;
  std::frexp(truth, &exponent);
  using limits = std::numeric_limits<T>;
  const long double ulp = std::ldexp(1.0L, std::max(exponent, limits::min_exponent) - limits::digits);
  return double(std::fabs((long double)(y) - truth) / ulp);
}

template <class T> void test_function(int which, const std::vector<int>& dtypes, std::vector<T> x) {
  x.resize((x.size() + 15) / 16 * 16, T(1));
  constexpr bool is_float = sizeof(T) == 4;
  const char* name = which ? "log" : "exp";
  using limits = std::numeric_limits<T>;
  std::vector<long double> truth;
  // For floats double is exact enough, and a good deal faster.
  using Wide = std::conditional_t<is_float, double, long double>;
  for (T v : x) truth.push_back(which ? std::log(Wide(v)) : std::exp(Wide(v)));
  const T special[16] = {-limits::infinity(), limits::infinity(), limits::quiet_NaN(), -limits::quiet_NaN(), 0, -T(0.0), -1,
                         -limits::max(), limits::max(), is_float ? T(88.8) : T(709.9), is_float ? T(-200) : T(-800),
                         1, -limits::min(), is_float ? T(-1e30) : T(-1e300), T(1000), T(-1000)};
  for (int dtype : dtypes)
    for (const Served& s : served(dtype)) {
      Aligned<T> in(x.size()), out(x.size());
      std::memcpy(in.data, x.data(), x.size() * sizeof(T));
      std::memset(out.data, 0xff, x.size() * sizeof(T));
      if (alphacl_cpu_function(s.set, dtype, which, in.data, out.data, int64_t(x.size()))) fail("%s: refused", name);
      double worst = 0;
      size_t at = 0;
      for (size_t k = 0; k < x.size(); k++) {
        const double error = in_ulps(out.data[k], truth[k]);
        if (!(error <= worst)) worst = error, at = k;
        if (error != error) break;
      }
      const double argument = double(x[at]);
      std::printf("%s of %s, %s, %s: at most %.3f ulp (at %.9g)\n", name, is_float ? "float" : "double", s.kernels.c_str(),
                  DTYPES[dtype], worst, argument);
      if (!(worst <= 2))
        fail("%s(%.17g) = %.17g, %.3f ulp off (%s, %s)", name, argument, double(out.data[at]), worst, s.kernels.c_str(),
             DTYPES[dtype]);

      Aligned<T> special_in(16), special_out(16);
      std::memcpy(special_in.data, special, sizeof(special));
      alphacl_cpu_function(s.set, dtype, which, special_in.data, special_out.data, 16);
      for (int k = 0; k < 16; k++) {
        const T v = special[k], y = special_out.data[k];
        const double right = which ? std::log(double(v)) : std::exp(double(v));
        bool good = std::isnan(right) ? std::isnan(y) : std::isinf(T(right)) ? y == T(right) : in_ulps(y, right) <= 2;
        if (!which && right < double(limits::min())) good = y == 0;
        if (!good)
          fail("%s(%.9g) = %.9g, expected %.9g (%s, %s)", name, double(v), double(y), right, s.kernels.c_str(), DTYPES[dtype]);
      }
    }
}

// The factors exp(log f − shift): in half precision a shorter polynomial, whose argument is not
// reduced in two parts.
template <class T> void test_factors(Random& random, int dtype, double end, int count) {
  for (const Served& s : served(dtype)) {
    const int64_t n = (count + 15) / 16 * 16;
    Aligned<T> x{size_t(n)}, y{size_t(n)};
    for (int64_t k = 0; k < n; k++) x.data[k] = T(random.uniform(-end, end));
    const T nan = std::numeric_limits<T>::quiet_NaN();
    x.data[0] = nan, x.data[1] = -nan, x.data[2] = 0;
    if (alphacl_cpu_function(s.set, dtype, 2, x.data, y.data, n)) fail("factor: refused");
    if (!std::isnan(y.data[0]) || !std::isnan(y.data[1]) || y.data[2] != 1)
      fail("factors of NaN, -NaN, 0: %g, %g, %g (%s)", double(y.data[0]), double(y.data[1]), double(y.data[2]), s.kernels.c_str());
    for (int64_t k = 2; k < n; k++) {
      const double truth = std::exp(double(x.data[k])), error = std::fabs(double(y.data[k]) - truth) / truth;
      const double bound = s.bfloat16 ? 2e-7 + 2e-8 * std::fabs(double(x.data[k])) : 4 * unit(dtype);
      if (!(error <= bound)) {
        fail("factor(%.9g) is off by %.3g, at most %.3g expected (%s)", double(x.data[k]), error, bound, s.kernels.c_str());
        break;
      }
    }
  }
}

// all exponents alike
template <class T> std::vector<T> positive_numbers(Random& random, int count) {
  std::vector<T> x;
  using limits = std::numeric_limits<T>;
  for (int k = 0; k < count; k++) {
    const int exponent = int(random.integer(limits::min_exponent - 1, limits::max_exponent - 1));
    x.push_back(std::ldexp(std::min(T(random.uniform(1, 2)), std::nextafter(T(2), T(1))), exponent));
  }
  const T one = 1;
  for (T edge : {limits::min(), limits::max(), one, std::nextafter(one, T(0)), std::nextafter(one, T(2))}) x.push_back(edge);
  for (int k = 0; k < count; k++) x.push_back(T(random.uniform(0.4, 2.2)));
  for (int k = 0; k < count; k++) x.push_back(T(1 + random.pick({-1, 1}) * std::exp2(random.uniform(-50, -2))));
  return x;
}

void test_functions(Random& random, bool thorough) {
  const int count = thorough ? 250000 : 2000;
  auto line = [&](auto zero, double low, double high, int points) {
    using T = decltype(zero);
    std::vector<T> x;
    for (int k = 0; k <= points; k++) x.push_back(T(low + (high - low) * k / points));
    for (int k = 0; k < points / 4; k++) x.push_back(T(random.pick({-1, 1}) * std::exp2(random.uniform(-40, 6))));
    for (int k = 0; k < points / 4; k++) x.push_back(T(random.uniform(-1, 1)));
    return x;
  };
  test_function<float>(0, {FLOAT32, BFLOAT16}, line(0.f, -87.3, 88.7, count));
  test_function<double>(0, {FLOAT64}, line(0.0, -708.3, 709.7, count / 4));
  test_function<float>(1, {FLOAT32, BFLOAT16}, positive_numbers<float>(random, count / 3));
  test_function<double>(1, {FLOAT64}, positive_numbers<double>(random, count / 12));
  for (int dtype : {FLOAT32, BFLOAT16}) test_factors<float>(random, dtype, 86.9, count / 4);
  test_factors<double>(random, FLOAT64, 699.9, count / 8);
}

}  // namespace

// test_kernels [--short] [--seed S]
int main(int argc, char** argv) {
  bool thorough = true;
  uint64_t seed = 1;
  for (int k = 1; k < argc; k++) {
    const std::string argument = argv[k];
    if (argument == "--short") {
      thorough = false;
    } else if (argument == "--seed" && k + 1 < argc) {
      seed = std::strtoull(argv[++k], nullptr, 10);
    } else {
      std::fprintf(stderr, "usage: test_kernels [--short] [--seed S]\n");
      return 2;
    }
  }
  std::signal(SIGALRM, give_up);
  Random random(seed);
  auto last = std::chrono::steady_clock::now();
  auto timed = [&](const char* what) {
    const auto now = std::chrono::steady_clock::now();
    std::printf("%-14s %5.1f s\n", what, std::chrono::duration<double>(now - last).count());
    std::fflush(stdout);
    last = now;
  };
  const int32_t mask = alphacl_cpu_instruction_sets();
  for (int set = 0; set < 6; set++)
    if (mask >> set & 1) std::printf("%s%s  ", SETS[set], mask >> (16 + set) & 1 ? "" : " (not on this processor)");
  std::printf("\n");
  test_refusals();
  test_functions(random, thorough);
  timed("functions");
  test_pair_rows(random, thorough);
  timed("rows");
  test_steps(random, thorough);
  test_given_steps(random);
  test_unit_rows(random);
  test_ids(random);
  timed("steps");
  test_same_id(random, thorough);
  timed("equal ids");
  // The driver keeps its largest workspace, which is filled with NaN before every call: what needs
  // much of it comes late.
  test_corners(random, thorough);
  timed("corners");
  test_random(random, thorough ? 1 : 0.06);
  timed("sample");
  test_large_blocks(random, thorough);
  timed("large blocks");
  test_callers(random);
  timed("callers");
  test_interruption();
  timed("interruption");
  if (thorough) test_coverage();
  int64_t cases = 0, sweeps = 0;
  for (const auto& [name, s] : statistics) {
    std::printf("%-24s %6lld cases, largest error %.2f of its tolerance\n", name.c_str(), (long long)(s.cases), s.largest);
    cases += s.cases, sweeps += s.sweeps;
  }
  std::printf("%lld cases in %lld sweeps, seed %llu: %s\n", (long long)(cases), (long long)(sweeps),
              (unsigned long long)(seed), failures ? "FAILED" : "all good");
  return failures ? 1 : 0;
}
