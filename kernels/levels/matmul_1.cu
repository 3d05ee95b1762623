// Matrix product, level 1: the definition, one thread per element of C.
//
// Changes  Nothing yet. Neighbouring threads have neighbouring rows, so a warp's load touches 32 rows of A and its store 32
//          rows of C: 32 transactions each, for data that would fit into one or two.
// Math     C = A B
// Shapes   A [m, k], B [k, n], C [m, n] real, without gaps. For all levels: m % 128 = 0, n % 256 = 0, k % 64 = 0
// Plan     thread i owns row i % m, column i / m
// Numerics one chain of fmaf over k from left to right; C is rounded when stored
// Cost     2 m n k flops. H100, bf16, 8192^3, 2026-11-27: 0.5 TFLOP/s, 0.001 of the ceiling of 800 (1 predicted). sm_90a: 32
//          registers.
#include "prim/real.cuh"

KERNEL_FLAT(level_matmul_1)(real* c, const real* a, const real* b, int m, int n, int k) {
  const long long i = FLAT_INDEX;
  if (i >= (long long)m * n) return;
  const long long row = i % m, col = i / m;
  float sum = 0.f;
  for (int p = 0; p < k; ++p) sum = fmaf(to_float(a[row * k + p]), to_float(b[(long long)p * n + col]), sum);
  c[row * n + col] = to_real(sum);
}
