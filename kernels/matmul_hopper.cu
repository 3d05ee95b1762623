// The engine's own matrix product on Hopper (sm_90a): the same function, with the same bits, as matmul.cu.
//
// Math     C = op(A) op(B) (+ bias) (+ R), in the layouts of matmul.cu; R real is C itself where C accumulates
// Shapes   A, B real by tensor map: nt A [m,k] boxes of 128 rows, B [n,k] boxes of D rows; nn B [k,n] boxes of 64 rows; tn A
//          [k,m] boxes of 64 rows. C [m,n] real, also by tensor map, boxes of 16 rows, or float (names in _float); R [m,n] or
//          bias [n] real. Rows begin at multiples of 16 bytes (float C: 8), n is even.
// Plan     A persistent block owns 128 x D of C at a time. One thread of its first warpgroup keeps a ring of stages full by TMA
//          (128-byte swizzle, k 64 per stage); the other two warpgroups multiply 64 x D each by wgmma and release a stage once
//          the next one's products are started. Real C leaves through shared memory by TMA. Tiles are taken in groups of `group`
//          rows, column by column, so that neighbours share L2. tn: the tiles that do not fill the last wave are cut along k, all
//          at the same places, for `workers` blocks in all. A part that does not begin its tile goes to `parts`; the block that
//          begins the tile adds the parts in the order of k.
// Numerics As matmul.cu: one chain of float sums over k in steps of 16, the same bits whatever D (measured on an H100). A tile of
//          tn that is cut is a sum of such chains from left to right; where the cuts lie depends on m, n, k, D.
// Cost     2 m n k flops; (m k + k n + m n) x sizeof bytes. H100 80GB, 2026-11-27, 8192^3, TFLOP/s: nt 804, nn 791, tn 630 with C
//          += (cuBLASLt in the same process: 804, 655, 647 with bf16 C =). More shapes: docs/kernels.md, Log.
#include "common/hopper_product.cuh"

// C and R real; `direct` is C too; ldc and ldr are row strides.
KERNEL(hopper_nt, D=128,192,224,256, THREADS=384, SHARED=hopper_shared(D), HOT)(const tensor_map& a, const tensor_map& b, const tensor_map& c,
       INOUT(real) direct, MAYBE(const real) residual, MAYBE(const real) bias, int m, int n, int k, int ldc, int ldr, int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  hopper_product<NT, D, false>(a, b, {&c, direct, residual, ldc, ldr}, {}, bias, m, n, k, group);
#endif
}

KERNEL(hopper_nn, D=128,192,224,256, THREADS=384, SHARED=hopper_shared(D), HOT)(const tensor_map& a, const tensor_map& b, const tensor_map& c,
       INOUT(real) direct, MAYBE(const real) residual, MAYBE(const real) bias, int m, int n, int k, int ldc, int ldr, int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  hopper_product<NN, D, false>(a, b, {&c, direct, residual, ldc, ldr}, {}, bias, m, n, k, group);
#endif
}

KERNEL(hopper_nt_float, D=128,192,224,256, THREADS=384, SHARED=hopper_float_shared(D), HOT)(const tensor_map& a, const tensor_map& b, INOUT(float) c,
       MAYBE(const real) bias, int m, int n, int k, int ldc, int accumulate, int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  hopper_product<NT, D, true>(a, b, {}, {c, nullptr, nullptr, ldc, accumulate, 0}, bias, m, n, k, group);
#endif
}

KERNEL(hopper_tn_float, D=128,192,224, THREADS=384, SHARED=hopper_float_shared(D), HOT)(const tensor_map& a, const tensor_map& b, INOUT(float) c,
       MAYBE(float) parts, MAYBE(int) flags, MAYBE(const real) bias, int m, int n, int k, int ldc, int accumulate, int workers, int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  hopper_product<TN, D, true>(a, b, {}, {c, parts, flags, ldc, accumulate, workers}, bias, m, n, k, group);
#endif
}
