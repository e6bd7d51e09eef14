// Results: from padded row vectors to the caller's.
#pragma once

#include <algorithm>
#include <vector>

#include "plan.h"

namespace {

// T is the accumulation dtype.
template <class T> void collect(const Plan& plan, const std::vector<Block>& blocks, const RowVectors& v) {
  const Sweep& s = plan.sweep;
  auto gather = [&](const auto* from, T* to, int64_t length, double scale = 1) {
    for (const Block& b : blocks)
      for (int64_t r = 0; r < b.rows && b.first + r < length; r++) to[b.first + r] = T(from[b.at + r] * scale);
  };
  for (int term = 0; term < TERM_COUNT; term++) {
    if (s.rows_of_terms[term] < 0) continue;
    T* out = static_cast<T*>(s.sums) + s.rows_of_terms[term] * s.anchors;
    if (term < SUM_COUNT) gather(v.sums + term * v.padded, out, s.anchors);
    else if (v.running_max) gather(static_cast<const T*>(v.running_max), out, s.anchors);
    else std::fill_n(out, s.anchors, T(s.constant_shift));
  }
  if (v.weight_sums) gather(v.weight_sums, static_cast<T*>(s.weight_sums), s.n, v.df_scale);
}

}  // namespace
