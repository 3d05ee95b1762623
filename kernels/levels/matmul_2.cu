// Matrix product, level 2: coalesced loads and stores.
//
// Changes  One line: neighbouring threads have neighbouring columns. A warp now reads 32 neighbours of B and writes 32
//          neighbours of C in one or two transactions, and all its lanes read the same value of A.
// Math     C = A B
// Shapes   as matmul_1.cu
// Plan     thread i owns row i / n, column i % n
// Numerics as matmul_1.cu, bit for bit
// Cost     2 m n k flops, and still two loads for each product: the load unit takes one warp a clock, so 7 TFLOP/s is its limit.
//          H100, bf16, 8192^3, 2026-11-27: 3.7 TFLOP/s, 0.005 of the ceiling of 800 (5 predicted). sm_90a: 32 registers.
#include "prim/real.cuh"

KERNEL_FLAT(level_matmul_2)(real* c, const real* a, const real* b, int m, int n, int k) {
  const long long i = FLAT_INDEX;
  if (i >= (long long)m * n) return;
  const long long row = i / n, col = i % n;
  float sum = 0.f;
  for (int p = 0; p < k; ++p) sum = fmaf(to_float(a[row * k + p]), to_float(b[(long long)p * n + col]), sum);
  c[row * n + col] = to_real(sum);
}
