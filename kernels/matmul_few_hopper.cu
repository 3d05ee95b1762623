// Products of few rows on Hopper (sm_90a): what matmul_few.cu computes, with TMA and wgmma.
//
// Math     few_hopper_nt: C = X W^T (+ bias) (+ C);  few_hopper_glu: y = act(g) * u with g|u = X W^T (+ bias), W's rows g above u
// Shapes   As matmul_few.cu; X and W by tensor map: X in boxes of D rows, W in boxes of `rows` (few_hopper_glu: 8) rows, 64 of k.
//          `weight` is W again, for the prefetch. bf16 only.
// Plan     The weight is the operand with 64 rows, X that with D columns: a wgmma of 64 x D. A block owns `rows` columns of C, 16, 32
//          or 64 (the other rows of its tile are never loaded, and their sums never stored), over the whole of k: few where n is small, so
//          that many multiprocessors have a part. One thread keeps a ring of `stages` stages of 64 k full by TMA; a warpgroup
//          multiplies. few_hopper_glu takes 8 rows of g, then the same 8 of u, so that a thread has both.
// Numerics As matmul_few.cu: one chain of float sums over k in steps of 16. That a wgmma gives each element the bits of mma.sync was
//          measured with X as the first operand, not yet as the second; an exact context compares before it uses this kernel.
// Cost     The weight once: n k sizeof bytes. At least 18 cycles for each 16 of k, where mma.sync takes 33, and no thread that
//          copies. H100: n 896, k 4,864, 8 rows 5 us (chain 3.1, start and end 2), n 9,728, k 896 7 us (weight 5.8);
//          *predicted*, not measured.
#include "common/activate.cuh"
#include "prim/tile.cuh"
#include "prim/wgmma.cuh"

// k of a stage; bytes of a stage and of the barriers.
EXPORT(int, FEW_HOPPER_STEP, 64);
EXPORT_FN(few_hopper_stage, d, (64 + d) * 128);
EXPORT(int, FEW_HOPPER_BARRIERS, 1024);
// The most stages.
EXPORT(int, FEW_HOPPER_STAGES, 24);
EXPORT(int, FEW_HOPPER_THREADS, 160);

#if defined(REAL_BF16) && defined(HOPPER)
// Asks for the block's rows of W while the kernel before it still runs: `rows` from row0, and from row1 on if it is not negative.
DEVICE void few_hopper_prefetch(const real* w, int ldw, int row0, int row1, int rows, int n, int k) {
  const int r = threadIdx.x, row = r < rows ? row0 + r : row1 + r - rows;
  if (r < (row1 < 0 ? rows : 2 * rows) && row < n) prefetch_l2(w + (long long)row * ldw, k / 8 * 16);
}

// The sums of the block's rows of W (first of the wgmma) and the rows of X: sum[4c + 2h + e] is W's row 16 warp + lane / 4 + 8 h of
// the tile, X's row 8 c + lane % 4 * 2 + e. `load` starts the loads of W for a step. False: this thread has none.
template <int D, class Load>
DEVICE bool few_hopper_sums(float (&sum)[D / 2], const tensor_map& x, int rows, int k, int stages, const Load& load) {
  unsigned char* ring = shared_base();
  mbarrier* full = (mbarrier*)(ring + stages * few_hopper_stage(D));
  mbarrier* empty = full + stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 1);
    }
    mbarrier_fence();
  }
  block_sync();
  wait_for_previous();
  const int steps = (k + FEW_HOPPER_STEP - 1) / FEW_HOPPER_STEP;
  int stage = 0, phase = 0;
  auto next = [&] {
    if (++stage == stages) stage = 0, phase ^= 1;
  };
  if (threadIdx.x >= 128) {
    if (threadIdx.x > 128) return false;
    for (int q = 0; q < steps; ++q, next()) {
      mbarrier_wait(empty + stage, phase ^ 1);
      mbarrier_expect(full + stage, (rows + D) * 128);
      bf16* tile = (bf16*)(ring + stage * few_hopper_stage(D));
      load(tile, full + stage, q * FEW_HOPPER_STEP);
      tma_load(tile + 64 * 64, &x, full + stage, q * FEW_HOPPER_STEP, 0);
    }
    return false;
  }
  int last = -1;
  for (int q = 0; q < steps; ++q, next()) {
    mbarrier_wait(full + stage, phase);
    const bf16 *w_tile = (bf16*)(ring + stage * few_hopper_stage(D)), *x_tile = w_tile + 64 * 64;
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < FEW_HOPPER_STEP; kk += 16)
      wgmma_ss<D, false, false>(sum, wgmma_desc<true>(w_tile + kk), wgmma_desc<true>(x_tile + kk), q > 0 || kk > 0);
    wgmma_commit();
    if (last >= 0) {
      wgmma_wait<1>();
      if (threadIdx.x == 0) mbarrier_arrive(empty + last);
    }
    last = stage;
  }
  wgmma_wait<0>();
  return true;
}

// Calls put(row of W in the tile, row of X, index of the sum) for each sum that lies within the block's rows of W and the m of X.
template <int D, class Put>
DEVICE void few_hopper_each(int rows, int m, const Put& put) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < D / 8; ++c)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int x = c * 8 + lane % 4 * 2 + e, w = warp * 16 + lane / 4;
      if (w < rows && x < m) put(w, x, 4 * c + e);
    }
}
#endif

KERNEL(few_hopper_nt, D=8,16,32,64, THREADS=160, HOT, WAITS)(const tensor_map& x, const tensor_map& w, MAYBE(real) c, MAYBE(float) cf, const real* weight,
       MAYBE(const real) bias, int m, int n, int k, int ldw, int ldc, int accumulate, int rows, int stages) {
#if defined(REAL_BF16) && defined(HOPPER)
  const int row0 = blockIdx.x * rows;
  few_hopper_prefetch(weight, ldw, row0, -1, rows, n, k);
  float sum[D / 2];
  const auto load = [&](bf16* tile, mbarrier* full, int from) { tma_load(tile, &w, full, from, row0); };
  if (!few_hopper_sums<D>(sum, x, rows, k, stages, load)) return;
  few_hopper_each<D>(rows, m, [&](int i, int j, int at) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int col = row0 + i + 8 * h;
      if (col >= n) continue;
      const long long to = (long long)j * ldc + col;
      float v = sum[at + 2 * h];
      if (bias) v += to_float(bias[col]);
      if (accumulate) v += cf ? cf[to] : to_float(c[to]);
      if (cf) cf[to] = v;
      else assign(c[to], v);
    }
  });
#else
  wait_for_previous();
#endif
}

KERNEL(few_hopper_glu, D=8,16,32,64, THREADS=160, HOT, WAITS)(const tensor_map& x, const tensor_map& w, real* y, const real* weight, MAYBE(const real) bias,
       int m, int f, int k, int ldw, int ldy, int activation, int rows, int stages) {
#if defined(REAL_BF16) && defined(HOPPER)
  const int f0 = blockIdx.x * (rows / 2);
  few_hopper_prefetch(weight, ldw, f0, f + f0, rows / 2, 2 * f, k);
  float sum[D / 2];
  // Columns past f, in the last block, are sums of other rows: they are not stored.
  const auto load = [&](bf16* tile, mbarrier* full, int from) {
    for (int i = 0; i < rows / 16; ++i) {
      tma_load(tile + i * 16 * 64, &w, full, from, f0 + i * 8);
      tma_load(tile + (i * 16 + 8) * 64, &w, full, from, f + f0 + i * 8);
    }
  };
  if (!few_hopper_sums<D>(sum, x, rows, k, stages, load)) return;
  few_hopper_each<D>(rows, m, [&](int i, int j, int at) {
    const int col = f0 + i / 16 * 8 + i % 8;
    if (col >= f) return;
    float g = sum[at], u = sum[at + 2];
    if (bias) {
      g += to_float(bias[col]);
      u += to_float(bias[f + col]);
    }
    assign(y[(long long)j * ldy + col], gated(activation, round_real(g), round_real(u)));
  });
#else
  wait_for_previous();
#endif
}
