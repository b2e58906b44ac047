// What the host functions of csrc/cuda/ ask of torch: the device, the stream, registration. With
// M2AE_EMU (tests/emulator.py) the same host code runs on CPU tensors, registered as ops of the
// namespace m2ae_emulated.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifdef M2AE_EMU

#define M2AE_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(m2ae_emulated, CPU, m)
#define M2AE_CUDA_CHECK(call) \
  STD_TORCH_CHECK((call) == cudaSuccess, "CUDA error in emulation: ", m2ae_emulator_error())

const char* m2ae_emulator_error();

namespace m2ae::cuda {

inline int device_guard(const torch::stable::Tensor&) {
  return 0;
}

inline cudaStream_t current_stream(const torch::stable::Tensor&) {
  return nullptr;
}

}  // namespace m2ae::cuda

#else

#define M2AE_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CUDA, m)
#define M2AE_CUDA_CHECK(call) STD_CUDA_CHECK(call)

namespace m2ae::cuda {

// The tensor's device is the current one while the result lives.
inline torch::stable::accelerator::DeviceGuard device_guard(const torch::stable::Tensor& tensor) {
  return torch::stable::accelerator::DeviceGuard(tensor.get_device_index());
}

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace m2ae::cuda

#endif
