// Matrix product, level 4: tiles in registers.
//
// Changes  A thread owns 8 x 8 of C in registers: 16 loads from shared memory now feed 64 products, instead of 2 feeding 1.
//          For the first time the float units are the limit; they do 67 TFLOP/s, a fifteenth of the tensor cores.
// Math     C = A B
// Shapes   as matmul_1.cu
// Plan     256 threads own 128 x 128 of C, 16 of k per step; thread (y, x) owns the rows y + 16 i and the columns x + 16 j, so
//          that a warp reads 16 neighbours of B's tile (no two in one bank) and two values of A's
// Numerics as matmul_1.cu, bit for bit
// Cost     2 m n k flops. H100, bf16, 8192^3, 2026-11-27: 28.7 TFLOP/s, 0.036 of the ceiling of 800 (25 predicted). sm_90a: 128
//          registers, no spills.
#include "prim/block.cuh"

constexpr int SIDE = 128, DEPTH = 16;
constexpr int STRIDE = SIDE + 1;  // A's tile is transposed: an odd stride spreads the writes of one row over the banks

KERNEL(level_matmul_4, SHARED=2 * 16 * 129 * 4)(real* c, const real* a, const real* b, int m, int n, int k) {
  float* ta = (float*)shared_base();  // DEPTH rows of k, 128 rows of A each
  float* tb = ta + DEPTH * STRIDE;    // DEPTH rows of k, 128 columns of B each
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const long long row0 = blockIdx.y * SIDE, col0 = blockIdx.x * SIDE;
  float sum[8][8] = {};
  for (int k0 = 0; k0 < k; k0 += DEPTH) {
    for (int i = threadIdx.x; i < SIDE * DEPTH; i += 256) {
      ta[i % DEPTH * STRIDE + i / DEPTH] = to_float(a[(row0 + i / DEPTH) * k + k0 + i % DEPTH]);
      tb[i / SIDE * STRIDE + i % SIDE] = to_float(b[(long long)(k0 + i / SIDE) * n + col0 + i % SIDE]);
    }
    block_sync();
#pragma unroll
    for (int p = 0; p < DEPTH; ++p) {
      float u[8], v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) u[i] = ta[p * STRIDE + y + 16 * i];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = tb[p * STRIDE + x + 16 * j];
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(u[i], v[j], sum[i][j]);
    }
    block_sync();
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) c[(row0 + y + 16 * i) * n + col0 + x + 16 * j] = to_real(sum[i][j]);
}
