// The engine's own matrix product, in the three layouts that training needs.
//
// Math     C = op(A) op(B) (+ bias) (+ C).  nt: A [m,k] B [n,k]^T (forward with an HF weight);
//          nn: A [m,k] B [k,n] (gradient of the input);  tn: A [k,m]^T B [k,n] (gradient of the weight)
// Shapes   A, B real with row strides lda, ldb; C real (D=0) or float (D=1) [m, n] with row stride ldc; bias [n] real
// Plan     bf16: a block of 8 warps owns 128 x 128 of C, steps of k 32, three stages of cp.async, ldmatrix, mma.sync m16n8k16; a
//          warp owns 64 x 32. f32: 64 x 64, steps of 16, 4 x 4 per thread; for exact f32 on a GPU and for study.
// Numerics Each element of C is one chain of float sums over k from left to right, in steps of 16 (bf16, inside the tensor core)
//          or 1 (f32), independent of m, so a row's bits do not depend on its batch. bias is added in float; C is rounded once,
//          when stored.
// Cost     2 m n k flops; (m k + k n + m n) x sizeof bytes. H100, 2026-11-26, bf16: 316 TFLOP/s of a ceiling of 798; Hopper has
//          matmul_hopper.cu.
#include "prim/tile.cuh"

template <int TRANS, int FLOAT_OUT>
DEVICE void product(real* c, float* cf, const real* a, const real* b, const real* bias, int m, int n, int k, int lda,
                    int ldb, int ldc, int accumulate) {
  constexpr bool AK = TRANS != TN, BK_CONTIGUOUS = TRANS == NT;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  const Matrix left(a, lda, AK ? m : k, AK ? k : m), right(b, ldb, BK_CONTIGUOUS ? n : k, BK_CONTIGUOUS ? k : n);
  Sums acc;
  multiply<TRANS>(acc, steps_of(k), [&](int step, real* ta, real* tb) {
    load_tile<AK>(ta, left, m0, step * BK);
    load_tile<BK_CONTIGUOUS>(tb, right, n0, step * BK);
  });
  if (FLOAT_OUT) {
    const Target<float> to(cf, bias, m, n, ldc, accumulate);
    each_pair(acc, m0, n0, [&](int row, int col, float x, float y) { to.put(row, col, x, y); });
  } else {
    const Target<real> to(c, bias, m, n, ldc, accumulate);
    each_pair(acc, m0, n0, [&](int row, int col, float x, float y) { to.put(row, col, x, y); });
  }
}

KERNEL(matmul_nt, D=0,1, SHARED=tile_shared(sizeof(real)), HOT)(MAYBE(real) c, MAYBE(float) cf, const real* a, const real* b, MAYBE(const real) bias, int m,
                              int n, int k, int lda, int ldb, int ldc, int accumulate) {
  product<NT, D>(c, cf, a, b, bias, m, n, k, lda, ldb, ldc, accumulate);
}

KERNEL(matmul_nn, D=0,1, SHARED=tile_shared(sizeof(real)), HOT)(MAYBE(real) c, MAYBE(float) cf, const real* a, const real* b, MAYBE(const real) bias, int m,
                              int n, int k, int lda, int ldb, int ldc, int accumulate) {
  product<NN, D>(c, cf, a, b, bias, m, n, k, lda, ldb, ldc, accumulate);
}

KERNEL(matmul_tn, D=0,1, SHARED=tile_shared(sizeof(real)), HOT)(MAYBE(real) c, MAYBE(float) cf, const real* a, const real* b, MAYBE(const real) bias, int m,
                              int n, int k, int lda, int ldb, int ldc, int accumulate) {
  product<TN, D>(c, cf, a, b, bias, m, n, k, lda, ldb, ldc, accumulate);
}
