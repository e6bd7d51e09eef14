// From a call to the kernels of its dtype. Every function returns null or what went wrong.
#pragma once

#include <atomic>

#include "problem.h"

namespace alphacl {

constexpr bool is_half(Dtype dtype) { return dtype == BFLOAT16 || dtype == FLOAT16; }
// The longest rows whose gradient a kernel accumulates in registers; longer ones take chunks of
// features and write weights.
constexpr int largest_features(Dtype dtype) {
  return is_half(dtype) ? 256 : dtype == FLOAT64 ? 32 : dtype == TFLOAT32 ? 128 : 64;
}
// Small enough for the 99 KB of shared memory that a block has on sm_86 and sm_89, but for float64.
constexpr int chunk_features(Dtype dtype) { return is_half(dtype) ? 64 : 32; }

template <Dtype> const char* sweep(const Sweep& a, void* stream);
template <Dtype> const char* rows(bool finish, const PairRows& a, void* stream);
template <Dtype> const char* rounded_rows(const RoundedRows& a, void* stream);  // of TFLOAT32 alone

// Why the current device cannot run this library, or null.
template <Dtype> __attribute__((visibility("hidden"))) const char* why_not();

// The error of a launch whose tiles are for other kernels.
constexpr const char* NOT_SERVED = "no kernel has tiles of this size for this launch";

// Whether the current device has the kernels of hopper.h for rows of this dtype.
template <Dtype> __attribute__((visibility("hidden"))) bool has_hopper();
// Whether they are used: −1 where they serve a launch, 0 never, 1 always; with 1 a launch that they
// cannot serve is refused.
inline std::atomic<int> hopper_mode{-1};

#define ALPHACL_DECLARE(DTYPE)                                          \
  template <> const char* sweep<DTYPE>(const Sweep&, void*);            \
  template <> const char* rows<DTYPE>(bool, const PairRows&, void*);    \
  template <> const char* rounded_rows<DTYPE>(const RoundedRows&, void*); \
  template <> const char* why_not<DTYPE>();                             \
  template <> bool has_hopper<DTYPE>();
ALPHACL_DECLARE(BFLOAT16)
ALPHACL_DECLARE(FLOAT16)
ALPHACL_DECLARE(TFLOAT32)
ALPHACL_DECLARE(FLOAT32)
ALPHACL_DECLARE(FLOAT64)
#undef ALPHACL_DECLARE

}  // namespace alphacl
