// Causal attention, level 5: wgmma, fed by TMA. bf16 and sm_90a only.
//
// Changes  A warpgroup multiplies 64 queries by 64 keys from shared memory; P stays in registers, as in level 4. TMA copies K and
//          V. Within a block nothing overlaps: products, softmax, products; other blocks on the SM fill some of the gaps.
// Math     as attention_4.cu
// Shapes   as attention_4.cu; q, k, v by tensor map, boxes of 64 rows of 128 bytes
// Plan     one warpgroup owns 64 queries; 64 keys per step, two stages; four blocks per SM
// Numerics bit for bit those of attention_4.cu: the accumulators lie in the same lanes
// Cost     4 D flops a pair. H100, 112 heads of 2048, 2026-11-27: 332 TFLOP/s, 0.42 of the ceiling of 800 (290 predicted).
//          sm_90a: 106 registers, no spills.
#include "common/online_softmax.cuh"
#include "prim/wgmma_loop.cuh"

#if defined(REAL_BF16) && defined(HOPPER)
constexpr int DIM = 64, SIDE = 64, STAGES = 2;
constexpr int TILE = SIDE * DIM;
#endif

KERNEL(level_attention_5, THREADS=128, BLOCKS=4, SHARED=(1 + 2 * 2) * 64 * 64 * 2 + 64)
(real* o, const tensor_map& q, const tensor_map& k, const tensor_map& v, int heads, int t, float scale) {
#if defined(REAL_BF16) && defined(HOPPER)
  bf16 *tq = (bf16*)shared_base(), *ring = tq + TILE;        // Q; stages of K and V
  mbarrier* full = (mbarrier*)(ring + STAGES * 2 * TILE);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = (gridDim.x - 1 - blockIdx.x) * SIDE, steps = first / SIDE + 1, base = blockIdx.y * t;
  auto start = [&](int step) {  // called by one thread
    mbarrier* arrived = full + step % STAGES;
    bf16 *tk = ring + step % STAGES * 2 * TILE, *tv = tk + TILE;
    mbarrier_expect(arrived, (step == 0 ? 3 : 2) * TILE * sizeof(bf16));  // Q arrives with the first step
    if (step == 0) tma_load(tq, &q, arrived, 0, base + first);
    tma_load(tk, &k, arrived, 0, base + step * SIDE);
    tma_load(tv, &v, arrived, 0, base + step * SIDE);
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) mbarrier_init(full + s, 1);
    mbarrier_fence();
    for (int s = 0; s < STAGES && s < steps; ++s) start(s);
  }
  block_sync();

  const int position[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
  const float factor = score_factor(scale, 0.f);
  OnlineSoftmax softmax;
  float sum[DIM / 8][4], s[SIDE / 8][4];
#pragma unroll
  for (int d = 0; d < DIM / 8; ++d)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[d][e] = 0.f;
  for (int step = 0; step < steps; ++step) {
    const bf16 *tk = ring + step % STAGES * 2 * TILE, *tv = tk + TILE;
    mbarrier_wait(full + step % STAGES, step / STAGES & 1);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < DIM; d += 16)  // S = Q K^T
      wgmma_ss<SIDE, false, false>((float (&)[SIDE / 2])s, wgmma_desc<true>(tq + d), wgmma_desc<true>(tk + d), d > 0);
    wgmma_commit();
    wgmma_wait<0>();
    hold((float (&)[SIDE / 2])s);  // keeps the compiler from reading an accumulator before the wait

    float alpha[2];
    hide_scores(s, position, t, step * SIDE);
    if (softmax.step(s, alpha, factor)) scale_rows(sum, alpha);
    unsigned p[SIDE / 16][4];
#pragma unroll
    for (int j = 0; j < SIDE / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) p[j / 2][j % 2 * 2 + h] = pack_bf16(s[j][2 * h], s[j][2 * h + 1]);

    wgmma_fence();
#pragma unroll
    for (int j = 0; j < SIDE / 16; ++j)  // O += P V
      wgmma_rs<DIM, true>((float (&)[DIM / 2])sum, p[j], wgmma_desc<false>(tv + j * 16 * 64), true);
    wgmma_commit();
    wgmma_wait<0>();
    hold((float (&)[DIM / 2])sum);
    block_sync();  // all threads have finished this stage
    if (threadIdx.x == 0 && step + STAGES < steps) start(step + STAGES);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float inverse = 1.f / row_sum(softmax.l[h]);
    unsigned* to = (unsigned*)(o + (long long)(base + position[h]) * DIM) + lane % 4;
#pragma unroll
    for (int d = 0; d < DIM / 8; ++d) to[d * 4] = pack_bf16(sum[d][2 * h] * inverse, sum[d][2 * h + 1] * inverse);
  }
#endif
}
