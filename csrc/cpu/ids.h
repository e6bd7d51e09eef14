// Ids of rows as numbers from 0, and how many negatives they leave an anchor.
#pragma once

#include <cstdint>
#include <vector>

namespace {

// Numbers in the order in which the ids are first seen; a hash table with open addresses.
class IdNumbers {
 public:
  explicit IdNumbers(int64_t most) {
    while (int64_t(1) << bits_ < 2 * most) bits_++;
    places_.assign(size_t(1) << bits_, Place{0, -1});
  }
  int32_t number(int64_t id) {
    // Fibonacci hashing: the high bits of the product depend on all bits of the id
    for (uint64_t at = (uint64_t(id) * 0x9e3779b97f4a7c15u) >> (64 - bits_);; at = (at + 1) & (places_.size() - 1)) {
      Place& place = places_[at];
      if (place.number < 0) place = {id, count_++};
      if (place.id == id) return place.number;
    }
  }
  int32_t count() const { return count_; }

 private:
  struct Place {
    int64_t id;
    int32_t number;
  };
  int bits_ = 1;
  int32_t count_ = 0;
  std::vector<Place> places_;
};

// The number of every id, and for the first `anchors` rows how many of those they meet have another
// id (at least 1, in T) and whether none has. Rows [0, split) meet the others; without a split all
// rows meet one another.
template <class T>
void number_ids(const int64_t* ids, int64_t n, int64_t split, int64_t anchors, int32_t* numbers, T* n_neg, bool* empty) {
  IdNumbers table(n);
  for (int64_t i = 0; i < n; i++) numbers[i] = table.number(ids[i]);
  std::vector<int64_t> sizes[2];
  for (auto& of_side : sizes) of_side.assign(size_t(table.count()), 0);
  for (int64_t i = 0; i < n; i++) sizes[i < split][size_t(numbers[i])]++;
  for (int64_t i = 0; i < anchors; i++) {
    const bool first = i < split;  // meets the rows from `split` on
    const int64_t all = first || !split ? n - split : split;
    const int64_t count = all - sizes[first || !split ? 0 : 1][size_t(numbers[i])];
    n_neg[i] = T(count > 1 ? count : 1), empty[i] = count == 0;
  }
}

}  // namespace
