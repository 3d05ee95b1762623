// Matrix product, level 8: persistent, warp-specialised, with an overlapped epilogue. bf16 and sm_90a only.
//
// Changes  One warpgroup only copies and two only multiply, 64 x 256 each: the tensor cores never wait for a copy to be started.
//          A block stays and takes tile after tile, so copies for the next one run while C leaves by TMA through shared
//          memory. A larger tile reads less, and tiles are taken in groups of 8 rows, so that neighbours share L2.
// Math     C = A B
// Shapes   as matmul_7.cu; C by tensor map too, boxes of 16 rows
// Plan     128 x 256 of C per tile, 64 of k per stage, four stages; the producer gives its registers to the consumers
// Numerics bit for bit those of matmul_6.cu
// Cost     2 m n k flops. H100, 8192^3, 2026-11-27: 772 TFLOP/s, 0.96 of the ceiling of 800 (785 predicted), as
//          kernels/matmul_hopper.cu, which has this structure, and more: layouts, widths, ragged ends. sm_90a: 168 registers at
//          the start, no spills.
#include "prim/wgmma.cuh"

#if defined(REAL_BF16) && defined(HOPPER)
constexpr int ROWS = 128, COLS = 256, DEPTH = 64, STAGES = 4, GROUP = 8;
#endif

KERNEL(level_matmul_8, THREADS=384, SHARED=4 * (128 + 256) * 64 * 2 + 8 * 2 * 16 * 64 * 2 + 64)
(const tensor_map& c, const tensor_map& a, const tensor_map& b, int m, int n, int k) {
#if defined(REAL_BF16) && defined(HOPPER)
  bf16* sa = (bf16*)shared_base();                   // STAGES tiles of A
  bf16* sb = sa + STAGES * ROWS * DEPTH;             // and of B
  bf16* sc = sb + STAGES * DEPTH * COLS;             // two boxes of 16 x 64 of C for each of 8 warps
  mbarrier* full = (mbarrier*)(sc + 8 * 2 * 16 * 64);  // per stage: its copies have arrived
  mbarrier* empty = full + STAGES;                     // both consumers have finished with it
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, 2);
    }
    mbarrier_fence();
  }
  block_sync();

  const int tiles_m = m / ROWS, tiles_n = n / COLS, steps = k / DEPTH;
  int stage = 0, phase = 0;  // they continue from tile to tile, in producer and consumers alike
  auto next_stage = [&] {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  };
  auto each_tile = [&](auto work) {  // column by column in groups of GROUP rows of tiles
    for (int tile = blockIdx.x; tile < tiles_m * tiles_n; tile += gridDim.x) {
      const int first = tile / (GROUP * tiles_n) * GROUP, r = tile % (GROUP * tiles_n);
      const int rows = tiles_m - first < GROUP ? tiles_m - first : GROUP;
      work((first + r % rows) * ROWS, r / rows * COLS);
    }
  };

  if (threadIdx.x < 128) {  // the producer
    registers_dec<40>();
    if (threadIdx.x != 0) return;
    each_tile([&](int row0, int col0) {
      for (int step = 0; step < steps; ++step, next_stage()) {
        mbarrier_wait(empty + stage, phase ^ 1);  // returns at once the first time around
        mbarrier_expect(full + stage, (ROWS + COLS) * DEPTH * sizeof(bf16));
        tma_load(sa + stage * ROWS * DEPTH, &a, full + stage, step * DEPTH, row0);
        for (int x = 0; x < COLS; x += 64) tma_load(sb + (stage * COLS + x) * DEPTH, &b, full + stage, col0 + x, step * DEPTH);
      }
    });
    return;
  }

  registers_inc<232>();
  const int consumer = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  each_tile([&](int row0, int col0) {
    float sum[COLS / 2];
    int last = -1;
    for (int step = 0; step < steps; ++step, next_stage()) {
      mbarrier_wait(full + stage, phase);
      const bf16 *ta = sa + (stage * ROWS + consumer * 64) * DEPTH, *tb = sb + stage * DEPTH * COLS;
      wgmma_fence();
#pragma unroll
      for (int p = 0; p < DEPTH; p += 16)
        wgmma_ss<COLS, false, true>(sum, wgmma_desc<true>(ta + p), wgmma_desc<false>(tb + p * 64), step > 0 || p > 0);
      wgmma_commit();
      if (last >= 0) {
        wgmma_wait<1>();  // the previous step is done, this one is in flight
        if (thread == 0) mbarrier_arrive(empty + last);
      }
      last = stage;
    }
    wgmma_wait<0>();
    if (thread == 0) mbarrier_arrive(empty + last);

#pragma unroll
    for (int x = 0; x < COLS / 64; ++x) {  // a warp's 16 x 256 of C, 64 columns at a time through its two boxes
      unsigned char* box = (unsigned char*)(sc + (warp * 2 + x % 2) * 16 * 64);
      if (lane == 0) tma_wait_read<1>();  // the box used two turns ago has been read
      warp_sync();
#pragma unroll
      for (int y = 0; y < 8; y += 2) {  // four 8 x 8 matrices: rows 0 and 8, then the same of the next 8 columns
        const float* d = sum + 4 * (8 * x + y);
        const unsigned r[4] = {pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]), pack_bf16(d[6], d[7])};
        stmatrix4(box + swizzle128(lane / 8 % 2 * 8 + lane % 8, y + lane / 16), r);
      }
      fence_async_proxy();
      warp_sync();
      if (lane == 0) {
        tma_store(&c, box, col0 + x * 64, row0 + warp * 16);
        tma_commit();
      }
    }
  });
  if (lane == 0) tma_wait<0>();
#endif
}
