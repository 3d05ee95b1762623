// Matrix product, level 3: tiles in shared memory.
//
// Changes  A block copies a 32 x 32 tile of A and of B into shared memory once, and uses each value 32 times from
//          there: a 32nd of the reads of L2. Now shared memory itself is the limit: two loads for each product.
// Math     C = A B
// Shapes   as matmul_1.cu
// Plan     a block of 32 x 32 threads owns 32 x 32 of C. Two barriers per step: the tiles are filled; all threads have finished
//          with them
// Numerics as matmul_1.cu, bit for bit; the tiles are float, so a bf16 is converted once
// Cost     2 m n k flops. H100, bf16, 8192^3, 2026-11-27: 9.2 TFLOP/s, 0.011 of the ceiling of 800 (8 predicted). sm_90a: 32
//          registers.
#include "prim/block.cuh"

constexpr int SIDE = 32;

KERNEL(level_matmul_3, THREADS=1024, SHARED=2 * 32 * 32 * 4)(real* c, const real* a, const real* b, int m, int n, int k) {
  float* ta = (float*)shared_base();  // SIDE rows of A, 32 of k each
  float* tb = ta + SIDE * SIDE;       // SIDE rows of k, 32 columns of B each
  const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
  const long long row = blockIdx.y * SIDE + y, col = blockIdx.x * SIDE + x;
  float sum = 0.f;
  for (int k0 = 0; k0 < k; k0 += SIDE) {
    ta[y * SIDE + x] = to_float(a[row * k + k0 + x]);
    tb[y * SIDE + x] = to_float(b[(long long)(k0 + y) * n + col]);
    block_sync();
#pragma unroll
    for (int p = 0; p < SIDE; ++p) sum = fmaf(ta[y * SIDE + p], tb[p * SIDE + x], sum);
    block_sync();
  }
  c[row * n + col] = to_real(sum);
}
