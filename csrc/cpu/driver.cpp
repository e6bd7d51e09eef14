// A sweep from its plan to its results, and the plain C interface that backend/cpu.py loads with
// ctypes. No header of torch or Python is needed: one binary serves every version of both.

#include "../generated/row_codes.h"
#include "collect.h"
#include "ids.h"
#include "isa.h"
#include "prepare.h"
#include "schedule.h"
#include "step.h"
#include "threads.h"
#include "workspace.h"

namespace {

// T is the accumulation dtype.
template <class T> Status sweep(const Sweep& s, const TileKernels& kernels) {
  WithoutInterpreter<Sweep> interpreter(s);
  const Plan plan(s, kernels);
  const Workspace workspace(plan.bytes);
  char* const memory = workspace.start();
  if (!memory) return NO_MEMORY;  // before anything else is allocated: a sweep too large ends here

  const std::vector<Block> blocks = place_blocks(plan, memory);
  const RowVectors vectors = pad_row_vectors<T>(plan, blocks, memory);
  const Schedule schedule(plan);
  Progress progress(memory + plan.rounds.at, plan.blocks);
  auto* const kept = static_cast<KeptTiles*>(s.kept);
  if (kept && !s.filled)
    kept->keep(s.form == Form::CONSTANT ? Keep::FACTORS : Keep::SIMILARITIES, plan.stride * plan.stride * int64_t(sizeof(T)),
               s.largest_t || s.guide ? kernels.mark_bytes(plan.stride) : 0, schedule.tiles());
  in_parallel(plan.threads, [&](int thread) {
    void* mine = memory + plan.thread.at + thread * plan.thread.size;
    run_thread(
        plan, schedule, progress, [&](int64_t b) { kernels.pack(s, blocks[b], mine); },
        [&](int64_t number, int64_t i, int64_t j) {
          kernels.tile(s, vectors, blocks[i], blocks[j], mine, kept ? kept->tile(number, s.filled) : KeptTile{});
        },
        [&](int64_t b) { kernels.unpack(s, blocks[b], vectors.df_scale, mine); },
        [&] { return interpreter.interrupted(); });
  });
  if (progress.status() == OK) collect<T>(plan, blocks, vectors);
  return progress.status();
}

// Whether a sweep or a step has a user's function, or names a kind.
template <class Call> bool has_function(const Call& call) {
  return call.values || (call.kind >= 0 && call.kind < KIND_COUNT);
}

// Pairs of rows in chunks; a row is done by itself, so the number of threads changes nothing.
int32_t run_rows(const PairRows& p, decltype(TileKernels::normalize) TileKernels::*function) {
  const TileKernels* kernels = choose(p.instruction_set, p.dtype == FLOAT64 ? FLOAT64 : FLOAT32);
  if (!kernels) return UNSUPPORTED;
  constexpr int64_t CHUNK = 64;
  const int threads = p.threads > 1 ? p.threads : 1;
  const int64_t thread_bytes = aligned(2 * (p.dim + 64) * (p.dtype == FLOAT64 ? 8 : 4));
  const Workspace workspace(threads * thread_bytes);
  if (!workspace.start()) return NO_MEMORY;
  std::atomic<int64_t> next{0};
  in_parallel(threads, [&](int thread) {
    for (int64_t i; (i = next.fetch_add(CHUNK)) < p.n_pairs;)
      (kernels->*function)(p, i, std::min(i + CHUNK, p.n_pairs), workspace.start() + thread * thread_bytes);
  });
  return OK;
}

int32_t run_unit_rows(const UnitRows& u) {
  const TileKernels* kernels = choose(u.instruction_set, u.dtype == FLOAT64 ? FLOAT64 : FLOAT32);
  if (!kernels) return UNSUPPORTED;
  constexpr int64_t CHUNK = 128;
  std::atomic<int64_t> next{0};
  in_parallel(u.threads > 1 ? u.threads : 1, [&](int) {
    for (int64_t i; (i = next.fetch_add(CHUNK)) < u.n;) kernels->unit_rows(u, i, std::min(i + CHUNK, u.n));
  });
  return OK;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Sizes of the structs that Python mirrors.
int32_t alphacl_cpu_sweep_size() { return sizeof(Sweep); }
int32_t alphacl_cpu_rows_size() { return sizeof(PairRows); }
int32_t alphacl_cpu_step_size() { return sizeof(Step); }
int32_t alphacl_cpu_unit_rows_size() { return sizeof(UnitRows); }
int32_t alphacl_cpu_codes() { return CODES_CHECKSUM; }
int32_t alphacl_cpu_row_steps() { return ROW_STEPS_CHECKSUM; }

const char* alphacl_cpu_build() { return ALPHACL_BUILD; }
const char* alphacl_cpu_sources() { return ALPHACL_SOURCES; }
// What users' functions are compiled with, as JSON (tools/build_cpu.py).
const char* alphacl_cpu_recipe() { return ALPHACL_RECIPE; }

// Bit k is set if instruction set k is compiled in (bits 0…) and runs here (bits 16…).
int32_t alphacl_cpu_instruction_sets() {
  int32_t mask = 0;
  for (int32_t set = 0; set < SET_COUNT; set++)
    if (kernels_of(set)) mask |= 1 << set | runs_here(set) << (16 + set);
  return mask;
}

// The instruction set whose kernels serve a dtype when sets up to `set` may be used, or null. Their
// blocks are fastest at multiples of *multiple rows, up to *largest, where there are *fewest or more.
const char* alphacl_cpu_kernels(int32_t set, int32_t dtype, int32_t* multiple, int32_t* largest, int32_t* fewest) {
  const TileKernels* kernels = choose(set, dtype);
  if (!kernels) return nullptr;
  *multiple = int32_t(kernels->row_multiple), *largest = int32_t(kernels->largest_block);
  *fewest = int32_t(kernels->fewest_blocks);
  return kernels->instruction_set;
}

int32_t alphacl_cpu_sweep(const Sweep* s) {
  const TileKernels* kernels = choose(s->instruction_set, s->dtype);
  if (!kernels || !has_function(*s)) return UNSUPPORTED;
  try {
    return kernels->accumulate == FLOAT64 ? sweep<double>(*s, *kernels) : sweep<float>(*s, *kernels);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}

int32_t alphacl_cpu_step(const Step* s) {
  const TileKernels* kernels = choose(s->instruction_set, dtype_of_rows(*s));
  const TileKernels* rows = choose(s->instruction_set, s->dtype == FLOAT64 ? FLOAT64 : FLOAT32);
  if (!kernels || !rows || !has_function(*s)) return UNSUPPORTED;
  try {
    return kernels->accumulate == FLOAT64 ? run_step<double>(*s, *kernels, *rows) : run_step<float>(*s, *kernels, *rows);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}

// Memory in which one sweep keeps tiles for the next: `kept` of a Sweep. Null: there is none.
void* alphacl_cpu_keep(int64_t bytes) { return new (std::nothrow) KeptTiles(bytes); }
void alphacl_cpu_forget(void* kept) { delete static_cast<KeptTiles*>(kept); }

int32_t alphacl_cpu_same_id_size() { return sizeof(SameIdBlock); }
int32_t alphacl_cpu_same_id(const SameIdBlock* b) {
  const TileKernels* kernels = choose(b->instruction_set, b->dtype);
  if (!kernels) return UNSUPPORTED;
  const int64_t row_bytes = aligned((b->cols + 16) * (b->dtype == FLOAT64 ? 8 : 4));
  const Workspace workspace(b->threads * row_bytes);
  if (!workspace.start()) return NO_MEMORY;
  constexpr int64_t CHUNK = 16;
  std::atomic<int64_t> next{0};
  in_parallel(b->threads, [&](int thread) {
    for (int64_t r; (r = next.fetch_add(CHUNK)) < b->rows;)
      kernels->same_id(*b, r, std::min(r + CHUNK, b->rows), workspace.start() + thread * row_bytes);
  });
  return OK;
}

// Cosine similarity: unit rows, their inverse norms and the positives' similarities; the last step
// of the gradient.
int32_t alphacl_cpu_normalize(const PairRows* p) { return run_rows(*p, &TileKernels::normalize); }
int32_t alphacl_cpu_finish(const PairRows* p) { return run_rows(*p, &TileKernels::finish); }
int32_t alphacl_cpu_unit_rows(const UnitRows* u) { return run_unit_rows(*u); }

// See number_ids; `n_neg` holds floats or, with dtype FLOAT64, doubles.
int32_t alphacl_cpu_number_ids(const int64_t* ids, int64_t n, int64_t split, int64_t anchors, int32_t dtype, int32_t* numbers, void* n_neg,
                               bool* empty) {
  try {
    if (dtype == FLOAT64) number_ids(ids, n, split, anchors, numbers, static_cast<double*>(n_neg), empty);
    else number_ids(ids, n, split, anchors, numbers, static_cast<float*>(n_neg), empty);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  return OK;
}

// exp (which = 0), log (1) or the factor exp (2) of n numbers, 64-byte aligned, n a multiple of 16.
int32_t alphacl_cpu_function(int32_t set, int32_t dtype, int32_t which, const void* x, void* y, int64_t n) {
  const TileKernels* kernels = choose(set, dtype);
  if (!kernels) return UNSUPPORTED;
  (which == 0 ? kernels->exponential : which == 1 ? kernels->logarithm : kernels->factor)(x, y, n);
  return OK;
}

}  // extern "C"
#pragma GCC visibility pop
