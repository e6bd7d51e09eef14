// A CUDA runtime without a GPU: the kernels' library is linked to it in place of libcudart, and
// every launch goes to a function of the caller with the kernel's name and its argument. Of two
// devices that it pretends to have, number 0 has capability 8.0 and number 1 has 9.0.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

namespace {

struct Call {
  dim3 grid, block;
  size_t shared;
};

// Sets off a launch; returns null or what went wrong.
using Launch = const char* (*)(const char* kernel, unsigned x, unsigned y, unsigned threads, size_t shared, const void* argument);

Launch launch = nullptr;
int device = 0;
std::string problem;
Call call;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> known;  // filled while the library is being loaded
  return known;
}
std::map<const void*, int> more_shared;  // kernels that may have more than 48 KB

// What `copies.py` reads: base, columns, rows, pitch, rows of a box.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                const cuuint64_t* pitches, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool known = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 && rank == 2 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                     swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  const bool allowed = reinterpret_cast<uintptr_t>(base) % 16 == 0 && pitches[0] % 16 == 0 && pitches[0] < (1ull << 40) &&
                       sizes[0] >= 1 && sizes[1] >= 1 && sizes[0] <= (1ull << 32) && sizes[1] <= (1ull << 32) && box[0] == 64 &&
                       box[1] >= 1 && box[1] <= 256 && steps[0] == 1 && steps[1] == 1;
  if (!known || !allowed) return CUDA_ERROR_INVALID_VALUE;
  const uint64_t words[5] = {reinterpret_cast<uint64_t>(base), sizes[0], sizes[1], pitches[0], box[1]};
  std::memset(map, 0, sizeof(CUtensorMap));
  std::memcpy(map, words, sizeof(words));
  return CUDA_SUCCESS;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void ptx_set_launch(Launch given) { launch = given; }
EXPORT void ptx_set_device(int given) { device = given; }

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[function] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void*) {
  call = {grid, block, shared};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = call.grid, *block = call.block, *shared = call.shared;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  const void* function = kernel;
  problem.clear();
  if (!launch) problem = "no function takes launches";
  else if (!names().count(function)) problem = "launch of an unknown kernel";
  else if (grid.z != 1 || block.y != 1 || block.z != 1 || grid.y > 65535) problem = "a grid or block of an unknown form";
  else if (shared > (48u << 10) && shared > size_t(more_shared[function])) problem = "more shared memory than was asked for";
  if (problem.empty())
    if (const char* error = launch(names()[function].c_str(), grid.x, grid.y, block.x, shared, arguments[0])) problem = error;
  return problem.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t cudaGetLastError() { return problem.empty() ? cudaSuccess : cudaErrorLaunchFailure; }
const char* cudaGetErrorString(cudaError_t) { return problem.c_str(); }
cudaError_t cudaGetDevice(int* number) {
  *number = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = number ? 9 : 8;
  else if (attribute == cudaDevAttrComputeCapabilityMinor) *value = 0;
  else return cudaErrorInvalidValue;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->numRegs = device ? 168 : 16;  // of a kernel of hopper.h, which is empty on other devices
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const int most = device ? 227 << 10 : 163 << 10;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > most) {
    problem = "more shared memory than the device has";
    return cudaErrorInvalidValue;
  }
  more_shared[function] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
