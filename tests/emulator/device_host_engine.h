// How device_host.h runs a kernel's threads: fibres, the order in which they take turns, and what
// they wait for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>

#ifdef __has_feature  // Clang's way to say what GCC's macros say
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#elif __has_feature(thread_sanitizer) && !defined(__SANITIZE_THREAD__)
#define __SANITIZE_THREAD__ 1
#endif
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range(void* start, unsigned long bytes);
}
#endif

// --- fibres --------------------------------------------------------------------------------------

// alphacl_switch(&from, to) saves the registers that a callee must preserve on the stack, whose
// pointer goes to `from`.
#if defined(__linux__) && defined(__x86_64__)
#define ALPHACL_SAVED_REGISTERS 6
asm(R"(
  .pushsection .text
  .weak alphacl_switch
  .hidden alphacl_switch
  .type alphacl_switch, @function
alphacl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size alphacl_switch, .-alphacl_switch
  .popsection
)");
#elif defined(__linux__) && defined(__aarch64__)
#define ALPHACL_SAVED_REGISTERS 20
asm(R"(
  .pushsection .text
  .weak alphacl_switch
  .hidden alphacl_switch
  .type alphacl_switch, @function
alphacl_switch:
  stp d8, d9, [sp, #-160]!
  stp d10, d11, [sp, #16]
  stp d12, d13, [sp, #32]
  stp d14, d15, [sp, #48]
  stp x19, x20, [sp, #64]
  stp x21, x22, [sp, #80]
  stp x23, x24, [sp, #96]
  stp x25, x26, [sp, #112]
  stp x27, x28, [sp, #128]
  stp x29, x30, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x29, x30, [sp, #144]
  ldp x27, x28, [sp, #128]
  ldp x25, x26, [sp, #112]
  ldp x23, x24, [sp, #96]
  ldp x21, x22, [sp, #80]
  ldp x19, x20, [sp, #64]
  ldp d14, d15, [sp, #48]
  ldp d12, d13, [sp, #32]
  ldp d10, d11, [sp, #16]
  ldp d8, d9, [sp], #160
  ret
  .size alphacl_switch, .-alphacl_switch
  .popsection
)");
#else
#include <ucontext.h>
#endif
#ifdef ALPHACL_SAVED_REGISTERS
extern "C" __attribute__((visibility("hidden"))) void alphacl_switch(void** from, void* to);
#endif

namespace device {

namespace emulation {

constexpr size_t STACK = 256 << 10;
constexpr size_t GUARD = 64 << 10;  // a multiple of every page size
constexpr size_t MOST_SHARED = 227 << 10;
constexpr int MOST_WARPS = 32;

// A stack and what is on it; sanitizers want to be told.
struct Fibre {
  unsigned char* stack = nullptr;
  size_t size = 0;
#ifdef ALPHACL_SAVED_REGISTERS
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
#elif defined(__SANITIZE_THREAD__)
  void* sanitizer = nullptr;
#endif

  void start(void (*entry)()) {
    void* memory = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, GUARD, PROT_NONE);
    stack = static_cast<unsigned char*>(memory) + GUARD;
    size = STACK;
#ifdef ALPHACL_SAVED_REGISTERS
    // fresh memory is zero: registers, and the end of backtraces
    void** top = reinterpret_cast<void**>(stack + size);
#ifdef __x86_64__
    top[-2] = reinterpret_cast<void*>(entry);
    pointer = top - 2 - ALPHACL_SAVED_REGISTERS;
#else
    top[-1] = reinterpret_cast<void*>(entry);
    pointer = top - ALPHACL_SAVED_REGISTERS;
#endif
#else
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#endif
#if defined(__SANITIZE_THREAD__)
    sanitizer = __tsan_create_fiber(0);
#endif
  }

  void release() {
    munmap(stack - GUARD, GUARD + STACK);
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(sanitizer);
#endif
  }

  // Call where a fibre goes on: at its start and after switch_to().
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void switch_to(Fibre& next) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake, next.stack, next.size);
#elif defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(next.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef ALPHACL_SAVED_REGISTERS
    alphacl_switch(&pointer, next.pointer);
#else
    swapcontext(&context, &next.context);
#endif
    arrived();
  }
};

// What the emulation itself reads and writes is no business of ThreadSanitizer.
struct Quiet {
#if defined(__SANITIZE_THREAD__)
  static void begin() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  static void end() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__), AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
  static void begin() {}
  static void end() {}
#endif
  Quiet() { begin(); }
  ~Quiet() { end(); }
  Quiet(const Quiet&) = delete;
};

// What it does for the kernel is, also within a Quiet scope.
struct Audible {
  Audible() { Quiet::end(); }
  ~Audible() { Quiet::begin(); }
  Audible(const Audible&) = delete;
};

#if defined(__SANITIZE_THREAD__)
inline void acquire(void* token) { __tsan_acquire(token); }
inline void release(void* token) { __tsan_release(token); }
#else
inline void acquire(void*) {}
inline void release(void*) {}
#endif

// --- a block -------------------------------------------------------------------------------------

struct Stop {};  // thrown through kernel bodies to end a launch

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Thread : Fibre {
  int index, warp, lane;
  bool finished = true;
  const char* awaits = nullptr;  // the operation that it waits in
  std::vector<Copy> copies;
  int group = 0;  // of copies, which copy_commit() closes
};

struct Warp {
  uint32_t ready = 0;    // by place: order of lanes
  uint32_t arrived = 0;  // lanes at a collective operation
  const char* operation = nullptr;
  void* operands[32];  // on the lanes' stacks, which stand still meanwhile
  char token[2];
  int meetings = 0;  // sync_warp() so far
};

struct Barrier {
  int arrived = 0, expected = 0, phase = 0;
  uint32_t waiting[MOST_WARPS] = {};  // by place
  char token[2];  // by turns, so that nobody acquires what was released after his own phase
};

inline int& seed() {
  static int value = 0;
  return value;
}

struct Engine {
  Fibre main;
  std::vector<std::unique_ptr<Thread>> threads;  // as many as any launch had
  Warp warps[MOST_WARPS];
  Barrier barriers[16];
  int count = 0, unfinished = 0;  // threads of a block
  int x = 0, y = 0;
  unsigned char* memory = nullptr;
  size_t bytes = 0;
  void (*body)(const void*) = nullptr;
  const void* args = nullptr;
  std::string error;
  bool stopping = false;
  int warp_order[MOST_WARPS], lane_order[32], place[32];
  int running = 0;  // warp
  uint32_t random = 0;
  char begun, ended;  // tokens of a launch; blocks are unordered
  // What device_host_hopper.h adds to a block that uses it.
  std::shared_ptr<void> hopper;
  bool (*progress)(bool stuck) = nullptr;  // may let asynchronous work arrive; whether any did
  const char* (*unfinished_work)() = nullptr;  // of this thread at its end

  Engine();
  ~Engine() {
    Quiet quiet;
    for (auto& thread : threads) thread->release();
    threads.clear();
  }

  uint32_t next_random() { return (random = random * 1664525u + 1013904223u) >> 8; }

  void wake(int warp, uint32_t places) { warps[warp].ready |= places; }
  void wake(const Thread& thread) { wake(thread.warp, 1u << place[thread.lane]); }

  // Null if nobody is ready.
  Thread* pick() {
    const int used = count / 32;
    const bool any_order = seed() > 1;
    if (any_order && progress && next_random() % 4 == 0) progress(false);
    for (;;) {
      int warp = running;
      if (!warps[warp].ready || (any_order && next_random() % 8 == 0)) {
        const int first = any_order ? int(next_random() % unsigned(used)) : 0;
        for (int k = 0; k < used; k++) {
          warp = warp_order[(first + k) % used];
          if (warps[warp].ready) break;
        }
      }
      if (const uint32_t ready = warps[warp].ready) {
        running = warp;
        const int first = __builtin_ctz(ready);
        warps[warp].ready &= ~(1u << first);
        return threads[warp * 32 + lane_order[first]].get();
      }
      if (!progress || !progress(true)) return nullptr;
    }
  }

  // Sets the orders of the block's warps and lanes.
  void shuffle(int block) {
    const int used = count / 32;
    random = uint32_t(seed()) * 2654435761u + uint32_t(block) * 40503u;
    const auto arrange = [&](int* order, int n) {
      std::iota(order, order + n, 0);
      if (seed() == 1) std::reverse(order, order + n);
      if (seed() > 1)
        for (int k = n - 1; k > 0; k--) std::swap(order[k], order[next_random() % unsigned(k + 1)]);
    };
    arrange(warp_order, used);
    arrange(lane_order, 32);
    for (int k = 0; k < 32; k++) place[lane_order[k]] = k;
    running = warp_order[0];
  }

  std::string deadlock() const;
  void run_block(int block);
  const char* run(int grid_x, int grid_y, int block_threads, size_t shared_bytes);
};

inline thread_local Engine* engine = nullptr;
inline thread_local Thread* self = nullptr;

// Ends the launch; the first message counts.
[[noreturn]] __attribute__((format(printf, 1, 2), noinline)) inline void fail(const char* format, ...) {
  Quiet quiet;
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  const int where = std::snprintf(text, sizeof text, "block (%d, %d) thread %d: ", engine->x, engine->y, self->index);
  std::vsnprintf(text + where, sizeof text - size_t(where), format, arguments);
  va_end(arguments);
  if (!engine->stopping) engine->error = text;
  engine->stopping = true;
  throw Stop{};
}

// Lets others run. Whoever calls it has seen to it that somebody wakes this thread. Call it in a
// Quiet scope.
inline void wait(const char* operation) {
  Thread* const me = self;
  me->awaits = operation;
  Thread* const next = engine->pick();
  if (next != me) {
    if (next) self = next;
    me->switch_to(next ? *next : engine->main);
    if (engine->stopping) throw Stop{};
  }
  me->awaits = nullptr;
}

// What a fibre does: the kernel's body once a block.
inline void live() {
  Thread& me = *self;
  me.arrived();
  for (;;) {
    acquire(&engine->begun);
    try {
      if (!engine->stopping) engine->body(engine->args);
      Quiet quiet;
      if (!engine->stopping && !me.copies.empty()) fail("copy16 that nobody waited for (copy_commit, copy_wait)");
      if (!engine->stopping && engine->unfinished_work)
        if (const char* work = engine->unfinished_work()) fail("%s", work);
    } catch (const Stop&) {
    }
    release(&engine->ended);
    Thread* next = nullptr;
    {
      Quiet quiet;
      me.finished = true;
      engine->unfinished--;
      if (!engine->stopping) next = engine->pick();
      if (next) self = next;
    }
    me.switch_to(next ? *next : engine->main);
  }
}

inline Engine::Engine() {
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  void* lowest = nullptr;
  pthread_attr_getstack(&attributes, &lowest, &main.size);
  main.stack = static_cast<unsigned char*>(lowest);
  pthread_attr_destroy(&attributes);
#elif defined(__SANITIZE_THREAD__)
  main.sanitizer = __tsan_get_current_fiber();
#endif
}

inline std::string Engine::deadlock() const {
  std::string text = "block (" + std::to_string(x) + ", " + std::to_string(y) + "): deadlock:";
  for (int first = 0, last; first < count; first = last + 1) {
    const auto state = [&](int k) {
      const Thread& t = *threads[k];
      return t.finished ? std::string("have returned") : std::string("wait in ") + (t.awaits ? t.awaits : "nothing");
    };
    for (last = first; last + 1 < count && state(last + 1) == state(first);) last++;
    text += (first ? "; threads " : " threads ") + std::to_string(first) + "-" + std::to_string(last) + " " + state(first);
  }
  for (int id = 0; id < 16; id++)
    if (const Barrier& b = barriers[id]; b.arrived)
      text += "; barrier " + std::to_string(id) + " has " + std::to_string(b.arrived) + " of " + std::to_string(b.expected);
  return text;
}

inline void Engine::run_block(int block) {
  void* allocated = nullptr;
  if (posix_memalign(&allocated, 1024, std::max<size_t>(bytes, 1))) throw std::bad_alloc();
  std::memset(allocated, 0xff, bytes);
  memory = static_cast<unsigned char*>(allocated);

  shuffle(block);
  for (Warp& w : warps) w.ready = w.arrived = 0;
  for (Barrier& b : barriers) b.arrived = 0, std::fill_n(b.waiting, MOST_WARPS, 0u);
  unfinished = count;
  for (int k = 0; k < count; k++) {
    Thread& t = *threads[k];
    t.finished = false;
    t.awaits = nullptr;
    t.copies.clear();
    wake(t);
  }

  self = pick();
  main.switch_to(*self);
  if (unfinished && !stopping) error = deadlock(), stopping = true;
  for (int k = 0; k < count; k++) {
    self = threads[k].get();
    if (!self->finished) main.switch_to(*self);  // throws Stop, all the way up
  }
  self = nullptr;
  hopper.reset();
  progress = nullptr;
  unfinished_work = nullptr;

  std::free(allocated);
}

inline const char* Engine::run(int grid_x, int grid_y, int block_threads, size_t shared_bytes) {
  release(&begun);
  {
    Quiet quiet;
    error.clear();
    stopping = false;
    if (grid_x < 1 || grid_y < 1) return "a grid without blocks";
    if (shared_bytes > MOST_SHARED) return "more than 232448 bytes of shared memory";
    count = block_threads;
    bytes = shared_bytes;
    while (int(threads.size()) < count) {
      const int k = int(threads.size());
      threads.push_back(std::make_unique<Thread>());
      threads[k]->index = k, threads[k]->warp = k / 32, threads[k]->lane = k % 32;
      threads[k]->start(live);
    }
    const int blocks = grid_x * grid_y;
    int order = 0, stride = 1;
    if (seed() > 1) {  // a stride that shares no factor with their number visits each once
      order = seed() % blocks;
      for (stride = blocks / 2 + seed() % 7 + 1; std::gcd(stride, blocks) != 1;) stride++;
    }
    for (int k = 0; k < blocks && !stopping; k++) {
      const int block = seed() == 1 ? blocks - 1 - k : int((order + int64_t(k) * stride) % blocks);
      x = block % grid_x, y = block / grid_x;
      run_block(block);
    }
  }
  acquire(&ended);
  return stopping ? error.c_str() : nullptr;
}

inline Engine& own_engine() {
  Quiet quiet;
  static thread_local Engine of_this_thread;
  return *(engine = &of_this_thread);
}

// All lanes of a warp come here, each with a T of its own; the last to come calls execute(operands
// by lane).
template <class T, class Execute> void together(const char* operation, T* operands, Execute execute) {
  Quiet quiet;
  Thread& me = *self;
  Warp& warp = engine->warps[me.warp];
  if (warp.arrived && warp.operation != operation && std::strcmp(warp.operation, operation))
    fail("lanes of warp %d meet at different operations: %s and %s", me.warp, warp.operation, operation);
  warp.operation = operation;
  warp.operands[me.lane] = operands;
  warp.arrived |= 1u << me.lane;
  if (warp.arrived == 0xffffffffu) {
    warp.arrived = 0;
    T* all[32];
    for (int lane = 0; lane < 32; lane++) all[lane] = static_cast<T*>(warp.operands[lane]);
    execute(all);
    engine->wake(me.warp, 0xffffffffu);
  }
  wait(operation);
}

inline void meet(const char* operation, int id, int threads) {
  Quiet quiet;
  Thread& me = *self;
  Barrier& barrier = engine->barriers[id];
  if (threads % 32 || threads < 32 || threads > engine->count) fail("%s of %d threads", operation, threads);
  if (barrier.arrived && barrier.expected != threads) fail("%s of %d and of %d threads", operation, barrier.expected, threads);
  barrier.expected = threads;
  void* const token = &barrier.token[barrier.phase & 1];
  release(token);
  barrier.waiting[me.warp] |= 1u << engine->place[me.lane];
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.phase++;
    for (int warp = 0; warp < engine->count / 32; warp++) {
      engine->wake(warp, barrier.waiting[warp]);
      barrier.waiting[warp] = 0;
    }
  }
  wait(operation);
  acquire(token);
}

inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace emulation

}  // namespace device
