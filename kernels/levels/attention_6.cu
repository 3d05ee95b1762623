// Causal attention, level 6: two consumers, and products under the softmax. bf16 and sm_90a only.
//
// Changes  Within a warpgroup, S of a step is started together with P V of the previous step, which runs during the softmax of S.
//          Two warpgroups share K and V, and an SM has two such blocks: the products of one run during the softmax of the others.
// Math     as attention_4.cu
// Shapes   as attention_5.cu
// Plan     A consumer owns 64 of 128 queries, the first one has one step less; 64 keys per step, five stages. A thread of
//          consumer 0 starts the copies, three steps ahead: with the registers of a producer warpgroup a second block would not
//          fit on the SM
// Numerics bit for bit those of attention_4.cu
// Cost     4 D flops a pair. H100, 112 heads of 2048, 2026-11-27: with turns at the tensor cores, which the consumers gave each
//          other by named barriers (ping-pong), 307 TFLOP/s, less than level 5: waiting for a turn cost more than the order was
//          worth, since the four warpgroups of an SM mix by themselves. Without turns, as kernels/attention_hopper.cu (347), the
//          same is *predicted*, not measured.
#include "common/online_softmax.cuh"
#include "prim/wgmma_loop.cuh"

#if defined(REAL_BF16) && defined(HOPPER)
constexpr int DIM = 64, SIDE = 64, STAGES = 5, AHEAD = STAGES - 2;
constexpr int TILE = SIDE * DIM;
typedef float Flat[SIDE / 2];  // 64 x 64 accumulators in the type that wgmma takes

DEVICE void start_scores(float (&s)[SIDE / 8][4], const bf16* tq, const bf16* tk) {
#pragma unroll
  for (int d = 0; d < DIM; d += 16) wgmma_ss<SIDE, false, false>((Flat&)s, wgmma_desc<true>(tq + d), wgmma_desc<true>(tk + d), d > 0);
  wgmma_commit();
}
DEVICE void start_sums(float (&sum)[DIM / 8][4], const unsigned (&p)[SIDE / 16][4], const bf16* tv) {
#pragma unroll
  for (int j = 0; j < SIDE / 16; ++j) wgmma_rs<DIM, true>((Flat&)sum, p[j], wgmma_desc<false>(tv + j * 16 * 64), true);
  wgmma_commit();
}
DEVICE void pack(unsigned (&p)[SIDE / 16][4], const float (&s)[SIDE / 8][4]) {
#pragma unroll
  for (int j = 0; j < SIDE / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) p[j / 2][j % 2 * 2 + h] = pack_bf16(s[j][2 * h], s[j][2 * h + 1]);
}
#endif

KERNEL(level_attention_6, BLOCKS=2, SHARED=(2 + 5 * 2) * 64 * 64 * 2 + 128)
(real* o, const tensor_map& q, const tensor_map& k, const tensor_map& v, int heads, int t, float scale) {
#if defined(REAL_BF16) && defined(HOPPER)
  bf16 *tq = (bf16*)shared_base(), *tk = tq + 2 * TILE, *tv = tk + STAGES * TILE;
  mbarrier *full = (mbarrier*)(tv + STAGES * TILE), *empty = full + STAGES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, 2);
    }
    mbarrier_fence();
  }
  block_sync();
  const int first = (gridDim.x - 1 - blockIdx.x) * 2 * SIDE, steps = first / SIDE + 2, base = blockIdx.y * t;

  // Called by one thread. Consumer 0 released this stage one step ago; the wait is for consumer 1.
  auto start = [&](int step) {
    if (step >= steps) return;
    const int stage = step % STAGES;
    mbarrier_wait(empty + stage, step / STAGES & 1 ^ 1);  // returns at once the first time around
    mbarrier_expect(full + stage, (step == 0 ? 4 : 2) * TILE * sizeof(bf16));
    for (int i = 0; i < 2 && step == 0; ++i) tma_load(tq + i * TILE, &q, full, 0, base + first + i * SIDE);
    tma_load(tk + stage * TILE, &k, full + stage, 0, base + step * SIDE);
    tma_load(tv + stage * TILE, &v, full + stage, 0, base + step * SIDE);
  };
  if (threadIdx.x == 0)
    for (int step = 0; step < AHEAD; ++step) start(step);

  const int w = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int position[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
  const int mine = steps - 1 + w;  // the last step is consumer 1's alone
  const float factor = score_factor(scale, 0.f);
  OnlineSoftmax softmax;
  float sum[DIM / 8][4], s[SIDE / 8][4], alpha[2];
  unsigned p[SIDE / 16][4];
#pragma unroll
  for (int d = 0; d < DIM / 8; ++d)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[d][e] = 0.f;
  const bf16* my_q = tq + w * TILE;

  auto ready = [&](int step) {
    mbarrier_wait(full + step % STAGES, step / STAGES & 1);
    wgmma_fence();
  };
  auto copy_ahead = [&](int step) {
    if (threadIdx.x == 0) start(step + AHEAD);
  };
  auto weights = [&](int step) {
    hold((Flat&)s);
    hide_scores(s, position, t, step * SIDE);
    return softmax.step(s, alpha, factor);
  };
  ready(0);
  start_scores(s, my_q, tk);
  copy_ahead(0);
  wgmma_wait<0>();
  weights(0);
  pack(p, s);
  for (int step = 1; step < mine; ++step) {
    const int before = (step - 1) % STAGES;
    ready(step);
    start_scores(s, my_q, tk + step % STAGES * TILE);
    start_sums(sum, p, tv + before * TILE);
    copy_ahead(step);
    wgmma_wait<1>();  // S is done, P V still runs
    if (warp_any(weights(step))) {
      // One wait per branch: the compiler would move a single wait before the branch to before the softmax.
      wgmma_wait<0>();
      hold((Flat&)sum);
      scale_rows(sum, alpha);
    } else {
      wgmma_wait<0>();
      hold((Flat&)sum);
    }
    if (threadIdx.x % 128 == 0) mbarrier_arrive(empty + before);
    pack(p, s);
  }
  wgmma_fence();
  start_sums(sum, p, tv + (mine - 1) % STAGES * TILE);
  wgmma_wait<0>();
  hold((Flat&)sum);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float inverse = 1.f / row_sum(softmax.l[h]);
    unsigned* to = (unsigned*)(o + (long long)(base + position[h]) * DIM) + lane % 4;
#pragma unroll
    for (int d = 0; d < DIM / 8; ++d) to[d * 4] = pack_bf16(sum[d][2 * h] * inverse, sum[d][2 * h + 1] * inverse);
  }
#endif
}
