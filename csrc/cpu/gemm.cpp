#include "gemm.h"

#include <dlfcn.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace m2ae::cpu {
namespace {

using torch::headeronly::BFloat16;

template <typename T>
using Brgemm = void(
    long M,
    long N,
    long K,
    long lda,
    long ldb,
    long ldc,
    bool add,
    const T* a,
    const T* b,
    float* c,
    bool is_vnni);
using Release = void(bool is_vnni);
using Sgemm = void(
    const char*,
    const char*,
    const int*,
    const int*,
    const int*,
    const float*,
    const float*,
    const int*,
    const float*,
    const int*,
    const float*,
    float*,
    const int*);

template <typename Function>
Function* find(const char* symbol) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, symbol));
}

// [16, 32] times [32, 16], of ones and twos.
template <typename T>
bool multiplies(Brgemm<T>* brgemm) {
  T a[16 * 32], b[32 * 16];
  float c[16 * 16];
  std::fill_n(a, 16 * 32, T(1.0f));
  std::fill_n(b, 32 * 16, T(2.0f));
  std::fill_n(c, 16 * 16, 0.0f);
  try {
    brgemm(16, 16, 32, 32, 16, 16, false, a, b, c, sizeof(T) == 2);
  } catch (...) {  // torch's way to say that it has no such kernel
    return false;
  }
  return std::all_of(c, c + 16 * 16, [](float x) { return x == 64; });
}

bool supports(Operand operand) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (operand == Operand::kFloat32)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  // Follows ATEN_CPU_CAPABILITY, as everything that depends on the instruction set.
  return __builtin_cpu_supports("avx512bf16") && &kernels() == &kAvx512;
#else
  return false;
#endif
}

struct Found {
  Brgemm<float>* float32;
  Brgemm<BFloat16>* bfloat16;
  Release* release;
  Sgemm* sgemm;

  Found() {
    const char* const kFloat32 = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb";
    const char* const kBFloat16 = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb";
    release = find<Release>("_ZN2at6native7cpublas14brgemm_releaseEb");
    sgemm = find<Sgemm>("sgemm_");
    const bool may = release != nullptr && sizeof(long) == 8;
    float32 = may && supports(Operand::kFloat32) ? find<Brgemm<float>>(kFloat32) : nullptr;
    bfloat16 = may && supports(Operand::kBFloat16) ? find<Brgemm<BFloat16>>(kBFloat16) : nullptr;
    if (float32 != nullptr && !multiplies(float32)) float32 = nullptr;
    if (bfloat16 != nullptr && !multiplies(bfloat16)) bfloat16 = nullptr;
  }
};

const Found& found() {
  static const Found found;
  return found;
}

// `group`: how many rows of B lie in turn.
template <typename T>
void plain_gemm(
    int64_t M,
    int64_t N,
    int64_t K,
    const T* a,
    int64_t lda,
    const T* b,
    int64_t ldb,
    int64_t group,
    bool add,
    float* c,
    int64_t ldc) {
  for (int64_t i = 0; i < M; ++i) {
    float* const row = c + i * ldc;
    if (!add) std::fill_n(row, N, 0.0f);
    for (int64_t k = 0; k < K; ++k) {
      const float factor = a[i * lda + k];
      const T* const of_b = b + k / group * group * ldb + k % group;
      for (int64_t j = 0; j < N; ++j) row[j] += factor * float(of_b[j * group]);
    }
  }
}

}  // namespace

bool has_bfloat16_gemm() {
  return found().bfloat16 != nullptr;
}

void gemm(
    Operand operand,
    int64_t M,
    int64_t N,
    int64_t K,
    const void* a,
    int64_t lda,
    const void* b,
    int64_t ldb,
    bool add,
    float* c,
    int64_t ldc) {
  if (operand == Operand::kBFloat16) {
    const auto *x = static_cast<const BFloat16*>(a), *y = static_cast<const BFloat16*>(b);
    try {
      found().bfloat16(M, N, K, lda, ldb, ldc, add, x, y, c, true);
    } catch (...) {  // since the first call, torch was told to do without oneDNN
      plain_gemm(M, N, K, x, lda, y, ldb, 2, add, c, ldc);
    }
    return;
  }
  const auto *x = static_cast<const float*>(a), *y = static_cast<const float*>(b);
  if (found().float32 != nullptr) {
    found().float32(M, N, K, lda, ldb, ldc, add, x, y, c, false);
  } else if (found().sgemm != nullptr) {
    // Column by column, as BLAS counts, this is C^T = B^T A^T.
    const int n = int(N), m = int(M), k = int(K), ld_a = int(lda), ld_b = int(ldb), ld_c = int(ldc);
    const float one = 1, beta = add ? 1 : 0;
    found().sgemm("N", "N", &n, &m, &k, &one, y, &ld_b, x, &ld_a, &beta, c, &ld_c);
  } else {
    plain_gemm(M, N, K, x, lda, y, ldb, 1, add, c, ldc);
  }
}

void gemm_release(Operand operand) {
  if (found().release != nullptr) found().release(operand == Operand::kBFloat16);
}

}  // namespace m2ae::cpu
