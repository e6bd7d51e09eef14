// Memory in which a step keeps its tiles from one sweep to the next.
#pragma once

#include <atomic>

#include "kernels.h"
#include "workspace.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace {

// The first tiles of a step, as many as the bytes hold; the others are computed again. The memory is
// one per process and stays allocated, since faulting its pages in again would cost more than it
// saves. A step that finds it taken by another thread keeps nothing.
class KeptTiles {
 public:
  explicit KeptTiles(int64_t bytes) : bytes_(bytes) {}
  ~KeptTiles() {
    if (mine_) owner_.store(0, std::memory_order_release);
  }
  KeptTiles(const KeptTiles&) = delete;

  // `count` tiles of `size` bytes, with so many bytes of marks each, are to be kept, where there is
  // room.
  void keep(Keep what, int64_t size, int64_t marks, int64_t count) {
    count = std::min(count, bytes_ / (size + marks));
    if (what == Keep::NOTHING || count <= 0 || !take()) return;
    if (!reserve(count * (size + marks))) return;
    what_ = what, size_ = size, marks_ = marks, count_ = count;
  }
  KeptTile tile(int64_t number, bool filled) const {
    if (number >= count_) return {};
    char* const at = memory_ + number * (size_ + marks_);
    return {at, marks_ ? at + size_ : nullptr, what_, filled};
  }
  int64_t count() const { return count_; }

 private:
  bool take() {
    const int64_t me = getpid();
    int64_t owner = 0;
    mine_ = owner_.compare_exchange_strong(owner, me, std::memory_order_acquire);
    // A fork copies the mark of a thread that the child does not have, and memory that the thread
    // may just be replacing.
    if (!mine_ && owner != me && owner_.compare_exchange_strong(owner, me, std::memory_order_acquire))
      mine_ = true, memory_ = nullptr, reserved_ = 0;
    return mine_;
  }
  static bool reserve(int64_t bytes) {
    if (bytes <= reserved_) return true;
    std::free(memory_);
    memory_ = allocated(bytes);
    reserved_ = memory_ ? bytes : 0;
    return memory_ != nullptr;
  }

  static inline std::atomic<int64_t> owner_{0};  // the process whose thread has it, 0: nobody
  static inline char* memory_ = nullptr;
  static inline int64_t reserved_ = 0;
  int64_t bytes_, size_ = 0, marks_ = 0, count_ = 0;
  Keep what_ = Keep::NOTHING;
  bool mine_ = false;
};

}  // namespace
