// The softmax of attention's tensor-core kernels over blocks of scores, from left to right. Training, prefill and decode, with
// mma.sync and with wgmma, all call this, so they have the same bits.
//
// A warp holds 16 rows of a block in the accumulators of adjacent m16n8 products: s[j][2h + e] is row g + 8h and column 8j + 2t +
// e, where g = lane / 4 and t = lane % 4.
#pragma once
#include "common/mask.cuh"
#include "prim/warp.cuh"

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// P is 2^(score * factor - base). Scale and base 2 are one factor, so that a weight takes one fmaf and one exp2.
DEVICE float score_factor(float scale, float softcap) { return softcap > 0.f ? LOG2_E : scale * LOG2_E; }

template <int N>
DEVICE void cap_scores(float (&s)[N][4], float scale, float softcap) {
  if (softcap > 0.f) {
    const float inner = scale / softcap;
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = softcap * tanh_f(s[j][e] * inner);
  }
}

// Sets to -inf what the two rows do not see: all but the `window` columns up to `position` (-1: no row, which sees nothing). The
// columns begin at `block`.
template <int N>
DEVICE void hide_scores(float (&s)[N][4], const int (&position)[2], int window, int block) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int high = position[h] - block - (int)threadIdx.x % 4 * 2;
    const int low = (int)((unsigned)high - (unsigned)window + 1u);  // wraps where high < 0, but then nothing is seen anyway
    if (low > 0 || high < N * 8) {
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (j * 8 + e < low || j * 8 + e > high) s[j][2 * h + e] = NEG_INF;
    }
  }
}

template <int N>
DEVICE void scale_rows(float (&o)[N][4], const float (&alpha)[2]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) o[j][e] *= alpha[e / 2];
}

// Maximum and sum over the four lanes that share a row.
DEVICE float row_max(float v) {
  v = max_fast(v, shfl_xor(v, 1));
  return max_fast(v, shfl_xor(v, 2));
}
DEVICE float row_sum(float v) {
  v += shfl_xor(v, 1);
  return v + shfl_xor(v, 2);
}

// P may reach 2^LEEWAY before a row's base follows its maximum, so most blocks rescale nothing. Each row decides for itself.
constexpr float LEEWAY = 8.f;
// The base of a row that has seen no key: finite, so that no difference is NaN.
constexpr float NO_BASE = -3e38f;

// The parts of a step over a block, for the row h of the two:
// the largest score, in base 2;
template <int N>
DEVICE float block_top(const float (&s)[N][4], int h, float factor) {
  float largest = max_fast(s[0][2 * h], s[0][2 * h + 1]);
#pragma unroll
  for (int j = 1; j < N; ++j) largest = max_fast(largest, max_fast(s[j][2 * h], s[j][2 * h + 1]));
  return row_max(largest) * factor;
}
// the new base, and the factor of what was summed before (exactly 1 where the base stays);
DEVICE float follow_top(float& base, float top) {
  const float before = base;
  if (top - base > LEEWAY) base = top;
  return exp2_fast(before - base);
}
// the weights in place of the scores, and this lane's part of their sum.
template <int N>
DEVICE float weigh(float (&s)[N][4], int h, float factor, float base) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& p = s[j][2 * h + e];
      p = exp2_fast(fmaf(p, factor, -base));
      sum += p;
    }
  return sum;
}

// State of two rows: weights are relative to 2^base; l is this lane's part of their sum.
struct OnlineSoftmax {
  float base[2] = {NO_BASE, NO_BASE}, l[2] = {0.f, 0.f};

  // Turns scores into weights. Returns true if the sums over earlier weights have to be multiplied by alpha first.
  template <int N>
  DEVICE_MEMBER bool step(float (&s)[N][4], float (&alpha)[2], float factor) {
    const float before[2] = {base[0], base[1]};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      alpha[h] = follow_top(base[h], block_top(s, h, factor));
      l[h] = fmaf(l[h], alpha[h], weigh(s, h, factor, base[h]));
    }
    return base[0] != before[0] || base[1] != before[1];
  }

  // log of the sum of e^score, given the sum of l over the row's lanes.
  DEVICE_MEMBER float lse(int h, float sum) const { return base[h] * LN_2 + log_f(sum); }
};
