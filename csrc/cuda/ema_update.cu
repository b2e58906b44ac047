// ema_update_ on CUDA. Contract and math: m2ae_kernels/ops/ema_update.py
//
// One launch for all tensors. A block takes chunks of kEmaChunk elements in turn; its first thread
// fetches the description of the chunk's pair into shared memory. A thread owns 4 neighbouring
// elements at a time and moves them as one access where all pointers allow it. Nothing else is
// shared, nothing is reduced: each element is read and written by one thread.
#include "ema_update.h"

#include "device.cuh"

namespace m2ae::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;

template <typename T>
struct alignas(kVector * sizeof(T)) Vector {
  T at[kVector];
};

__device__ double number(const EmaNumber& x) {
  if (x.device == nullptr) return x.value;
  if (x.element == Element::kFloat64) return *static_cast<const double*>(x.device);
  if (x.element == Element::kFloat32) return *static_cast<const float*>(x.device);
  return *static_cast<const uint8_t*>(x.device);
}

// torch's lerp: two branches, fused, and exact at both ends whatever the other side holds.
template <typename acc_t>
struct Average {
  acc_t weight;
  bool copies, keeps;

  __device__ explicit Average(double decay)
      : weight(acc_t(1 - decay)), copies(decay == 0), keeps(decay == 1) {}

  __device__ __forceinline__ acc_t operator()(acc_t target, acc_t source) const {
    if (copies) return source;
    if (keeps) return target;
    const acc_t difference = source - target;
    return weight < acc_t(0.5) ? fma(weight, difference, target)
                               : fma(weight - acc_t(1), difference, source);
  }
};

template <typename target_t, typename source_t>
__device__ __forceinline__ target_t new_target(target_t target, source_t source, double decay) {
  constexpr bool kDouble = std::is_same_v<target_t, double> || std::is_same_v<source_t, double>;
  using acc_t = std::conditional_t<kDouble, double, float>;
  const Average<acc_t> average(decay);
  if (average.keeps) return target;
  return convert<target_t>(average(convert<acc_t>(target), convert<acc_t>(source)));
}

template <typename target_t>
__device__ __forceinline__ void store_shadow(const EmaPair& pair, int64_t i, target_t x) {
  if (pair.shadow_element == Element::kFloat16)
    static_cast<__half*>(pair.shadow)[i] = convert<__half>(x);
  else
    static_cast<__nv_bfloat16*>(pair.shadow)[i] = convert<__nv_bfloat16>(x);
}

template <typename target_t, typename shadow_t>
__device__ __forceinline__ void store_shadow(
    const EmaPair& pair, int64_t i, const Vector<target_t>& x) {
  Vector<shadow_t> shadow;
#pragma unroll
  for (int j = 0; j < kVector; ++j) shadow.at[j] = convert<shadow_t>(x.at[j]);
  *reinterpret_cast<Vector<shadow_t>*>(static_cast<shadow_t*>(pair.shadow) + i) = shadow;
}

// All elements of the chunk lie in runs of memory.
template <typename target_t, typename source_t>
__device__ __forceinline__ void average_runs(
    const EmaPair& pair, int64_t begin, int64_t end, double decay) {
  auto* const target = static_cast<target_t*>(pair.target);              // [numel]
  const auto* const source = static_cast<const source_t*>(pair.source);  // [numel]
  const bool has_shadow = pair.shadow != nullptr;
  const uintptr_t positions = reinterpret_cast<uintptr_t>(target) / sizeof(target_t) |
                              reinterpret_cast<uintptr_t>(source) / sizeof(source_t) |
                              reinterpret_cast<uintptr_t>(pair.shadow) / sizeof(__half);
  const int64_t vectors_end =
      positions % kVector == 0 ? begin + (end - begin) / kVector * kVector : begin;
  for (int64_t i = begin + threadIdx.x * kVector; i < vectors_end; i += kThreads * kVector) {
    auto t = *reinterpret_cast<const Vector<target_t>*>(target + i);
    const auto s = *reinterpret_cast<const Vector<source_t>*>(source + i);
#pragma unroll
    for (int j = 0; j < kVector; ++j) t.at[j] = new_target(t.at[j], s.at[j], decay);
    *reinterpret_cast<Vector<target_t>*>(target + i) = t;
    if (!has_shadow) continue;
    if (pair.shadow_element == Element::kFloat16)
      store_shadow<target_t, __half>(pair, i, t);
    else
      store_shadow<target_t, __nv_bfloat16>(pair, i, t);
  }
  for (int64_t i = vectors_end + threadIdx.x; i < end; i += kThreads) {
    target[i] = new_target(target[i], source[i], decay);
    if (has_shadow) store_shadow(pair, i, target[i]);
  }
}

template <typename target_t>
__device__ void average_runs(const EmaPair& pair, int64_t begin, int64_t end, double decay) {
  switch (pair.source_element) {
    case Element::kFloat64:
      return average_runs<target_t, double>(pair, begin, end, decay);
    case Element::kBFloat16:
      return average_runs<target_t, __nv_bfloat16>(pair, begin, end, decay);
    case Element::kFloat16:
      return average_runs<target_t, __half>(pair, begin, end, decay);
    default:
      return average_runs<target_t, float>(pair, begin, end, decay);
  }
}

template <typename bytes_t>
__device__ void copy_runs(const EmaPair& pair, int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const bytes_t x = static_cast<const bytes_t*>(pair.source)[i];
    static_cast<bytes_t*>(pair.target)[i] = x;
    if (pair.shadow != nullptr) static_cast<bytes_t*>(pair.shadow)[i] = x;
  }
}

// The slow lane: one code for all dtypes, element by element.
__device__ double load(const void* from, Element element, int64_t i) {
  switch (element) {
    case Element::kFloat64:
      return static_cast<const double*>(from)[i];
    case Element::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
    case Element::kFloat16:
      return __half2float(static_cast<const __half*>(from)[i]);
    default:
      return static_cast<const float*>(from)[i];
  }
}

__device__ void store(void* to, Element element, int64_t i, double x) {
  switch (element) {
    case Element::kFloat64:
      static_cast<double*>(to)[i] = x;
      break;
    case Element::kBFloat16:
      static_cast<__nv_bfloat16*>(to)[i] = convert<__nv_bfloat16>(x);
      break;
    case Element::kFloat16:
      static_cast<__half*>(to)[i] = convert<__half>(x);
      break;
    default:
      static_cast<float*>(to)[i] = float(x);
  }
}

__device__ void copy(void* to, int64_t i, const void* from, int64_t j, Element element) {
  switch (element) {
    case Element::kBytes1:
      static_cast<uint8_t*>(to)[i] = static_cast<const uint8_t*>(from)[j];
      break;
    case Element::kBytes2:
      static_cast<uint16_t*>(to)[i] = static_cast<const uint16_t*>(from)[j];
      break;
    case Element::kBytes4:
      static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[j];
      break;
    default:
      static_cast<uint64_t*>(to)[i] = static_cast<const uint64_t*>(from)[j];
  }
}

__device__ void update_strided(
    const EmaPair& pair, const EmaLayout& layout, int64_t begin, int64_t end, double decay) {
  const bool in_double =
      pair.target_element == Element::kFloat64 || pair.source_element == Element::kFloat64;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    int64_t offsets[3] = {0, 0, 0};  // of the element in target, source and shadow
    int64_t rest = i;
    for (int64_t d = layout.dims - 1; d >= 0; --d) {
      const int64_t at = rest % layout.sizes[d];
      rest /= layout.sizes[d];
#pragma unroll
      for (int t = 0; t < 3; ++t) offsets[t] += at * layout.strides[t][d];
    }
    if (!is_floating(pair.target_element)) {
      copy(pair.target, offsets[0], pair.source, offsets[1], pair.target_element);
      if (pair.shadow != nullptr)
        copy(pair.shadow, offsets[2], pair.target, offsets[0], pair.target_element);
      continue;
    }
    const double t = load(pair.target, pair.target_element, offsets[0]);
    const double s = load(pair.source, pair.source_element, offsets[1]);
    if (decay != 1) {
      const double x =
          in_double ? new_target(t, s, decay) : double(new_target(float(t), float(s), decay));
      store(pair.target, pair.target_element, offsets[0], x);
    }
    if (pair.shadow != nullptr)
      store(
          pair.shadow,
          pair.shadow_element,
          offsets[2],
          load(pair.target, pair.target_element, offsets[0]));
  }
}

__global__ void __launch_bounds__(kThreads)
    ema_update_kernel(EmaTable table, EmaNumber decay_number, EmaNumber found_inf) {
  if (number(found_inf) != 0) return;
  const double decay = number(decay_number);
  __shared__ EmaPair pair;
  __shared__ int64_t begin;

  for (int64_t c = blockIdx.x; c < table.num_chunks; c += gridDim.x) {
    __syncthreads();  // the last chunk's readers are done with the description
    if (threadIdx.x == 0) {
      const EmaChunk chunk = table.chunks[c];
      pair = table.pairs[chunk.pair];
      begin = chunk.index * kEmaChunk;
    }
    __syncthreads();
    const int64_t end = begin + kEmaChunk < pair.numel ? begin + kEmaChunk : pair.numel;
    if (pair.layout != kEmaFlat) {
      update_strided(pair, table.layouts[pair.layout], begin, end, decay);
      continue;
    }
    switch (pair.target_element) {
      case Element::kFloat32:
        average_runs<float>(pair, begin, end, decay);
        break;
      case Element::kFloat64:
        average_runs<double>(pair, begin, end, decay);
        break;
      case Element::kBFloat16:
        average_runs<__nv_bfloat16>(pair, begin, end, decay);
        break;
      case Element::kFloat16:
        average_runs<__half>(pair, begin, end, decay);
        break;
      case Element::kBytes1:
        copy_runs<uint8_t>(pair, begin, end);
        break;
      case Element::kBytes2:
        copy_runs<uint16_t>(pair, begin, end);
        break;
      case Element::kBytes4:
        copy_runs<uint32_t>(pair, begin, end);
        break;
      case Element::kBytes8:
        copy_runs<uint64_t>(pair, begin, end);
        break;
    }
  }
}

}  // namespace

cudaError_t ema_update_launch(
    const EmaTable& table, EmaNumber decay, EmaNumber found_inf, int blocks, cudaStream_t stream) {
  M2AE_LAUNCH((ema_update_kernel), blocks, kThreads, 0, stream, table, decay, found_inf);
  return cudaGetLastError();
}

}  // namespace m2ae::cuda
