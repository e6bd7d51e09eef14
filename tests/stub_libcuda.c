// A libcuda.so.1 without a GPU: it writes down what Triton's launchers start. The low byte of a
// kernel's handle is the number of its parameters, of which eight bytes each are kept.
#include <cuda.h>
#include <stdint.h>
#include <string.h>

static uint64_t written[1 << 16];
static uint64_t count;

uint64_t* stub_written(void) { return written; }
uint64_t stub_count(void) { return count; }
void stub_clear(void) { count = 0; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** params, void** extra) {
  const uint64_t parameters = (uint64_t)f & 0xff;
  const uint64_t head[] = {7 + parameters, (uint64_t)f, config->gridDimX, config->gridDimY,
                           config->blockDimX, config->sharedMemBytes, (uint64_t)config->hStream};
  memcpy(written + count, head, sizeof head);
  count += 7;
  for (uint64_t k = 0; k < parameters; ++k) memcpy(written + count++, params[k], 8);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr ptr) {
  memcpy(data, &ptr, sizeof ptr);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "an error";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int number) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) {
  return CUDA_SUCCESS;
}
