// Low-rank adapters fused with the products beside which they stand.
//
// Math     A unit's output columns have up to three segments (q|k|v, gate|up) [start_i, end_i), each with an adapter of rank
//          r_i: t = s x A^T [m, R], R = sum r_i;  y = x W^T (+ bias) + t Bd^T, with Bd block-diagonal: B_i in the rows of
//          segment i and the columns of its ranks;  dt_i = s_i dy_i B_i;  dx = dy W + dt A;  dA = dt^T x;  dB_i = dy_i^T t_i
//          (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021)
// Shapes   x, dx [m, k], y, dy [m, n], W [n, k], A [R, k], B_i [end_i - start_i, r_i], t, dt [m, R] real with row strides;
//          bias [n] real; dA, dB_i float, without strides
// Plan     The tile of prim/tile.cuh. y and dx: the loop over k (n) goes on over R more columns, from t and Bd (dt and A);
//          Bd is put together as its tiles are read. dt: a launch for all segments (blockIdx.z). Gradients: a launch whose
//          blocks share out the tiles of dA and of all dB.
// Numerics Float sums from left to right, the low-rank term last; one rounding when stored. t and dt are real.
// Cost     y: 2 m n (k + R) flops, 2 m R more bytes read than without the adapter. GPU: not measured yet.
#include "prim/tile.cuh"

// The segments of a unit; absent ones are empty. A rank's offset in R is the sum of the ranks before it.
struct Segments {
  const real* b[3];
  int start[3], end[3], rank[3];
  DEVICE_MEMBER Segments(const real* b0, const real* b1, const real* b2, int start0, int end0, int rank0, int start1,
                         int end1, int rank1, int start2, int end2, int rank2)
      : b{b0, b1, b2}, start{start0, start1, start2}, end{end0, end1, end2}, rank{rank0, rank1, rank2} {}
};

// Bd [n, R] as an operand: rows are y's columns.
struct BlockDiagonal {
  const Segments& s;
  DEVICE_MEMBER float at(int row, int col) const {
    float v = 0.f;
    int offset = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int local = col - offset;
      if (row >= s.start[i] && row < s.end[i] && local >= 0 && local < s.rank[i])
        v = to_float(s.b[i][(long long)(row - s.start[i]) * s.rank[i] + local]);
      offset += s.rank[i];
    }
    return v;
  }
#ifdef REAL_BF16
  DEVICE_MEMBER void chunk(bf16* dst, int row, int col) const {
    const bf16* whole = nullptr;  // the 8 values, if they lie side by side where a copy can start
    bool mixed = false;
    int offset = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int local = col - offset;
      if (row >= s.start[i] && row < s.end[i] && local > -8 && local < s.rank[i]) {
        const bf16* from = s.b[i] + (long long)(row - s.start[i]) * s.rank[i] + local;
        mixed = local < 0 || local + 8 > s.rank[i] || ((unsigned long long)from & 15) != 0;
        whole = from;
      }
      offset += s.rank[i];
    }
    if (mixed) {
      for (int j = 0; j < 8; ++j) dst[j] = to_bf16(at(row, col + j));
    } else {
      copy_async16(dst, whole ? whole : s.b[0], whole ? 16 : 0);
    }
  }
#endif
};

// y = x W^T (+ bias) + t Bd^T.
KERNEL(lora_nt, SHARED=tile_shared(sizeof(real)), HOT)(real* y, const real* x, const real* w, MAYBE(const real) bias, const real* t, const real* b0,
                     MAYBE(const real) b1, MAYBE(const real) b2, int m, int n, int k, int ranks, int ldx, int ldw, int ldy,
                     int ldt, int start0, int end0, int rank0, int start1, int end1, int rank1, int start2, int end2,
                     int rank2) {
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, steps = steps_of(k);
  const Segments segments(b0, b1, b2, start0, end0, rank0, start1, end1, rank1, start2, end2, rank2);
  const Matrix left(x, ldx, m, k), right(w, ldw, n, k), low(t, ldt, m, ranks);
  const BlockDiagonal diagonal = {segments};
  Sums acc;
  multiply<NT>(acc, steps + steps_of(ranks), [&](int step, real* ta, real* tb) {
    if (step < steps) {
      load_tile<true>(ta, left, m0, step * BK);
      load_tile<true>(tb, right, n0, step * BK);
    } else {
      load_tile<true>(ta, low, m0, (step - steps) * BK);
      load_tile<true>(tb, diagonal, n0, (step - steps) * BK);
    }
  });
  const Target<real> to(y, bias, m, n, ldy, false);
  each_pair(acc, m0, n0, [&](int row, int col, float u, float v) { to.put(row, col, u, v); });
}

// dx (+)= dy W + dt A.
KERNEL(lora_nn, SHARED=tile_shared(sizeof(real)), HOT)(real* dx, const real* dy, const real* w, const real* dt, const real* a, int m, int n, int k, int ranks,
                     int lddy, int ldw, int lddx, int lddt, int lda, int accumulate) {
  const int m0 = blockIdx.y * BM, k0 = blockIdx.x * BN, steps = steps_of(n);
  const Matrix left(dy, lddy, m, n), right(w, ldw, n, k), low(dt, lddt, m, ranks), down(a, lda, ranks, k);
  Sums acc;
  multiply<NN>(acc, steps + steps_of(ranks), [&](int step, real* ta, real* tb) {
    if (step < steps) {
      load_tile<true>(ta, left, m0, step * BK);
      load_tile<false>(tb, right, k0, step * BK);
    } else {
      load_tile<true>(ta, low, m0, (step - steps) * BK);
      load_tile<false>(tb, down, k0, (step - steps) * BK);
    }
  });
  const Target<real> to(dx, nullptr, m, k, lddx, accumulate);
  each_pair(acc, m0, k0, [&](int row, int col, float u, float v) { to.put(row, col, u, v); });
}

// dt_i = s_i dy_i B_i; a segment a blockIdx.z.
KERNEL(lora_dt, SHARED=tile_shared(sizeof(real)))(real* dt, const real* dy, const real* b0, MAYBE(const real) b1, MAYBE(const real) b2, int m, int lddy,
                int lddt, int start0, int end0, int rank0, int start1, int end1, int rank1, int start2, int end2, int rank2,
                float s0, float s1, float s2) {
  const int z = blockIdx.z, m0 = blockIdx.y * BM, r0 = blockIdx.x * BN;
  const int start = z == 0 ? start0 : z == 1 ? start1 : start2, end = z == 0 ? end0 : z == 1 ? end1 : end2;
  const int rank = z == 0 ? rank0 : z == 1 ? rank1 : rank2, offset = z == 0 ? 0 : z == 1 ? rank0 : rank0 + rank1;
  const float s = z == 0 ? s0 : z == 1 ? s1 : s2;
  if (r0 >= rank) return;
  const Matrix left(dy + start, lddy, m, end - start), right(z == 0 ? b0 : z == 1 ? b1 : b2, rank, end - start, rank);
  Sums acc;
  multiply<NN>(acc, steps_of(end - start), [&](int step, real* ta, real* tb) {
    load_tile<true>(ta, left, m0, step * BK);
    load_tile<false>(tb, right, r0, step * BK);
  });
  const Target<real> to(dt + offset, nullptr, m, rank, lddt, false);
  each_pair(acc, m0, r0, [&](int row, int col, float u, float v) { to.put(row, col, u * s, v * s); });
}

// dA (+)= dt^T x and dB_i (+)= dy_i^T t_i, each if it is given; bit 0 of `accumulate` adds to dA, bit i + 1 to dB_i. The
// blocks of the grid (blockIdx.x) are dA's tiles, then dB_0's and so on.
KERNEL(lora_grads, SHARED=tile_shared(sizeof(real)), HOT)(MAYBE(float) da, MAYBE(float) db0, MAYBE(float) db1, MAYBE(float) db2, const real* x, const real* dt,
                        const real* dy, const real* t, int m, int k, int ranks, int ldx, int lddt, int lddy, int ldt,
                        int start0, int end0, int rank0, int start1, int end1, int rank1, int start2, int end2, int rank2,
                        int accumulate) {
  int tile = blockIdx.x;
  float* out = da;
  int rows = ranks, cols = k, group = 0, first = 0, offset = 0;
  const int across_a = (k + BN - 1) / BN, tiles_a = da ? (ranks + BM - 1) / BM * across_a : 0;
  int across = across_a;
  if (tile >= tiles_a) {
    tile -= tiles_a;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int start = i == 0 ? start0 : i == 1 ? start1 : start2, end = i == 0 ? end0 : i == 1 ? end1 : end2;
      const int rank = i == 0 ? rank0 : i == 1 ? rank1 : rank2;
      float* db = i == 0 ? db0 : i == 1 ? db1 : db2;
      const int wide = (rank + BN - 1) / BN, tiles = db ? (end - start + BM - 1) / BM * wide : 0;
      if (tile >= 0 && tile < tiles) {
        out = db, rows = end - start, cols = rank, group = i + 1, first = start, across = wide;
        offset = i == 0 ? 0 : i == 1 ? rank0 : rank0 + rank1;
        break;
      }
      tile -= tiles;
    }
    if (group == 0) return;
  }
  const int m0 = tile / across * BM, n0 = tile % across * BN;
  const Matrix left(group ? dy + first : dt, group ? lddy : lddt, m, rows);
  const Matrix right(group ? t + offset : x, group ? ldt : ldx, m, cols);
  Sums acc;
  multiply<TN>(acc, steps_of(m), [&](int step, real* ta, real* tb) {
    load_tile<false>(ta, left, m0, step * BK);
    load_tile<false>(tb, right, n0, step * BK);
  });
  const Target<float> to(out, nullptr, rows, cols, cols, accumulate >> group & 1);
  each_pair(acc, m0, n0, [&](int row, int col, float u, float v) { to.put(row, col, u, v); });
}
