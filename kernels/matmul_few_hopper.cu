// Products of few rows on Hopper (sm_90a): what matmul_few.cu computes, with TMA and wgmma, for more rows, and with a norm in front.
//
// Math     few_hopper_nt: C = X W^T (+ bias) (+ C);  few_hopper_glu: y = act(g) * u with g|u = X W^T (+ bias), W's rows g above u;
//          few_norm_nt, few_norm_glu: the same of N in place of X (and nothing added to C), N the norm of s = X (+ R) (rmsnorm.cu)
// Shapes   As matmul_few.cu, few_hopper_nt of any number of rows; X and W by tensor map: X in boxes of D rows, W in boxes of `rows`
//          (few_*_glu: 8) rows, 64 of k. `weight` is W again, for the prefetch. few_norm_*: X, R, s [m, k] real without gaps, m up to
//          8, k a multiple of 8 and at most 256 D; norm [k] real. bf16 only.
// Plan     The weight is the operand with 64 rows, X that with D columns: a wgmma of 64 x D. A block owns `rows` columns of C, 16, 32
//          or 64 (the other rows of its tile are never loaded, and their sums never stored), over the whole of k: few where n is small, so
//          that many multiprocessors have a part. few_hopper_nt has a row of blocks for every D rows of X: tiles smaller than
//          hopper_nt's, for a C that has too few of those. Two threads, one for W and one for X, keep a ring of `stages` stages of
//          64 k full by TMA; a warpgroup multiplies. few_*_glu takes 8 rows of g, then the same 8 of u, so that a thread has both.
//          few_norm_*: while the first stages of W travel, each warp of every block norms two of the rows, from L2 to registers to
//          the tiles that wgmma reads: all of k at once, so only W goes through the ring. The first block writes s.
// Numerics As matmul_few.cu: one chain of float sums over k in steps of 16. That a wgmma gives each element the bits of mma.sync was
//          measured with X as the first operand, not yet as the second; an exact context compares before it uses this kernel.
//          few_norm_*: s and N have the bits of rmsnorm_fwd, whose sums are taken in the same order.
// Cost     The weight once: n k sizeof bytes; from L2 (rows + D) 128 bytes a block for each 64 of k. About 120 cycles for each 64 of k
//          (192 for 128 by the stall counts of the machine code, and the waits), where mma.sync takes 132, and no thread that copies.
//          H100: n 896, k 4,864, 8 rows 6 us (chain 5.2), n 9,728, k 896 7 us (weight 5.8); 256 rows: n 896 or 1,152, k 896 3 us, n 896,
//          k 4,864 10 us (105 MB from L2). few_norm_*: 0.5 us more than few_hopper_* (X waits for two rounds of shuffles, a square root
//          and a barrier), for a launch of rmsnorm_fwd less, 1.5 us. All *predicted*, not measured.
#include "common/activate.cuh"
#include "common/few_rows.cuh"
#include "common/norm.cuh"
#include "prim/tile.cuh"
#include "prim/wgmma_loop.cuh"

// k of a stage; bytes of a stage and of the barriers.
EXPORT(int, FEW_HOPPER_STEP, 64);
EXPORT_FN(few_hopper_stage, d, (64 + d) * 128);
EXPORT(int, FEW_HOPPER_BARRIERS, 1024);
// The most stages: with few, a block finds room beside the blocks of the kernel before it.
EXPORT(int, FEW_HOPPER_STAGES, 8);
EXPORT(int, FEW_HOPPER_THREADS, 192);
// The most rows for which few_hopper_nt is tried: those of a large decoding step.
EXPORT(int, FEW_HOPPER_ROWS, 1024);
// The most rows of few_norm_*, and the bytes that they take for each step of k.
EXPORT(int, FEW_NORM_ROWS, 8);
EXPORT(int, FEW_NORM_TILE, 1024);

#if defined(REAL_BF16) && defined(HOPPER)
// X by tensor map: the block's D rows, each box behind the W of its stage.
template <int D>
struct LoadedRows {
  static constexpr int BYTES = D * 128;  // that a stage holds and a load brings
  static constexpr int LOADERS = 1;
  const tensor_map& map;
  DEVICE_MEMBER void prepare(unsigned char*, int) const {}
  DEVICE_MEMBER void begin(unsigned char*, int) const {}
  DEVICE_MEMBER void load(bf16* tile, mbarrier* full, int from) const {
    mbarrier_expect(full, BYTES);
    tma_load(tile + 64 * 64, &map, full, from, blockIdx.y * D);
  }
  // The first tile.
  DEVICE_MEMBER const bf16* tile(const bf16* w, const unsigned char*) const { return w + 64 * 64; }
};

// N: rows that the block norms itself, in a tile of 8 rows for each step, behind the ring. D packs of a row a lane.
template <int D>
struct NormedRows {
  static constexpr int BYTES = 0, LOADERS = 0;
  real* sum;
  const real *x, *res, *weight;
  int m, k, once;
  float eps, plus;

  // Zeros for the rows that X does not have.
  DEVICE_MEMBER void prepare(unsigned char* tiles, int steps) const {
    if (threadIdx.x >= 128) {
      for (int i = (int)threadIdx.x - 128; i * 64 < k; i += (int)blockDim.x - 128) prefetch_l2(weight + i * 64);
      return;
    }
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
  DEVICE_MEMBER const bf16* tile(const bf16*, const unsigned char* tiles) const { return (const bf16*)tiles; }

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

// Where a block's rows of W are: half of them from `low` on, the others from `high` on; and how much of them is prefetched.
struct FewWeight {
  const real* w;
  int ld, n, low, high, ahead, wave;
};

// The sums of the block's rows of W (first of the wgmma) and the rows of X: sum[4c + 2h + e] is W's row 16 warp + lane / 4 + 8 h of
// the tile, X's row 8 c + lane % 4 * 2 + e. `load` starts the loads of W for a step, `first` those that the end needs. False: this
// thread has none.
template <int D, class Rows, class Load, class First>
DEVICE bool few_hopper_sums(float (&sum)[D / 2], const Rows& x, const FewWeight& w, int rows, int k, int stages, const Load& load,
                            const First& first) {
  constexpr int STAGE = few_hopper_stage(Rows::BYTES / 128);
  unsigned char* ring = shared_base();
  mbarrier* full = (mbarrier*)(ring + stages * STAGE);
  mbarrier* empty = full + stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(full + i, 1 + Rows::LOADERS);
      mbarrier_init(empty + i, 1);
    }
    mbarrier_fence();
  }
  const int steps = (k + FEW_HOPPER_STEP - 1) / FEW_HOPPER_STEP;
  unsigned char* tiles = ring + stages * STAGE + FEW_HOPPER_BARRIERS;
  x.prepare(tiles, steps);
  block_sync();
  prefetch_rows(w.w, w.ld, w.low, w.high, rows / 2, w.n, w.ahead, w.wave);
  wait_for_previous();
  int stage = 0, phase = 0;
  auto next = [&] {
    if (++stage == stages) stage = 0, phase ^= 1;
  };
  // The warp's number, read from its first lane: the compiler then knows that the branch is uniform, and uses uniform registers.
  const int warp = shfl((int)threadIdx.x / 32, 0);
  if (warp >= 4) {
    // A thread of warp 4 loads W, one of warp 5 X.
    if (threadIdx.x % 32 != 0 || warp > 4 + Rows::LOADERS) return false;
    for (int q = 0; q < steps; ++q, next()) {
      mbarrier_wait(empty + stage, phase ^ 1);
      bf16* tile = (bf16*)(ring + stage * STAGE);
      if (warp == 4) {
        mbarrier_expect(full + stage, rows * 128);
        load(tile, full + stage, q * FEW_HOPPER_STEP);
      } else {
        x.load(tile, full + stage, q * FEW_HOPPER_STEP);
      }
    }
    return false;
  }
  first();
  x.begin(tiles, steps);
  const wgmma_operand w0 = wgmma_desc<true>((bf16*)ring), x0 = wgmma_desc<true>(x.tile((bf16*)ring, tiles));
  int last = -1;
  for (int q = 0; q < steps; ++q, next()) {
    mbarrier_wait(full + stage, phase);
    const wgmma_operand w_tile = wgmma_step(w0, stage * (STAGE / 2));
    const wgmma_operand x_tile = wgmma_step(x0, Rows::BYTES ? stage * (STAGE / 2) : q * (FEW_NORM_TILE / 2));
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < FEW_HOPPER_STEP; kk += 16)
      wgmma_ss<D, false, false>(sum, wgmma_step(w_tile, kk), wgmma_step(x_tile, kk), q > 0 || kk > 0);
    wgmma_commit();
    if (last >= 0) {
      wgmma_wait<1>();
      if (threadIdx.x == 0) mbarrier_arrive(empty + last);
    }
    last = stage;
  }
  wgmma_wait<0>();
  hold(sum);
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

// Adds the biases of a thread's two rows of W.
template <int D>
DEVICE void few_hopper_bias(float (&sum)[D], const float (&b)[2]) {
#pragma unroll
  for (int i = 0; i < D; ++i) sum[i] += b[i / 2 % 2];
}

// Where a block's sums of few_*_nt go. A thread has two columns of C; their biases are read while the first tiles are loaded.
struct FewTarget {
  real* c;
  float* cf;
  const real* bias;
  int m, n, ldc, accumulate, rows;
  DEVICE_MEMBER void begin(float (&b)[2]) const {
    if (!bias) return;
    const int col = blockIdx.x * rows + (int)threadIdx.x / 32 * 16 + (int)threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) b[h] = col + 8 * h < n ? to_float(bias[col + 8 * h]) : 0.f;
  }
  // One loop for each thing to do: in one loop for all, each element would take its own branches.
  template <int D>
  DEVICE_MEMBER void put(float (&sum)[D], const float (&b)[2]) const {
    if (bias) few_hopper_bias(sum, b);
    if (accumulate) each<2 * D>([&](long long at, int i) { sum[i] += cf ? cf[at] : to_float(c[at]); });
    if (cf)
      each<2 * D>([&](long long at, int i) { cf[at] = sum[i]; });
    else
      each<2 * D>([&](long long at, int i) { assign(c[at], sum[i]); });
  }

 private:
  // Calls use(place in C, index of the sum).
  template <int D, class Use>
  DEVICE_MEMBER void each(const Use& use) const {
    const int col0 = blockIdx.x * rows, row0 = blockIdx.y * D;
    few_hopper_each<D>(rows, m - row0, [&](int i, int j, int at) {
      const long long to = (long long)(row0 + j) * ldc + col0 + i;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (col0 + i + 8 * h < n) use(to + 8 * h, at + 2 * h);
    });
  }
};

// Where those of few_*_glu go. Columns past f, in the last block, are sums of other rows: they are not stored.
struct FewGatedTarget {
  real* y;
  const real* bias;
  int m, f, ldy, activation, rows;
  DEVICE_MEMBER void begin(float (&b)[2]) const {
    if (!bias) return;
    const int col = blockIdx.x * (rows / 2) + (int)threadIdx.x / 32 * 8 + (int)threadIdx.x % 32 / 4;
    b[0] = col < f ? to_float(bias[col]) : 0.f;
    b[1] = col < f ? to_float(bias[f + col]) : 0.f;
  }
  template <int D>
  DEVICE_MEMBER void put(float (&sum)[D], const float (&b)[2]) const {
    const int f0 = blockIdx.x * (rows / 2);
    if (bias) few_hopper_bias(sum, b);
    few_hopper_each<2 * D>(rows, m, [&](int i, int j, int at) {
      const int col = f0 + i / 16 * 8 + i % 8;
      if (col < f) assign(y[(long long)j * ldy + col], gated(activation, round_real(sum[at]), round_real(sum[at + 2])));
    });
  }
};

// A block's part of a product with D columns of X.
template <int D, class Rows>
DEVICE void few_hopper_product(const Rows& x, const tensor_map& map, FewWeight w, int k, int stages, const FewTarget& to) {
  const int row0 = blockIdx.x * to.rows;
  w.low = row0, w.high = row0 + to.rows / 2;
  float sum[D / 2], b[2] = {};
  const auto load = [&](bf16* tile, mbarrier* full, int from) { tma_load(tile, &map, full, from, row0); };
  if (few_hopper_sums<D>(sum, x, w, to.rows, k, stages, load, [&] { to.begin(b); })) to.put(sum, b);
}
template <int D, class Rows>
DEVICE void few_hopper_gated(const Rows& x, const tensor_map& map, FewWeight w, int k, int stages, const FewGatedTarget& to) {
  const int f0 = blockIdx.x * (to.rows / 2), f = to.f;
  w.low = f0, w.high = f + f0;
  float sum[D / 2], b[2] = {};
  const auto load = [&](bf16* tile, mbarrier* full, int from) {
    for (int i = 0; i < to.rows / 16; ++i) {
      tma_load(tile + i * 16 * 64, &map, full, from, f0 + i * 8);
      tma_load(tile + (i * 16 + 8) * 64, &map, full, from, f + f0 + i * 8);
    }
  };
  if (few_hopper_sums<D>(sum, x, w, to.rows, k, stages, load, [&] { to.begin(b); })) to.put(sum, b);
}
#endif

KERNEL(few_hopper_nt, D=8,16,32,64,128, THREADS=192, HOT, WAITS)(const tensor_map& x, const tensor_map& w, MAYBE(real) c, MAYBE(float) cf,
       const real* weight, MAYBE(const real) bias, int m, int n, int k, int ldw, int ldc, int accumulate, int rows, int stages, int ahead,
       int wave) {
#if defined(REAL_BF16) && defined(HOPPER)
  few_hopper_product<D>(LoadedRows<D>{x}, w, {weight, ldw, n, 0, 0, ahead, wave}, k, stages, {c, cf, bias, m, n, ldc, accumulate, rows});
#else
  wait_for_previous();
#endif
}

KERNEL(few_hopper_glu, D=8,16,32,64, THREADS=192, HOT, WAITS)(const tensor_map& x, const tensor_map& w, real* y, const real* weight,
       MAYBE(const real) bias, int m, int f, int k, int ldw, int ldy, int activation, int rows, int stages, int ahead, int wave) {
#if defined(REAL_BF16) && defined(HOPPER)
  few_hopper_gated<D>(LoadedRows<D>{x}, w, {weight, ldw, 2 * f, 0, 0, ahead, wave}, k, stages, {y, bias, m, f, ldy, activation, rows});
#else
  wait_for_previous();
#endif
}

KERNEL(few_norm_nt, D=4,8, THREADS=192, HOT, WAITS)(const tensor_map& w, real* c, MAYBE(real) sum, const real* x, MAYBE(const real) res,
       const real* norm, const real* weight, MAYBE(const real) bias, int m, int n, int k, int ldw, int ldc, float eps, float plus,
       int once, int rows, int stages, int ahead, int wave) {
#if defined(REAL_BF16) && defined(HOPPER)
  const NormedRows<D> normed = {sum, x, res, norm, m, k, once, eps, plus};
  few_hopper_product<FEW_NORM_ROWS>(normed, w, {weight, ldw, n, 0, 0, ahead, wave}, k, stages, {c, nullptr, bias, m, n, ldc, 0, rows});
#else
  wait_for_previous();
#endif
}

KERNEL(few_norm_glu, D=4,8, THREADS=192, HOT, WAITS)(const tensor_map& w, real* y, MAYBE(real) sum, const real* x, MAYBE(const real) res,
       const real* norm, const real* weight, MAYBE(const real) bias, int m, int f, int k, int ldw, int ldy, int activation, float eps,
       float plus, int once, int rows, int stages, int ahead, int wave) {
#if defined(REAL_BF16) && defined(HOPPER)
  const NormedRows<D> normed = {sum, x, res, norm, m, k, once, eps, plus};
  few_hopper_gated<FEW_NORM_ROWS>(normed, w, {weight, ldw, 2 * f, 0, 0, ahead, wave}, k, stages, {y, bias, m, f, ldy, activation, rows});
#else
  wait_for_previous();
#endif
}
