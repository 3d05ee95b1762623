// The statistics of a part of a row of logits: of as many columns as a tile of head_hopper.cu has. In a bf16 run a slice of
// logits.cuh is summed part by part, so a tile of the product with the head gives the same bits as a warp that reads the logits from memory.
//
// The sums of a part are a binary tree over the bits of the column: bit 6 first, then 5, 4, 3, 0, 2, 1. A lane of wgmma's
// accumulators holds the values whose columns differ in bits 6 to 3 and 0, and shares a part with three others (head_hopper.cu); four
// lanes of a warp that reads from memory hold bits 6 to 4, 1 and 0 (logits.cuh). Neither needs more than six shuffles for a sum.
#pragma once
#include "prim/math.cuh"

EXPORT(int, LOGIT_PART, 128);
// Floats that hopper_head_parts (head_hopper.cu) writes per part: max l, sum e^d, sum e^d d, the first column of the max.
EXPORT(int, TILE_STATS, 4);

// Clamps d to the domain of exp_down. NaN stays NaN.
DEVICE float no_less(float d) {
#ifdef __CUDACC__
  float y;
  asm("max.NaN.f32 %0, %1, 0fC2AC0000;" : "=f"(y) : "f"(d));  // -86
  return y;
#else
  return d < -86.f ? -86.f : d;
#endif
}
// e^d for d from -86 to about 0. On a GPU by ex2 (2 ulp): with the polynomial a tile's end would take longer than its products. The
// rounding of the argument and of log2(e) costs at most 1.3 |d| e^d 2^-24, beside a sum of 1 or more.
DEVICE float exp_logit(float d) {
#ifdef __CUDACC__
  return exp2_fast(d * 1.44269504f);
#else
  return exp_down(d);
#endif
}
// e^d for any d up to about 0; 0 below -86 (on a GPU, below -87.3).
DEVICE float exp_or_zero(float d) {
#ifdef __CUDACC__
  return exp_logit(d);
#else
  const float e = exp_down(no_less(d));
  return d < -86.f ? 0.f : e;
#endif
}

// scale times the largest of some logits; 0 if all are -inf.
DEVICE float scaled_top(float largest, float scale) { return largest == NEG_INF ? 0.f : largest * scale; }

// With d_j = scale l_j - scale max l: sum e^{d_j}, sum e^{d_j} d_j and sum e^{2 d_j}. d_j is clamped at -86: a term below 1e-35
// beside one of 1.
struct LogitSums {
  float sum, mean, square;
};
// The terms of two columns that differ in bit 6.
DEVICE LogitSums pair_of_terms(float low, float high, float scale, float top) {
  const float d0 = no_less(fmaf(low, scale, -top)), d1 = no_less(fmaf(high, scale, -top));
  const float e0 = exp_logit(d0), e1 = exp_logit(d1);
  return {e0 + e1, fmaf(e1, d1, e0 * d0), fmaf(e1, e1, e0 * e0)};
}
// The sums of a part whose largest value is `largest`, relative to the larger `top`.
DEVICE LogitSums share_of(const LogitSums& part, float largest, float top, float scale) {
  const float d = no_less(largest * scale - scaled_top(top, scale)), e = exp_logit(d);
  return {e * part.sum, e * fmaf(part.sum, d, part.mean), e * e * part.square};
}

// The gradient of a row's logits: d loss / d l = up (1[target] - p) - by_entropy p (l - lse + H), with p = e^{l - lse}.
struct LogitGradient {
  float scale, lse, minus_up, entropy, minus_by_entropy;
  template <bool ENTROPY>
  DEVICE_MEMBER float at(float logit, bool target) const {
    const float v = fmaf(logit, scale, -lse), p = exp_or_zero(v), g = target ? p - 1.f : p;
    return ENTROPY ? fmaf(minus_up, g, minus_by_entropy * p * (no_less(v) + entropy)) : minus_up * g;
  }
};
