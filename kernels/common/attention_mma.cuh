// What the attention kernels with mma.sync share: the layout of their tiles in shared memory, and the scores of a tile.
#pragma once
#include "common/mask.cuh"
#include "common/online_softmax.cuh"
#include "prim/mma.cuh"

// Rows of a block, and positions of a forward step.
EXPORT(int, MMA_ROWS, 64);
// Row stride with eight values of padding: an odd number of 16-byte chunks, so the eight rows of an ldmatrix hit all banks.
EXPORT_FN(mma_stride, d, d + 8);

#ifdef REAL_BF16
constexpr int ROWS = MMA_ROWS;

template <int D>
constexpr int STRIDE = mma_stride(D);

// acc = A B^T: this warp's 16 rows of A and the N rows of B, D columns.
template <int D, int N>
DEVICE void scores(float (&acc)[N / 8][4], const bf16* a, const bf16* b) {
  const int lane = threadIdx.x % 32, half = lane / 8 % 2 * 8, upper = lane / 16 * 8, r = lane % 8;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[j][e] = 0.f;
#pragma unroll
  for (int kk = 0; kk < D; kk += 16) {
    unsigned fa[4];
    ldmatrix4<false>(fa, a + (half + r) * STRIDE<D> + kk + upper);
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
      unsigned fb[4];
      ldmatrix4<false>(fb, b + (j * 8 + upper + r) * STRIDE<D> + kk + half);
      mma_bf16(acc[j], fa, {fb[0], fb[1]});
      mma_bf16(acc[j + 1], fa, {fb[2], fb[3]});
    }
  }
}

template <int N>
DEVICE void clear(float (&acc)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[j][e] = 0.f;
}
#endif
