// Low-rank adapters fused with the products that they accompany.
//
// Math     The output columns of a fused projection have up to three segments (q|k|v, gate|up) [start_i, end_i), each with an
//          adapter of rank r_i: t = s x A^T [m, R], R = sum r_i;  y = x W^T (+ bias) + t Bd^T, with Bd block-diagonal: B_i in the
//          rows of segment i and the columns of its ranks;  dt_i = s_i dy_i B_i;  dx = dy W + dt A;  dA = dt^T x;  dB_i = dy_i^T
//          t_i
//          (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021)
// Shapes   x, dx [m, k], y, dy [m, n], W [n, k], A [R, k], B_i [end_i - start_i, r_i], t, dt [m, R] real with row strides; bias
//          [n] real; dA, dB_i float, without strides
// Plan     t and dt (lora_narrow): few columns and a long k. A block owns 32 rows; its eight warps share k in chunks of 32, read
//          fragments straight from global memory, and their sums are added in order in shared memory. One launch for all
//          segments, with the scales. y and dx: the tile of prim/tile.cuh; the loop over k (n) continues over R more columns,
//          from t and Bd (dt and A); Bd is assembled as its tiles are read. Gradients: one launch whose blocks share the tiles of
//          dA and of all dB.
// Numerics Float sums, in y and dx from left to right, the low-rank term last; in t and dt eight chains in a fixed order, which
//          depends on k alone. Rounded once when stored, after the scale. t and dt are real.
// Cost     y: 2 m n (k + R) flops, 2 m R more bytes read than without the adapter. t and dt: one read of x or dy; at 4,096 rows
//          on an H100 t of k 1,024, R 48 9 us, dt of two segments of 3,072 19 us, *predicted* (docs/kernels.md, Log).
#include "prim/tile.cuh"

// The segments of a fused projection; absent ones are empty. A rank's offset in R is the sum of the ranks before it.
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
    const bf16* whole = nullptr;  // the 8 values, if they are contiguous and aligned for a copy
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

// The narrow products, whose few columns would leave most of a tile of prim/tile.cuh empty: a block owns NARROW_ROWS rows and
// NARROW_COLS columns, and its warps share k.
EXPORT(int, NARROW_ROWS, 32);
EXPORT(int, NARROW_COLS, 32);
// Shared memory of a block: each warp's sums, with rows 8 banks apart.
EXPORT_FN(narrow_shared, real_bytes, real_bytes == 2 ? 8 * 32 * (32 + 8) * 4 : 0);
constexpr int NARROW_WARPS = 8, NARROW_PITCH = NARROW_COLS + 8, NARROW_TILES = NARROW_COLS / 8;

#ifdef REAL_BF16
// Eight neighbours of a row as four words; zero outside. WHOLE: they are one aligned run of 16 bytes, or entirely outside.
template <bool WHOLE>
DEVICE void eight(unsigned (&to)[4], const Matrix& a, int row, int col) {
  if constexpr (WHOLE) {
    const Packed<8, bf16> p = fetch<8>(a.p + (long long)row * a.ld + col, row < a.rows ? 8 : 0);
    memcpy(to, &p, 16);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = pack_bf16(a.at(row, col + 2 * e), a.at(row, col + 2 * e + 1));
  }
}

// Eight neighbours of each of four columns. WHOLE: the four of a row are one aligned run of 8 bytes, or entirely outside, and all
// rows exist.
struct alignas(8) Quad {
  unsigned low, high;
};
template <bool WHOLE>
DEVICE void eight_down(unsigned (&to)[NARROW_TILES][4], const Matrix& a, int row, int col) {
  static_assert(NARROW_TILES == 4, "a lane has four columns");
  const bf16* p = a.p + (long long)row * a.ld + col;
  Quad v[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    v[e] = {0, 0};
    if constexpr (WHOLE) {
      if (col < a.cols) v[e] = *(const Quad*)(p + e * a.ld);
    } else if (row + e < a.rows) {
      unsigned c[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) c[j] = col + j < a.cols ? p[e * a.ld + j].bits : 0;
      v[e] = {c[0] | c[1] << 16, c[2] | c[3] << 16};
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const Quad even = v[2 * e], odd = v[2 * e + 1];
    to[0][e] = (even.low & 0xffffu) | odd.low << 16;
    to[1][e] = even.low >> 16 | (odd.low & 0xffff0000u);
    to[2][e] = (even.high & 0xffffu) | odd.high << 16;
    to[3][e] = even.high >> 16 | (odd.high & 0xffff0000u);
  }
}

// This warp's part of the products of rows m0.. of x and columns c0.. of w (D=0: w's rows): every NARROW_WARPS-th 32 of k. Lane 4
// g + q takes k = 8 q .. 8 q + 7 of them, for both operands, so a fragment is one load. Where w's columns are strided (D=1) it
// takes four neighbours, 4 g .. 4 g + 3, one for each tile: one load per row. All loads of a chunk are issued before its first
// product.
template <int D, bool WHOLE>
DEVICE void narrow_sums(float (&acc)[2][NARROW_TILES][4], const Matrix& x, const Matrix& w, int m0, int c0, int k) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll(WHOLE ? 2 : 1)
  for (int k0 = warp * 32; k0 < k; k0 += NARROW_WARPS * 32) {
    unsigned fx[2][2][4], fw[NARROW_TILES][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) eight<WHOLE>(fx[i][h], x, m0 + i * 16 + h * 8 + g, k0 + 8 * q);
    if constexpr (D == 1) {
      eight_down<WHOLE>(fw, w, k0 + 8 * q, c0 + 4 * g);
    } else {
#pragma unroll
      for (int j = 0; j < NARROW_TILES; ++j) eight<WHOLE>(fw[j], w, c0 + j * 8 + g, k0 + 8 * q);
    }
#pragma unroll
    for (int j = 0; j < NARROW_TILES; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int s = 0; s < 4; s += 2) {
          const unsigned a[4] = {fx[i][0][s], fx[i][1][s], fx[i][0][s + 1], fx[i][1][s + 1]}, b[2] = {fw[j][s], fw[j][s + 1]};
          mma_bf16(acc[i][j], a, b);
        }
  }
}
#endif

// out_i = s_i x_i W_i. D=0: t = s x A^T, one segment of all columns of x, W = A [R, k]. D=1: dt_i = s_i dy_i B_i, one segment per
// blockIdx.z, W = B_i [k, rank].
KERNEL(lora_narrow, D=0,1, BLOCKS=1, SHARED=narrow_shared(sizeof(real)), HOT)(real* out, const real* x, const real* w0, MAYBE(const real) w1,
                MAYBE(const real) w2, const float* scale, int m, int ldx, int ldout, int start0, int end0, int rank0,
                int start1, int end1, int rank1, int start2, int end2, int rank2) {
  const int z = blockIdx.z, m0 = blockIdx.y * NARROW_ROWS, c0 = blockIdx.x * NARROW_COLS;
  const int start = z == 0 ? start0 : z == 1 ? start1 : start2, end = z == 0 ? end0 : z == 1 ? end1 : end2;
  const int rank = z == 0 ? rank0 : z == 1 ? rank1 : rank2, offset = z == 0 ? 0 : z == 1 ? rank0 : rank0 + rank1;
  const real* wz = z == 0 ? w0 : z == 1 ? w1 : w2;
  if (c0 >= rank) return;
  const int k = end - start, cols = rank - c0 < NARROW_COLS ? rank - c0 : NARROW_COLS;
  const Matrix left(x + start, ldx, m, k), right(wz, D == 0 ? k : rank, D == 0 ? rank : k, D == 0 ? k : rank);
#ifdef REAL_BF16
  float acc[2][NARROW_TILES][4] = {};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool quads = ((((unsigned long long)wz >> 1) | (unsigned)rank) & 3) == 0;
  if (left.aligned && k % 32 == 0 && (D == 1 ? quads : right.aligned))
    narrow_sums<D, true>(acc, left, right, m0, c0, k);
  else
    narrow_sums<D, false>(acc, left, right, m0, c0, k);
  float* sums = (float*)shared_base();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < NARROW_TILES; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = i * 16 + e / 2 * 8 + lane / 4, n = lane % 4 * 2 + e % 2, col = D == 1 ? n * 4 + j : j * 8 + n;
        sums[(warp * NARROW_ROWS + row) * NARROW_PITCH + col] = acc[i][j][e];
      }
  block_sync();
#endif
  for (int item = threadIdx.x; item < NARROW_ROWS * NARROW_COLS; item += 256) {
    const int row = item / NARROW_COLS, col = item % NARROW_COLS;
    if (m0 + row >= m || col >= cols) continue;
    float sum = 0.f;
#ifdef REAL_BF16
#pragma unroll
    for (int w = 0; w < NARROW_WARPS; ++w) sum += sums[(w * NARROW_ROWS + row) * NARROW_PITCH + col];
#else
    for (int i = 0; i < k; ++i)
      sum = fmaf(left.at(m0 + row, i), D == 0 ? right.at(c0 + col, i) : right.at(i, c0 + col), sum);
#endif
    out[(long long)(m0 + row) * ldout + offset + c0 + col] = to_real(sum * scale[offset + c0 + col]);
  }
}

// dA (+)= dt^T x and dB_i (+)= dy_i^T t_i, each if its pointer is given; bit 0 of `accumulate` adds to dA, bit i + 1 to dB_i. The
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
