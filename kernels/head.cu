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
#include "common/logits.cuh"

// logp, lse and (if asked) entropy, log sum_j p_j^2 and the arg max (the lowest of equals) of each row
KERNEL_WARP(head_stats, HOT)(float* logp, float* lse, MAYBE(float) entropy, MAYBE(float) square, MAYBE(int) best, const float* logits,
                             const int* target, int rows, int vocab, float scale) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const float* l = logits + row * vocab;
  const RowFigures f = row_figures(l, vocab, row_max(l, vocab), scale);
  const float t = target ? l[target[row]] : 0.f;
  if (LANE == 0) {
    lse[row] = f.top + f.log_sum;
    logp[row] = f.logp(t, scale);
    if (entropy) entropy[row] = f.entropy();
  }
  if (square) {
    WarpPack squares = {};
    for (int i = WCOL; i < vocab; i += WARP_STEP) {
      WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
      for (int j = 0; j < WV; ++j) {
        const float e = exp_f(fmaf(v.v[j], scale, -f.top));
        squares.v[j] = fmaf(e, e, squares.v[j]);
      }
    }
    const float s2 = pack_sum(squares);
    if (LANE == 0) square[row] = log_f(s2) - 2.f * f.log_sum;
  }
  if (best) {
    const int first = row_first(l, vocab, f.top, scale);
    if (LANE == 0) best[row] = first;
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
