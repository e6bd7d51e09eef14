// The memory of one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Memory in whole pages, in huge ones if it is big; null: there is not enough.
inline char* allocated(int64_t& bytes) {
  constexpr int64_t PAGE = 4096, HUGE_PAGE = 2 << 20;
  const bool big = bytes >= 2 * HUGE_PAGE;
  bytes = (bytes + PAGE - 1) / PAGE * PAGE;
  void* start = nullptr;
  if (posix_memalign(&start, size_t(big ? HUGE_PAGE : PAGE), size_t(bytes)) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Whole pages only: memory beyond the end has another owner.
  if (big) madvise(start, size_t(bytes / HUGE_PAGE * HUGE_PAGE), MADV_HUGEPAGE);
#endif
  return static_cast<char*>(start);
}

// One allocation. The last one is kept for the next call unless it is large: faulting its pages in
// again would cost small batches half their time.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      std::swap(start_, kept_), std::swap(size_, kept_size_);
    }
    if (size_ >= bytes) return;
    std::free(start_);  // too small: keeping it would only add to the new one
    start_ = allocated(bytes);
    size_ = start_ ? bytes : 0;
  }
  ~Workspace() {
    if (size_ <= LARGEST_KEPT) {
      const std::lock_guard<std::mutex> hold(mutex_);
      if (size_ > kept_size_) std::swap(start_, kept_), std::swap(size_, kept_size_);
    }
    std::free(start_);
  }
  Workspace(const Workspace&) = delete;
  char* start() const { return start_; }  // null: there is not enough memory

 private:
  static constexpr int64_t LARGEST_KEPT = 64 << 20;
  static inline std::mutex mutex_;
  static inline char* kept_ = nullptr;
  static inline int64_t kept_size_ = 0;
  char* start_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace
