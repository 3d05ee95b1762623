// Products of few rows on Hopper (sm_90a): what matmul_few.cu computes, with TMA and wgmma, and with a norm in front of it.
//
// Math     few_hopper_nt: C = X W^T (+ bias) (+ C);  few_hopper_glu: y = act(g) * u with g|u = X W^T (+ bias), W's rows g above u;
//          few_norm_nt, few_norm_glu: the same of N in place of X (and nothing added to C), N the norm of s = X (+ R) (rmsnorm.cu)
// Shapes   As matmul_few.cu; X and W by tensor map: X in boxes of D rows, W in boxes of `rows` (few_*_glu: 8) rows, 64 of k.
//          `weight` is W again, for the prefetch. few_norm_*: X, R, s [m, k] real without gaps, m up to 8, k a multiple of 8 and at
//          most 256 D; norm [k] real. bf16 only.
// Plan     The weight is the operand with 64 rows, X that with D columns: a wgmma of 64 x D. A block owns `rows` columns of C, 16, 32
//          or 64 (the other rows of its tile are never loaded, and their sums never stored), over the whole of k: few where n is small, so
//          that many multiprocessors have a part. One thread keeps a ring of `stages` stages of 64 k full by TMA; a warpgroup
//          multiplies. few_*_glu takes 8 rows of g, then the same 8 of u, so that a thread has both.
//          few_norm_*: while the first stages of W travel, each warp of every block norms two of the rows, from L2 to registers to
//          the tiles that wgmma reads: all of k at once, so only W goes through the ring. The first block writes s.
// Numerics As matmul_few.cu: one chain of float sums over k in steps of 16. That a wgmma gives each element the bits of mma.sync was
//          measured with X as the first operand, not yet as the second; an exact context compares before it uses this kernel.
//          few_norm_*: s and N have the bits of rmsnorm_fwd, whose sums are taken in the same order.
// Cost     The weight once: n k sizeof bytes. At least 18 cycles for each 16 of k, where mma.sync takes 33, and no thread that
//          copies. H100: n 896, k 4,864, 8 rows 5 us (chain 3.1, start and end 2), n 9,728, k 896 7 us (weight 5.8);
//          few_norm_*: 0.2 us more than few_hopper_* (X waits for two rounds of shuffles, a square root and a barrier), for a launch
//          of rmsnorm_fwd less, 1.5 us. All *predicted*, not measured.
#include "common/activate.cuh"
#include "common/norm.cuh"
#include "prim/tile.cuh"
#include "prim/wgmma.cuh"

// k of a stage; bytes of a stage and of the barriers.
EXPORT(int, FEW_HOPPER_STEP, 64);
EXPORT_FN(few_hopper_stage, d, (64 + d) * 128);
EXPORT(int, FEW_HOPPER_BARRIERS, 1024);
// The most stages.
EXPORT(int, FEW_HOPPER_STAGES, 24);
EXPORT(int, FEW_HOPPER_THREADS, 160);
// The most rows of few_norm_*, and the bytes that they take for each step of k.
EXPORT(int, FEW_NORM_ROWS, 8);
EXPORT(int, FEW_NORM_TILE, 1024);

#if defined(REAL_BF16) && defined(HOPPER)
// Asks for the block's rows of W while the kernel before it still runs: `rows` from row0, and from row1 on if it is not negative.
DEVICE void few_hopper_prefetch(const real* w, int ldw, int row0, int row1, int rows, int n, int k) {
  const int r = threadIdx.x, row = r < rows ? row0 + r : row1 + r - rows;
  if (r < (row1 < 0 ? rows : 2 * rows) && row < n) prefetch_l2(w + (long long)row * ldw, k / 8 * 16);
}

// X by tensor map: boxes of D rows, each behind the W of its stage.
template <int D>
struct LoadedRows {
  static constexpr int BYTES = D * 128;  // that a stage holds and a load brings
  const tensor_map& map;
  DEVICE_MEMBER void prepare(unsigned char*, int) const {}
  DEVICE_MEMBER void begin(unsigned char*, int) const {}
  DEVICE_MEMBER void load(bf16* tile, mbarrier* full, int from) const { tma_load(tile + 64 * 64, &map, full, from, 0); }
  DEVICE_MEMBER const bf16* tile(const bf16* w, const unsigned char*, int) const { return w + 64 * 64; }
};

// N: rows that the block norms itself, in a tile of 8 rows for each step, behind the ring. D packs of a row a lane.
template <int D>
struct NormedRows {
  static constexpr int BYTES = 0;
  real* sum;
  const real *x, *res, *weight;
  int m, k, once;
  float eps, plus;

  // Zeros for the rows that X does not have.
  DEVICE_MEMBER void prepare(unsigned char* tiles, int steps) const {
    if (threadIdx.x == 128) prefetch_l2(weight, k * 2);
    if (threadIdx.x >= 128) return;
    for (int c = m * 8 + (int)threadIdx.x; c < 64 * steps; c += 128)
      if (c % 64 >= m * 8) put(at(tiles, c % 64 / 8, c / 64 * 64 + c % 8 * 8), packed<real>(FlatPack{}), V);
  }
  DEVICE_MEMBER void begin(unsigned char* tiles, int steps) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = warp; row < m; row += 4) norm(tiles, row, lane, steps * FEW_HOPPER_STEP);
    fence_async_proxy();
    named_barrier(1, 128);
  }
  DEVICE_MEMBER void load(bf16*, mbarrier*, int) const {}
  DEVICE_MEMBER const bf16* tile(const bf16*, const unsigned char* tiles, int step) const {
    return (const bf16*)(tiles + step * FEW_NORM_TILE);
  }

 private:
  DEVICE_MEMBER real* at(unsigned char* tiles, int row, int col) const {
    return (real*)(tiles + col / FEW_HOPPER_STEP * FEW_NORM_TILE + swizzle128(row, col % FEW_HOPPER_STEP / 8));
  }
  // As rmsnorm_fwd; `end`: columns of the tiles.
  DEVICE_MEMBER void norm(unsigned char* tiles, int row, int lane, int end) const {
    const long long from = (long long)row * k;
    Packed<V, real> s[D], r[D], g[D];
#pragma unroll
    for (int i = 0; i < D; ++i) {
      const int col = (i * 32 + lane) * V;
      s[i] = fetch<V>(x + from + col, k - col);
      r[i] = fetch<V>((res ? res : x) + from + col, k - col);
      g[i] = fetch<V>(weight + col, k - col);
    }
    FlatPack square = {};
#pragma unroll
    for (int i = 0; i < D; ++i) {
      FlatPack v = values(s[i]);
      if (res) {
        const FlatPack more = values(r[i]);
#pragma unroll
        for (int j = 0; j < V; ++j) v.v[j] = round_real(v.v[j] + more.v[j]);
        s[i] = packed<real>(v);
        if (blockIdx.x == 0) put(sum + from + (i * 32 + lane) * V, s[i], k - (i * 32 + lane) * V);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) square.v[j] = fmaf(v.v[j], v.v[j], square.v[j]);
    }
    const float rstd = rstd_by_lanes(square, k, eps);
#pragma unroll
    for (int i = 0; i < D; ++i) {
      const int col = (i * 32 + lane) * V;
      FlatPack v = values(s[i]);
      const FlatPack w = values(g[i]);
#pragma unroll
      for (int j = 0; j < V; ++j) v.v[j] = weighted(v.v[j] * rstd, w.v[j], plus, once);
      if (col < end) put(at(tiles, row, col), packed<real>(v), V);
    }
  }
};

// The sums of the block's rows of W (first of the wgmma) and the rows of X: sum[4c + 2h + e] is W's row 16 warp + lane / 4 + 8 h of
// the tile, X's row 8 c + lane % 4 * 2 + e. `load` starts the loads of W for a step. False: this thread has none.
template <int D, class Rows, class Load>
DEVICE bool few_hopper_sums(float (&sum)[D / 2], const Rows& x, int rows, int k, int stages, const Load& load) {
  constexpr int STAGE = few_hopper_stage(Rows::BYTES / 128);
  unsigned char* ring = shared_base();
  mbarrier* full = (mbarrier*)(ring + stages * STAGE);
  mbarrier* empty = full + stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 1);
    }
    mbarrier_fence();
  }
  const int steps = (k + FEW_HOPPER_STEP - 1) / FEW_HOPPER_STEP;
  unsigned char* tiles = ring + stages * STAGE + FEW_HOPPER_BARRIERS;
  x.prepare(tiles, steps);
  block_sync();
  wait_for_previous();
  int stage = 0, phase = 0;
  auto next = [&] {
    if (++stage == stages) stage = 0, phase ^= 1;
  };
  if (threadIdx.x >= 128) {
    if (threadIdx.x > 128) return false;
    for (int q = 0; q < steps; ++q, next()) {
      mbarrier_wait(empty + stage, phase ^ 1);
      mbarrier_expect(full + stage, rows * 128 + Rows::BYTES);
      bf16* tile = (bf16*)(ring + stage * STAGE);
      load(tile, full + stage, q * FEW_HOPPER_STEP);
      x.load(tile, full + stage, q * FEW_HOPPER_STEP);
    }
    return false;
  }
  x.begin(tiles, steps);
  int last = -1;
  for (int q = 0; q < steps; ++q, next()) {
    mbarrier_wait(full + stage, phase);
    const bf16 *w_tile = (bf16*)(ring + stage * STAGE), *x_tile = x.tile(w_tile, tiles, q);
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

// Where a block's sums of few_*_nt go.
struct FewTarget {
  real* c;
  float* cf;
  const real* bias;
  int m, n, ldc, accumulate, rows;
  template <int D>
  DEVICE_MEMBER void put(const float (&sum)[D]) const {
    const int row0 = blockIdx.x * rows;
    few_hopper_each<2 * D>(rows, m, [&](int i, int j, int at) {
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
  }
};

// Where those of few_*_glu go. Columns past f, in the last block, are sums of other rows: they are not stored.
struct FewGatedTarget {
  real* y;
  const real* bias;
  int m, f, ldy, activation, rows;
  template <int D>
  DEVICE_MEMBER void put(const float (&sum)[D]) const {
    const int f0 = blockIdx.x * (rows / 2);
    few_hopper_each<2 * D>(rows, m, [&](int i, int j, int at) {
      const int col = f0 + i / 16 * 8 + i % 8;
      if (col >= f) return;
      float g = sum[at], u = sum[at + 2];
      if (bias) {
        g += to_float(bias[col]);
        u += to_float(bias[f + col]);
      }
      assign(y[(long long)j * ldy + col], gated(activation, round_real(g), round_real(u)));
    });
  }
};

// A block's part of a product with D columns of X.
template <int D, class Rows>
DEVICE void few_hopper_product(const Rows& x, const tensor_map& w, const real* weight, int k, int ldw, int stages, const FewTarget& to) {
  const int row0 = blockIdx.x * to.rows;
  few_hopper_prefetch(weight, ldw, row0, -1, to.rows, to.n, k);
  float sum[D / 2];
  const auto load = [&](bf16* tile, mbarrier* full, int from) { tma_load(tile, &w, full, from, row0); };
  if (few_hopper_sums<D>(sum, x, to.rows, k, stages, load)) to.put(sum);
}
template <int D, class Rows>
DEVICE void few_hopper_gated(const Rows& x, const tensor_map& w, const real* weight, int k, int ldw, int stages,
                             const FewGatedTarget& to) {
  const int f0 = blockIdx.x * (to.rows / 2), f = to.f;
  few_hopper_prefetch(weight, ldw, f0, f + f0, to.rows / 2, 2 * f, k);
  float sum[D / 2];
  const auto load = [&](bf16* tile, mbarrier* full, int from) {
    for (int i = 0; i < to.rows / 16; ++i) {
      tma_load(tile + i * 16 * 64, &w, full, from, f0 + i * 8);
      tma_load(tile + (i * 16 + 8) * 64, &w, full, from, f + f0 + i * 8);
    }
  };
  if (few_hopper_sums<D>(sum, x, to.rows, k, stages, load)) to.put(sum);
}
#endif

KERNEL(few_hopper_nt, D=8,16,32,64, THREADS=160, HOT, WAITS)(const tensor_map& x, const tensor_map& w, MAYBE(real) c, MAYBE(float) cf,
       const real* weight, MAYBE(const real) bias, int m, int n, int k, int ldw, int ldc, int accumulate, int rows, int stages) {
#if defined(REAL_BF16) && defined(HOPPER)
  few_hopper_product<D>(LoadedRows<D>{x}, w, weight, k, ldw, stages, {c, cf, bias, m, n, ldc, accumulate, rows});
#else
  wait_for_previous();
#endif
}

KERNEL(few_hopper_glu, D=8,16,32,64, THREADS=160, HOT, WAITS)(const tensor_map& x, const tensor_map& w, real* y, const real* weight,
       MAYBE(const real) bias, int m, int f, int k, int ldw, int ldy, int activation, int rows, int stages) {
#if defined(REAL_BF16) && defined(HOPPER)
  few_hopper_gated<D>(LoadedRows<D>{x}, w, weight, k, ldw, stages, {y, bias, m, f, ldy, activation, rows});
#else
  wait_for_previous();
#endif
}

KERNEL(few_norm_nt, D=4,8, THREADS=160, HOT, WAITS)(const tensor_map& w, real* c, MAYBE(real) sum, const real* x, MAYBE(const real) res,
       const real* norm, const real* weight, MAYBE(const real) bias, int m, int n, int k, int ldw, int ldc, float eps, float plus,
       int once, int rows, int stages) {
#if defined(REAL_BF16) && defined(HOPPER)
  const NormedRows<D> normed = {sum, x, res, norm, m, k, once, eps, plus};
  few_hopper_product<FEW_NORM_ROWS>(normed, w, weight, k, ldw, stages, {c, nullptr, bias, m, n, ldc, 0, rows});
#else
  wait_for_previous();
#endif
}

KERNEL(few_norm_glu, D=4,8, THREADS=160, HOT, WAITS)(const tensor_map& w, real* y, MAYBE(real) sum, const real* x, MAYBE(const real) res,
       const real* norm, const real* weight, MAYBE(const real) bias, int m, int f, int k, int ldw, int ldy, int activation, float eps,
       float plus, int once, int rows, int stages) {
#if defined(REAL_BF16) && defined(HOPPER)
  const NormedRows<D> normed = {sum, x, res, norm, m, k, once, eps, plus};
  few_hopper_gated<FEW_NORM_ROWS>(normed, w, weight, k, ldw, stages, {y, bias, m, f, ldy, activation, rows});
#else
  wait_for_previous();
#endif
}
