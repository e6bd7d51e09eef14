// The order of the tiles, and how threads wait for one another.
//
// With m blocks (one more, of no rows, to make m odd) round r pairs the blocks i + j ≡ r (mod m):
// every block is in exactly one tile of a round, the block with 2i ≡ r in its own diagonal tile,
// and after m rounds every pair has met once. A tile adds to the sums and the gradient of its two
// blocks, so the tiles of a round are independent and each block's additions happen in the order of
// the rounds: no locks, no copies for each thread, and the same bits whatever the number of
// threads. Nor is there a barrier: tiles are dealt out in order, and each waits only until its two
// blocks have finished the round before.
#pragma once

#include <atomic>
#include <new>
#include <thread>
#include <utility>

#include "plan.h"

namespace {

constexpr int64_t NO_BLOCK = -1;

struct Tile {
  int64_t round, i, j;  // blocks, or NO_BLOCK; i == j is a diagonal tile
};

class Schedule {
 public:
  explicit Schedule(const Plan& plan)
      : left_(plan.left), right_(plan.blocks - plan.left), triangle_(!plan.sweep.split) {
    rounds_ = triangle_ ? left_ | 1 : left_ > right_ ? left_ : right_;
    per_round_ = triangle_ ? (rounds_ + 1) / 2 : rounds_;
  }
  int64_t rounds() const { return rounds_; }
  int64_t tiles() const { return rounds_ * per_round_; }
  Tile tile(int64_t number) const {
    const int64_t m = rounds_, round = number / per_round_;
    int64_t k = number % per_round_;
    if (!triangle_) {
      const int64_t j = (k + round) % m;
      return {round, k < left_ ? k : NO_BLOCK, j < right_ ? left_ + j : NO_BLOCK};
    }
    // i + j ≡ round: the two blocks at distance k on either side of half = round/2 (mod m). The far
    // pairs of one round hold the near blocks of the next: going to and fro keeps a round between
    // the two.
    const int64_t half = round % 2 == 0 ? round / 2 : (round + m) / 2 % m;
    if (round % 2) k = per_round_ - 1 - k;
    int64_t i = (half - k + m) % m, j = (half + k) % m;
    if (i > j) std::swap(i, j);
    return {round, i < left_ ? i : NO_BLOCK, j < left_ ? j : NO_BLOCK};
  }

 private:
  int64_t left_, right_;
  bool triangle_;
  int64_t rounds_, per_round_;
};

// How many rounds every block has finished, and why a sweep ends early.
class Progress {
 public:
  // `rounds` is memory for one number a block.
  Progress(void* rounds, int64_t blocks) : rounds_(static_cast<std::atomic<int64_t>*>(rounds)) {
    for (int64_t b = 0; b < blocks; b++) new (rounds_ + b) std::atomic<int64_t>(-1);
  }
  void stop(Status status) { status_.store(status); }
  Status status() const { return status_.load(std::memory_order_relaxed); }
  // Block b has been packed (0) or has been through so many rounds; NO_BLOCK is always ready.
  void finish(int64_t b, int64_t rounds) {
    if (b != NO_BLOCK) rounds_[b].store(rounds, std::memory_order_release);
  }
  // Returns false if the sweep was stopped before.
  bool wait(int64_t b, int64_t rounds) const {
    for (int spins = 0; b != NO_BLOCK && rounds_[b].load(std::memory_order_acquire) < rounds; spins++) {
      if (status() != OK) return false;
      if (spins > 1000) std::this_thread::yield();
    }
    return status() == OK;
  }

  std::atomic<int64_t> next_block{0}, next_tile{0}, next_unpack{0};

 private:
  std::atomic<int64_t>* rounds_;
  std::atomic<Status> status_{OK};
};

// What one thread does in a sweep: packs blocks, works on tiles, unpacks gradients. `interrupted`
// is asked after each tile.
// (A class of its own for the progress lets tests watch it.)
template <class Watched, class Pack, class OnTile, class Unpack, class Interrupted>
void run_thread(const Plan& plan, const Schedule& schedule, Watched& progress, Pack pack, OnTile on_tile,
                Unpack unpack, Interrupted interrupted) {
  for (int64_t b; (b = progress.next_block.fetch_add(1)) < plan.blocks;) {
    pack(b);
    progress.finish(b, 0);
  }
  for (int64_t number; (number = progress.next_tile.fetch_add(1)) < schedule.tiles();) {
    const Tile tile = schedule.tile(number);
    if (!progress.wait(tile.i, tile.round) || !progress.wait(tile.j, tile.round)) return;
    if (tile.i != NO_BLOCK && tile.j != NO_BLOCK) on_tile(number, tile.i, tile.j);
    progress.finish(tile.i, tile.round + 1);
    // One store per block: a second store for a diagonal tile could follow another thread's store for
    // the next round, set the counter back, and leave all threads waiting for ever.
    if (tile.j != tile.i) progress.finish(tile.j, tile.round + 1);
    if (interrupted()) progress.stop(INTERRUPTED);
  }
  for (int64_t b; (b = progress.next_unpack.fetch_add(1)) < plan.blocks;) {
    if (!plan.block(b).wanted) continue;
    if (!progress.wait(b, schedule.rounds())) return;
    unpack(b);
  }
}

}  // namespace
