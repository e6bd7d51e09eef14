// Memory for the blocks, and the caller's row vectors padded block by block.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "plan.h"

namespace {

inline std::vector<Block> place_blocks(const Plan& plan, char* workspace) {
  std::vector<Block> blocks(size_t(plan.blocks));
  char *packed = workspace + plan.packed.at, *accumulator = workspace + plan.accumulators.at;
  for (int64_t b = 0; b < plan.blocks; b++, packed += plan.packed.size) {
    Block& x = blocks[size_t(b)] = plan.block(b);
    x.packed = packed;
    if (plan.guides.count) x.guide = workspace + plan.guides.at + b * plan.guides.size;
    if (!x.wanted) continue;
    if (plan.in_place(x)) x.df = plan.rows_of_df(x);
    else x.df = accumulator, accumulator += plan.accumulators.size;
  }
  return blocks;
}

// T is the accumulation dtype.
template <class T>
RowVectors pad_row_vectors(const Plan& plan, const std::vector<Block>& blocks, char* workspace) {
  const Sweep& s = plan.sweep;
  const int64_t rows = plan.padded;
  char* next = workspace + plan.vectors.at;
  auto filled = [&](auto value) {
    auto* x = reinterpret_cast<decltype(value)*>(next);
    next += plan.vectors.size;
    for (int64_t r = 0; r < rows; r++) x[r] = value;
    return x;
  };
  auto spread = [&](const auto* from, int64_t length, auto* to) {
    for (const Block& b : blocks)
      for (int64_t r = 0; r < b.rows && b.first + r < length; r++) to[b.at + r] = from[b.first + r];
    return to;
  };
  T* const zeros = filled(T(0));  // stands for every vector that is missing
  auto padded = [&](const void* from, int64_t length) {
    return from ? spread(static_cast<const T*>(from), length, filled(T(0))) : zeros;
  };

  RowVectors v{};
  v.padded = rows, v.df_scale = 1;
  v.moment_origin = padded(s.moment_origin, s.anchors);
  T* row_weight = padded(s.row_weight, s.anchors);
  v.row_weight = row_weight;
  const T* shift = padded(s.shift, s.anchors);
  v.shift = shift;
  v.argument_offset = padded(s.argument_offset, s.anchors);
  v.baseline = padded(s.baseline, s.anchors);
  const bool unscaled_rows = plan.kernels.operands == BFLOAT16;  // similarities are scaled instead
  if (unscaled_rows && s.scale) {  // rows are packed with the power of two of their scale
    T* scale = padded(s.scale, s.n);
    int exponent;
    for (int64_t r = 0; r < rows; r++) scale[r] = std::frexp(scale[r], &exponent);
    v.scale = scale;
  }
  if (s.bias) v.bias = padded(s.bias, s.n);
  if (s.largest_t) v.largest_t = padded(s.largest_t, s.anchors);
  if (s.guide) v.largest_guide = padded(s.largest_guide, s.anchors);
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  if (s.ids) v.ids = spread(s.ids, s.n, filled(Int(-1)));
  if (s.form == Form::ONLINE || s.form == Form::T_MAX) v.running_max = filled(T(-HUGE_VAL));
  if (s.gradient && s.form == Form::CONSTANT)
    for (int64_t r = 0; r < rows; r++)
      if (row_weight[r] != 0) row_weight[r] *= std::exp(T(s.constant_shift) - shift[r]);
  if (unscaled_rows && s.gradient) {
    // Weights are rounded to bfloat16. Equal ones, as a hinge has them, become powers of two: their
    // errors would not average out.
    T largest = 0;
    for (int64_t r = 0; r < rows; r++) largest = std::fmax(largest, std::fabs(row_weight[r]));
    if (largest > std::numeric_limits<T>::min() && largest < std::numeric_limits<T>::max()) {
      for (int64_t r = 0; r < rows; r++) row_weight[r] /= largest;
      v.df_scale = largest;
    }
  }
  v.sums = reinterpret_cast<double*>(workspace + plan.sums.at);
  std::memset(v.sums, 0, size_t(plan.sums.size));
  if (s.bias && s.gradient) v.weight_sums = v.sums + SUM_COUNT * rows;
  return v;
}

}  // namespace
