// Products of tiles on the calling thread, with float32 sums.
//
// They are oneDNN's brgemm, which libtorch exports under at::native::cpublas but outside its stable
// ABI: it is looked up when first used, tried, and only then trusted. Without it, the sgemm_ of
// libtorch's BLAS; without that, plain loops.
#pragma once

#include <cstdint>

namespace m2ae::cpu {

// What the rows of a product's operands are made of.
enum class Operand : uint8_t { kFloat32 = 0, kBFloat16 = 1 };

constexpr int kOperands = 2;

inline int64_t bytes_of(Operand operand) {
  return operand == Operand::kFloat32 ? 4 : 2;
}

// The same in a process from the first call on, so that a backward finds what its forward left.
bool has_bfloat16_gemm();

// C [M, N] = A B, or += if add. A [M, K]; B [K, N], but as [K / 2, N, 2] of bfloat16: two rows in
// turn. lda, ldb, ldc: elements from one row to the next; of bfloat16 ldb: pairs. K is even then.
// Each new (M, N, K, lda, ldb, ldc, add) costs a thread about 0.1 ms of compilation.
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
    int64_t ldc);

// To be called by each thread after its last product of an op.
void gemm_release(Operand operand);

}  // namespace m2ae::cpu
