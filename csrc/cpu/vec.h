// Vectors as wide as the registers of the instruction set that a file is compiled for, through the
// compiler's vector extensions (GCC >= 9, clang): one source for AVX-512, AVX2 and any other
// architecture.
//
// Everything is in an unnamed namespace: a file compiled for AVX-512 must not lend a function to
// one that is not.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define ALPHACL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define ALPHACL_VECTOR_BYTES 32
#else
#define ALPHACL_VECTOR_BYTES 16
#endif

#define ALPHACL_INLINE inline __attribute__((always_inline))

namespace {

template <class T> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float V __attribute__((vector_size(ALPHACL_VECTOR_BYTES), may_alias));
  typedef float Unaligned __attribute__((vector_size(ALPHACL_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t M __attribute__((vector_size(ALPHACL_VECTOR_BYTES), may_alias));
  typedef uint32_t U __attribute__((vector_size(ALPHACL_VECTOR_BYTES), may_alias));
  typedef int32_t Int;
};
template <> struct VectorOf<double> {
  typedef double V __attribute__((vector_size(ALPHACL_VECTOR_BYTES), may_alias));
  typedef double Unaligned __attribute__((vector_size(ALPHACL_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t M __attribute__((vector_size(ALPHACL_VECTOR_BYTES), may_alias));
  typedef uint64_t U __attribute__((vector_size(ALPHACL_VECTOR_BYTES), may_alias));
  typedef int64_t Int;
};

template <class T> using Vec = typename VectorOf<T>::V;
template <class T> using Mask = typename VectorOf<T>::M;  // -1 where true, 0 where false
template <class T> using Word = typename VectorOf<T>::U;  // whose overflow is defined
template <class T> using Int = typename VectorOf<T>::Int;
template <class T> constexpr int LANES = ALPHACL_VECTOR_BYTES / sizeof(T);

template <class T> ALPHACL_INLINE Vec<T> load(const T* p) { return *reinterpret_cast<const Vec<T>*>(p); }
template <class T> ALPHACL_INLINE void store(T* p, Vec<T> v) { *reinterpret_cast<Vec<T>*>(p) = v; }
template <class T> ALPHACL_INLINE Vec<T> load_unaligned(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(p);
}
// Not 0 + x: that makes 0 of −0, and a compiler must keep the sum.
template <class T> ALPHACL_INLINE Vec<T> broadcast(T x) { return x - Vec<T>{}; }

template <class T> ALPHACL_INLINE Mask<T> load_mask(const Int<T>* p) { return *reinterpret_cast<const Mask<T>*>(p); }

template <class T> ALPHACL_INLINE Mask<T> bits(Vec<T> v) {
  Mask<T> m;
  std::memcpy(&m, &v, sizeof(m));
  return m;
}
template <class T> ALPHACL_INLINE Vec<T> from_bits(Mask<T> m) {
  Vec<T> v;
  std::memcpy(&v, &m, sizeof(v));
  return v;
}

template <class T> ALPHACL_INLINE Vec<T> vmax(Vec<T> a, Vec<T> b) { return a > b ? a : b; }
// NaN wins
template <class T> ALPHACL_INLINE Vec<T> largest(Vec<T> a, Vec<T> b) { return (a > b) | (a != a) ? a : b; }
// keeps NaN
template <class T> ALPHACL_INLINE Vec<T> relu(Vec<T> a) { return a < 0 ? Vec<T>{} : a; }

// x itself, as a rounded number: keeps the compiler from fusing the product it came from into a
// later sum. Where sweeps must agree to the last bit on a quantity, it goes through here.
template <class T> ALPHACL_INLINE Vec<T> rounded(Vec<T> x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__SSE2__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  volatile Vec<T> y = x;
  x = y;
#endif
  return x;
}

template <class T> ALPHACL_INLINE Mask<T> lane_numbers() {
  Mask<T> m;
  for (int i = 0; i < LANES<T>; i++) m[i] = i;
  return m;
}

// Moves the value of lane l + H to lane l. Callers ignore the last H lanes.
template <class T, int H> ALPHACL_INLINE Vec<T> moved_down(Vec<T> v) {
#if defined(__clang__)
  Vec<T> moved;
  for (int l = 0; l < LANES<T>; l++) moved[l] = v[(l + H) % LANES<T>];
  return moved;
#else
  Mask<T> from;
#pragma GCC unroll 16
  for (int l = 0; l < LANES<T>; l++) from[l] = (l + H) % LANES<T>;
  return __builtin_shuffle(v, from);
#endif
}
template <class T> ALPHACL_INLINE T sum_of(Vec<T> v) {
  if constexpr (LANES<T> > 8) v += moved_down<T, 8>(v);
  if constexpr (LANES<T> > 4) v += moved_down<T, 4>(v);
  if constexpr (LANES<T> > 2) v += moved_down<T, 2>(v);
  return v[0] + v[1];
}
template <class T> ALPHACL_INLINE bool any(Mask<T> m) {
  uint64_t words[ALPHACL_VECTOR_BYTES / 8], found = 0;
  std::memcpy(words, &m, sizeof(m));
  for (uint64_t word : words) found |= word;
  return found != 0;
}
// A mask as one bit for each lane, and back.
template <class T> ALPHACL_INLINE uint16_t bits_of(Mask<T> m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return uint16_t(_mm512_movepi32_mask((__m512i)m));
  else return uint16_t(_mm512_movepi64_mask((__m512i)m));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return uint16_t(_mm256_movemask_ps((__m256)m));
  else return uint16_t(_mm256_movemask_pd((__m256d)m));
#else
  int found = 0;
  for (int i = 0; i < LANES<T>; i++) found |= int(m[i] & 1) << i;
  return uint16_t(found);
#endif
}
template <class T> ALPHACL_INLINE Mask<T> mask_of(uint16_t bits) {
  Mask<T> own;
  for (int i = 0; i < LANES<T>; i++) own[i] = Int<T>(1) << i;
  return (own & (Mask<T>{} + Int<T>(bits))) != 0;
}
template <class T> ALPHACL_INLINE T max_of(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < LANES<T>; i++) best = v[i] > best || v[i] != v[i] ? v[i] : best;
  return best;
}

// --- elementary functions ------------------------------------------------------------------------
//
// exp: x = k·ln 2 + r, |r| <= ln 2 / 2, with ln 2 in two parts; e^r by a polynomial; 2^k by adding
// k to the exponent. At most 1 ulp (float) and 1 ulp (double), measured in
// tests/cpp/test_kernels.cpp. Results below the smallest normal number are 0, above the largest one
// infinite.

template <class T> struct ExpConstants;
template <> struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504088896341f, ln2_high = 0.693145751953125f, ln2_low = 1.42860682030941723212e-6f;
  // 1.5·2^23: adding it rounds to an integer, which is then in the low bits
  static constexpr float magic = 12582912.f;
  static constexpr float lowest = -87.33f, highest = 88.72283f;
  static constexpr int mantissa = 23;
};
template <> struct ExpConstants<double> {
  static constexpr double log2e = 1.44269504088896340736, ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double magic = 6755399441055744.;
  static constexpr double lowest = -708.39, highest = 709.782712893384;
  static constexpr int mantissa = 52;
};

ALPHACL_INLINE Vec<float> expm1_polynomial(Vec<float> r) {  // minimax on |r| <= ln 2 / 2
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r;
}
ALPHACL_INLINE Vec<double> expm1_polynomial(Vec<double> r) {
  Vec<double> p = r * 1.6059043836821613e-10 + 2.08767569878681e-9;
  p = p * r + 2.505210838544172e-8;
  p = p * r + 2.7557319223985893e-7;
  p = p * r + 2.7557319223985888e-6;
  p = p * r + 2.4801587301587302e-5;
  p = p * r + 1.9841269841269841e-4;
  p = p * r + 1.3888888888888889e-3;
  p = p * r + 8.3333333333333333e-3;
  p = p * r + 4.1666666666666667e-2;
  p = p * r + 1.6666666666666667e-1;
  p = p * r + 0.5;
  return p * (r * r) + r;
}
template <class V> ALPHACL_INLINE V exp_polynomial(V r) { return expm1_polynomial(r) + 1; }

template <class T> ALPHACL_INLINE Vec<T> vexp(Vec<T> x) {
  using C = ExpConstants<T>;
  const Vec<T> shifted = x * C::log2e + C::magic;
  const Vec<T> k = shifted - C::magic;
  Vec<T> r = x - k * C::ln2_high;
  r = r - k * C::ln2_low;
  Vec<T> y = from_bits<T>((Mask<T>)((Word<T>)bits<T>(exp_polynomial(r)) + ((Word<T>)bits<T>(shifted) << C::mantissa)));
  y = x < C::lowest ? Vec<T>{} : y;
  y = x > C::highest ? broadcast<T>(__builtin_inf()) : y;
  return x != x ? x : y;
}

// exp where |x| < 87 (float) or 700 (double), or NaN: 2^k is a separate factor, and the ends of
// the range need no care.
template <class T> ALPHACL_INLINE Vec<T> vexp_bounded(Vec<T> x) {
  using C = ExpConstants<T>;
  constexpr T biased = C::magic + T((1 << (sizeof(T) == 4 ? 7 : 10)) - 1);
  const Vec<T> shifted = x * C::log2e + biased;
  const Vec<T> k = shifted - biased;
  Vec<T> r = x - k * C::ln2_high;
  r = r - k * C::ln2_low;
  return exp_polynomial(r) * from_bits<T>((Mask<T>)((Word<T>)bits<T>(shifted) << C::mantissa));
}

// log of a positive normal number (0 → −inf, inf → inf, NaN and negative → NaN): x = 2^k·m, m in
// [√½, √2), log m = 2·atanh(s), s = (m − 1)/(m + 1). Powers of floats use the series for
// doubles as well.
ALPHACL_INLINE Vec<double> log_series(Vec<double> s2) {
  Vec<double> p = s2 * 1.479819860511658591e-01 + 1.531383769920937332e-01;
  p = p * s2 + 1.818357216161805012e-01;
  p = p * s2 + 2.222219843214978396e-01;
  p = p * s2 + 2.857142874366239149e-01;
  p = p * s2 + 3.999999999940941908e-01;
  p = p * s2 + 6.666666666666735130e-01;
  return p * s2;
}
ALPHACL_INLINE Vec<float> log_series(Vec<float> s2) {
  Vec<float> p = s2 * 0.24279078841f + 0.28498786688f;
  p = p * s2 + 0.40000972152f;
  p = p * s2 + 0.66666662693f;
  return p * s2;
}

// With Lost, log(x + lost), |lost| at most half a unit in the last place of x.
template <class T, bool Lost> ALPHACL_INLINE Vec<T> log_of(Vec<T> x, Vec<T> lost) {
  using C = ExpConstants<T>;
  using I = typename VectorOf<T>::Int;
  const I root_half = I(sizeof(T) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd), one = I(sizeof(T) == 4 ? 127 : 1023);
  const Mask<T> ix = bits<T>(x);
  // arithmetic: floor
  const Mask<T> k = (Mask<T>)((Word<T>)ix - (Word<T>)(Mask<T>{} + root_half)) >> C::mantissa;
  const Vec<T> m = from_bits<T>((Mask<T>)((Word<T>)ix - ((Word<T>)k << C::mantissa)));
  Vec<T> f = m - 1;
  if (Lost) {
    const Vec<T> unit = from_bits<T>((Mask<T>)((Word<T>)(one - k) << C::mantissa));  // 2^-k
    f = x < T(0x1p60) ? f + lost * unit : f;  // above, nothing is lost, and 2^-k may be no number
  }
  const Vec<T> s = f / (f + 2), half = f * f * T(0.5);
  const Vec<T> kf = __builtin_convertvector(k, Vec<T>);
  Vec<T> y = f - (half - s * (half + log_series(s * s)));
  y = kf * C::ln2_high + (y + kf * C::ln2_low);
  y = x == 0 ? broadcast<T>(-__builtin_inf()) : y;
  y = x == broadcast<T>(__builtin_inf()) ? x : y;
  return x >= 0 ? y : broadcast<T>(__builtin_nan(""));
}
template <class T> ALPHACL_INLINE Vec<T> vlog(Vec<T> x) { return log_of<T, false>(x, Vec<T>{}); }

// log(1 + x) to the last digits of a small x, with what the sum 1 + x has lost of it.
template <class T> ALPHACL_INLINE Vec<T> vlog1p(Vec<T> x) {
  const Vec<T> u = x + 1;
  return log_of<T, true>(u, x - (u - 1));
}

// log(1 + x) for 0 ≤ x ≤ 1, without a quotient: x + x²·q(x). At most 1.5 ulp.
ALPHACL_INLINE Vec<float> vlog1p_unit(Vec<float> x) {
  Vec<float> q = x * -3.318473231e-3f + 2.0204588771e-2f;
  q = q * x - 5.7664450258e-2f;
  q = q * x + 1.0680556297e-1f;
  q = q * x - 1.5355396271e-1f;
  q = q * x + 1.9695401192e-1f;
  q = q * x - 2.4958588183e-1f;
  q = q * x + 3.3330512047e-1f;
  q = q * x - 4.9999931455e-1f;
  return q * (x * x) + x;
}
ALPHACL_INLINE Vec<double> vlog1p_unit(Vec<double> x) { return vlog1p<double>(x); }

template <class T> ALPHACL_INLINE Vec<T> vsqrt(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
  else return (Vec<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  else return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
  Vec<T> y;
  for (int i = 0; i < LANES<T>; i++) y[i] = sizeof(T) == 4 ? __builtin_sqrtf(x[i]) : __builtin_sqrt(x[i]);
  return y;
#endif
}

// x^q for x > 0. exp(q·log x) loses |q·log x| ulp, so floats go through doubles.
ALPHACL_INLINE Vec<double> vpow(Vec<double> x, double q) { return vexp<double>(vlog<double>(x) * q); }
ALPHACL_INLINE Vec<float> vpow(Vec<float> x, double q) {
  constexpr int L = LANES<double>;
  float in[2 * L], out[2 * L];
  std::memcpy(in, &x, sizeof(x));
  for (int half = 0; half < 2; half++) {
    Vec<double> wide;
    for (int i = 0; i < L; i++) wide[i] = in[half * L + i];
    wide = vpow(wide, q);
    for (int i = 0; i < L; i++) out[half * L + i] = float(wide[i]);
  }
  Vec<float> y;
  std::memcpy(&y, out, sizeof(y));
  return y;
}

// --- transposition -------------------------------------------------------------------------------

// lanes of (a, b): low takes a[l], b[l − H]; high takes a[l + H], b[l]
template <int H, int L> struct Butterfly {
  static constexpr int low(int l) { return (l & H) ? L + l - H : l; }
  static constexpr int high(int l) { return (l & H) ? L + l : l + H; }
};

template <class T, int H> ALPHACL_INLINE void exchange(Vec<T>& a, Vec<T>& b) {
  constexpr int L = LANES<T>;
  using B = Butterfly<H, L>;
#if defined(__clang__)
  Vec<T> low, high;
  for (int l = 0; l < L; l++) {
    low[l] = B::low(l) < L ? a[B::low(l)] : b[B::low(l) - L];
    high[l] = B::high(l) < L ? a[B::high(l)] : b[B::high(l) - L];
  }
#else
  Mask<T> pick_low, pick_high;
#pragma GCC unroll 16
  for (int l = 0; l < L; l++) pick_low[l] = B::low(l), pick_high[l] = B::high(l);
  const Vec<T> low = __builtin_shuffle(a, b, pick_low), high = __builtin_shuffle(a, b, pick_high);
#endif
  a = low, b = high;
}

template <class T, int H> ALPHACL_INLINE void transpose_stage(Vec<T>* r) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES<T>; i++)
    if (!(i & H)) exchange<T, H>(r[i], r[i + H]);
}

// r[i][l] ↔ r[l][i]
template <class T> ALPHACL_INLINE void transpose(Vec<T>* r) {
  constexpr int L = LANES<T>;
  transpose_stage<T, 1>(r);
  if constexpr (L > 2) transpose_stage<T, 2>(r);
  if constexpr (L > 4) transpose_stage<T, 4>(r);
  if constexpr (L > 8) transpose_stage<T, 8>(r);
}

}  // namespace
