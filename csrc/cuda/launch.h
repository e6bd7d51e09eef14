// From a call to the kernels of its dtype. Every function returns null or what went wrong.
#pragma once

#include "problem.h"

namespace alphacl {

// The longest rows whose gradient a kernel accumulates in registers; longer ones take chunks of features and write weights.
constexpr int largest_features(Dtype dtype) {
  return dtype == BFLOAT16 || dtype == FLOAT16 ? 256 : dtype == FLOAT64 ? 32 : dtype == TFLOAT32 ? 128 : 64;
}
constexpr int chunk_features(Dtype dtype) { return dtype == BFLOAT16 || dtype == FLOAT16 ? 128 : dtype == FLOAT64 ? 32 : 64; }

template <Dtype> const char* sweep(bool gradient, const Sweep& a, int row_blocks, void* stream);
template <Dtype> const char* rows(bool finish, const PairRows& a, void* stream);

}  // namespace alphacl
