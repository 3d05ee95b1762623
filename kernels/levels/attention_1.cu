// Causal attention, level 1: the scores in memory.
//
// Changes  Nothing yet: three kernels, one per line of the formula. The t x t scores of each head are written once, read and
//          written by the softmax, and read again: 20 bytes a score, where its products need 4 D flops.
// Math     S = scale Q K^T, key j seen by query i where j <= i;  P = softmax of each row of S;  O = P V
// Shapes   q, k, v, o [heads, t, 64] real, without gaps;  s [heads, t, t] float. For all levels: t % 128 = 0
// Plan     scores, out: one thread per value; softmax: one warp per row
// Numerics float throughout; o is rounded when stored
// Cost     4 D flops a pair (i, j). H100, bf16, 112 heads of 2048, 2026-11-27: 0.5 TFLOP/s, 0.001 of the ceiling of 800 (3
//          predicted) (scores alone move 9 GB). sm_90a: 30, 34 and 32 registers.
#include "prim/math.cuh"
#include "prim/warp.cuh"

constexpr int DIM = 64;

KERNEL_FLAT(level_attention_1_scores)(float* s, const real* q, const real* k, int heads, int t, float scale) {
  const long long i = FLAT_INDEX;
  if (i >= (long long)heads * t * t) return;
  const long long row = i / t, key = row / t * t + i % t;  // rows of [heads * t, 64]
  float sum = 0.f;
  for (int d = 0; d < DIM; ++d) sum = fmaf(to_float(q[row * DIM + d]), to_float(k[key * DIM + d]), sum);
  s[i] = key <= row ? sum * scale : NEG_INF;
}

KERNEL_WARP(level_attention_1_softmax)(INOUT(float) s, int rows, int t) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  float *x = s + row * t, largest = NEG_INF, sum = 0.f;
  for (int i = WCOL; i - WCOL < t; i += WARP_STEP) largest = max2(largest, pack_max(load_row(x, i, t, NEG_INF)));
  for (int i = WCOL; i - WCOL < t; i += WARP_STEP) {
    WarpPack p = load_row(x, i, t, NEG_INF);
#pragma unroll
    for (int j = 0; j < WV; ++j) p.v[j] = exp_f(p.v[j] - largest);
    sum += pack_sum(p);
    store(x + i, p, t - i);
  }
  for (int i = WCOL; i - WCOL < t; i += WARP_STEP) {
    WarpPack p = load_row(x, i, t);
#pragma unroll
    for (int j = 0; j < WV; ++j) p.v[j] /= sum;
    store(x + i, p, t - i);
  }
}

KERNEL_FLAT(level_attention_1_out)(real* o, const float* s, const real* v, int heads, int t) {
  const long long i = FLAT_INDEX;
  if (i >= (long long)heads * t * DIM) return;
  const long long row = i / DIM, d = i % DIM, first = row / t * t;
  float sum = 0.f;
  for (long long key = first; key <= row; ++key) sum = fmaf(s[row * t + key - first], to_float(v[key * DIM + d]), sum);
  o[i] = to_real(sum);
}
