// Matrix product, level 5: vector loads.
//
// Changes  Every load moves 16 bytes: packs of A and B from memory, four floats at a time from shared memory. With a quarter
//          of the load instructions, more issue slots are left for products. A thread's columns therefore come in fours.
// Math     C = A B
// Shapes   as matmul_1.cu
// Plan     as matmul_4.cu, but thread (y, x) owns the rows 4 y + i and 64 + 4 y + i, and columns likewise
// Numerics as matmul_1.cu, bit for bit
// Cost     2 m n k flops. H100, bf16, 8192^3, 2026-11-27: 41.1 TFLOP/s, 0.051 of the ceiling of 800 (40 predicted); the float
//          units end at 67, so this is where a kernel without tensor cores ends. sm_90a: 111 registers, no spills.
#include "prim/block.cuh"
#include "prim/vec.cuh"

constexpr int SIDE = 128, DEPTH = 16;
constexpr int STRIDE = SIDE + 4;  // a multiple of four floats, but not of all banks

struct alignas(16) Four {
  float v[4];
};

// The eight values that thread coordinate q (of 16) owns in a row of a tile.
DEVICE void eight(float (&to)[8], const float* row, int q) {
  const Four low = *(const Four*)(row + 4 * q), high = *(const Four*)(row + 64 + 4 * q);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[i] = low.v[i];
    to[4 + i] = high.v[i];
  }
}

KERNEL(level_matmul_5, SHARED=2 * 16 * 132 * 4)(real* c, const real* a, const real* b, int m, int n, int k) {
  float* ta = (float*)shared_base();  // DEPTH rows of k, 128 rows of A each
  float* tb = ta + DEPTH * STRIDE;    // DEPTH rows of k, 128 columns of B each
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const long long row0 = blockIdx.y * SIDE, col0 = blockIdx.x * SIDE;
  float sum[8][8] = {};
  for (int k0 = 0; k0 < k; k0 += DEPTH) {
    for (int i = threadIdx.x * V; i < SIDE * DEPTH; i += 256 * V) {
      const Pack<V> u = load<V>(a + (row0 + i / DEPTH) * k + k0 + i % DEPTH, V);
      const Pack<V> v = load<V>(b + (long long)(k0 + i / SIDE) * n + col0 + i % SIDE, V);
#pragma unroll
      for (int j = 0; j < V; ++j) ta[(i % DEPTH + j) * STRIDE + i / DEPTH] = u.v[j];
#pragma unroll
      for (int j = 0; j < V; j += 4) *(Four*)(tb + i / SIDE * STRIDE + i % SIDE + j) = {v.v[j], v.v[j + 1], v.v[j + 2], v.v[j + 3]};
    }
    block_sync();
#pragma unroll
    for (int p = 0; p < DEPTH; ++p) {
      float u[8], v[8];
      eight(u, ta + p * STRIDE, y);
      eight(v, tb + p * STRIDE, x);
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
    for (int j = 0; j < 8; j += 4) {
      const long long row = row0 + i / 4 * 64 + 4 * y + i % 4, col = col0 + j / 4 * 64 + 4 * x;
      const Pack<4> four = {{sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]}};
      store(c + row * n + col, four, 4);
    }
}
