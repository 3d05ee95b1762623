// Low-rank adapters inside the products that they accompany, on Hopper (sm_90a): y and dx of lora.cu with its bits, and all gradients
// of a group beside dx.
//
// Math     hopper_lora_nt: y = x W^T (+ bias) + t Bd^T.  hopper_lora_nn: dx (+)= dy W + dt A, dA (+)= dt^T x, dB_i (+)= dy_i^T t_i
//          (names as in lora.cu)
// Shapes   As in matmul_hopper.cu and lora.cu. By tensor map, boxes 64 wide: x, dy, t, dt of 128 rows, W of D (nt) or 64 (nn), B_i of D,
//          A of 64; for the gradients dy, x, dt and each t_i once more, of 64 rows. n, k and each rank are multiples of 8
// Plan     The persistent product of common/hopper_product.cuh, whose ring takes further steps after the last of k. nt: one step for each 64
//          ranks of each segment that overlaps the tile; B_i's box begins at the tile's first column, which may lie before the segment:
//          what is outside is zero, so a tile may cross segments. Only the 16s that have ranks are multiplied. nn: steps over A's
//          rows. Then the blocks take the tiles of the gradients, 64 of x's or dy's columns by 64 ranks, each over all rows: they begin
//          in the last wave of dx, and 40 blocks read as fast as memory gives. rows = 0: no dx, the gradients alone.
// Numerics As lora_nt, lora_nn and lora_grads: one chain of float sums in steps of 16 for each element, the low-rank term last, one
//          rounding. A segment's ranks begin at a multiple of 16 of t, or are 8 within one: else steps hold other ranks than there.
// Cost     y: 2 m n (k + r) flops. Gradients: x once, dy once, and t or dt once for each 64 columns. H100, 4,096 rows, rank 16, *predicted*:
//          k 1,024, n 6,144 81 us, where product and additions to y take 79 and 34; dx of the same with its gradients 92 us, where product,
//          addition to dx and three products for gradients take 76, 6 and 30 (docs/kernels.md, Log). Not measured.
#include "common/hopper_product.cuh"

#if defined(REAL_BF16) && defined(HOPPER)
typedef LowRank<const tensor_map*> LowRankBoxes;

// The gradients of a group: tiles of 64 of x's columns (dA) or of dy's (dB_i) by up to 64 ranks, in steps of 128 rows. They follow the
// `before` tiles of dx in the blocks' turns. Bit 0 of `accumulate` adds to dA, bit i + 1 to dB_i.
struct Gradients {
  const tensor_map *x, *dt, *dy, *t[3];
  float *da, *db[3];
  int m, k, before, accumulate, start[3], end[3], rank[3];

  // A tile of dA (i = 0) or dB_{i-1}: from `row` of x's or the segment's columns, and from rank `col`, on. False past the last.
  DEVICE_MEMBER bool tile(int index, int& i, int& row, int& col) const {
    int at = -1, wide = 1;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int ranks = g ? rank[g - 1] : rank[0] + rank[1] + rank[2], size = g ? end[g - 1] - start[g - 1] : k;
      const int across = (ranks + 63) / 64, tiles = (g ? db[g - 1] : da) ? (size + 63) / 64 * across : 0;
      if (index >= 0 && index < tiles) i = g, at = index, wide = across;
      index -= tiles;
    }
    row = at / wide * 64;
    col = at % wide * 64;
    return at >= 0;
  }
  // This block's first tile.
  DEVICE_MEMBER int first() const {
    const int step = gridDim.x, block = blockIdx.x;
    return block < before ? block + (before - block + step - 1) / step * step - before : block - before;
  }
  DEVICE_MEMBER void load(Ring ring) const {
    int i, from, rank_from;
    for (int index = first(); tile(index, i, from, rank_from); index += gridDim.x) {
      const tensor_map *left = i ? dy : x, *right = dt;
#pragma unroll
      for (int g = 0; g < 3; ++g)
        if (i == g + 1) right = t[g], from += start[g];
      for (int row = 0; row < m; row += 2 * DEPTH, ring.next()) {
        mbarrier_wait(ring.empty + ring.stage, ring.phase ^ 1);
        mbarrier* arrived = ring.full + ring.stage;
        mbarrier_expect(arrived, 4 * 64 * DEPTH * 2);
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          tma_load(ring.sa + ring.stage * ring.a_size + half * 64 * DEPTH, left, arrived, from, row + half * DEPTH);
          tma_load(ring.sb + ring.stage * ring.b_size + half * 64 * DEPTH, right, arrived, rank_from, row + half * DEPTH);
        }
      }
    }
  }
  // The first warpgroup sums: it alone multiplies a step in less time than the step's loads take.
  DEVICE_MEMBER void sum(Ring ring) const {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const bool sums = threadIdx.x / 128 == 1;
    int i, from, rank_from;
    for (int index = first(); tile(index, i, from, rank_from); index += gridDim.x) {
      if (!sums) {
        for (int row = 0; row < m; row += 2 * DEPTH, ring.next())
          if (thread == 0) {
            mbarrier_wait(ring.full + ring.stage, ring.phase);
            mbarrier_arrive(ring.empty + ring.stage);
          }
        continue;
      }
      float d[32];
      int last = -1;
      for (int row = 0; row < m; row += 2 * DEPTH, ring.next()) {
        mbarrier_wait(ring.full + ring.stage, ring.phase);
        const bf16 *ta = ring.sa + ring.stage * ring.a_size, *tb = ring.sb + ring.stage * ring.b_size;
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < 2 * DEPTH; kk += 16)  // the second half's boxes follow the first's
          wgmma_ss<64, true, true>(d, wgmma_desc<false>(ta + kk * 64), wgmma_desc<false>(tb + kk * 64), row > 0 || kk > 0);
        wgmma_commit();
        if (last >= 0) {
          wgmma_wait<1>();
          if (thread == 0) mbarrier_arrive(ring.empty + last);
        }
        last = ring.stage;
      }
      wgmma_wait<0>();
      if (thread == 0) mbarrier_arrive(ring.empty + last);
      // Column c of out is rank c of dB, of which a row has `wide`; of dA it is row c, `wide` floats long.
      float* out = da;
      int wide = k, rows = k - from, cols = rank[0] + rank[1] + rank[2] - rank_from;
#pragma unroll
      for (int g = 0; g < 3; ++g)
        if (i == g + 1) out = db[g], wide = rank[g], rows = end[g] - start[g] - from, cols = rank[g] - rank_from;
      const bool add = accumulate >> i & 1;
#pragma unroll
      for (int e = 0; e < 32; ++e) {
        const int row = thread / 32 * 16 + lane / 4 + e / 2 % 2 * 8, col = e / 4 * 8 + lane % 4 * 2 + e % 2;
        const int down = (i ? row : col) + (i ? from : rank_from), across = (i ? col : row) + (i ? rank_from : from);
        float* to = out + (long long)down * wide + across;
        if (row < rows && col < cols) *to = add ? *to + d[e] : d[e];
      }
    }
  }
};
#endif

// `direct` is y too.
KERNEL(hopper_lora_nt, D=128,192,224,256, THREADS=384, SHARED=hopper_shared(D), HOT)(const tensor_map& x, const tensor_map& w,
       const tensor_map& y, const tensor_map& t, const tensor_map& b0, const tensor_map& b1, const tensor_map& b2, INOUT(real) direct,
       MAYBE(const real) bias, int m, int n, int k, int ldy, int group, int start0, int end0, int rank0, int start1, int end1, int rank1,
       int start2, int end2, int rank2) {
#if defined(REAL_BF16) && defined(HOPPER)
  const LowRankBoxes low(&b0, &b1, &b2, start0, end0, rank0, start1, end1, rank1, start2, end2, rank2);
  hopper_product<NT, D, false>(x, w, {&y, direct, nullptr, ldy, 0}, {}, bias, m, n, k, group, &t, low);
#endif
}

// `direct` is dx too, of which `rows` are computed (m or 0); `residual` is it again where dx is added to. The maps in _rows, and t_i's, have
// boxes of 64 rows.
KERNEL(hopper_lora_nn, D=128,192,224,256, THREADS=384, SHARED=hopper_shared(D), HOT)(const tensor_map& dy, const tensor_map& w,
       const tensor_map& dx, const tensor_map& dt, const tensor_map& a, const tensor_map& x_rows, const tensor_map& dt_rows,
       const tensor_map& dy_rows, const tensor_map& t0, const tensor_map& t1, const tensor_map& t2, MAYBE(real) direct, MAYBE(const real) residual, MAYBE(float) da,
       MAYBE(float) db0, MAYBE(float) db1, MAYBE(float) db2, int rows, int m, int n, int k, int lddx, int group, int start0, int end0,
       int rank0, int start1, int end1, int rank1, int start2, int end2, int rank2, int accumulate) {
#if defined(REAL_BF16) && defined(HOPPER)
  const LowRankBoxes low(&a, &a, &a, 0, k, rank0 + rank1 + rank2, 0, 0, 0, 0, 0, 0);
  const int tiles = (rows + ROWS - 1) / ROWS * ((k + D - 1) / D);
  const Gradients gradients = {&x_rows, &dt_rows, &dy_rows, {&t0, &t1, &t2}, da, {db0, db1, db2}, m, k, tiles, accumulate,
                               {start0, start1, start2}, {end0, end1, end2}, {rank0, rank1, rank2}};
  hopper_product<NN, D, false>(dy, w, {&dx, direct, residual, lddx, lddx}, {}, nullptr, rows, k, n, group, &dt, low, gradients);
#endif
}
