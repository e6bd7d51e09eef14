// Instruction sets: which of them this processor runs, and which kernels serve a dtype.
#pragma once

#include "kernels.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

// The build names the sets it compiles: ALPHACL_SETS is SET(portable) SET(avx2) …
#define SET(name) const TileKernels* alphacl_kernels_##name(Dtype operands);
ALPHACL_SETS
#undef SET

namespace {

enum InstructionSet { portable, avx2, avx512, avx512_bf16, amx, amx_emulated, SET_COUNT };

using KernelsOf = const TileKernels* (*)(Dtype operands);

// Null for a set that was not compiled.
KernelsOf kernels_of(int32_t set) {
  switch (set) {
#define SET(name) \
  case name: return alphacl_kernels_##name;
    ALPHACL_SETS
#undef SET
    default: return nullptr;
  }
}

// Bit k is set where the processor and the operating system run instruction set k.
int32_t sets_of_processor() {
  int32_t sets = 1 << portable;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return sets;
  if (!(c & bit_OSXSAVE) || !(c & bit_FMA) || !(c & bit_F16C)) return sets;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return sets;
  sets |= 1 << avx2;
  constexpr unsigned F_DQ_BW_VL = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  if ((low & 0xe6) != 0xe6 || (b & F_DQ_BW_VL) != F_DQ_BW_VL) return sets;
  sets |= 1 << avx512;
  const bool has_amx = (d >> 22 & 1) && (d >> 24 & 1) && (low >> 17 & 3) == 3;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return sets;
  sets |= 1 << avx512_bf16 | 1 << amx_emulated;
#if defined(__linux__)
  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): a process must ask before it uses tiles.
  if (has_amx && kernels_of(amx) && syscall(SYS_arch_prctl, 0x1023, 18) == 0) sets |= 1 << amx;
#else
  (void)has_amx;
#endif
#endif
  return sets;
}

bool runs_here(int32_t set) {
  static const int32_t sets = sets_of_processor();
  return set >= 0 && set < SET_COUNT && (sets >> set & 1);
}

// The kernels for a dtype where instruction sets up to `set` may be used; null if `set` does not
// run here. Half precision without products of its own is multiplied as float32. Only a set that
// runs here is asked for its kernels: even the function that names them is compiled with its
// instructions.
const TileKernels* choose(int32_t set, int32_t dtype) {
  auto best = [set](Dtype operands) -> const TileKernels* {
    for (int32_t other = set; other >= 0; other--)
      if (runs_here(other) && kernels_of(other) && !(set == amx_emulated && other == amx))
        if (const TileKernels* kernels = kernels_of(other)(operands)) return kernels;
    return nullptr;
  };
  if (!runs_here(set)) return nullptr;
  const TileKernels* own = dtype == BFLOAT16 ? best(BFLOAT16) : nullptr;
  return own ? own : best(dtype == FLOAT64 ? FLOAT64 : FLOAT32);
}

}  // namespace
