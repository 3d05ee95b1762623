// Causal attention, level 4: tensor cores by mma.sync. bf16 only.
//
// Changes  Both products use tensor cores. The accumulators of S = Q K^T, packed to bf16, lie in a warp's lanes exactly as the
//          next product O += P V needs its left operand: P never leaves registers.
// Math     as attention_2.cu, with the exponent in base 2 (common/online_softmax.cuh, which all further levels share)
// Shapes   as attention_2.cu, bf16
// Plan     4 warps own 64 queries, 16 each; 64 keys per step, copied by cp.async one step ahead. The blocks with the most keys
//          start first, so that the last ones are short
// Numerics S, the softmax and the sums in float; P is rounded to bf16 for its product, l sums it before rounding
// Cost     4 D flops a pair. H100, 112 heads of 2048, 2026-11-27: 227 TFLOP/s, 0.28 of the ceiling of 800 (215 predicted), as
//          kernels/attention_mma.cu, which has this structure. sm_90a: 128 registers, no spills.
#include "common/online_softmax.cuh"
#include "prim/async.cuh"
#include "prim/mma.cuh"

#ifdef REAL_BF16
constexpr int DIM = 64, SIDE = 64;  // head size; queries of a block and keys of a step
constexpr int STRIDE = DIM + 8;     // an odd number of 16-byte chunks: the eight rows of one ldmatrix hit all banks
constexpr int TILE = SIDE * STRIDE;

// Starts the copy of 64 rows.
DEVICE void fetch(bf16* tile, const bf16* from) {
#pragma unroll
  for (int i = 0; i < SIDE * DIM / 8 / 128; ++i) {
    const int chunk = threadIdx.x + i * 128, r = chunk / (DIM / 8), c = chunk % (DIM / 8) * 8;
    copy_async16(tile + r * STRIDE + c, from + r * DIM + c, 16);
  }
}
#endif

KERNEL(level_attention_4, THREADS=128, SHARED=5 * 64 * 72 * 2)
(real* o, const real* q, const real* k, const real* v, int heads, int t, float scale) {
#ifdef REAL_BF16
  bf16 *tq = (bf16*)shared_base(), *ring = tq + TILE;  // Q; two stages of K and V
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = lane / 8 % 2 * 8, upper = lane / 16 * 8, r = lane % 8;
  const int first = (gridDim.x - 1 - blockIdx.x) * SIDE, steps = first / SIDE + 1;
  const long long base = (long long)blockIdx.y * t * DIM;
  auto start = [&](int step) {
    if (step < steps) {
      fetch(ring + step % 2 * 2 * TILE, k + base + step * SIDE * DIM);
      fetch(ring + step % 2 * 2 * TILE + TILE, v + base + step * SIDE * DIM);
    }
    copy_commit();
  };
  fetch(tq, q + base + first * DIM);
  start(0);
  const int position[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};  // of this lane's two rows
  const float factor = score_factor(scale, 0.f);
  OnlineSoftmax softmax;
  float sum[DIM / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    start(step + 1);
    copy_wait<1>();
    block_sync();
    const bf16 *tk = ring + step % 2 * 2 * TILE, *tv = tk + TILE;

    float s[SIDE / 8][4] = {};  // S = Q K^T: 16 rows, 64 columns per warp
#pragma unroll
    for (int d = 0; d < DIM; d += 16) {
      unsigned fq[4], fk[4];
      ldmatrix4<false>(fq, tq + (warp * 16 + half + r) * STRIDE + d + upper);
#pragma unroll
      for (int j = 0; j < SIDE / 8; j += 2) {
        ldmatrix4<false>(fk, tk + (j * 8 + upper + r) * STRIDE + d + half);
        mma_bf16(s[j], fq, {fk[0], fk[1]});
        mma_bf16(s[j + 1], fq, {fk[2], fk[3]});
      }
    }

    float alpha[2];  // scores become weights; rows whose maximum rose are rescaled
    hide_scores(s, position, t, step * SIDE);
    if (softmax.step(s, alpha, factor)) scale_rows(sum, alpha);

#pragma unroll
    for (int j = 0; j < SIDE / 16; ++j) {  // O += P V, 16 keys at a time
      const unsigned p[4] = {pack_bf16(s[2 * j][0], s[2 * j][1]), pack_bf16(s[2 * j][2], s[2 * j][3]),
                             pack_bf16(s[2 * j + 1][0], s[2 * j + 1][1]), pack_bf16(s[2 * j + 1][2], s[2 * j + 1][3])};
      unsigned fv[4];
#pragma unroll
      for (int d = 0; d < DIM / 8; d += 2) {
        ldmatrix4<true>(fv, tv + (j * 16 + half + r) * STRIDE + d * 8 + upper);
        mma_bf16(sum[d], p, {fv[0], fv[1]});
        mma_bf16(sum[d + 1], p, {fv[2], fv[3]});
      }
    }
    block_sync();  // all warps have finished this stage
  }
  copy_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float inverse = 1.f / row_sum(softmax.l[h]);
    unsigned* to = (unsigned*)(o + base + (long long)position[h] * DIM) + lane % 4;
#pragma unroll
    for (int d = 0; d < DIM / 8; ++d) to[d * 4] = pack_bf16(sum[d][2 * h] * inverse, sum[d][2 * h + 1] * inverse);
  }
#endif
}
