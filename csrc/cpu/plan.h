// The plan of a sweep: which blocks there are and what lies where in the workspace. It follows from
// the sweep's sizes and the kernels alone: nothing is read or allocated.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace {

constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// `count` pieces of `size` bytes each, the first at offset `at` of the workspace.
struct Pieces {
  int64_t at, size, count;
};

struct Plan {
  const Sweep& sweep;
  const TileKernels& kernels;
  int64_t block_rows, stride;  // rows of a block, and with padding
  int64_t left_rows;           // rows [0, split), or all
  int64_t left, blocks;        // blocks of those, and of all rows
  int64_t padded;              // length of a padded row vector
  int threads;
  Pieces packed, guides, accumulators, vectors, sums, thread, rounds;
  int64_t bytes = 0;  // of the workspace

  // Zeros for those that are missing, five row scalars, scale, bias, ids, largest_t, largest_guide,
  // running maxima.
  static constexpr int64_t ROW_VECTORS = 12;

  Plan(const Sweep& s, const TileKernels& k, int64_t row_vectors = ROW_VECTORS, int64_t thread_bytes = 0)
      : sweep(s), kernels(k) {
    block_rows = s.block < k.largest_block ? s.block : k.largest_block;
    stride = (block_rows + k.row_multiple - 1) / k.row_multiple * k.row_multiple;
    left_rows = s.split ? s.split : s.n;
    left = (left_rows + block_rows - 1) / block_rows;
    blocks = left + (s.n - left_rows + block_rows - 1) / block_rows;
    padded = blocks * stride;
    threads = s.threads > 1 ? s.threads : 1;
    int64_t apart = 0;  // accumulators outside df
    for (int64_t b = 0; s.gradient && s.hi > s.lo && b < blocks; b++) {
      const Block x = block(b);
      apart += x.wanted && !in_place(x);
    }
    packed = pieces(blocks, k.packed_bytes(s.dim, stride, s.gradient));
    guides = s.guide ? pieces(blocks, k.guide_bytes(s.guide_dim, stride)) : Pieces{};
    accumulators = pieces(apart, k.df_bytes(s.dim, stride));
    vectors = pieces(row_vectors, padded * (k.accumulate == FLOAT64 ? 8 : 4));
    sums = pieces(1, padded * 8 * (SUM_COUNT + (s.bias && s.gradient)));  // the last: of weights
    thread = pieces(threads, std::max(k.workspace_bytes(s.dim, s.guide ? s.guide_dim : 0, stride), thread_bytes));
    rounds = pieces(1, blocks * 8);
  }

  // Memory behind all that was planned before.
  Pieces pieces(int64_t count, int64_t size) {
    const Pieces p{bytes, aligned(size), count};
    bytes += p.count * p.size;
    return p;
  }

  // Block b, without its memory.
  Block block(int64_t b) const {
    const Sweep& s = sweep;
    Block x{};
    x.first = b < left ? b * block_rows : left_rows + (b - left) * block_rows;
    const int64_t end = b < left ? left_rows : s.n;
    x.rows = end - x.first < block_rows ? end - x.first : block_rows;
    x.stride = stride, x.at = b * stride;
    x.anchor = x.first < s.anchors;
    x.wanted = s.gradient && s.hi > s.lo && x.first < s.hi && x.first + x.rows > s.lo;
    return x;
  }

  // The rows of df in which a block's gradient ends up.
  char* rows_of_df(const Block& x) const {
    return static_cast<char*>(sweep.df) + (x.first - sweep.lo) * sweep.dim * (kernels.accumulate == FLOAT64 ? 8 : 4);
  }
  // They may hold the accumulator of a full block. Accumulators are the largest part of the
  // workspace.
  bool in_place(const Block& x) const {
    const bool whole = x.rows == stride && x.first >= sweep.lo && x.first + x.rows <= sweep.hi;
    return whole && kernels.in_place(sweep.dim, stride) && reinterpret_cast<uintptr_t>(rows_of_df(x)) % 64 == 0;
  }
};

}  // namespace
