// Bugs of a Hopper kernel that the strict CPU mode must catch, each beside its correct twin. CPU only: tests/it/hopper.rs runs
// them.
//
// Math     C = A B^T for the twin, D = 0; D > 0 plants one bug
// Shapes   A, B [64, 64 steps], C [64, 64] real, boxes of 64 rows; one block of 256 threads
// Plan     a ring of two stages: thread 0 produces by TMA, threads 128 to 255 multiply by wgmma and store by TMA
// Numerics those of prim/wgmma.cuh
// Cost     nothing; never launched outside the tests
#include "prim/wgmma.cuh"

EXPORT_ENUM(hopper_bug, NONE, NO_WAIT, WRONG_PARITY, OUTSIDE_SHARED, OUTSIDE_TILE, NO_PROXY_FENCE, EARLY_RELEASE, WRONG_BYTES,
            NO_WGMMA_WAIT, NO_WGMMA_FENCE, STORE_NOT_AWAITED);

KERNEL(planted_hopper, D=0,1,2,3,4,5,6,7,8,9,10, SHARED=5 * 8192 + 64)(const tensor_map& a, const tensor_map& b, const tensor_map& c, int steps) {
#ifdef REAL_BF16
  typedef hopper_bug bug;
  constexpr int TILE = 64 * 64;
  bf16* ring = (bf16*)shared_base();  // two stages of two tiles
  unsigned char* out = (unsigned char*)(ring + 4 * TILE);
  mbarrier *full = (mbarrier*)(out + 8192), *empty = full + 2;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 1);
    }
    mbarrier_fence();
  }
  block_sync();
  if (threadIdx.x < 128) {
    if (threadIdx.x != 0) return;
    for (int q = 0; q < steps; ++q) {
      const int s = q % 2, phase = q / 2 % 2;
      mbarrier_wait(empty + s, phase ^ 1);
      mbarrier_expect(full + s, D == bug::WRONG_BYTES ? 8192 : 16384);
      tma_load(ring + s * 2 * TILE, &a, full + s, q * 64, 0);
      tma_load(ring + s * 2 * TILE + TILE, &b, full + s, q * 64, 0);
    }
    return;
  }
  const int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
  float d[32];
  for (int q = 0; q < steps; ++q) {
    const int s = q % 2, phase = q / 2 % 2;
    if (D != bug::NO_WAIT) mbarrier_wait(full + s, D == bug::WRONG_PARITY ? 0 : phase);
    if (D != bug::NO_WGMMA_FENCE) wgmma_fence();
    const bf16 *ta = ring + s * 2 * TILE + (D == bug::OUTSIDE_SHARED ? 16 * TILE : 0), *tb = ring + s * 2 * TILE + TILE;
    for (int kk = 0; kk < 4; ++kk)
      wgmma_ss<64, false, false>(d, wgmma_desc<true>(ta + (D == bug::OUTSIDE_TILE ? 16 : 0) + kk * 16),
                                 wgmma_desc<true>(tb + kk * 16), q + kk > 0);
    wgmma_commit();
    if (D != bug::EARLY_RELEASE && D != bug::NO_WGMMA_WAIT) wgmma_wait<0>();
    if (thread == 0 && D != bug::NO_WGMMA_WAIT) mbarrier_arrive(empty + s);
    if (D == bug::EARLY_RELEASE && q == steps - 1) wgmma_wait<0>();
  }
  for (int x = 0; x < 8; x += 2) {
    unsigned r[4];
    for (int y = 0; y < 4; ++y) r[y] = pack_bf16(d[4 * x + 2 * y], d[4 * x + 2 * y + 1]);
    stmatrix4(out + swizzle128(warp * 16 + lane / 8 % 2 * 8 + lane % 8, x + lane / 16), r);
  }
  if (D != bug::NO_PROXY_FENCE) fence_async_proxy();
  named_barrier(1, 128);
  if (thread == 0) {
    tma_store(&c, out, 0, 0);
    tma_commit();
    if (D != bug::STORE_NOT_AWAITED) tma_wait<0>();
  }
  if (D == bug::NO_WGMMA_WAIT) wgmma_wait<0>();
#endif
}

// y[i] = x[n - 1 - i] through shared memory of n floats, filled by cp.async whose completion arrives at an mbarrier. D = 1 reads
// without waiting for it.
KERNEL(planted_copy_arrival, D=0,1)(float* y, const float* x, int n) {
  const int i = threadIdx.x;
  float* s = (float*)shared_base();
  mbarrier* full = (mbarrier*)(s + n);
  if (i == 0) mbarrier_init(full, blockDim.x);
  block_sync();
  if (i * 4 < n) copy_async16(s + i * 4, x + i * 4, 16);
  mbarrier_arrive_copies(full);
  if (D == 0) mbarrier_wait(full, 0);
  if (i < n) y[i] = s[n - 1 - i];
}
