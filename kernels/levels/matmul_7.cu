// Matrix product, level 7: wgmma, fed by TMA. bf16 and sm_90a only.
//
// Changes  A warpgroup of 4 warps multiplies 64 x 16 by 16 x 128 in one instruction, with both operands in shared memory: no
//          fragments, no ldmatrix. One thread starts the copy of a whole box by its tensor map; an mbarrier counts its bytes.
// Math     C = A B
// Shapes   as matmul_1.cu, bf16; A and B by tensor map: boxes of 128 rows of A, of 64 rows of B, each row 128 bytes
// Plan     two warpgroups own 128 x 128 of C, 64 rows each; 64 of k per step, three stages. A stage is refilled once both have
//          finished with it; meanwhile the tensor cores wait, but the SM has a second block
// Numerics bit for bit those of matmul_6.cu: wgmma accumulates like a chain of mma.sync
// Cost     2 m n k flops. H100, 8192^3, 2026-11-27: 442 TFLOP/s, 0.55 of the ceiling of 800 (520 predicted). sm_90a: 90
//          registers, no spills.
#include "prim/wgmma.cuh"

#if defined(REAL_BF16) && defined(HOPPER)
constexpr int SIDE = 128, DEPTH = 64, STAGES = 3;
constexpr int TILE = SIDE * DEPTH;  // values per tile of A or of B
#endif

KERNEL(level_matmul_7, BLOCKS=2, SHARED=3 * 2 * 128 * 64 * 2 + 64)
(real* c, const tensor_map& a, const tensor_map& b, int m, int n, int k) {
#if defined(REAL_BF16) && defined(HOPPER)
  bf16* shared = (bf16*)shared_base();
  mbarrier* full = (mbarrier*)(shared + STAGES * 2 * TILE);  // per stage: its copies have arrived
  const int row0 = blockIdx.y * SIDE, col0 = blockIdx.x * SIDE, steps = k / DEPTH;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  auto start = [&](int step) {  // called by one thread
    mbarrier* arrived = full + step % STAGES;
    bf16 *ta = shared + step % STAGES * 2 * TILE, *tb = ta + TILE;
    mbarrier_expect(arrived, 2 * TILE * sizeof(bf16));
    tma_load(ta, &a, arrived, step * DEPTH, row0);
    tma_load(tb, &b, arrived, col0, step * DEPTH);  // 128 columns are two boxes of 64
    tma_load(tb + 64 * DEPTH, &b, arrived, col0 + 64, step * DEPTH);
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) mbarrier_init(full + s, 1);
    mbarrier_fence();
    for (int s = 0; s < STAGES && s < steps; ++s) start(s);
  }
  block_sync();

  float sum[SIDE / 2];
  for (int step = 0; step < steps; ++step) {
    const bf16 *ta = shared + step % STAGES * 2 * TILE, *tb = ta + TILE;
    mbarrier_wait(full + step % STAGES, step / STAGES & 1);  // the parity changes each time the stage is filled
    wgmma_fence();
#pragma unroll
    for (int p = 0; p < DEPTH; p += 16)
      wgmma_ss<SIDE, false, true>(sum, wgmma_desc<true>(ta + group * 64 * DEPTH + p), wgmma_desc<false>(tb + p * 64),
                                  step > 0 || p > 0);
    wgmma_commit();
    wgmma_wait<0>();
    block_sync();
    if (threadIdx.x == 0 && step + STAGES < steps) start(step + STAGES);
  }
#pragma unroll
  for (int j = 0; j < SIDE / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const long long row = row0 + warp * 16 + lane / 4 + h * 8, col = col0 + j * 8 + lane % 4 * 2;
      *(unsigned*)(c + row * n + col) = pack_bf16(sum[4 * j + 2 * h], sum[4 * j + 2 * h + 1]);
    }
#endif
}
