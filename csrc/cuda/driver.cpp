// The plain C interface: binding.cpp calls it with torch's tensors, tests with their own memory.
#include "launch.h"

#define ALPHACL_EXPORT extern "C" __attribute__((visibility("default")))

namespace alphacl {
#define ALPHACL_DECLARE(DTYPE)                                                   \
  template <> const char* sweep<DTYPE>(bool, const Sweep&, int, void*);          \
  template <> const char* rows<DTYPE>(bool, const PairRows&, void*);             \
  template <> bool has_hopper<DTYPE>();
ALPHACL_DECLARE(BFLOAT16)
ALPHACL_DECLARE(FLOAT16)
ALPHACL_DECLARE(TFLOAT32)
ALPHACL_DECLARE(FLOAT32)
ALPHACL_DECLARE(FLOAT64)
#undef ALPHACL_DECLARE
}  // namespace alphacl

ALPHACL_EXPORT const char* alphacl_cuda_sweep(int32_t gradient, int32_t dtype, const Sweep* a, int32_t row_blocks, void* stream) {
  using namespace alphacl;
  switch (dtype) {
    case BFLOAT16: return sweep<BFLOAT16>(gradient, *a, row_blocks, stream);
    case FLOAT16: return sweep<FLOAT16>(gradient, *a, row_blocks, stream);
    case TFLOAT32: return sweep<TFLOAT32>(gradient, *a, row_blocks, stream);
    case FLOAT32: return sweep<FLOAT32>(gradient, *a, row_blocks, stream);
    case FLOAT64: return sweep<FLOAT64>(gradient, *a, row_blocks, stream);
    default: return "unknown dtype";
  }
}

ALPHACL_EXPORT const char* alphacl_cuda_rows(int32_t finish, const PairRows* a, void* stream) {
  using namespace alphacl;
  switch (a->dtype) {
    case BFLOAT16: return rows<BFLOAT16>(finish, *a, stream);
    case FLOAT16: return rows<FLOAT16>(finish, *a, stream);
    case FLOAT32: return rows<FLOAT32>(finish, *a, stream);
    case FLOAT64: return rows<FLOAT64>(finish, *a, stream);
    default: return "unknown dtype";
  }
}

ALPHACL_EXPORT int32_t alphacl_cuda_largest_features(int32_t dtype) { return alphacl::largest_features(Dtype(dtype)); }

// Sets hopper_mode (launch.h) and returns the one before.
ALPHACL_EXPORT int32_t alphacl_cuda_hopper(int32_t mode) { return alphacl::hopper_mode.exchange(mode); }

// Whether launches on the current device go to the kernels of hopper.h, where they serve one.
ALPHACL_EXPORT int32_t alphacl_cuda_has_hopper() { return alphacl::hopper_mode && alphacl::has_hopper<BFLOAT16>(); }

#ifdef ALPHACL_EMULATED
#include "device.h"

ALPHACL_EXPORT void alphacl_cuda_schedule(int32_t seed) { device::schedule(seed); }
#endif
