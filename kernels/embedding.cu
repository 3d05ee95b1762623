// Token embedding, gather and scatter of whole rows.
//
// Math     y[i] = w[ids[i]];  dw[t] = sum of dy[i] over the places i of token t, in order
//          gather: y[i] = x[index[i]];  scatter: x[index[i]] += dy[i], for an index without repetition
// Shapes   w [vocab, d] real; ids, index [n] int; y [n, d] real; dw [vocab, d] float
//          The host sorts the places of each token: unique [u], starts [u+1], order [n] (stable)
// Plan     Forward: one warp copies one row. Backward: a warp owns 32 V columns of one distinct token and adds its places from
//          first to last: deterministic, no atomics.
// Numerics Copies are exact; dw sums in float.
// Cost     2 n d sizeof(real) forward; n d sizeof(real) + 8 u d bytes backward. *Predicted* at copy speed, 2.95 TB/s on an H100.
#include "prim/warp.cuh"

// y[i] = x[index[i]]
KERNEL_WARP(gather_rows)(real* y, const real* x, const int* index, int n, int d) {
  const long long i = WARP_INDEX;
  if (i >= n) return;
  const real* from = x + (long long)index[i] * d;
  for (int c = WCOL; c < d; c += WARP_STEP) store(y + i * d + c, load_row(from, c, d), d - c);
}

// x[index[i]] += dy[i]. The entries of index are distinct; all other rows are unchanged.
KERNEL_WARP(scatter_rows)(INOUT(real) x, const real* dy, const int* index, int n, int d) {
  const long long i = WARP_INDEX;
  if (i >= n) return;
  real* to = x + (long long)index[i] * d;
  for (int c = WCOL; c < d; c += WARP_STEP) store(to + c, load_row(dy + i * d, c, d), d - c, true);
}

// dw[unique[u] - shift] += sum of dy over the places order[starts[u] .. starts[u+1]]
KERNEL_WARP(embedding_bwd)(INOUT(float) dw, const real* dy, const int* unique, const int* starts, const int* order, int u, int d, int shift) {
  const int steps = (d + WARP_STEP - 1) / WARP_STEP;
  const long long warp = WARP_INDEX;
  const int t = (int)(warp / steps), c = (int)(warp % steps) * WARP_STEP + WCOL;
  if (t >= u) return;
  WarpPack acc = {};
  for (int i = starts[t]; i < starts[t + 1]; ++i) {
    WarpPack v = load_row(dy + (long long)order[i] * d, c, d);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] += v.v[j];
  }
  store(dw + (long long)(unique[t] - shift) * d + c, acc, d - c, true);
}
