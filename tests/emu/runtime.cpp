// The few functions of the CUDA runtime that the host files of csrc/cuda/ call, on host memory.
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "fibers.h"

const char* m2ae_emulator_error() {
  static std::string reported;
  reported = std::exchange(emu::last_error(), std::string());
  return reported.c_str();
}

extern "C" {

cudaError_t cudaGetLastError() {
  return emu::last_error().empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(
    void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}

// A test can pretend that a graph is being captured.
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = std::getenv("M2AE_EMU_CAPTURING") == nullptr ? cudaStreamCaptureStatusNone
                                                         : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = 2;  // few, so that blocks take several turns even in small tests
  return cudaSuccess;
}

}  // extern "C"
