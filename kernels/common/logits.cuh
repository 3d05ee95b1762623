// The figures of a row of logits that log-probs and entropies are made of: the same bits in the trainer's head and in the
// sampler, because both call this. One warp owns the row.
#pragma once
#include "prim/math.cuh"
#include "prim/warp.cuh"

// With d_j = scale (l_j - max l):  log_sum = log sum_j e^{d_j};  centered = sum_j p_j d_j;  H = log_sum - centered.
struct RowFigures {
  float top;  // scale max l
  float log_sum, centered;
  DEVICE_MEMBER float logp(float l, float scale) const { return (l * scale - top) - log_sum; }
  DEVICE_MEMBER float entropy() const { return log_sum - centered; }
};

DEVICE float row_max(const float* l, int vocab) {
  WarpPack top;
#pragma unroll
  for (int j = 0; j < WV; ++j) top.v[j] = NEG_INF;
  for (int i = WCOL; i < vocab; i += WARP_STEP) {
    WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
    for (int j = 0; j < WV; ++j) top.v[j] = max2(top.v[j], v.v[j]);
  }
  return pack_max(top);
}

DEVICE RowFigures row_figures(const float* l, int vocab, float largest, float scale) {
  const float m = largest * scale;
  WarpPack sum = {}, mean = {};
  for (int i = WCOL; i < vocab; i += WARP_STEP) {
    WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      const float d = fmaf(v.v[j], scale, -m), e = exp_f(d);
      sum.v[j] += e;
      mean.v[j] = fmaf(e, max2(d, -200.f), mean.v[j]);  // e is 0 long before; keeps 0 x inf out
    }
  }
  const float s = pack_sum(sum);
  return {m, log_f(s), pack_sum(mean) / s};
}

// The lowest column whose value times scale is `top`.
DEVICE int row_first(const float* l, int vocab, float top, float scale) {
  WarpPack first;
#pragma unroll
  for (int j = 0; j < WV; ++j) first.v[j] = -16777216.f;
  for (int i = WCOL; i < vocab; i += WARP_STEP) {
    WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
    for (int j = 0; j < WV; ++j)
      first.v[j] = max2(first.v[j], v.v[j] * scale == top && i + j < vocab ? -(float)(i + j) : -16777216.f);
  }
  return (int)-pack_max(first);
}
