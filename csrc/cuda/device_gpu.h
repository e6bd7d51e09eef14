// device.h by PTX, for sm_80 and later.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <string>

#define DEVICE __device__ __forceinline__

namespace device {

DEVICE int thread() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE unsigned char* shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
DEVICE void sync() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
template <class T> DEVICE T shuffle_xor(T x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
DEVICE bool any(bool x) { return __any_sync(0xffffffffu, x); }

DEVICE uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

DEVICE void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(row)) : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(row)) : "memory");
}

#define ALPHACL_MMA(NAME, SHAPE)                                                                                              \
  DEVICE void NAME(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                                         \
    asm("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));     \
  }
ALPHACL_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
ALPHACL_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
ALPHACL_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef ALPHACL_MMA

DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
DEVICE float from_f16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
DEVICE double from_bits(uint64_t bits) { return __longlong_as_double(int64_t(bits)); }
DEVICE uint32_t to_bits(float x) { return __float_as_uint(x); }
DEVICE uint64_t to_bits(double x) { return uint64_t(__double_as_longlong(x)); }
DEVICE uint32_t rounded_to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- sm_90a --------------------------------------------------------------------------------------

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HOPPER = true;
#else
constexpr bool HOPPER = false;
#endif

using TensorMap = CUtensorMap;

DEVICE void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(arrivals) : "memory");
}
DEVICE void barrier_publish() {
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(b)) : "memory");
}
DEVICE void barrier_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(b)), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(uint64_t* b, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nwaiting:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra waiting;\n}"
      ::"r"(address(b)), "r"(parity) : "memory");
}
DEVICE void tensor_copy(void* to, const TensorMap* map, int x, int y, uint64_t* b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                   address(to)), "l"(map), "r"(x), "r"(y), "r"(address(b)) : "memory");
}

DEVICE void operands_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// How operands lie in shared memory: device_host_hopper.h.
DEVICE uint64_t matrix_descriptor(const void* start, int leading, int stride) {
  const auto field = [](uint32_t bytes) { return uint64_t(bytes >> 4 & 0x3fff); };
  return field(address(start)) | field(leading) << 16 | field(stride) << 32 | uint64_t(1) << 62;
}

DEVICE void product_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void product_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// A product is volatile, but a use of its registers is not: without this the compiler may read them
// before the wait, or set them after the fence.
template <int N> DEVICE void hold_registers(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> DEVICE void hold_registers(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}
template <int N> DEVICE void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void registers_less() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

enum class Factors { BF16, F16, TF32 };  // what a product of a warpgroup multiplies

// N = 64, 128, 256; the assembler wants every accumulator by name
template <Factors TYPE, int N, int TRANS_B> struct Product;

#define ALPHACL_TEN(T) "%" #T "0, %" #T "1, %" #T "2, %" #T "3, %" #T "4, %" #T "5, %" #T "6, %" #T "7, %" #T "8, %" #T "9"
#define ALPHACL_8(C, I)                                                                                                       \
  "+f"(C[I]), "+f"(C[I + 1]), "+f"(C[I + 2]), "+f"(C[I + 3]), "+f"(C[I + 4]), "+f"(C[I + 5]), "+f"(C[I + 6]), "+f"(C[I + 7])
#define ALPHACL_32(C, I) ALPHACL_8(C, I), ALPHACL_8(C, I + 8), ALPHACL_8(C, I + 16), ALPHACL_8(C, I + 24)
#define ALPHACL_64(C, I) ALPHACL_32(C, I), ALPHACL_32(C, I + 32)
#define ALPHACL_128(C, I) ALPHACL_64(C, I), ALPHACL_64(C, I + 64)
#define ALPHACL_30_NAMES ALPHACL_TEN() ", " ALPHACL_TEN(1) ", " ALPHACL_TEN(2) ", "
#define ALPHACL_60_NAMES ALPHACL_30_NAMES ALPHACL_TEN(3) ", " ALPHACL_TEN(4) ", " ALPHACL_TEN(5) ", "
#define ALPHACL_120_NAMES                                                                                                     \
  ALPHACL_60_NAMES ALPHACL_TEN(6) ", " ALPHACL_TEN(7) ", " ALPHACL_TEN(8) ", " ALPHACL_TEN(9) ", " ALPHACL_TEN(10) ", "       \
  ALPHACL_TEN(11) ", "
// Only factors of 16 bits may lie transposed, and their instructions alone say so.
#define ALPHACL_LAYOUT_16(X) X
#define ALPHACL_LAYOUT_8(X)
// DEPTH is 16 or 8 elements, 32 bytes; Pn are the names of the operands after the accumulators.
#define ALPHACL_PRODUCT(FACTORS, DEPTH, TYPE, N, NAMES, C, P0, P1, P2, P3, P4, P5, P6)                                        \
  template <int TRANS_B> struct Product<FACTORS, N, TRANS_B> {                                                                \
    static_assert(DEPTH == 16 || !TRANS_B, "an instruction for factors of 16 bits");                                          \
    static DEVICE void ss(float (&c)[N / 2], uint64_t a, uint64_t b, int add) {                                               \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " P2 ", 0;\n"                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k" #DEPTH ".f32." TYPE "." TYPE " {" NAMES "}, " P0 ", " P1        \
                   ", add, 1, 1" ALPHACL_LAYOUT_##DEPTH(", 0, " P3) ";\n}" : C : "l"(a), "l"(b), "r"(add), "n"(TRANS_B));     \
    }                                                                                                                         \
    static DEVICE void rs(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {                                   \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " P5 ", 0;\n"                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k" #DEPTH ".f32." TYPE "." TYPE                                    \
                   " {" NAMES "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", add, 1, 1" ALPHACL_LAYOUT_##DEPTH(", " P6) ";\n}" \
                   : C : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANS_B));                         \
    }                                                                                                                         \
  };
#define ALPHACL_PRODUCTS(FACTORS, DEPTH, TYPE)                                                                                \
  ALPHACL_PRODUCT(FACTORS, DEPTH, TYPE, 64, ALPHACL_30_NAMES "%30, %31", ALPHACL_32(c, 0), "%32", "%33", "%34", "%35",        \
                  "%36", "%37", "%38")                                                                                        \
  ALPHACL_PRODUCT(FACTORS, DEPTH, TYPE, 128, ALPHACL_60_NAMES "%60, %61, %62, %63", ALPHACL_64(c, 0), "%64", "%65", "%66",    \
                  "%67", "%68", "%69", "%70")                                                                                 \
  ALPHACL_PRODUCT(FACTORS, DEPTH, TYPE, 256, ALPHACL_120_NAMES "%120, %121, %122, %123, %124, %125, %126, %127",              \
                  ALPHACL_128(c, 0), "%128", "%129", "%130", "%131", "%132", "%133", "%134")
ALPHACL_PRODUCTS(Factors::BF16, 16, "bf16")
ALPHACL_PRODUCTS(Factors::F16, 16, "f16")
ALPHACL_PRODUCTS(Factors::TF32, 8, "tf32")
#undef ALPHACL_PRODUCTS
#undef ALPHACL_PRODUCT
#undef ALPHACL_LAYOUT_8
#undef ALPHACL_LAYOUT_16
#undef ALPHACL_120_NAMES
#undef ALPHACL_60_NAMES
#undef ALPHACL_30_NAMES
#undef ALPHACL_128
#undef ALPHACL_64
#undef ALPHACL_32
#undef ALPHACL_8
#undef ALPHACL_TEN

template <Factors TYPE, int N, int TRANS_B> DEVICE void product_ss(float (&c)[N / 2], uint64_t a, uint64_t b, int add) {
  Product<TYPE, N, TRANS_B>::ss(c, a, b, add);
}
template <Factors TYPE, int N, int TRANS_B>
DEVICE void product_rs(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {
  Product<TYPE, N, TRANS_B>::rs(c, a, b, add);
}

DEVICE void sync_some(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// --- launch --------------------------------------------------------------------------------------

template <class K>
__global__ void __launch_bounds__(K::THREADS, K::BLOCKS) entry(const __grid_constant__ typename K::Args args) {
  K::body(args);
}

template <class K>
const char* launch(int grid_x, int grid_y, size_t shared_bytes, const typename K::Args& args, void* stream) {
  if (shared_bytes > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(entry<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  entry<K><<<dim3(grid_x, grid_y), K::THREADS, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Why the current device cannot run K, or null: its driver may be too old for the runtime, or the
// library may hold no code for it. The text stays until this thread's next call.
template <class K> const char* why_not() {
  static thread_local std::string text;
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, entry<K>);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // the next launch must not find it
  int driver = 0;
  cudaDriverGetVersion(&driver);
  const auto version = [](int x) { return std::to_string(x / 1000) + "." + std::to_string(x % 1000 / 10); };
  text = std::string("cannot run on this device: ") + cudaGetErrorString(error) + " (compiled with CUDA " +
         version(CUDART_VERSION) + ", the driver serves " + (driver ? version(driver) : "none") + ")";
  return text.c_str();
}

// By K's registers: compiled for another architecture than sm_90a its body is empty.
template <class K> bool runs_hopper() {
  static std::atomic<signed char> known[64];  // by device: 0 not asked yet, 1 or -1
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
  if (!known[device]) {
    int major = 0, minor = 0;
    cudaFuncAttributes kernel{};
    const bool yes = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
                     major == 9 && minor == 0 && cudaFuncGetAttributes(&kernel, entry<K>) == cudaSuccess &&
                     kernel.numRegs > 64;
    known[device] = yes ? 1 : -1;
  }
  return known[device] > 0;
}

inline const char* tensor_map(TensorMap& map, const void* base, int64_t columns, int64_t rows, int64_t pitch, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {  // asked of the runtime, so that nothing links to the driver
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, pitches[1] = {cuuint64_t(pitch)};
  const cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const CUresult error = encode(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(base), sizes, pitches, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses the rows";
}

}  // namespace device
