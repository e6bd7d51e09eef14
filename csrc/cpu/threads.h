// Threads: a region in which several of them run, and the interpreter's lock while they do.
#pragma once

#include <chrono>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

// Runs work(0) … work(threads − 1), each in a thread, work(0) in the calling one; fewer may run.
template <class Work> void in_parallel(int threads, Work&& work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
  work(omp_get_thread_num());
#else
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (int t = 1; t < threads; t++) others.emplace_back(work, t);
  } catch (const std::system_error&) {  // continue with the threads that have started
  }
  work(0);
  for (auto& t : others) t.join();
#endif
}

// Releases the interpreter's lock for its lifetime. `Call` has the three functions of `Sweep`.
template <class Call> class WithoutInterpreter {
 public:
  explicit WithoutInterpreter(const Call& call) : call_(call), lock_(call.release_lock ? call.release_lock() : nullptr) {}
  ~WithoutInterpreter() {
    if (call_.take_lock) call_.take_lock(lock_);
  }
  WithoutInterpreter(const WithoutInterpreter&) = delete;

  // Whether a signal has raised an exception. Only the calling thread asks, every 200 ms.
  bool interrupted() {
    if (!call_.check_signals || std::this_thread::get_id() != caller_) return false;
    const auto now = std::chrono::steady_clock::now();
    if (now - asked_ <= std::chrono::milliseconds(200)) return false;
    asked_ = now;
    call_.take_lock(lock_);
    const bool raised = call_.check_signals();
    lock_ = call_.release_lock();
    return raised;
  }

 private:
  const Call& call_;
  void* lock_;
  const std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

}  // namespace
