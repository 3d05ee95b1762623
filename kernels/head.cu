// The rows of the language-model head: from logits to log-probs and their gradients. The products around it are matmul's.
//
// Math     l = scale * logits;  lse = log sum_j e^{l_j};  logp = l_t - lse;  p = e^{l - lse};  H = lse - sum_j p_j l_j
//          d logp / d l_j = 1[j = t] - p_j;   d H / d l_j = -p_j (l_j - lse + H)
//          head_grad: dl_j = scale * ( a (1[j=t] - p_j) - b p_j (l_j - lse + H) ), a, b the upstreams of logp and H
// Shapes   logits [rows, vocab] float (a chunk of all rows); target, best [rows] int; logp, lse, entropy, a, b [rows]
//          float; dlogits [rows, vocab] real
// Plan     A warp owns a row and passes over it for the maximum, for the sums, and for the gradient.
// Numerics Logits are float, also in a bf16 build: half-precision logits cost accuracy where it matters most. Sums in
//          float in a fixed order; dlogits is rounded when stored. The gradient of H as it stands has no cancellation.
// Cost     12 vocab bytes a row read, sizeof(real) vocab written. GPU: not measured yet.
#include "prim/math.cuh"
#include "prim/warp.cuh"

// logp, lse and (if asked) entropy, log sum_j p_j^2 and the arg max (the lowest of equals) of each row
KERNEL_WARP(head_stats, HOT)(float* logp, float* lse, MAYBE(float) entropy, MAYBE(float) square, MAYBE(int) best, const float* logits,
                             const int* target, int rows, int vocab, float scale) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const float* l = logits + row * vocab;
  WarpPack top;
#pragma unroll
  for (int j = 0; j < WV; ++j) top.v[j] = NEG_INF;
  for (int i = WCOL; i < vocab; i += WARP_STEP) {
    WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
    for (int j = 0; j < WV; ++j) top.v[j] = max2(top.v[j], v.v[j]);
  }
  const float m = pack_max(top) * scale;
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
  const float s = pack_sum(sum), log_s = log_f(s);
  const float t = target ? l[target[row]] * scale : 0.f;
  const float centered = pack_sum(mean) / s;
  if (LANE == 0) {
    lse[row] = m + log_s;
    logp[row] = (t - m) - log_s;
    if (entropy) entropy[row] = log_s - centered;
  }
  if (square) {
    WarpPack squares = {};
    for (int i = WCOL; i < vocab; i += WARP_STEP) {
      WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
      for (int j = 0; j < WV; ++j) {
        const float e = exp_f(fmaf(v.v[j], scale, -m));
        squares.v[j] = fmaf(e, e, squares.v[j]);
      }
    }
    const float s2 = pack_sum(squares);
    if (LANE == 0) square[row] = log_f(s2) - 2.f * log_s;
  }
  if (best) {
    WarpPack first;
#pragma unroll
    for (int j = 0; j < WV; ++j) first.v[j] = -16777216.f;
    for (int i = WCOL; i < vocab; i += WARP_STEP) {
      WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
      for (int j = 0; j < WV; ++j)
        first.v[j] = max2(first.v[j], v.v[j] * scale == m && i + j < vocab ? -(float)(i + j) : -16777216.f);
    }
    const float b = pack_max(first);
    if (LANE == 0) best[row] = (int)-b;
  }
}

// dlogits of each row from the upstreams a (of logp) and b (of the entropy, or null)
KERNEL_WARP(head_grad, HOT)(real* dlogits, const float* logits, const int* target, const float* lse,
                            MAYBE(const float) entropy, const float* a, MAYBE(const float) b, int rows, int vocab, float scale) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const float* l = logits + row * vocab;
  const int t = target[row];
  const float norm = lse[row], up = a[row] * scale;
  if (b) {
    const float h = entropy[row], ue = b[row] * scale;
    for (int i = WCOL; i < vocab; i += WARP_STEP) {
      WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
      for (int j = 0; j < WV; ++j) {
        const float d = fmaf(v.v[j], scale, -norm), p = exp_f(d);
        v.v[j] = up * ((i + j == t ? 1.f : 0.f) - p) - ue * p * (max2(d, -200.f) + h);
      }
      store(dlogits + row * vocab + i, v, vocab - i);
    }
    return;
  }
  for (int i = WCOL; i < vocab; i += WARP_STEP) {
    WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
    for (int j = 0; j < WV; ++j) v.v[j] = up * ((i + j == t ? 1.f : 0.f) - exp_f(fmaf(v.v[j], scale, -norm)));
    store(dlogits + row * vocab + i, v, vocab - i);
  }
}

// upstream[i] = -weight[i]: the gradient of the weighted loss for each log-prob
KERNEL_FLAT(nll_upstream)(float* upstream, const float* weight, int rows) {
  const long long i = FLAT_INDEX;
  if (i < rows) upstream[i] = -weight[i];
}

// loss[0] = -sum_i weight[i] logp[i]. One warp.
KERNEL_WARP(weighted_nll)(float* loss, const float* logp, const float* weight, int rows) {
  if (WARP_INDEX > 0) return;
  WarpPack acc = {};
  for (int i = WCOL; i < rows; i += WARP_STEP) {
    WarpPack l = load_row(logp, i, rows), w = load_row(weight, i, rows);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] = fmaf(-w.v[j], l.v[j], acc.v[j]);
  }
  const float s = pack_sum(acc);
  if (LANE == 0) loss[0] = s;
}
