// Causal attention, level 2: the online softmax.
//
// Changes  No score is stored. A row keeps its largest score m so far, the sum l of e^(s - m), and o; when a new key
//          raises m, both sums are multiplied by e^(old m - new m). Memory for the scores: none. Keys that are not
//          seen cost nothing.
// Math     m' = max(m, s);  l = l e^(m - m') + e^(s - m');  o = o e^(m - m') + e^(s - m') v;  in the end o / l
// Shapes   as attention_1.cu, without s
// Plan     one thread per query row, q and o in registers; the threads of a warp read the same key at the same time
// Numerics float throughout, keys from left to right; o is rounded when stored
// Cost     4 D flops a pair, one load per two of them: the load unit limits this to 14 TFLOP/s. H100, bf16, 112 heads of 2048,
//          2026-11-27: 4.8 TFLOP/s, 0.006 of the ceiling of 800 (10 predicted). sm_90a: 166 registers, no spills.
#include "prim/math.cuh"
#include "prim/real.cuh"

constexpr int DIM = 64;

KERNEL_FLAT(level_attention_2, THREADS=128)(real* o, const real* q, const real* k, const real* v, int heads, int t, float scale) {
  const long long row = FLAT_INDEX;
  if (row >= (long long)heads * t) return;
  float x[DIM], sum[DIM], m = NEG_INF, l = 0.f;
#pragma unroll
  for (int d = 0; d < DIM; ++d) {
    x[d] = to_float(q[row * DIM + d]);
    sum[d] = 0.f;
  }
  for (long long key = row / t * t; key <= row; ++key) {
    float s = 0.f;
#pragma unroll
    for (int d = 0; d < DIM; ++d) s = fmaf(x[d], to_float(k[key * DIM + d]), s);
    s *= scale;
    const float largest = max2(m, s), alpha = exp_f(m - largest), p = exp_f(s - largest);
    m = largest;
    l = fmaf(l, alpha, p);
#pragma unroll
    for (int d = 0; d < DIM; ++d) sum[d] = fmaf(p, to_float(v[key * DIM + d]), sum[d] * alpha);
  }
#pragma unroll
  for (int d = 0; d < DIM; ++d) o[row * DIM + d] = to_real(sum[d] / l);
}
