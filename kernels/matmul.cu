// The engine's own matrix product, in the three layouts that training needs.
//
// Math     C = op(A) op(B) (+ bias) (+ C).  nt: A [m,k] B [n,k]^T (forward with an HF weight);
//          nn: A [m,k] B [k,n] (gradient of the input);  tn: A [k,m]^T B [k,n] (gradient of the weight)
// Shapes   A, B real with row strides lda, ldb; C real (D=0) or float (D=1) [m, n] with row stride ldc; bias [n] real
// Plan     bf16: a block of 8 warps owns 128 x 128 of C, steps of k 32, three stages of cp.async, ldmatrix, mma.sync
//          m16n8k16; a warp owns 64 x 32. f32: 64 x 64, steps of 16, 4 x 4 a thread; for exact f32 on a GPU and for study.
// Numerics Each element of C is one chain of float sums over k from left to right, in steps of 16 (bf16, inside the
//          tensor core) or 1 (f32), the same whatever m, so a row's bits do not depend on its batch. bias is added in
//          float; C is rounded once, when stored.
// Cost     2 m n k flops; (m k + k n + m n) x sizeof bytes. GPU: not measured yet.
#include "prim/async.cuh"
#include "prim/mma.cuh"
#include "prim/vec.cuh"

enum Trans { NT, NN, TN };

#ifdef REAL_BF16
constexpr int BM = 128, BN = 128, BK = 32, STAGES = 3;
constexpr int TILE = 128 * 32;  // elements of one operand's tile, either way round

// Element offset of the 16-byte chunk holding (row, col) in a tile of 32 (k contiguous) or 128 (m or n contiguous)
// columns. The xor spreads the eight rows that one ldmatrix reads over all banks.
template <bool K_CONTIGUOUS>
DEVICE int chunk_at(int row, int col) {
  if (K_CONTIGUOUS) return row * 32 + (((col >> 3) ^ ((row >> 1) & 3)) << 3);
  return row * 128 + (((col >> 3) ^ (row & 7)) << 3);
}

// Starts the copy of one tile. K_CONTIGUOUS: 128 rows (of m or n) x 32 of k; else 32 rows (of k) x 128.
template <bool K_CONTIGUOUS>
DEVICE void load_tile(bf16* tile, const bf16* src, int ld, int row0, int col0, int rows, int cols, bool aligned) {
  constexpr int COLS = K_CONTIGUOUS ? 32 : 128;
#pragma unroll
  for (int i = 0; i < TILE / 8 / 256; ++i) {
    const int c = (int)threadIdx.x + i * 256;
    const int r = c / (COLS / 8), col = c % (COLS / 8) * 8;
    const int row = row0 + r;
    int valid = row < rows ? cols - (col0 + col) : 0;
    valid = valid < 0 ? 0 : valid > 8 ? 8 : valid;
    bf16* dst = tile + chunk_at<K_CONTIGUOUS>(r, col);
    const bf16* from = valid ? src + (long long)row * ld + col0 + col : src;
    if (aligned) {
      copy_async16(dst, from, valid * 2);
    } else {
      for (int j = 0; j < 8; ++j) dst[j] = j < valid ? from[j] : to_bf16(0.f);
    }
  }
}

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T x, y;
};

// Stores x and, if `two`, y beside it; in one access if `paired`, the address being a multiple of both values' bytes.
template <class T>
DEVICE void store_two(T* to, float x, float y, bool two, bool paired, bool accumulate) {
  if (two && paired) {
    Two<T> old = {};
    if (accumulate) old = *(const Two<T>*)to;
    assign(old.x, accumulate ? to_float(old.x) + x : x);
    assign(old.y, accumulate ? to_float(old.y) + y : y);
    *(Two<T>*)to = old;
  } else {
    assign(to[0], accumulate ? to_float(to[0]) + x : x);
    if (two) assign(to[1], accumulate ? to_float(to[1]) + y : y);
  }
}

template <int TRANS, int FLOAT_OUT>
DEVICE void product(real* c, float* cf, const real* a, const real* b, const real* bias, int m, int n, int k, int lda,
                    int ldb, int ldc, int accumulate) {
  constexpr bool AK = TRANS != TN, BK_CONTIGUOUS = TRANS == NT;
  bf16* shared = (bf16*)shared_base();
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int wm = warp / 4 * 64, wn = warp % 4 * 32;
  const bool a_aligned = ((((unsigned long long)a >> 1) | (unsigned)lda) & 7) == 0;
  const bool b_aligned = ((((unsigned long long)b >> 1) | (unsigned)ldb) & 7) == 0;
  float acc[4][4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.f;

  const int steps = (k + BK - 1) / BK;
  auto fetch = [&](int step) {
    if (step < steps) {
      bf16* ta = shared + step % STAGES * 2 * TILE;
      bf16* tb = ta + TILE;
      if (AK)
        load_tile<true>(ta, a, lda, m0, step * BK, m, k, a_aligned);
      else
        load_tile<false>(ta, a, lda, step * BK, m0, k, m, a_aligned);
      if (BK_CONTIGUOUS)
        load_tile<true>(tb, b, ldb, n0, step * BK, n, k, b_aligned);
      else
        load_tile<false>(tb, b, ldb, step * BK, n0, k, n, b_aligned);
    }
    copy_commit();  // also when empty, so that the wait below always counts the same
  };
  for (int s = 0; s < STAGES - 1; ++s) fetch(s);
  for (int step = 0; step < steps; ++step) {
    copy_wait<STAGES - 2>();
    block_sync();
    fetch(step + STAGES - 1);
    const bf16* ta = shared + step % STAGES * 2 * TILE;
    const bf16* tb = ta + TILE;
#pragma unroll
    for (int kk = 0; kk < BK; kk += 16) {
      unsigned fa[4][4], fb[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = lane / 8 % 2 * 8, upper = lane / 16 * 8, r = lane % 8;
        if (AK)
          ldmatrix4<false>(fa[i], ta + chunk_at<true>(wm + i * 16 + half + r, kk + upper));
        else
          ldmatrix4<true>(fa[i], ta + chunk_at<false>(kk + upper + r, wm + i * 16 + half));
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const int half = lane / 8 % 2 * 8, upper = lane / 16 * 8, r = lane % 8;
        unsigned two[4];
        if (BK_CONTIGUOUS)
          ldmatrix4<false>(two, tb + chunk_at<true>(wn + j * 8 + upper + r, kk + half));
        else
          ldmatrix4<true>(two, tb + chunk_at<false>(kk + half + r, wn + j * 8 + upper));
        fb[j][0] = two[0];
        fb[j][1] = two[1];
        fb[j + 1][0] = two[2];
        fb[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_bf16(acc[i][j], fa[i], fb[j]);
    }
  }
  copy_wait<0>();
  // A lane has two neighbouring values of a row; they are stored as one where the address allows.
  const bool paired = FLOAT_OUT ? (((unsigned long long)cf >> 2 | (unsigned)ldc) & 1) == 0
                                : (((unsigned long long)c >> 1 | (unsigned)ldc) & 1) == 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = m0 + wm + i * 16 + lane / 4 + h * 8, col = n0 + wn + j * 8 + lane % 4 * 2;
        if (row >= m || col >= n) continue;
        const long long at = (long long)row * ldc + col;
        const bool two = col + 1 < n;
        float x = acc[i][j][2 * h], y = acc[i][j][2 * h + 1];
        if (bias) {
          x += to_float(bias[col]);
          if (two) y += to_float(bias[col + 1]);
        }
        if (FLOAT_OUT)
          store_two(cf + at, x, y, two, paired, accumulate);
        else
          store_two(c + at, x, y, two, paired, accumulate);
      }
}
#else
constexpr int BM = 64, BN = 64, BK = 16;

template <int TRANS, int FLOAT_OUT>
DEVICE void product(real* c, float* cf, const real* a, const real* b, const real* bias, int m, int n, int k, int lda,
                    int ldb, int ldc, int accumulate) {
  float* ta = (float*)shared_base();      // [BK][BM + 4]
  float* tb = ta + BK * (BM + 4);         // [BK][BN + 4]
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  const int tm = threadIdx.x / 16 * 4, tn = threadIdx.x % 16 * 4;
  float acc[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = 0.f;
  for (int k0 = 0; k0 < k; k0 += BK) {
    // Neighbouring threads read neighbouring addresses of whichever dimension is contiguous.
    for (int i = threadIdx.x; i < BM * BK; i += 256) {
      const int r = TRANS == TN ? i % BM : i / BK, kk = TRANS == TN ? i / BM : i % BK;
      const long long at = TRANS == TN ? (long long)(k0 + kk) * lda + m0 + r : (long long)(m0 + r) * lda + k0 + kk;
      ta[kk * (BM + 4) + r] = m0 + r < m && k0 + kk < k ? to_float(a[at]) : 0.f;
    }
    for (int i = threadIdx.x; i < BN * BK; i += 256) {
      const int r = TRANS == NT ? i / BK : i % BN, kk = TRANS == NT ? i % BK : i / BN;
      const long long at = TRANS == NT ? (long long)(n0 + r) * ldb + k0 + kk : (long long)(k0 + kk) * ldb + n0 + r;
      tb[kk * (BN + 4) + r] = n0 + r < n && k0 + kk < k ? to_float(b[at]) : 0.f;
    }
    block_sync();
#pragma unroll
    for (int kk = 0; kk < BK; ++kk) {
      float x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = ta[kk * (BM + 4) + tm + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = tb[kk * (BN + 4) + tn + j];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(x[i], y[j], acc[i][j]);
    }
    block_sync();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = m0 + tm + i, col = n0 + tn + j;
      if (row >= m || col >= n) continue;
      float v = acc[i][j];
      if (bias) v += to_float(bias[col]);
      const long long at = (long long)row * ldc + col;
      if (FLOAT_OUT)
        cf[at] = accumulate ? cf[at] + v : v;
      else
        c[at] = to_real(accumulate ? to_float(c[at]) + v : v);
    }
}
#endif

KERNEL(matmul_nt, D=0,1, HOT)(MAYBE(real) c, MAYBE(float) cf, const real* a, const real* b, MAYBE(const real) bias, int m,
                              int n, int k, int lda, int ldb, int ldc, int accumulate) {
  product<NT, D>(c, cf, a, b, bias, m, n, k, lda, ldb, ldc, accumulate);
}

KERNEL(matmul_nn, D=0,1, HOT)(MAYBE(real) c, MAYBE(float) cf, const real* a, const real* b, MAYBE(const real) bias, int m,
                              int n, int k, int lda, int ldb, int ldc, int accumulate) {
  product<NN, D>(c, cf, a, b, bias, m, n, k, lda, ldb, ldc, accumulate);
}

KERNEL(matmul_tn, D=0,1, HOT)(MAYBE(real) c, MAYBE(float) cf, const real* a, const real* b, MAYBE(const real) bias, int m,
                              int n, int k, int lda, int ldb, int ldc, int accumulate) {
  product<TN, D>(c, cf, a, b, bias, m, n, k, lda, ldb, ldc, accumulate);
}
