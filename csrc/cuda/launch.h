// From a call to the kernels of its dtype. Every function returns null or what went wrong.
#pragma once

#include <atomic>

#include "problem.h"

namespace alphacl {

// The longest rows whose gradient a kernel accumulates in registers; longer ones take chunks of features and write weights.
constexpr int largest_features(Dtype dtype) {
  return dtype == BFLOAT16 || dtype == FLOAT16 ? 256 : dtype == FLOAT64 ? 32 : dtype == TFLOAT32 ? 128 : 64;
}
// Small enough for the 99 KB of shared memory that a block has on sm_86 and sm_89, but for float64.
constexpr int chunk_features(Dtype dtype) { return dtype == BFLOAT16 || dtype == FLOAT16 ? 64 : 32; }

template <Dtype> const char* sweep(bool gradient, const Sweep& a, int row_blocks, void* stream);
template <Dtype> const char* rows(bool finish, const PairRows& a, void* stream);

// Whether the current device has the kernels of hopper.h, for rows of this dtype, and whether they are taken: −1 where they serve
// a fast launch of the row-block form, 0 never, 1 for every one, which is refused if they do not.
template <Dtype> __attribute__((visibility("hidden"))) bool has_hopper();
inline std::atomic<int> hopper_mode{-1};

}  // namespace alphacl
